"""Pictures: recognised by content, checked from the header, decoded to sRGB.

A picture array is uint8 (height, width, 3) in sRGB, upright. Files are open, binary and seekable, are read from their
start, and are never changed. What cannot be used raises `BadImage` with a reason that reads well after the file's name;
trouble with the disk is an OSError, as the file raised it.

Known limit: a JPEG whose coded data was damaged in the middle decodes to wrong pixels without any error, because the
format has no checksum.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    QoiImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from aquatint import storage

Pixels = npt.NDArray[np.uint8]

Greys = npt.NDArray[np.uint8]  # (height, width)

MIN_SIDE_PX = 8  # less is a tracking pixel or a scrap, and no bucket could do anything with it
MAX_HEADER_BYTES = 64 << 20  # before the pixels: profiles, EXIF, previews
MAX_PROFILE_BYTES = 4 << 20  # those of printers have 2 or 3
_BYTES_PER_PIXEL = 8  # 16 bits of red, green, blue and alpha: no format that is read here needs more
_PLUGINS = (  # importing a plugin is what registers its format
    JpegImagePlugin, PngImagePlugin, WebPImagePlugin, AvifImagePlugin, GifImagePlugin, BmpImagePlugin,
    TiffImagePlugin, Jpeg2KImagePlugin, PpmImagePlugin, QoiImagePlugin,
)  # fmt: skip
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI")  # none that runs a program, as EPS does
_READABLE = "JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, JPEG 2000, PNM or QOI"
_ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # a camera's JPEG with a preview inside is not one
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """A picture that cannot be used. The text is the reason, and reads well after the file's name and a colon."""


@dataclass(frozen=True)
class Header:
    """What a picture's header says: its upright size, and remarks about what will be done to it.

    `is_reducible` says whether it can be decoded at a fraction of its size, which is what JPEG's blocks allow.
    """

    size_hw: tuple[int, int]
    notices: tuple[str, ...] = ()
    is_reducible: bool = False


@dataclass(frozen=True)
class Decoded:
    """A picture, upright and in sRGB, as Pillow holds it: of a fraction of its size, 1 / `reduction`, if it was decoded so.

    `size_hw` is that of the whole picture. If `reduction` does not divide it, a row or column of `image` lies partly beyond its edge;
    turned upright, that may be the first. `origin_tl` is where in `image` the whole picture begins, in pixels of `image`.
    """

    image: Image.Image
    size_hw: tuple[int, int]
    reduction: int = 1
    origin_tl: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, pixels: Pixels) -> Decoded:
        return cls(Image.fromarray(pixels), (pixels.shape[0], pixels.shape[1]))

    @property
    def pixels(self) -> Pixels:
        return np.array(self.image, dtype=np.uint8)


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Keeps Pillow's remarks on odd files, which name no file, off the screen.

    Goes around the threads that read pictures and not into them: the filters belong to the whole process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def digest_picture(file: BinaryIO) -> bytes:
    """BLAKE2b-128 of the file's bytes."""
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()  # type: ignore[arg-type]


def read_header(file: BinaryIO, max_pixels: int) -> Header:
    """Size and remarks, without decoding any pixel, and without reading more than a header can need. Raises BadImage, OSError."""
    _check_bytes(file, max_pixels)
    with _HeaderFile(file) as head:
        image = _open(head)
        _check_size(image, max_pixels)
        width, height = image.size
        turned = _orientation(image) in (5, 6, 7, 8)
        is_reducible = isinstance(image, JpegImagePlugin.JpegImageFile)
        return Header((width, height) if turned else (height, width), tuple(_notices(image)), is_reducible)


def load_image(file: BinaryIO, alpha_color: str, max_pixels: int) -> Pixels:
    """The same as `decode_image`, whole, as uint8 (H, W, 3)."""
    return decode_image(file, alpha_color, max_pixels).pixels


