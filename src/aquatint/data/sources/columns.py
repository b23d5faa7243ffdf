"""Which columns of a table have pictures, captions and masks: those that the source names, or those with usual names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from aquatint.data.sources.listing import Remarks, Source
from aquatint.data.sources.text_rows import KEY
from aquatint.errors import DataError

Kind = Literal["any", "text", "texts", "bytes", "other"]  # what a column holds, as far as the table says; `any`: each cell may differ

PICTURES = (
    "image", "image_path", "img_path", "image_file", "image_filename", "img", "picture", "picture_path", "filename", "filepath",
    "file_path", "file", "path", "jpg", "jpeg", "png", "webp",
)  # fmt: skip
FILE_NAME = "file_name"  # imagefolder's; or `image_file_name`
URLS = ("url", "image_url", "img_url", "picture_url")
CAPTIONS = (
    "caption", "captions", "text", "texts", "prompt", "prompts", "description", "descriptions", "txt", "tags", "tag_string",
    "caption_string",
)  # fmt: skip
MASKS = ("mask", "mask_path", "mask_file", "mask_file_name")
_SHOWN = 20


@dataclass(frozen=True)
class Columns:
    """Names of columns; `mask` is empty if there are no masks."""

    picture: str
    captions: tuple[str, ...]
    mask: str


def find_columns(path: str, kinds: Mapping[str, Kind], source: Source, remarks: Remarks) -> Columns:
    """Raises DataError for a column that is not there, that holds something else, or that could be one of several."""
    picture = source.picture_column or (KEY if KEY in kinds else _find_picture(path, kinds))
    _check(path, kinds, picture, ("any", "text", "bytes"), "paths, URLs or pictures")
    captions = source.caption_columns or _find_captions(path, kinds, picture)
    for name in captions:
        _check(path, kinds, name, ("any", "text", "texts"), "texts")
    mask = source.mask_column or _find_mask(path, kinds, source, remarks)
    if mask:
        _check(path, kinds, mask, ("any", "text", "bytes"), "paths, URLs or pictures")
    return Columns(picture, captions, mask)


def _check(path: str, kinds: Mapping[str, Kind], name: str, allowed: Sequence[Kind], expected: str) -> None:
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise DataError(f"the table {path} has no column `{name}`", hint=f"{guess}it has {_listed(list(kinds))}")
    if kinds[name] not in allowed:
        raise DataError(
            f"the column `{name}` of the table {path} does not hold {expected}",
            hint=f"name another one in data.sources; it has {_listed(list(kinds))}",
        )


def _find_picture(path: str, kinds: Mapping[str, Kind]) -> str:
    """Pictures before names of files, and these before URLs, which often only tell where a picture came from."""
    names = [name for name, kind in kinds.items() if kind in ("any", "text", "bytes") and _fold(name) not in MASKS]
    usual = [name for name in names if _fold(name) in PICTURES or _fold(name).endswith(f"_{FILE_NAME}")]
    for group in (
        [name for name in names if _fold(name) == FILE_NAME],
        [name for name in usual if kinds[name] == "bytes"],
        usual,
        [name for name in names if _fold(name) in URLS],
    ):
        if len(group) > 1:
            raise DataError(
                f"the table {path} has several columns that could be the picture: {_listed(group)}",
                hint=f'set picture_column = "{group[0]}" in data.sources, or another one of them',
            )
        if group:
            return group[0]
    raise DataError(
        f"the table {path} has no column with a usual name for pictures; it has {_listed(list(kinds))}",
        hint='set picture_column = "…" in data.sources',
    )


def _find_captions(path: str, kinds: Mapping[str, Kind], picture: str) -> tuple[str, ...]:
    found = tuple(name for name in kinds if _fold(name) in CAPTIONS and kinds[name] in ("any", "text", "texts") and name != picture)
    if not found and KEY not in kinds:
        raise DataError(
            f"the table {path} has no column with a usual name for captions; it has {_listed(list(kinds))}",
            hint='set caption_columns = ["…"] in data.sources; a column `caption` may also be empty',
        )
    return found


def _find_mask(path: str, kinds: Mapping[str, Kind], source: Source, remarks: Remarks) -> str:
    found = [name for name in kinds if _fold(name) in MASKS]
    if source.masks != "files":
        if found and source.masks == "none":
            remarks.warnings.append(f'{path} has a column `{found[0]}`, which is not used; masks = "files" in data.sources would use it')
        return ""
    if len(found) != 1:
        what = (
            f"several columns that could be the mask: {_listed(found)}" if found else f"no column for masks; it has {_listed(list(kinds))}"
        )
        raise DataError(f"the table {path} has {what}", hint='set mask_column = "…" in data.sources, or masks = "none"')
    return found[0]


def _fold(name: str) -> str:
    return name.strip().lower()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name[:40]}`" for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown or "none"
