from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.models.sdxl.tokenizer import CHUNK_TOKENS, EOS, PAD, PAD_2, chunk, padded, tokenize, write_tokenizer_folder

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


def test_padding_differs_between_the_two_encoders(reference):
    for tokenizer, pad in zip(reference, (PAD, PAD_2), strict=True):
        ids = tokenizer("a cat", padding="max_length", max_length=77, truncation=True).input_ids
        assert ids == padded(tokenize("a cat"), pad)
        assert tokenizer.model_max_length == 77


def test_the_empty_text_is_one_chunk_of_padding():
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


def test_the_tokenizer_folder_has_the_files_of_published_ones(tmp_path: Path):
    write_tokenizer_folder(tmp_path, PAD)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
