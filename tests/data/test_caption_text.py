import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.caption_text import (
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    MAX_NESTED,
    BadCaption,
    all_choices,
    clean_caption,
    decode_caption,
    decode_json_caption,
    draw_choices,
    parse_choices,
    printable,
    split_tags,
    tag_key,
)
from aquatint.utils.seeds import generator


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


def test_a_zero_in_marked_utf16_is_refused_too():
    with pytest.raises(BadCaption, match="a zero at letter 1"):
        decode_caption("\ufeffa\0b".encode("utf-16-le"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\0b", "a zero at letter 1"),
        ("fox \ud83e", "half a character at letter 4"),
        ("x" * (MAX_CAPTION_BYTES + 1), "longer than 65,536 letters"),
    ],
)
def test_text_that_is_no_caption_is_refused(text, reason):
    with pytest.raises(BadCaption, match=reason):
        clean_caption(text)


def test_text_is_trimmed_like_that_of_files():
    assert clean_caption(" one\r\ntwo \n") == "one\ntwo"


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ("a fox", ("a fox",)),
        (["a fox", " a red fox\n"], ("a fox", "a red fox")),
        ({"caption": "a fox", "width": 3}, ("a fox",)),
        ({"Caption": "a fox"}, ("a fox",)),
        ({"captions": ["a fox", "a red fox", ""]}, ("a fox", "a red fox")),
        ({"text": "a fox"}, ("a fox",)),
        ({"prompt": "a fox"}, ("a fox",)),
        ({"description": "a fox"}, ("a fox",)),
        ({"tags": ["fox", " snow ", "", "red fur"]}, ("fox, snow, red fur",)),
        ({"tags": "fox, snow"}, ("fox, snow",)),
        ({"caption": "", "tags": ["fox"]}, ("fox",)),
        ({"caption": None}, ()),
        ({"caption": ""}, ()),
        ({"tags": []}, ()),
        ([], ()),
        (None, ()),
    ],
)
def test_json_side_files_of_many_shapes(content, captions):
    assert decode_json_caption(json.dumps(content).encode()) == (captions, None)


def test_tags_of_a_json_file_are_joined_by_the_separator():
    assert decode_json_caption(b'{"tags": ["a", "b"]}', separator=";") == (("a; b",), None)


def test_what_a_json_file_has_beside_the_caption_is_said():
    captions, remark = decode_json_caption(b'{"tags": ["fox"], "caption": "A fox.", "prompt": "x"}')
    assert captions == ("A fox.",)
    assert remark == "has a 'caption', so what it has as 'prompt', 'tags' is not used"


def test_numbers_of_a_json_file_do_not_matter_whatever_they_are():
    captions, remark = decode_json_caption(b'{"score": NaN, "b": -Infinity, "c": 1' + b"0" * 9999 + b', "caption": "a fox"}')
    assert (captions, remark) == (("a fox",), None)
    assert decode_json_caption(b'{"caption": NaN}') == ((), None)


def test_json_in_an_older_encoding_is_read_with_a_remark():
    captions, remark = decode_json_caption('{"caption": "café"}'.encode("cp1252"))
    assert captions == ("café",)
    assert "Windows-1252" in remark
    assert decode_json_caption('\ufeff{"caption": "café"}'.encode()) == (("café",), None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"is not JSON: expecting value \(line 1, column 1\)"),
        (b'{"caption": "a",}', "is not JSON"),
        (b'{"caption": "a\nb"}', "is not JSON"),
        (b"[" * 500_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"caption": "a", "caption": "b"}', "has 'caption' twice in one object"),
        (b'{"x": {"' + b"k" * 99 + b'": 1, "' + b"k" * 99 + b'": 2}}', r"has 'k{39}\\u2026' twice"),
        (b'{"url": "x"}', "has no caption: there is none of 'caption', 'captions', 'text'"),
        (b"5", "has a number as 'caption', where a text belongs"),
        (b'{"caption": true}', "has true or false as 'caption'"),
        (b'{"tags": {"general": ["a"]}}', "has an object as 'tags'"),
        (b'["a", null]', "has nothing in a list as 'caption'"),
        (b'["a", ["b"]]', "has a list in a list as 'caption'"),
        (b'{"caption": "\\ud83e"}', "half a character at letter 0"),
        (b'{"caption": "a\\u0000"}', "a zero at letter 1"),
        (b'{"caption": "a\0"}', "a zero at byte 14"),
        (json.dumps({"caption": "x" * 70_000}).encode(), "longer than 65,536 letters"),
        (b" " * (MAX_JSON_BYTES + 1), "longer than 1,048,576 bytes"),
    ],
)
def test_json_that_is_no_caption_is_refused_with_the_reason(data, reason):
    with pytest.raises(BadCaption, match=reason) as caught:
        decode_json_caption(data)
    assert len(str(caught.value)) < 250


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.from_regex(r"[\[\]{}\",:a0 ]{0,20}").map(str.encode))
def test_any_bytes_are_json_captions_or_refused(data):
    try:
        captions, _ = decode_json_caption(data)
    except BadCaption:
        return
    assert all(caption == clean_caption(caption) != "" for caption in captions)


