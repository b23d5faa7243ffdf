import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.captions import MAX_CAPTION_BYTES, BadCaption, decode_caption, draw_dropout, render, split_tags, variants
from aquatint.utils.seeds import generator

TAGS = "a, b, c, d, e, f, g, h"
PLAIN = {"style": "tags", "separator": ",", "shuffle": False, "keep_first": 1, "tag_drop_prob": 0.0}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a red fox", "a red fox"),
        (b"\xef\xbb\xbfa red fox\r\n", "a red fox"),
        ("ein grüner Fuchs 🦊 שועל".encode(), "ein grüner Fuchs 🦊 שועל"),
        ("\ufeffein grüner Fuchs".encode("utf-16-le"), "ein grüner Fuchs"),
        ("\ufeff狐".encode("utf-16-be"), "狐"),
        (b"one\r\ntwo\rthree\n\n", "one\ntwo\nthree"),
        (b"  \r\n ", ""),
        (b"", ""),
    ],
)
def test_captions_are_read_without_a_remark(data, expected):
    assert decode_caption(data) == (expected, None)


@pytest.mark.parametrize(
    ("data", "expected", "remark"),
    [
        (b"it\x92s a caf\xe9", "it’s a café", "Windows-1252"),
        (b"d\xe9j\xe0 vu", "déjà vu", "Windows-1252"),
        ("a red fox".encode("utf-16-le"), "a red fox", "UTF-16"),
        ("a red fox".encode("utf-16-be"), "a red fox", "UTF-16"),
    ],
)
def test_older_encodings_are_read_with_a_remark(data, expected, remark):
    text, said = decode_caption(data)
    assert text == expected
    assert remark in said
    assert "save it as UTF-8" in said


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"caf\xe9 \x81 x", 5),  # no character in Windows-1252
        (b"\xff\xfea\0b", 4),  # half a character of UTF-16
        (b"\xff\xfe\x00\xd8a\0", 2),  # half a pair
    ],
)
def test_what_is_in_no_encoding_is_refused_with_the_place(data, offset):
    with pytest.raises(BadCaption, match=f"neither UTF-8, UTF-16 nor Windows-1252 from byte {offset} on"):
        decode_caption(data)


def test_a_caption_with_a_zero_byte_is_refused_with_the_place():
    with pytest.raises(BadCaption, match="not text: there is a zero at byte 5"):
        decode_caption(b"a fox\0 and more")


def test_a_caption_as_long_as_a_book_is_refused():
    assert len(decode_caption(b"x" * MAX_CAPTION_BYTES)[0]) == MAX_CAPTION_BYTES
    with pytest.raises(BadCaption, match="longer than 65,536 bytes"):
        decode_caption(b"x" * (MAX_CAPTION_BYTES + 1))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_caption_or_refused_and_never_replaced(data):
    try:
        text, remark = decode_caption(data)
    except BadCaption:
        return
    assert "\ufffd" not in text or "\ufffd".encode() in data or b"\xfd\xff" in data or b"\xff\xfd" in data
    assert remark is None or "check that it was read well" in remark


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1))
def test_utf8_text_comes_back_whole(text):
    read, remark = decode_caption(text.encode())
    assert read == "\n".join(text.splitlines()).strip()
    assert remark is None


def test_tags_are_split_and_trimmed_and_blank_ones_left_out():
    assert split_tags(" a ,b,, c d ,\n e\n", ",") == ["a", "b", "c d", "e"]
    assert split_tags("a | b.c", ".") == ["a | b", "c"]


def test_prose_is_left_as_it_is():
    text = "A fox,  in the snow.\nIt is cold,"
    rendered = render(text, style="prose", separator=",", shuffle=True, keep_first=0, tag_drop_prob=1.0, rng=generator(0, "x", 0))
    assert rendered == text


def test_tags_without_chance_keep_their_order():
    assert render("a,b , c", **PLAIN, rng=generator(0, "x", 0)) == "a, b, c"


