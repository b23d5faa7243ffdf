"""What stands in a caption: bytes to text, JSON side files, tags, and choices such as `{red|blue}`."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np

MAX_CAPTION_BYTES = 65536  # about 200 chunks of 75 tokens; what is longer is a log or a book, and would fill the memory
MAX_JSON_BYTES = 1 << 20  # of a side file: captions, and what other programs know of the picture
CAPTION_KEYS = ("caption", "captions", "text", "texts", "prompt", "prompts", "description", "descriptions", "tags")  # the first one counts
MAX_NESTED = 16  # choices within choices; a brace that is deeper is text

Node: TypeAlias = "str | tuple[Template, ...]"  # text, or a choice
Template: TypeAlias = tuple[Node, ...]

_MARKS = re.compile(r"(\\[{}|]|[{}|])")
_CP1252 = "is in the older Windows-1252 encoding; check that it was read well, or save it as UTF-8"
_UTF16 = "is in UTF-16 without a mark; check that it was read well, or save it as UTF-8"


class BadCaption(Exception):
    """A caption that cannot be used. The text is the reason, and reads well after the file's name."""


# Bytes


def decode_caption(data: bytes) -> tuple[str, str | None]:
    """Text without a byte order mark or blank ends, lines ended by `\\n`, and a remark if the encoding was a guess.

    UTF-8 first, UTF-16 if a mark or its zero bytes show it, then Windows-1252. Raises BadCaption with a byte offset
    if none fits: nothing is ever replaced.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise BadCaption(f"is longer than {MAX_CAPTION_BYTES:,} bytes, which no caption is")
    text, remark = _decode_any(data)
    return clean_caption(text), remark


def clean_caption(text: str) -> str:
    """A caption that came as text, such as a table's, without blank ends and with lines ended by `\\n`. Raises BadCaption."""
    if len(text) > MAX_CAPTION_BYTES:
        raise BadCaption(f"is longer than {MAX_CAPTION_BYTES:,} letters, which no caption is")
    if "\0" in text:
        raise BadCaption(f"is not text: there is a zero at letter {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadCaption(f"is not text: there is half a character at letter {error.start}") from error
    return "\n".join(text.splitlines()).strip()


def _decode_any(data: bytes) -> tuple[str, str | None]:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _decode(data, "utf-16"), None
    if encoding := _unmarked_utf16(data):
        return _decode(data, encoding), _UTF16
    if (offset := data.find(0)) >= 0:
        raise BadCaption(f"is not text: there is a zero at byte {offset}")
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        return _decode(data, "cp1252"), _CP1252


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadCaption(f"is neither UTF-8, UTF-16 nor Windows-1252 from byte {error.start} on; save it as UTF-8") from error


def _unmarked_utf16(data: bytes) -> str | None:
    """UTF-16 of mostly Latin text has zeros in every other byte and nowhere else."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if len(data) % 2 or max(even, odd) * 4 < len(data):
        return None
    return {(True, False): "utf-16-le", (False, True): "utf-16-be"}.get((even == 0, odd == 0))


# JSON side files


def decode_json_caption(data: bytes, *, separator: str = ",") -> tuple[tuple[str, ...], str | None]:
    """The captions of a picture (several are alternatives) out of a JSON file, and a remark. None, if it says there are none.

    The file is a text, a list of texts, or an object with one of CAPTION_KEYS, whatever else it holds. A list of `tags`
    is one caption, joined by the separator; any other list has alternatives. Raises BadCaption.
    """
    if len(data) > MAX_JSON_BYTES:
        raise BadCaption(f"is longer than {MAX_JSON_BYTES:,} bytes, which no caption is")
    text, remark = _decode_any(data)
    key, value, others = _caption_field(_parse(text))
    if others:
        ignored = f"has a {key!r}, so what it has as {_listed(others)} is not used"
        remark = f"{remark}; it {ignored}" if remark else ignored
    texts = _texts(key, value)
    if key == "tags":
        texts = [f"{separator.strip()} ".join(stripped for tag in texts if (stripped := tag.strip()))]
    return tuple(cleaned for one in texts if (cleaned := clean_caption(one))), remark


def _parse(text: str) -> Any:
    """NaN and infinity, which Python writes though JSON has none, count as nothing: they are never a caption."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=lambda _: None, parse_int=float)
    except json.JSONDecodeError as error:
        raise BadCaption(f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]} (line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise BadCaption("is nested too deeply, which no caption is") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise BadCaption(f"has {_shown(key)} twice in one object")
        found[key] = value
    return found


def _caption_field(value: Any) -> tuple[str, Any, list[str]]:
    """The key that has the captions, what stands there, and the keys of others that are not used. No key is `caption`."""
    if not isinstance(value, dict):
        return "caption", value, []
    known = {key.strip().lower(): found for key, found in value.items()}
    present = [key for key in CAPTION_KEYS if key in known]
    if not present:
        raise BadCaption(f"has no caption: there is none of {_listed(CAPTION_KEYS)} in it")
    filled = [key for key in present if known[key]] or present[:1]
    return filled[0], known[filled[0]], filled[1:]


def _texts(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    texts = value if isinstance(value, list) else [value]
    for one in texts:
        if not isinstance(one, str):
            names = {dict: "an object", list: "a list", float: "a number", bool: "true or false", type(None): "nothing"}
            where = f"in a list as {key!r}" if isinstance(value, list) else f"as {key!r}"
            raise BadCaption(f"has {names.get(type(one), 'something else')} {where}, where a text belongs")
    return texts


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in keys)


def _shown(key: str) -> str:
    return ascii(key if len(key) <= 40 else f"{key[:39]}…")


def printable(text: str) -> str:
    """On one line, with everything escaped that a terminal would not show as a letter."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


# Tags


def split_tags(caption: str, separator: str) -> list[str]:
    """The tags of a caption, without blank ones. A line end separates too."""
    if "\n" in caption:
        caption = caption.replace("\n", separator)
    return [tag for part in caption.split(separator) if (tag := part.strip())]


def tag_key(tag: str) -> str:
    """What tags are compared by: `Long_Hair` is `long hair`."""
    return tag.lower().replace("_", " ")


# Choices


def parse_choices(text: str) -> Template:
    """A text with choices `{a|b}`, which may be nested, as texts and choices in turn.

    `\\{`, `\\|` and `\\}` are plain letters. Braces without a partner or without a `|` of their own are text, and so
    are other marks of prompt languages: counts (`2$$`), weights (`3::`) and names of files (`__colour__`).
    """
    open_choices: list[list[list[Node]]] = []
    options: list[list[Node]] = [[]]  # of the innermost open choice; outside of all, its only one is the text
    for part in _MARKS.split(text):
        if part == "{" and len(open_choices) < MAX_NESTED:
            open_choices.append(options)
            options = [[]]
        elif part == "|" and open_choices:
            options.append([])
        elif part == "}" and open_choices:
            closed, options = options, open_choices.pop()
            options[-1].extend([tuple(map(_merged, closed))] if len(closed) > 1 else ["{", *closed[0], "}"])
        elif part:
            options[-1].append(part[1] if len(part) == 2 and _MARKS.fullmatch(part) else part)
    while open_choices:  # what is still open was no choice
        unclosed, options = options, open_choices.pop()
        options[-1].append("{")
        for index, option in enumerate(unclosed):
            options[-1].extend(["|", *option] if index else option)
    return _merged(options[0])


def _merged(nodes: Iterable[Node]) -> Template:
    """Neighbouring texts as one."""
    merged: list[Node] = []
    for is_text, group in groupby(nodes, key=lambda node: isinstance(node, str)):
        neighbours = list(group)
        merged.extend(["".join(map(str, neighbours))] if is_text else neighbours)
    return tuple(merged)


def draw_choices(template: Template, rng: np.random.Generator) -> str:
    """One of the texts; the options of a choice are equally likely."""
    return "".join(
        node if isinstance(node, str) else draw_choices(node[min(int(rng.random() * len(node)), len(node) - 1)], rng) for node in template
    )


def all_choices(template: Template, limit: int) -> dict[str, float] | None:
    """Every text with its probability, or None for more than `limit` of them. Texts that come out equal are one."""
    texts = {"": 1.0}
    for node in template:
        if isinstance(node, str):
            texts = {text + node: prob for text, prob in texts.items()}
            continue
        endings = _union([all_choices(option, limit) for option in node], limit)
        if endings is None:
            return None
        joined: dict[str, float] = {}
        for text, prob in texts.items():
            for ending, ending_prob in endings.items():
                joined[text + ending] = joined.get(text + ending, 0.0) + prob * ending_prob
            if len(joined) > limit:
                return None
        texts = joined
    return texts


def _union(options: Sequence[dict[str, float] | None], limit: int) -> dict[str, float] | None:
    union: dict[str, float] = {}
    for option in options:
        if option is None:
            return None
        for text, prob in option.items():
            union[text] = union.get(text, 0.0) + prob / len(options)
    return union if len(union) <= limit else None
