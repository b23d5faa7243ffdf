"""One picture: its bytes are digested, its header is read, its caption and its mask are looked into. Nothing is ever written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeAlias

from aquatint.data.caption_text import MAX_CAPTION_BYTES, MAX_JSON_BYTES, BadCaption, decode_caption, decode_json_caption
from aquatint.data.downloads import public_name
from aquatint.data.image import BadImage, digest_picture, read_header
from aquatint.data.index import place_in
from aquatint.data.places import Opener, Place
from aquatint.data.sources.listing import Source
from aquatint.data.sources.names import printable
from aquatint.errors import StorageError

Captions: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out. With a `reason`, which reads well after the name, the picture cannot be used.

    `notices` are about the picture, `remarks` about its caption. What does not last is looked into again next time.
    """

    digest: bytes | None = None
    size_hw: tuple[int, int] | None = None
    notices: tuple[str, ...] = ()
    is_reducible: bool = False
    captions: Captions = ()
    mask_digest: bytes | None = None
    remarks: tuple[str, ...] = ()
    reason: str | None = None
    lasts: bool = True


class _Unusable(Exception):
    """The text is the reason. Trouble with the disk or the network does not last."""

    def __init__(self, reason: str, *, lasts: bool) -> None:
        super().__init__(reason)
        self.lasts = lasts


def examine(row: Mapping[str, Any], source: Source, opener: Opener, max_pixels: int, known: Finding | None = None) -> Finding:
    """Reads what a row of a listing names. What is `known` of its picture is not read again."""
    finding = known or Finding()
    try:
        if finding.size_hw is None:
            place = place_in(row)
            assert place is not None
            with _reading(), opener.open(place) as file:
                finding = replace(finding, digest=digest_picture(file))
                header = read_header(file, max_pixels)
                finding = replace(finding, size_hw=header.size_hw, notices=header.notices, is_reducible=header.is_reducible)
        finding = _with_captions(finding, row, source, opener)
        return _with_mask(finding, row, opener, max_pixels)
    except _Unusable as error:
        return replace(finding, reason=str(error), lasts=error.lasts)


@contextlib.contextmanager
def _reading(what: str = "") -> Iterator[None]:
    """Turns whatever is wrong with a file into a reason."""
    try:
        yield
    except (BadImage, BadCaption) as error:
        raise _Unusable(f"{what}{error}", lasts=True) from error
    except OSError as error:
        raise _Unusable(f"{what}cannot be read: {error.strerror or error}", lasts=False) from error
    except StorageError as error:
        raise _Unusable(f"{what}cannot be read: {error.message}", lasts=False) from error


def _label(what: str, place: Place) -> str:
    """`its caption a.txt `; a part of a file has no name of its own."""
    return f"{what} {printable(public_name(place.path).rpartition('/')[2])} " if _is_whole(place) else f"{what} "


def _with_captions(finding: Finding, row: Mapping[str, Any], source: Source, opener: Opener) -> Finding:
    place = place_in(row, "caption_")
    if place is None:
        return replace(finding, captions=tuple(row["captions"]))
    with _reading(_label("its caption", place)), opener.open(place) as file:
        captions, remark = decode_side_file(_start_of(file), place, source)
    remarks = (*finding.remarks, f"its caption {remark}") if remark else finding.remarks
    return replace(finding, captions=captions, remarks=remarks)


def _start_of(file: BinaryIO) -> bytes:
    return file.read(max(MAX_CAPTION_BYTES, MAX_JSON_BYTES) + 1)


def _with_mask(finding: Finding, row: Mapping[str, Any], opener: Opener, max_pixels: int) -> Finding:
    place = place_in(row, "mask_")
    if place is None:
        return finding
    with _reading(_label("its mask", place)), opener.open(place) as file:
        digest, header = digest_picture(file), read_header(file, max_pixels)
        if header.size_hw != finding.size_hw:
            (height, width), (mask_height, mask_width) = finding.size_hw or (0, 0), header.size_hw
            raise BadImage(f"has {mask_width} x {mask_height} pixels, and the picture {width} x {height}; save it in the same size")
    return replace(finding, mask_digest=digest)


# Captions


def decode_side_file(data: bytes, place: Place, source: Source) -> tuple[Captions, str | None]:
    """Captions and a remark. A caption in a tar has no name of its own, and tells by its content if it is JSON. Raises BadCaption."""
    endings = (public_name(place.path),) if _is_whole(place) else source.caption_extensions
    kinds = {ending.lower().endswith(".json") for ending in endings}
    captions, remark = _decode(data, is_json=True in kinds, is_text=False in kinds)
    if source.caption_lines == "alternatives":
        captions = tuple(line.strip() for text in captions for line in text.splitlines())
    return tuple(caption for caption in captions if caption), remark


def _decode(data: bytes, *, is_json: bool, is_text: bool) -> tuple[Captions, str | None]:
    """As one of the two; if it may be both, as JSON if it is JSON, which no plain caption is by chance."""
    if is_json and (not is_text or data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[", b'"'))):
        try:
            return decode_json_caption(data)
        except BadCaption:
            if not is_text:
                raise
    text, remark = decode_caption(data)
    return (text,), remark


def _is_whole(place: Place) -> bool:
    return place.start == 0 and place.length < 0 and not place.column
