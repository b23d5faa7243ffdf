"""Bad and odd files, all made by code, each with what should become of it.

`refused` is found from the header, `broken` when the pixels are decoded, `used` not at all: then size and mean colour
are known. Pictures are laid over white where they are transparent.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 128, 0), (0, 0, 255), (128, 128, 128)


@dataclass(frozen=True)
class Specimen:
    """`reason` and `notice` are parts of what is said about it; `tolerance` is for the mean colour, of 255."""

    name: str
    make: Callable[[], bytes]
    verdict: Literal["used", "refused", "broken"]
    reason: str = ""
    notice: str = ""
    size_hw: tuple[int, int] = (24, 32)
    mean_rgb: tuple[float, float, float] | None = None
    tolerance: float = 1.0


def write(folder: Path, specimens: Iterable[Specimen]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for specimen in specimens:
        (folder / specimen.name).write_bytes(specimen.make())


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def plain(color: Any = RED, size_hw: tuple[int, int] = (24, 32), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (size_hw[1], size_hw[0]), color)


def textured(size_hw: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth colours that differ in every corner and compress to something that has a middle to damage."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC)


# Containers by hand


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, extra: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """`rows` are the raw scanlines with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


def webp_bomb() -> bytes:
    """A lossless WebP header that announces 16,383 x 16,383 pixels."""
    bits = 16382 | 16382 << 14
    body = b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", bits) + b"\0" * 5
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def icc_profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """An ICC version 2 profile of the given tags."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78), b"cprt": b"text" + bytes(4) + b"none\0", **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02100000, kind, space, pcs) + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + table + body


def icc_xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(value * 65536) for value in (x, y, z)))


def icc_gamma(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def patched(data: bytes, mark: bytes, offset: int, numbers: bytes) -> bytes:
    """`data` with other bytes from `offset` after the first `mark` on."""
    start = data.index(mark) + offset
    return data[:start] + numbers + data[start + len(numbers) :]


def tiff(width: int, height: int, bits: tuple[int, ...], photometric: int, data: bytes) -> bytes:
    """An uncompressed little-endian TIFF of one strip."""
    size = 2 + 12 * 9 + 4
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, len(bits), 8 + size if len(bits) > 2 else bits[0]), (259, 3, 1, 1),
        (262, 3, 1, photometric), (273, 4, 1, 8 + size + 2 * len(bits)), (277, 3, 1, len(bits)), (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack(f"<{len(bits)}H", *bits) + data


WHITE_D50 = (0.9642, 1.0, 0.8249)
P3_TO_XYZ_D50 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])  # columns R, G, B
ADOBE_TO_XYZ_D50 = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
ADOBE_GAMMA = 563 / 256


def rgb_profile(to_xyz_d50: Any, gamma: float, extra_bytes: int = 0) -> bytes:
    """Primaries and a plain gamma, and some bytes in a tag that nobody reads."""
    columns = {name: icc_xyz(*to_xyz_d50[:, index]) for index, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    curves = {name: icc_gamma(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    extra = {b"test": b"text" + bytes(4 + extra_bytes)} if extra_bytes else {}
    return icc_profile(b"RGB ", {b"wtpt": icc_xyz(*WHITE_D50), **columns, **curves, **extra})


def display_p3() -> bytes:
    """Display P3's primaries with a plain gamma."""
    return rgb_profile(P3_TO_XYZ_D50, 2.2)


def adobe_rgb() -> bytes:
    return rgb_profile(ADOBE_TO_XYZ_D50, ADOBE_GAMMA)


def grey_gamma(gamma: float) -> bytes:
    return icc_profile(b"GRAY", {b"wtpt": icc_xyz(*WHITE_D50), b"kTRC": icc_gamma(gamma)})


def cmyk_to_grey() -> bytes:
    """A press that can only print grey: L* = 100 without ink, 50 with full cyan, 0 with any other ink."""
    lightness = [[255, 128][corner == 0b1000] if corner in (0, 0b1000) else 0 for corner in range(16)]
    grid = bytes(value for corner in lightness for value in (corner, 128, 128))
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if index % 4 == 0 else 0 for index in range(9)))
    table = b"mft1" + bytes(4) + struct.pack("BBBB", 4, 3, 2, 0) + matrix + identity * 4 + grid + identity * 3
    return icc_profile(b"CMYK", {b"wtpt": icc_xyz(*WHITE_D50), b"A2B0": table}, pcs=b"Lab ")


