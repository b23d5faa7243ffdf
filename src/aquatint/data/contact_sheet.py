"""Pictures side by side on one sheet, each with a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aquatint.data.image import Pixels

_MARGIN_PX = 16
_MAX_LABEL_LINES = 6


def contact_sheet(images: Sequence[Pixels], labels: Sequence[str], columns: int) -> Pixels:
    """Pictures of any sizes in rows of `columns`, each with its label wrapped under it: uint8 (H, W, 3) on white."""
    width = max(image.shape[1] for image in images)
    font = ImageFont.load_default(size=min(28.0, max(12.0, width / 24)))
    texts = [_wrap(label, font, width) for label in labels]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    floors = [max(images[index].shape[0] for index in row) for row in rows]  # the pictures of a row stand on one line
    line_px = round(font.size * 1.3) if isinstance(font, ImageFont.FreeTypeFont) else 16
    row_px = [floor + line_px * max(len(texts[index]) for index in row) + _MARGIN_PX for floor, row in zip(floors, rows, strict=True)]
    sheet = Image.new("RGB", (len(rows[0]) * (width + _MARGIN_PX) + _MARGIN_PX, sum(row_px) + _MARGIN_PX), "white")
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN_PX
    for row, floor, height in zip(rows, floors, row_px, strict=True):
        for column, index in enumerate(row):
            middle = _MARGIN_PX + column * (width + _MARGIN_PX) + width // 2
            picture = Image.fromarray(images[index])
            sheet.paste(picture, (middle - picture.width // 2, top + floor - picture.height))
            for number, line in enumerate(texts[index]):
                pen.text((middle - font.getlength(line) / 2, top + floor + number * line_px + 2), line, fill="black", font=font)
        top += height
    return np.array(sheet, dtype=np.uint8)


def _wrap(text: str, font: Any, width_px: int) -> list[str]:
    """Lines no wider than `width_px`; a word that is wider by itself is cut."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width_px:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width_px:
                lines.append("")
            lines[-1] += letter
    if len(lines) > _MAX_LABEL_LINES:
        lines = [*lines[: _MAX_LABEL_LINES - 1], lines[_MAX_LABEL_LINES - 1][:-1] + "…"]
    return lines