def test_terminals_are_shown_no_control_characters():
    assert printable("a\x1b[31m\nü🦊") == "a\\x1b[31m\\nü🦊"


def test_tags_are_split_and_trimmed_and_blank_ones_left_out():
    assert split_tags(" a ,b,, c d ,\n e\n", ",") == ["a", "b", "c d", "e"]
    assert split_tags("a | b.c", ".") == ["a | b", "c"]
    assert split_tags("a, b\nc", ", ") == ["a", "b", "c"]


def test_tags_are_compared_without_case_and_underscores():
    assert tag_key("Long_Hair") == tag_key("long hair") == "long hair"


def choices(text, limit=1000):
    return all_choices(parse_choices(text), limit)


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("a fox", ["a fox"]),
        ("a {red|blue} fox", ["a red fox", "a blue fox"]),
        ("{a|b}{c|d}", ["ac", "ad", "bc", "bd"]),
        ("{a|{b|c} d}", ["a", "b d", "c d"]),
        ("{|very} red", [" red", "very red"]),
        ("{a|b|}", ["a", "b", ""]),
        ("{a} and {}", ["{a} and {}"]),
        ("{{a|b}}", ["{a}", "{b}"]),
        ("{x {a} | b}", ["x {a} ", " b"]),
        ("a|b", ["a|b"]),
        ("a {b|c", ["a {b|c"]),
        ("a {b|{c|d}", ["a {b|c", "a {b|d"]),
        ("a} {b|c}", ["a} b", "a} c"]),
        (r"\{a|b\}", ["{a|b}"]),
        (r"{a\|b|c\}}", ["a|b", "c}"]),
        (r"\(a\) \\ \o/", [r"\(a\) \\ \o/"]),
        ("{2$$a|b}", ["2$$a", "b"]),
    ],
)
def test_choices_and_what_is_none(text, texts):
    found = choices(text)
    assert list(found) == texts
    assert sum(found.values()) == pytest.approx(1)


def test_options_are_equally_likely_and_equal_texts_are_one():
    assert choices("{a|a|b|{c|d}}") == {"a": 0.5, "b": 0.25, "c": 0.125, "d": 0.125}


def test_texts_are_drawn_as_often_as_they_are_likely():
    template = parse_choices("{a|b|{c|d}} {x|y}")
    drawn = [draw_choices(template, generator(0, "x", position)) for position in range(3000)]
    for text, prob in all_choices(template, 100).items():
        assert drawn.count(text) == pytest.approx(3000 * prob, abs=4 * np.sqrt(3000 * prob * (1 - prob)))


def test_too_many_texts_are_not_listed():
    assert len(choices("{a|b}" * 3, limit=8)) == 8
    assert choices("{a|b}" * 3, limit=7) is None
    assert choices("{a|b}" * 5000, limit=7) is None
    assert choices("{" + "|".join(map(str, range(100))) + "}", limit=99) is None
    assert len(choices("{a|a}" * 3000, limit=1)) == 1


def test_braces_nested_without_end_are_text_in_the_end():
    deep = "{a|" * (MAX_NESTED + 3) + "b" + "}" * (MAX_NESTED + 3)
    assert "b" in "".join(choices(deep))
    for bomb in ("{" * 60_000, "{a|" * 20_000, "}" * 60_000, "|" * 60_000, "{a|" * 10_000 + "}" * 10_000):
        draw_choices(parse_choices(bomb), generator(0, "x", 0))


@settings(max_examples=200, deadline=None)
@given(st.text("{}|\\ab", max_size=25), st.integers(0, 100))
def test_what_is_drawn_is_among_all_texts(text, position):
    template = parse_choices(text)
    drawn = draw_choices(template, generator(0, "x", position))
    assert drawn in all_choices(template, 10**6)
    if "|" not in text and "\\" not in text:
        assert drawn == text