@settings(max_examples=50, deadline=None)
@given(keep_first=st.integers(0, 10), position=st.integers(0, 1000))
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(keep_first, position):
    settings_ = {**PLAIN, "shuffle": True, "keep_first": keep_first}
    tags = split_tags(render(TAGS, **settings_, rng=generator(0, "x", position)), ",")
    assert sorted(tags) == sorted(split_tags(TAGS, ","))
    assert tags[:keep_first] == split_tags(TAGS, ",")[:keep_first]


def test_shuffling_shuffles_differently_at_each_position():
    orders = {render(TAGS, **{**PLAIN, "shuffle": True}, rng=generator(0, "x", position)) for position in range(50)}
    assert len(orders) > 45


def test_every_order_of_the_shuffled_tags_is_equally_likely():
    counts = {}
    for position in range(1200):
        text = render("k, a, b, c", **{**PLAIN, "shuffle": True}, rng=generator(0, "x", position))
        counts[text] = counts.get(text, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 200) < 60 for count in counts.values())


def test_tags_are_dropped_at_their_rate_and_the_first_ones_never():
    dropped = {**PLAIN, "keep_first": 2, "tag_drop_prob": 0.25}
    rendered = [split_tags(render(TAGS, **dropped, rng=generator(0, "x", position)), ",") for position in range(1000)]
    assert all(tags[:2] == ["a", "b"] for tags in rendered)
    assert np.mean([len(tags) - 2 for tags in rendered]) == pytest.approx(6 * 0.75, abs=0.15)
    assert all(tags == sorted(tags) for tags in rendered)


def test_dropping_all_tags_leaves_the_first_ones():
    assert render(TAGS, **{**PLAIN, "tag_drop_prob": 1.0}, rng=generator(0, "x", 0)) == "a"
    assert render(TAGS, **{**PLAIN, "keep_first": 0, "tag_drop_prob": 1.0}, rng=generator(0, "x", 0)) == ""


def test_variants_are_a_function_of_the_content():
    arguments = {**PLAIN, "shuffle": True}
    first = variants(TAGS, "ab", count=4, **arguments)
    assert len(first) == 4
    assert len(set(first)) > 1
    assert first == variants(TAGS, "ab", count=4, **arguments)
    assert first == variants(TAGS, "ab", count=9, **arguments)[:4]
    assert first != variants(TAGS, "cd", count=4, **arguments)


@pytest.mark.parametrize("settings_", [PLAIN, {**PLAIN, "style": "prose", "shuffle": True, "tag_drop_prob": 0.5}])
def test_a_caption_without_chance_has_one_variant(settings_):
    assert len(variants(TAGS, "ab", count=8, **settings_)) == 1


def test_captions_are_dropped_at_their_rates():
    drawn = [draw_dropout(3, position, prob=0.2, zeros_share=0.25) for position in range(10_000)]
    assert drawn.count("keep") == pytest.approx(8000, abs=160)
    assert drawn.count("zeros") == pytest.approx(500, abs=90)
    assert drawn.count("empty") == pytest.approx(1500, abs=150)


@pytest.mark.parametrize(
    ("prob", "zeros_share", "expected"),
    [(0.0, 0.5, {"keep"}), (1.0, 1.0, {"zeros"}), (1.0, 0.0, {"empty"}), (1.0, 0.5, {"zeros", "empty"})],
)
def test_dropout_at_its_limits(prob, zeros_share, expected):
    assert {draw_dropout(0, position, prob=prob, zeros_share=zeros_share) for position in range(200)} == expected


def test_dropout_is_a_function_of_seed_and_position():
    first = [draw_dropout(1, position, prob=0.5, zeros_share=0.5) for position in range(64)]
    assert first == [draw_dropout(1, position, prob=0.5, zeros_share=0.5) for position in range(64)]
    assert first != [draw_dropout(2, position, prob=0.5, zeros_share=0.5) for position in range(64)]


def test_a_higher_dropout_drops_what_a_lower_one_drops():
    low = {position for position in range(500) if draw_dropout(0, position, prob=0.1, zeros_share=0.5) != "keep"}
    high = {position for position in range(500) if draw_dropout(0, position, prob=0.3, zeros_share=0.5) != "keep"}
    assert low < high
