import re
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.models.sdxl import tokenizer as tokenizer_module
from aquatint.models.sdxl.tokenizer import (
    CHUNK_TOKENS,
    EOS,
    PAD,
    PAD_2,
    chunk,
    chunk_report,
    chunk_reports,
    num_chunks,
    padded,
    token_text,
    tokenize,
    write_tokenizer_folder,
)

COMMA = 267
ODD = [
    "", " ", "a photo of a cat", "1girl, long_hair, (masterpiece:1.2)", "日本語テスト", "🤖🎨👩\u200d👩\u200d👧 🇩🇪", "a" * 200,
    "don't you're we'll I'd", "x<|endoftext|>y", "<|startoftext|>", "<|ENDOFTEXT|>", "\u00a0no-break\tTab\nline", "É é e\u0301",
    "İstanbul ΣΊΣΥΦΟΣ ß", "½²③Ⅷ", "&amp; <b>", "a" + "\u0300" * 5, "\x00\x01\x7f\ufffd", "!!!???...", "0123456789", "ﬁ ligature",
    "ﷺ", "_", "''s 's'S", "hello!", "word, " * 60,
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' tokenizer, from the files that an export writes."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_folder(folder / "first", PAD)
    write_tokenizer_folder(folder / "second", PAD_2)
    return CLIPTokenizer.from_pretrained(folder / "first"), CLIPTokenizer.from_pretrained(folder / "second")


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:12]))
def test_ids_equal_transformers(reference, text):
    assert tokenize(text) == reference[0](text).input_ids[1:-1]


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_ids_equal_transformers_on_any_text(reference, text):
    text = text.encode("utf-8", "replace").decode()
    assert tokenize(text) == reference[0](text).input_ids[1:-1]


def test_known_ids():
    assert tokenize("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert tokenize(",") == [COMMA]


def test_tokens_are_shown_as_what_they_stand_for():
    assert [token_text(token) for token in tokenize("A photo, of Ünicorns!")] == ["a", "photo", ",", "of", "ü", "nic", "orns", "!"]
    assert "".join(token_text(token) for token in tokenize("antidisestablishmentarianism")) == "antidisestablishmentarianism"
    assert [token_text(token) for token in (PAD_2, EOS)] == ["!", "<|endoftext|>"]
    assert token_text(tokenize("\x01")[0]) == "\x01"


def test_every_token_can_be_shown():
    shown = [token_text(token) for token in range(49408)]
    assert all(shown)
    assert len(set(shown)) > 30_000  # many words are there twice, as a whole and as a beginning
    for text in shown[:49406:7]:
        if text.isascii() and text.isprintable() and text.strip() and "\\" not in text:
            assert "".join(map(token_text, tokenize(text))) == text.lower()


def test_padding_differs_between_the_two_encoders(reference):
    for tokenizer, pad in zip(reference, (PAD, PAD_2), strict=True):
        ids = tokenizer("a cat", padding="max_length", max_length=77, truncation=True).input_ids
        assert ids == padded(tokenize("a cat"), pad)
        assert tokenizer.model_max_length == 77


def test_methods_7_the_empty_text_is_one_chunk_of_padding():
    assert chunk("") == [[]]
    assert padded([], PAD) == [49406, *[49407] * 76]
    assert padded([], PAD_2) == [49406, 49407, *[0] * 75]


def test_chunks_hold_75_tokens_and_lose_none():
    ids = tokenize("word " * 200)
    chunks = chunk("word " * 200)
    assert [len(part) for part in chunks] == [75, 75, 50]
    assert list(chain.from_iterable(chunks)) == ids
    assert len(padded(chunks[0], PAD)) == 77
    assert padded(chunks[0], PAD_2)[76] == EOS


@given(words=st.lists(st.sampled_from(["cat", "a", ",", "extraordinarily", "red"]), max_size=300))
@settings(max_examples=50, deadline=None)
def test_chunks_are_the_text_in_order_and_never_too_long(words):
    text = " ".join(words)
    chunks = chunk(text)
    assert list(chain.from_iterable(chunks)) == tokenize(text)
    assert all(len(part) <= CHUNK_TOKENS for part in chunks)


def test_a_chunk_ends_after_a_comma_that_is_near():
    near = chunk("cat " * 60 + ", " + "dog " * 20)
    assert [len(part) for part in near] == [61, 20]
    assert near[0][-1] == COMMA


def test_a_chunk_is_filled_when_the_last_comma_is_far():
    assert [len(part) for part in chunk("cat " * 40 + ", " + "dog " * 40)] == [75, 6]


def test_a_comma_that_does_not_fit_does_not_move_the_tag_before_it():
    assert [len(part) for part in chunk("cat " * 70 + ", " + "dog " * 4 + ", red")] == [75, 2]


def step_by_step(text):
    """Chunks made token by token, as programs that generate images make them: a backtrack of 20 tokens, empty ones between BREAKs."""
    chunks, current, last_comma = [], [], None
    for index, part in enumerate(re.split(r"\s*\bBREAK\b\s*", text)):
        if index:
            chunks.append(current)
            current, last_comma = [], None
        for token in tokenize(part):
            if len(current) == 75:
                moved = []
                if token != COMMA and last_comma is not None and 75 - last_comma <= 20:
                    current, moved = current[: last_comma + 1], current[last_comma + 1 :]
                chunks.append(current)
                current, last_comma = moved, None
            if token == COMMA:
                last_comma = len(current)
            current.append(token)
    return [*chunks, current] if current or not chunks else chunks


@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["cat ", "a ", ", ", "extraordinarily ", "red ", "BREAK ", ",", "BREAKFAST "]), st.integers(1, 40)),
        max_size=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_chunks_equal_those_made_token_by_token(parts):
    text = "".join(word * min(times, 3 if "BREAK" in word else 40) for word, times in parts)
    chunks = chunk(text)
    assert chunks == step_by_step(text)
    report = chunk_report(text)
    assert report.num_chunks == len(chunks)
    assert report.num_tokens == sum(map(len, chunks))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat BREAK a dog", ["a cat", "a dog"]),
        ("a cat,\n BREAK\t, a dog", ["a cat,", ", a dog"]),
        ("a cat,BREAK,a dog", ["a cat,", ",a dog"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("a BREAK", ["a"]),
        ("BREAK a", ["", "a"]),
        ("BREAK", [""]),
        ("BREAK BREAK", ["", ""]),
        ("a break", ["a break"]),
        ("a BREAKFAST, BREAK_up, OUTBREAK", ["a BREAKFAST, BREAK_up, OUTBREAK"]),
    ],
)
def test_the_word_break_starts_a_chunk(text, parts):
    assert chunk(text) == [tokenize(part) for part in parts]
    assert num_chunks([text]) == [len(parts)]