def decode_image(file: BinaryIO, alpha_color: str, max_pixels: int, *, reduction: int = 1) -> Decoded:
    """The upright first frame in sRGB, over `alpha_color` (`#rrggbb`) where it is transparent.

    Deeper numbers are scaled to 0..255, not clipped. With a `reduction` of 2, 4 or 8, the decoder leaves frequencies out, and
    gives each side at that fraction, rounded up; ValueError for what is not `Header.is_reducible`. Raises BadImage, OSError.
    """
    image, orientation, (width, height) = _decode(file, max_pixels, reduction)
    with _decoder_errors(image.format):
        color, alpha = _split_alpha(_to_eight_bits(image))
        picture = _to_srgb(color, _profile(image))
    if alpha is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, alpha_color), alpha)
    size_hw = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    picture = _upright(picture, orientation)
    beyond_hw = picture.height - size_hw[0] / reduction, picture.width - size_hw[1] / reduction
    origin_tl = beyond_hw[0] * (orientation in (3, 4, 7, 8)), beyond_hw[1] * (orientation in (2, 3, 6, 7))  # what was last is first
    return Decoded(picture, size_hw, reduction, origin_tl)


def load_alpha(file: BinaryIO, max_pixels: int) -> Greys:
    """The opacity of the picture that `load_image` gives, as uint8 (H, W): 255 where nothing shines through. Raises BadImage, OSError."""
    image, orientation, _ = _decode(file, max_pixels)
    with _decoder_errors(image.format):
        _, alpha = _split_alpha(_to_eight_bits(image))
    return np.array(_upright(alpha or Image.new("L", image.size, 255), orientation), dtype=np.uint8)


def load_mask(file: BinaryIO, max_pixels: int) -> Greys:
    """A mask's first frame, upright, as uint8 (H, W): its brightness (ITU-R BT.601), and 0 where it is transparent.

    Its numbers are meant as they are: no colour profile is applied. Raises BadImage, also for a mask of zeros and ones,
    which would mask everything; OSError.
    """
    image, orientation, _ = _decode(file, max_pixels)
    if image.mode in ("L", "I", "I;16") and image.getextrema()[1] == 1:
        raise BadImage("has no values but 0 and 1, of which 1 is as good as black: save it in black and white")
    with _decoder_errors(image.format):
        color, alpha = _split_alpha(_to_eight_bits(image))
        grey = (color if color.mode in ("1", "L") else _to_srgb(color, b"")).convert("L")
    if alpha is not None:
        grey = Image.composite(grey, Image.new("L", grey.size, 0), alpha)
    return np.array(_upright(grey, orientation), dtype=np.uint8)


def resize(image: Pixels, size_hw: tuple[int, int]) -> Pixels:
    """Resampled with Lanczos, antialiased, to `size_hw`."""
    return cut(Decoded.of(image), (0.0, 0.0, *image.shape[:2]), size_hw)


