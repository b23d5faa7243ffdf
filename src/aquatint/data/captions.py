"""Captions: read from bytes, split into tags, shuffled and thinned out, dropped."""

from __future__ import annotations

import codecs
import re
from typing import Literal

import numpy as np

from aquatint.utils.seeds import generator

MAX_CAPTION_BYTES = 65536  # about 200 chunks of 75 tokens; what is longer is a log or a book, and would fill the memory
Style = Literal["tags", "prose"]


class BadCaption(Exception):
    """A caption that cannot be used. The text is the reason, and reads well after the file's name."""


def decode_caption(data: bytes) -> tuple[str, str | None]:
    """Text without a byte order mark or blank ends, lines ended by `\\n`, and a remark if the encoding was a guess.

    UTF-8 first, UTF-16 if a mark or its zero bytes show it, then Windows-1252. Raises BadCaption with a byte offset
    if none fits: nothing is ever replaced.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise BadCaption(f"is longer than {MAX_CAPTION_BYTES:,} bytes, which no caption is")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text, remark = _decode(data, "utf-16"), None
    elif encoding := _unmarked_utf16(data):
        text, remark = _decode(data, encoding), "is in UTF-16 without a mark; check that it was read well, or save it as UTF-8"
    elif (offset := data.find(0)) >= 0:
        raise BadCaption(f"is not text: there is a zero at byte {offset}")
    else:
        text, remark = _decode_bytewise(data)
    return "\n".join(text.splitlines()).strip(), remark


def _decode_bytewise(data: bytes) -> tuple[str, str | None]:
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        return _decode(data, "cp1252"), "is in the older Windows-1252 encoding; check that it was read well, or save it as UTF-8"


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


def split_tags(caption: str, separator: str) -> list[str]:
    """The tags of a caption, without blank ones. A line end separates too."""
    return [tag for part in re.split(f"{re.escape(separator)}|\n", caption) if (tag := part.strip())]


def render(
    caption: str, *, style: Style, separator: str, shuffle: bool, keep_first: int, tag_drop_prob: float, rng: np.random.Generator
) -> str:
    """A caption as it is trained. Prose stays as it is; the tags after the first `keep_first` are dropped and shuffled.

    Tags are joined by the separator and a space.
    """
    if style == "prose":
        return caption
    tags = split_tags(caption, separator)
    kept, rest = tags[:keep_first], tags[keep_first:]
    stays = rng.random(len(rest)) >= tag_drop_prob
    order = rng.permutation(len(rest)) if shuffle else np.arange(len(rest))
    joint = f"{separator.strip()} "
    return joint.join([*kept, *(rest[index] for index in order if stays[index])])


def variants(
    caption: str,
    picture_digest: str,
    *,
    count: int,
    style: Style,
    separator: str,
    shuffle: bool,
    keep_first: int,
    tag_drop_prob: float,
) -> tuple[str, ...]:
    """`count` renderings, a function of the picture's content; one, if nothing in them is random."""
    is_random = style == "tags" and (shuffle or tag_drop_prob > 0)
    return tuple(
        render(
            caption,
            style=style,
            separator=separator,
            shuffle=shuffle,
            keep_first=keep_first,
            tag_drop_prob=tag_drop_prob,
            rng=generator(0, f"caption/{picture_digest}", index),
        )
        for index in range(count if is_random else 1)
    )


def draw_dropout(seed: int, position: int, *, prob: float, zeros_share: float) -> Literal["keep", "zeros", "empty"]:
    """What the sample at a global position is trained with: its caption, zeros, or the encoded empty text."""
    dropped, kind = generator(seed, "dropout", position).random(2)
    if dropped >= prob:
        return "keep"
    return "zeros" if kind < zeros_share else "empty"