def test_emphasis_is_text():
    assert chunk("(red:1.2)") == [tokenize("(red:1.2)")]
    assert len(chunk("(red:1.2)")[0]) > len(chunk("red")[0])


def test_there_may_be_any_number_of_chunks():
    assert chunk_report("cat, " * 20_000) == (40_000, 534, False)


def test_a_tag_that_fills_more_than_a_chunk_is_broken():
    assert [len(part) for part in chunk("red, " + "cat " * 100 + ", blue")] == [75, 29]
    assert chunk_report("red, " + "cat " * 100 + ", blue") == (104, 2, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 1, False)),
        ("a cat", (2, 1, False)),
        ("cat " * 75, (75, 1, False)),
        ("cat " * 76, (76, 2, True)),
        ("cat " * 75 + ", dog", (77, 2, False)),
        ("cat " * 60 + ", " + "dog " * 20, (81, 2, False)),
        ("cat " * 40 + ", " + "dog " * 40, (81, 2, True)),
        ("cat " * 40 + "BREAK " + "dog " * 40, (80, 2, False)),
        ("cat " * 76 + "BREAK dog", (77, 3, True)),
    ],
)
def test_reports(text, expected):
    assert chunk_report(text) == expected


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:12]))
def test_words_give_the_tokens_of_the_text(text):
    text = f"{text} {text}  x {text}"
    assert tokenizer_module._Words().tokenize(text) == tokenize(text)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["'s", "<|endoftext|>", "\u0301", "\u1100"]))
)
@settings(max_examples=300, deadline=None)
def test_words_give_the_tokens_of_any_text(words):
    assert tokenizer_module._Words().tokenize(" ".join(words)) == tokenize(" ".join(words))


def test_few_words_are_remembered(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_MAX_WORDS", 3)
    words = tokenizer_module._Words()
    text = "one two three four five six " + "x" * 41
    assert words.tokenize(text) == tokenize(text)
    assert 0 < len(words) <= 3
    assert all(len(word) <= 40 for word in words)


def test_reports_of_many_texts_are_those_of_each():
    texts = [*ODD, "cat, " * 100, "a BREAK b"]
    assert list(chunk_reports(texts)) == [chunk_report(text) for text in texts]
    assert num_chunks(texts) == [len(chunk(text)) for text in texts]


def test_the_tokenizer_folder_has_the_files_of_published_ones(tmp_path: Path):
    write_tokenizer_folder(tmp_path, PAD)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