def cut(picture: Decoded, box_tlbr: tuple[float, float, float, float], size_hw: tuple[int, int]) -> Pixels:
    """The part `box_tlbr` (top, left, bottom, right), resampled with Lanczos, antialiased, to `size_hw`.

    The box is in pixels of the whole picture, may lie between pixels, and sees its surroundings: the result is that of
    resizing everything and cropping, but for rounding, without ever holding the resized whole.
    """
    top, left, bottom, right = (
        start + edge / picture.reduction for start, edge in zip(picture.origin_tl * 2, box_tlbr, strict=True)
    )  # fmt: skip
    if (top, left, bottom, right) == (0, 0, *size_hw) and size_hw == (picture.image.height, picture.image.width):
        return picture.pixels
    resized = picture.image.resize((size_hw[1], size_hw[0]), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    return np.array(resized, dtype=np.uint8)


def save_png(path: Path, image: Pixels) -> None:
    """Writes uint8 (H, W, 3) as a PNG file. Raises StorageError."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    storage.write_bytes(path, buffer.getvalue())


def encode_webp(image: Pixels, quality: int = 80) -> bytes:
    """A small picture for a page, uint8 (H, W, 3), as the bytes of a WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


# Opening and checking


class _HeaderFile:
    """The part of a file that a header may take: reading more raises BadImage, so that no memory is filled.

    WebP and AVIF may be read whole, as their readers need. Around reading, it sees to it that trouble with the disk is
    not lost: Pillow takes some of it for damage.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell
        self._trouble: OSError | None = None
        start = file.read(16)
        is_read_whole = start[8:12] == b"WEBP" or start[4:8] == b"ftyp"
        self._left = file.seek(0, os.SEEK_END) + 64 if is_read_whole else MAX_HEADER_BYTES
        file.seek(0)

    def __enter__(self) -> BinaryIO:
        return cast(BinaryIO, self)

    def __exit__(self, *error: object) -> None:
        if self._trouble is not None:
            raise self._trouble

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        except OSError as error:
            self._trouble = error
            raise
        self._left -= len(data)
        if self._left < 0:
            raise BadImage(f"has more than {MAX_HEADER_BYTES >> 20} MiB before its pixels, which no picture needs")
        return data


def _check_bytes(file: BinaryIO, max_pixels: int) -> None:
    """Raises BadImage for a file that is larger than any with so many pixels can be."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if num_bytes > (limit := MAX_HEADER_BYTES + _BYTES_PER_PIXEL * max_pixels):
        raise BadImage(f"has {num_bytes:,} bytes, more than the {limit:,} that data.max_pixels = {max_pixels} can need")


def _decode(file: BinaryIO, max_pixels: int, reduction: int = 1) -> tuple[ImageFile.ImageFile, int, tuple[int, int]]:
    """The picture with its pixels, as they are in the file, its orientation, and the width and height that its header says.

    Nothing is decoded before its size was checked.
    """
    _check_bytes(file, max_pixels)
    image = _open(file if isinstance(file, io.BytesIO) else io.BytesIO(file.read()))  # from here on the disk is out of it
    _check_size(image, max_pixels)
    orientation = _orientation(image)  # of what stands before the pixels: that is what the header said
    width, height = image.size
    if reduction > 1:
        image.draft(None, (width // reduction, height // reduction))
        if image.size != (-(-width // reduction), -(-height // reduction)):
            raise ValueError(f"a {image.format} picture cannot be decoded at 1/{reduction} of its size")
    with _decoder_errors(image.format):
        image.load()
    return image, orientation, (width, height)


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """Recognises a picture by its content and reads its header. Raises BadImage.

    Goes to the format's reader directly: Image.open has a pixel limit of its own, a mutable global, half of which is
    a warning. Ours is `max_pixels`.
    """
    start = file.read(64)
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(start[:16]) is not True:
            continue
        file.seek(0)
        with _decoder_errors(name):
            return factory(file, "")
    raise BadImage(_why_unknown(start))


def _why_unknown(start: bytes) -> str:
    """The most helpful thing to say about a file that is none of our formats, from its first bytes."""
    if not start:
        return "the file is empty"
    if not start.strip(b"\0"):
        return "the file begins with zeros: it was probably never written or downloaded completely"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html", b"<head")):
        return "is a web page, not a picture: the download was probably refused"
    if start[4:8] == b"ftyp":
        return "is a HEIC picture or a video, which cannot be read: convert it to JPEG or PNG"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "is a JPEG XL file, which cannot be read: convert it to PNG"
    if start.startswith(b"8BPS"):
        return "is a Photoshop file, which cannot be read: export it as PNG"
    return f"is not a picture that can be read ({_READABLE})"


def _check_size(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Raises BadImage for too many pixels or too few."""
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"has {width} x {height} pixels, more than the {max_pixels:,} that data.max_pixels allows")
    if min(width, height) < MIN_SIDE_PX:
        raise BadImage(f"has only {width} x {height} pixels; each side needs at least {MIN_SIDE_PX}")


def _notices(image: ImageFile.ImageFile) -> Iterator[str]:
    if image.format in _ANIMATIONS:
        with _decoder_errors(image.format):
            animated = getattr(image, "is_animated", False)
        if animated:
            yield "has several frames; the first one is used"
    if (profile := _profile(image)) and _color_transform(profile, _color_mode(image)) == "broken":
        yield "has a colour profile that is broken or does not fit; sRGB is assumed"


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation 1..8, from what stands before the pixels.

    Pillow's own PNG reader would decode the whole file to look for it behind them, and its TIFF reader applies it by
    itself. Damaged EXIF data says nothing, as in every viewer.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever damaged bytes lead the parser to
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@contextlib.contextmanager
def _decoder_errors(format_name: str | None) -> Iterator[None]:
    """Whatever a decoder raises on damaged bytes becomes BadImage. Only Pillow's own work goes inside."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadImage(f"is a damaged {format_name} file: {reason}") from error


# Numbers and transparency


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as 8-bit grey, scaled; everything else as it is. Transparency stays in `info`."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray(_scale_to_eight_bits(values))
    if isinstance(key := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _scale_to_eight_bits(values: npt.NDArray[Any]) -> Pixels:
    """(H, W) of any numbers to uint8 over their full scale.

    Full scale is 0..65535 for integers and 0..1 for floats, as files mean it; numbers beyond that stretch it, so that
    nothing is clipped.
    """
    if not np.isfinite(values).all():
        raise BadImage("has values that are not numbers")
    unit = 1.0 if values.dtype.kind == "f" else 65535.0
    low, high = min(0.0, float(values.min())), max(unit, float(values.max()))
    return np.round((values.astype(np.float64) - low) * (255.0 / (high - low))).astype(np.uint8)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency, and the opacity (mode L) if there is any."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if not image.has_transparency_data:
        return image, None
    if image.mode in ("1", "L", "RGB"):
        return image, _opacity_from_key(image)
    image = image.convert("RGBA")
    return image.convert("RGB"), image.getchannel("A")


def _opacity_from_key(image: Image.Image) -> Image.Image:
    """Opacity (mode L) of a picture in which one colour stands for transparent."""
    key = np.atleast_1d(np.asarray(image.info["transparency"]))
    if key.max() > 255:  # a 16-bit PNG: Pillow keeps the upper byte of the pixels, but not of the key
        key = key >> 8
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    return Image.fromarray(np.where((values.reshape(*values.shape[:2], -1) == key).all(axis=-1), 0, 255).astype(np.uint8))


# Colour


def _color_mode(image: Image.Image) -> str:
    """The Pillow mode in which this picture's colours meet a profile: L, RGB, CMYK or LAB."""
    if image.mode in ("CMYK", "LAB"):
        return image.mode
    return "L" if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I") else "RGB"


def _profile(image: Image.Image) -> bytes:
    """The ICC profile, or nothing. Of one that is too large, so little that it counts as broken."""
    profile: bytes = image.info.get("icc_profile") or b""
    return profile if len(profile) <= MAX_PROFILE_BYTES else profile[:64]


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Mode RGB in sRGB. Without a profile, or with a broken one, the numbers are taken to be sRGB already."""
    mode = _color_mode(image)
    transform = _color_transform(profile, mode)
    if isinstance(transform, str):
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    return transform.apply(image.convert(transform.input_mode))


@functools.lru_cache(maxsize=16)
def _color_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | Literal["none", "broken"]:
    """From an ICC profile (or from CIE Lab) to sRGB for pictures of `mode`; `none` if it would change nothing."""
    if mode == "LAB":
        return _build_transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")
    if not profile:
        return "none"
    input_mode = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}.get(profile[16:20], "")
    if input_mode != mode and (input_mode, mode) != ("RGB", "L"):
        return "broken"
    try:
        transform = _build_transform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), input_mode)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return "broken"
    return "none" if _changes_nothing(transform) else transform


def _build_transform(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    """Relative colorimetric with black point compensation, as browsers do it. NOCACHE makes it safe across threads."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
    return ImageCms.ImageCmsTransform(profile, srgb, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=flags)


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether no colour of a 17 x 17 x 17 cube moves by more than 1 of 255: then the profile is sRGB by another name."""
    if transform.input_mode == "CMYK":
        return False
    steps = np.round(np.linspace(0, 255, 17)).astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(17, -1, 3)
    before = Image.fromarray(cube).convert(transform.input_mode)
    after = np.asarray(transform.apply(before), dtype=np.int16)
    return bool(np.abs(after - np.asarray(before.convert("RGB"), dtype=np.int16)).max() <= 1)
