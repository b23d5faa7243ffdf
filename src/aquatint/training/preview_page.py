"""One HTML page that shows what the UNet will see. Self-contained: styles and pictures are in it, and it asks no network for anything."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Caption:
    """A caption as it is encoded, with the share of the samples that get it, and its tokens chunk by chunk."""

    text: str
    share: float
    chunks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class PreviewRow:
    """One picture. `crop_box` (top, left, bottom, right) is the part that is kept, in shares of the original; `picture` is the crop
    itself, `original` a small copy of the whole, and `mask` where the loss counts, all encoded as `mime` says.
    """

    name: str
    original_hw: tuple[int, int]
    bucket_hw: tuple[int, int]
    scale: float
    cropped: float
    time_ids: tuple[int, int, int, int, int, int]
    crop_box: tuple[float, float, float, float]
    flipped: bool
    picture: bytes
    original: bytes
    mime: str
    captions: tuple[Caption, ...]
    mask: bytes | None = None
    loss_weight: float = 1.0
    repeats: str = "1"
    source: str = ""
    role: str = "train"
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listed:
    """A list of names under a heading, with one line on what it means. Each entry is a name and what is to be said of it."""

    title: str
    about: str
    entries: tuple[tuple[str, str], ...]
    thumbnails: tuple[tuple[bytes, ...], ...] = ()  # of the pictures of each entry


@dataclass(frozen=True)
class Summary:
    """What stands above and below the pictures. `facts` are (name, value); `tables` are texts with a title."""

    title: str
    facts: tuple[tuple[str, str], ...]
    plot_png: bytes | None = None
    tables: tuple[tuple[str, str], ...] = ()
    lists: tuple[Listed, ...] = field(default=())
    mime: str = "image/webp"


def page(rows: Sequence[PreviewRow], summary: Summary) -> str:
    """The whole page."""
    assets = files("aquatint.training") / "assets"
    style, script = ((assets / f"preview.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    parts = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(summary.title)}</title>", f"<style>{style}</style>", "</head>", "<body>",
        *_head(summary, len(rows)), '<main id="pictures">', *(_card(row) for row in rows), "</main>",
        *_lists(summary), f"<script>{script}</script>", "</body>", "</html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _head(summary: Summary, shown: int) -> Iterator[str]:
    yield f"<header><h1>{escape(summary.title)}</h1>"
    yield "<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in summary.facts) + "</dl>"
    yield '<p class="filter"><label>Show only <input id="filter" type="search" placeholder="name, caption or 1024 × 1024"></label>'
    yield f' <span id="count">{shown}</span> of {shown} pictures</p></header>'


def _card(row: PreviewRow) -> str:
    height, width = row.bucket_hw
    words = f"{row.name} {width} × {height} {width}x{height} {row.role} {row.source} " + " ".join(caption.text for caption in row.captions)
    return "\n".join(
        [
            f'<article data-words="{escape(words.lower())}">',
            f"<h2>{escape(row.name)}</h2>",
            '<div class="pictures">',
            f"<figure>{_image(row.picture, row.mime, f'{row.name} as it is trained')}<figcaption>as it is trained</figcaption></figure>",
            f'<figure><div class="whole">{_image(row.original, row.mime, f"{row.name} as it is in its file")}{_box(row)}</div>'
            f"<figcaption>in its file; the frame is what is kept{', mirrored' if row.flipped else ''}</figcaption></figure>",
            *_mask(row),
            "</div>",
            "<table>", *(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _facts(row)), "</table>",
            *_captions(row.captions),
            *(f'<p class="remark">{escape(remark)}</p>' for remark in row.remarks),
            "</article>",
        ]
    )  # fmt: skip


def _mask(row: PreviewRow) -> Iterator[str]:
    if row.mask is not None:
        yield f"<figure>{_image(row.mask, row.mime, 'mask')}<figcaption>where the loss counts</figcaption></figure>"


def _facts(row: PreviewRow) -> Iterator[tuple[str, str]]:
    (height, width), (bucket_height, bucket_width) = row.original_hw, row.bucket_hw
    resized = f"enlarged {row.scale:.2f} ×" if row.scale > 1 else f"reduced to {row.scale:.0%}"
    yield "file", f"{width} × {height} pixels"
    yield "bucket", f"{bucket_width} × {bucket_height}; {resized}, {row.cropped:.1%} cropped"
    names = ("original", "crop from", "target")
    pairs = zip(names, (row.time_ids[0:2], row.time_ids[2:4], row.time_ids[4:6]), strict=True)
    yield "time_ids", ", ".join(f"{name} {first}, {second}" for name, (first, second) in pairs) + "  (height, width; top, left)"
    yield "shown", f"{row.repeats} × per epoch, loss weight {row.loss_weight:.3g}" + (f", {row.role}" if row.role != "train" else "")
    if row.source:
        yield "source", row.source


def _captions(captions: Sequence[Caption]) -> Iterator[str]:
    """The first one in full, and the others behind a click: renderings of one caption are much alike."""
    yield from map(_caption, captions[:1])
    if more := captions[1:]:
        yield f'<details class="more"><summary>{len(more)} more as it is rendered</summary>'
        yield from map(_caption, more)
        yield "</details>"


def _caption(caption: Caption) -> str:
    total = sum(len(chunk) for chunk in caption.chunks)
    share = "" if caption.share >= 0.9995 else f"{caption.share:.0%} of its samples; "
    chunks = len(caption.chunks)
    counted = f"{share}{total} token{'' if total == 1 else 's'} in {chunks} chunk{'' if chunks == 1 else 's'} of 77"
    tokens = "".join(
        '<span class="chunk">' + " ".join(f"<span>{escape(token)}</span>" for token in chunk) + "</span>" for chunk in caption.chunks
    )
    text = escape(caption.text) or "<em>no caption</em>"
    return (
        f'<section class="caption"><p dir="auto">{text}</p>'
        f'<details><summary>{escape(counted)}</summary><p class="tokens">{tokens}</p></details></section>'
    )


def _box(row: PreviewRow) -> str:
    top, left, bottom, right = row.crop_box
    return (
        f'<span class="box" style="top:{top:.2%};left:{left:.2%};'
        f'width:{right - left:.2%};height:{bottom - top:.2%}"></span>'
    )  # fmt: skip


def _image(data: bytes, mime: str, text: str) -> str:
    return f'<img src="data:{mime};base64,{base64.b64encode(data).decode()}" alt="{escape(text)}">'


def _lists(summary: Summary) -> Iterator[str]:
    yield "<footer>"
    if summary.plot_png:
        yield f"<section><h2>Buckets</h2>{_image(summary.plot_png, 'image/png', 'how the pictures fill the buckets')}</section>"
    for title, text in summary.tables:
        yield f"<section><h2>{escape(title)}</h2><pre>{escape(text)}</pre></section>"
    for listed in summary.lists:
        yield f"<section><h2>{escape(listed.title)} <small>{len(listed.entries)}</small></h2><p>{escape(listed.about)}</p>"
        yield "<ul>" + "".join(_entry(listed, index, summary.mime) for index in range(len(listed.entries))) + "</ul></section>"
    yield "</footer>"


def _entry(listed: Listed, index: int, mime: str) -> str:
    name, remark = listed.entries[index]
    thumbnails = listed.thumbnails[index] if index < len(listed.thumbnails) else ()
    pictures = "".join(_image(thumbnail, mime, name) for thumbnail in thumbnails)
    return f"<li>{pictures}<span><b>{escape(name)}</b> {escape(remark)}</span></li>"