# The animals


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def half_transparent(mode: str) -> Image.Image:
    """Left half opaque and dark, right half transparent over a colour that must not be seen: mean 127.5 over white."""
    image = Image.new("RGBA", (32, 24), (0, 0, 0, 255))
    image.paste((255, 0, 0, 0), (16, 0, 32, 24))
    return image.convert(mode)


def palette_with_key(as_bytes: bool) -> bytes:
    """Index 0 black; index 1 red and transparent."""
    image = Image.new("P", (32, 24), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (16, 0, 32, 24))
    return encoded(image, "PNG", transparency=b"\xff\x00" if as_bytes else 1)


def animation(format_name: str) -> bytes:
    return encoded(plain(RED), format_name, save_all=True, append_images=[plain(BLUE)], duration=100)


def ramp_16() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32))


def rgb_16_png(key: bool = False) -> bytes:
    """16 bits per colour, all of it (32768, 0, 65535): in eight bits (128, 0, 255)."""
    row = b"\0" + struct.pack(">HHH", 32768, 0, 65535) * 32
    return png(32, 24, 16, 2, row * 24, [(b"tRNS", struct.pack(">HHH", 32768, 0, 65535))] if key else [])


def with_huge_profile(format_name: str) -> bytes:
    """A profile that would be right, but for 5 MiB of nothing in it."""
    return encoded(plain(GREY), format_name, icc_profile=rgb_profile(P3_TO_XYZ_D50, 2.2, extra_bytes=5 << 20))


def damaged_png() -> bytes:
    data = bytearray(encoded(textured((24, 32)), "PNG"))
    middle = data.index(b"IDAT") + (len(data) - data.index(b"IDAT")) // 2
    data[middle] ^= 0xFF
    return bytes(data)


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def cut_off(format_name: str) -> bytes:
    return cut(encoded(textured((96, 128)), format_name), 0.6)


def bomb(format_name: str, mark: bytes, offset: int, numbers: str, side: int) -> bytes:
    """A small file whose header announces `side` x `side` pixels: two numbers at `offset` after `mark`."""
    return patched(encoded(plain(), format_name), mark, offset, struct.pack(numbers, side, side))


REFUSED = (
    Specimen("empty.jpg", lambda: b"", "refused", "the file is empty"),
    Specimen("zeros.png", lambda: bytes(4096), "refused", "begins with zeros"),
    Specimen("error_page.jpg", lambda: b"\n<!DOCTYPE html><html>403</html>", "refused", "is a web page"),
    Specimen("noise.png", lambda: bytes(range(7, 250)), "refused", "not a picture that can be read"),
    Specimen("phone.heic", lambda: b"\0\0\0\x18ftypheic" + bytes(64), "refused", "HEIC"),
    Specimen("new.jxl", lambda: b"\xff\x0a" + bytes(64), "refused", "JPEG XL"),
    Specimen("layers.png", lambda: b"8BPS\0\x01" + bytes(64), "refused", "Photoshop"),
    Specimen("header_only.jpg", lambda: encoded(plain(), "JPEG")[:20], "refused", "damaged JPEG"),
    Specimen("bomb.png", lambda: png(12_000, 12_000, 1, 0, b""), "refused", "12000 x 12000 pixels, more than"),
    Specimen("bomb_400mp.png", lambda: png(20_000, 20_000, 1, 0, b""), "refused", "20000 x 20000 pixels, more than"),
    Specimen("bomb.webp", webp_bomb, "refused", "damaged WEBP"),
    Specimen("bomb.jpg", lambda: bomb("JPEG", b"\xff\xc0", 5, ">HH", 65_500), "refused", "65500 x 65500 pixels, more than"),
    Specimen("bomb.gif", lambda: bomb("GIF", b"GIF8", 6, "<HH", 65_535), "refused", "65535 x 65535 pixels, more than"),
    Specimen("bomb.bmp", lambda: bomb("BMP", b"BM", 18, "<ii", 40_000), "refused", "40000 x 40000 pixels, more than"),
    Specimen("bomb.jp2", lambda: bomb("JPEG2000", b"ihdr", 4, ">II", 40_000), "refused", "40000 x 40000 pixels, more than"),
    Specimen("bomb.qoi", lambda: bomb("QOI", b"qoif", 4, ">II", 40_000), "refused", "40000 x 40000 pixels, more than"),
    Specimen("bomb.avif", lambda: bomb("AVIF", b"ispe", 8, ">II", 40_000), "refused", "damaged AVIF"),
    Specimen("bomb.ppm", lambda: b"P6 40000 40000 255\n", "refused", "40000 x 40000 pixels, more than"),
    Specimen("bomb.tif", lambda: tiff(40_000, 40_000, (8,), 1, b""), "refused", "40000 x 40000 pixels, more than"),
    Specimen("cut.webp", lambda: cut(encoded(textured((96, 128)), "WEBP"), 0.6), "refused", "damaged WEBP"),
    Specimen("cut.avif", lambda: cut(encoded(textured((96, 128)), "AVIF"), 0.6), "refused", "damaged AVIF"),
    Specimen("pixel.png", lambda: encoded(plain(size_hw=(1, 1)), "PNG"), "refused", "only 1 x 1 pixels"),
    Specimen("pixel.gif", lambda: encoded(plain(size_hw=(1, 1)), "GIF"), "refused", "only 1 x 1 pixels"),
    Specimen("thread.png", lambda: encoded(plain(0, (1, 65_000), "1"), "PNG"), "refused", "only 65000 x 1 pixels"),
    Specimen(
        "text_bomb.png",
        lambda: png(32, 24, 8, 0, bytes(33 * 24), [(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 22)))]),
        "refused",
        "damaged PNG",
    ),
    Specimen(
        "profile_bomb.png",
        lambda: png(32, 24, 8, 0, bytes(33 * 24), [(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 22)))]),
        "refused",
        "damaged PNG",
    ),
)

BROKEN = (
    Specimen("cut.jpg", lambda: cut(encoded(textured((96, 128)), "JPEG", quality=95), 0.6), "broken", "damaged JPEG", size_hw=(96, 128)),
    Specimen("cut.png", lambda: cut(encoded(textured((96, 128)), "PNG"), 0.6), "broken", "damaged PNG", size_hw=(96, 128)),
    *(
        Specimen(f"cut.{ending}", partial(cut_off, name), "broken", f"damaged {name}", size_hw=(96, 128))
        for ending, name in [("gif", "GIF"), ("tif", "TIFF"), ("jp2", "JPEG2000"), ("bmp", "BMP"), ("qoi", "QOI"), ("ppm", "PPM")]
    ),
    Specimen("damaged.png", damaged_png, "broken", "damaged PNG"),
    Specimen("nan.tif", lambda: encoded(Image.fromarray(np.full((24, 32), np.nan, np.float32)), "TIFF"), "broken", "not numbers"),
)

USED = (
    Specimen("plain.jpg", lambda: encoded(plain(GREY), "JPEG"), "used", mean_rgb=GREY),
    Specimen("plain.png", lambda: encoded(plain(GREEN), "PNG"), "used", mean_rgb=GREEN),
    Specimen("plain.webp", lambda: encoded(plain(BLUE), "WEBP", lossless=True), "used", mean_rgb=BLUE),
    Specimen("plain.avif", lambda: encoded(plain(GREY), "AVIF"), "used", mean_rgb=GREY, tolerance=3.0),
    Specimen("plain.bmp", lambda: encoded(plain(RED), "BMP"), "used", mean_rgb=RED),
    Specimen("plain.tif", lambda: encoded(plain(RED), "TIFF"), "used", mean_rgb=RED),
    Specimen("plain.jp2", lambda: encoded(plain(RED), "JPEG2000"), "used", mean_rgb=RED),
    Specimen("plain.qoi", lambda: encoded(plain(RED), "QOI"), "used", mean_rgb=RED),
    Specimen("really_a_jpeg.png", lambda: encoded(plain(GREY), "JPEG"), "used", mean_rgb=GREY),
    Specimen("really_a_png.jpg", lambda: encoded(plain(RED), "PNG"), "used", mean_rgb=RED),
    # transparency
    Specimen("rgba.png", lambda: encoded(half_transparent("RGBA"), "PNG"), "used", mean_rgb=(127.5,) * 3),
    Specimen("la.png", lambda: encoded(half_transparent("LA"), "PNG"), "used", mean_rgb=(127.5,) * 3),
    Specimen("p_key.png", lambda: palette_with_key(as_bytes=False), "used", mean_rgb=(127.5,) * 3),
    Specimen("p_alpha.png", lambda: palette_with_key(as_bytes=True), "used", mean_rgb=(127.5,) * 3),
    Specimen("grey_key.png", lambda: encoded(plain(9, mode="L"), "PNG", transparency=9), "used", mean_rgb=(255,) * 3),
    Specimen("rgb_key.png", lambda: encoded(plain(RED), "PNG", transparency=RED), "used", mean_rgb=(255,) * 3),
    Specimen("rgb_other_key.png", lambda: encoded(plain(RED), "PNG", transparency=BLUE), "used", mean_rgb=RED),
    Specimen("rgba_16_key.png", lambda: rgb_16_png(key=True), "used", mean_rgb=(255,) * 3),
    Specimen("palette.gif", lambda: encoded(plain(RED).quantize(8), "GIF"), "used", mean_rgb=RED),
    Specimen("palette.png", lambda: encoded(plain(GREEN).quantize(8), "PNG"), "used", mean_rgb=GREEN),
    Specimen("grey.jpg", lambda: encoded(plain(90, mode="L"), "JPEG"), "used", mean_rgb=(90,) * 3),
    Specimen("one_bit.png", lambda: encoded(plain(1, mode="1"), "PNG"), "used", mean_rgb=(255,) * 3),
    Specimen("rgba.webp", lambda: encoded(half_transparent("RGBA"), "WEBP", lossless=True), "used", mean_rgb=(127.5,) * 3),
    # depth
    Specimen("ramp_16.png", lambda: encoded(ramp_16(), "PNG"), "used", mean_rgb=(127.5,) * 3),
    Specimen("ramp_16.tif", lambda: encoded(ramp_16(), "TIFF"), "used", mean_rgb=(127.5,) * 3),
    Specimen("rgb_16.png", rgb_16_png, "used", mean_rgb=(128, 0, 255)),
    Specimen("grey_16_key.png", lambda: encoded(plain(700, mode="I;16"), "PNG", transparency=700), "used", mean_rgb=(255,) * 3),
    Specimen("rgb_16.tif", lambda: tiff(32, 24, (16,) * 3, 2, struct.pack("<HHH", 32768, 0, 65535) * 768), "used", mean_rgb=(128, 0, 255)),
    Specimen("int_32.tif", lambda: encoded(plain(32768, mode="I"), "TIFF"), "used", mean_rgb=(127.5,) * 3),
    Specimen("float.tif", lambda: encoded(plain(0.5, mode="F"), "TIFF"), "used", mean_rgb=(127.5,) * 3),
    Specimen("grey_16.pgm", lambda: b"P5 32 24 65535\n" + struct.pack(">H", 32768) * 768, "used", mean_rgb=(127.5,) * 3),
    # colour
    Specimen("cmyk.jpg", lambda: encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG"), "used", mean_rgb=RED, tolerance=2.0),
    Specimen("cmyk.tif", lambda: encoded(plain((0, 255, 255, 0), mode="CMYK"), "TIFF"), "used", mean_rgb=RED),
    Specimen(
        "cmyk_profile.jpg",
        lambda: encoded(plain((255, 0, 0, 0), mode="CMYK"), "JPEG", icc_profile=cmyk_to_grey()),
        "used",
        mean_rgb=(119, 119, 119),  # L* = 50.2 in sRGB
        tolerance=2.0,
    ),
    Specimen("lab.tif", lambda: encoded(plain((255, 128, 128), mode="LAB"), "TIFF"), "used", mean_rgb=(255,) * 3, tolerance=3.0),
    Specimen(
        "broken_profile.jpg",
        lambda: encoded(plain(GREY), "JPEG", icc_profile=b"no profile at all, but long enough"),
        "used",
        notice="sRGB is assumed",
        mean_rgb=GREY,
    ),
    *(
        Specimen(
            f"huge_profile.{ending}",
            partial(with_huge_profile, name),
            "used",
            notice="sRGB is assumed",
            mean_rgb=GREY,
            tolerance=3.0,
        )
        for ending, name in [("jpg", "JPEG"), ("webp", "WEBP"), ("tif", "TIFF")]
    ),
    Specimen(
        "misplaced_profile.png",
        lambda: encoded(plain(GREEN), "PNG", icc_profile=grey_gamma(1.0)),
        "used",
        notice="sRGB is assumed",
        mean_rgb=GREEN,
    ),
    # several frames
    Specimen("animation.gif", lambda: animation("GIF"), "used", notice="first one is used", mean_rgb=RED),
    Specimen("animation.png", lambda: animation("PNG"), "used", notice="first one is used", mean_rgb=RED),
    Specimen("animation.webp", lambda: animation("WEBP"), "used", notice="first one is used", mean_rgb=RED, tolerance=3.0),
    Specimen("animation.avif", lambda: animation("AVIF"), "used", notice="first one is used", mean_rgb=RED, tolerance=3.0),
    Specimen("pages.tif", lambda: animation("TIFF"), "used", notice="first one is used", mean_rgb=RED),
    # orientation: a picture of 24 x 32 in the file that stands on its side
    Specimen("turned.jpg", lambda: encoded(plain(GREY), "JPEG", exif=exif_with(6)), "used", size_hw=(32, 24), mean_rgb=GREY),
    Specimen("damaged_exif.jpg", lambda: encoded(plain(GREY), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), "used", mean_rgb=GREY),
)
