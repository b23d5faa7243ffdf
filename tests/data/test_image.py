import errno
import hashlib
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from aquatint.data import image as module
from aquatint.data.image import (
    BadImage,
    Decoded,
    cut,
    decode_image,
    digest_picture,
    encode_webp,
    load_alpha,
    load_image,
    load_mask,
    quiet_decoders,
    read_header,
    resize,
    save_png,
)
from tests import zoo

MAX_PIXELS = 100_000_000


def header(data, max_pixels=MAX_PIXELS):
    return read_header(io.BytesIO(data), max_pixels)


def loaded(data, alpha_color="#ffffff"):
    return load_image(io.BytesIO(data), alpha_color, MAX_PIXELS)


def alpha(data):
    return load_alpha(io.BytesIO(data), MAX_PIXELS)


def mask(data):
    return load_mask(io.BytesIO(data), MAX_PIXELS)


@pytest.mark.parametrize("specimen", zoo.REFUSED, ids=lambda specimen: specimen.name)
def test_a_hopeless_file_is_refused_from_its_header(specimen):
    data = specimen.make()
    for read in (header, loaded, alpha, mask):
        with pytest.raises(BadImage, match=specimen.reason):
            read(data)


@pytest.mark.parametrize("specimen", zoo.BROKEN, ids=lambda specimen: specimen.name)
def test_a_damaged_file_is_found_when_it_is_decoded(specimen):
    data = specimen.make()
    assert header(data).size_hw == specimen.size_hw
    for read in (loaded, alpha, mask):
        with pytest.raises(BadImage, match=specimen.reason):
            read(data)


@pytest.mark.parametrize("specimen", zoo.USED, ids=lambda specimen: specimen.name)
def test_an_odd_file_becomes_the_picture_a_person_would_see(specimen):
    data = specimen.make()
    with quiet_decoders():
        found, pixels, opacity, grey = header(data), loaded(data), alpha(data), mask(data)
    assert found.size_hw == specimen.size_hw
    assert pixels.shape == (*specimen.size_hw, 3)
    assert opacity.shape == grey.shape == specimen.size_hw
    assert pixels.dtype == opacity.dtype == grey.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), specimen.mean_rgb, atol=specimen.tolerance)
    assert (specimen.notice in " ".join(found.notices)) if specimen.notice else found.notices == ()


def test_files_on_a_disk_are_read_from_their_start_and_never_changed(tmp_path):
    """As they come: buffered, at any position."""
    before = {specimen.name: specimen.make() for specimen in (*zoo.USED, *zoo.BROKEN)}
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
        with (tmp_path / name).open("rb") as file, quiet_decoders():
            file.read(9)
            assert read_header(file, MAX_PIXELS) == header(data)
            assert digest_picture(file) == hashlib.blake2b(data, digest_size=16).digest()
            try:
                assert (load_image(file, "#ffffff", MAX_PIXELS) == loaded(data)).all()
            except BadImage:
                assert name in {specimen.name for specimen in zoo.BROKEN}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class FailingFile:
    """A disk that fails from the given byte on."""

    def __init__(self, data, good_bytes):
        self._file, self._good_bytes = io.BytesIO(data), good_bytes
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, size=-1):
        if self.tell() + (size if size >= 0 else 1 << 40) > self._good_bytes:
            raise OSError(errno.EIO, "Input/output error")
        return self._file.read(size)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_trouble_with_the_disk_is_not_trouble_with_the_picture(format_name):
    data = zoo.encoded(zoo.textured((96, 128)), format_name)
    for good_bytes in (0, 70, len(data) // 2):
        for read in (load_alpha, load_mask, lambda file, max_pixels: load_image(file, "#ffffff", max_pixels)):
            with pytest.raises(OSError, match="Input/output error"):
                read(FailingFile(data, good_bytes), MAX_PIXELS)


@pytest.mark.parametrize("format_name", ["JPEG", "WEBP", "TIFF", "GIF", "PNG"])
def test_trouble_with_the_disk_is_told_apart_in_headers_too(format_name):
    """TIFF has its directory at the end; the others, something long before the pixels."""
    data = zoo.encoded(zoo.textured((96, 128)), format_name, exif=zoo.exif_with(1), icc_profile=zoo.display_p3(), comment=b"x" * 200)
    for good_bytes in (10, 64, 150):
        with pytest.raises(OSError, match="Input/output error"), quiet_decoders():
            read_header(FailingFile(data, good_bytes), MAX_PIXELS)


def test_the_pixel_limit_is_ours_and_not_the_decoders():
    data = zoo.png(20_000, 20_000, 1, 0, b"")
    assert header(data, 400_000_000).size_hw == (20_000, 20_000)
    with pytest.raises(BadImage, match=r"more than the 399,999,999 that data\.max_pixels allows"):
        header(data, 399_999_999)


def test_no_bomb_is_decoded_to_be_refused(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("decoded"))
    with pytest.raises(BadImage):
        loaded(zoo.png(12_000, 12_000, 1, 0, b""))


def test_a_file_larger_than_its_pixels_can_be_is_not_read(monkeypatch):
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 1000)
    data = zoo.encoded(zoo.plain(), "PNG") + bytes(1000 + 8 * 768)
    for read in (read_header, load_alpha, load_mask):
        with pytest.raises(BadImage, match=r"bytes, more than the 7,144 that data\.max_pixels = 768 can need"):
            read(io.BytesIO(data), 768)


@pytest.mark.parametrize(
    "data",
    [
        zoo.png(32, 24, 8, 0, bytes(33 * 24), [(b"eXIf", bytes(1 << 20))]),
        zoo.png(32, 24, 8, 0, bytes(33 * 24), [(b"prVt", bytes(1 << 20))]),
        zoo.encoded(zoo.plain(), "JPEG").replace(b"\xff\xdb", (b"\xff\xe1\xff\xfd" + bytes(0xFFFB)) * 20 + b"\xff\xdb", 1),
    ],
    ids=["PNG EXIF", "PNG private", "JPEG EXIF"],
)
def test_what_stands_before_the_pixels_must_not_be_endless(monkeypatch, data):
    assert header(data).size_hw == (24, 32)
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 1 << 19)
    with pytest.raises(BadImage, match="before its pixels"):
        header(data)


def test_bombs_do_not_fill_the_memory(tmp_path):
    """All hopeless files, and 200 MB of EXIF data in a picture of 32 x 24."""
    (tmp_path / "exif.png").write_bytes(zoo.png(32, 24, 8, 0, bytes(33 * 24), [(b"eXIf", bytes(200_000_000))]))
    zoo.write(tmp_path, zoo.REFUSED)
    script = """
import resource, sys
from pathlib import Path
from aquatint.data.image import BadImage, load_alpha, quiet_decoders, read_header
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for path in Path(sys.argv[1]).iterdir():
    for read in (read_header, load_alpha) if path.name != "exif.png" else (read_header,):
        try:
            with path.open("rb") as file, quiet_decoders():
                read(file, 100_000_000)
        except BadImage:
            refused += 1
print(refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    ran = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True, env=os.environ)
    refused, mebibytes = map(int, ran.stdout.split())
    assert refused == 2 * len(zoo.REFUSED) + 1
    assert mebibytes < 250


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_exif_orientation_is_turned_upright(orientation, format_name):
    """The picture is stored so that turning it by the tag gives dark top left, light elsewhere, as wide as 48 and as high as 32."""
    upright = np.full((32, 48, 3), 230, np.uint8)
    upright[:16, :16] = 20
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    data = zoo.encoded(Image.fromarray(np.ascontiguousarray(stored)), format_name, exif=zoo.exif_with(orientation))
    assert header(data).size_hw == (32, 48)
    np.testing.assert_allclose(loaded(data).astype(int), upright, atol=40)
    np.testing.assert_allclose(mask(data).astype(int), upright[:, :, 0], atol=40)
    assert alpha(data).shape == (32, 48)


def test_headers_of_png_files_are_read_without_decoding_them(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *args: pytest.fail("decoded"))
    assert header(zoo.encoded(zoo.plain(), "PNG")).size_hw == (24, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_the_colour_that_was_chosen(mode):
    pixels = loaded(zoo.encoded(zoo.half_transparent(mode), "PNG"), "#0A141e")
    assert (pixels[:, 16:] == (10, 20, 30)).all()
    assert (pixels[:, :16] == 0).all()


def test_half_opaque_pixels_are_mixed_and_rounded():
    pixels = loaded(zoo.encoded(zoo.plain((200, 100, 0, 64), mode="RGBA"), "PNG"), "#ffffff")
    expected = np.round((np.array([200, 100, 0]) * 64 + 255 * (255 - 64)) / 255)
    assert np.abs(pixels - expected).max() == 0


def test_floats_beyond_one_and_below_zero_are_scaled_and_not_clipped():
    values = np.full((24, 32), -1.0, np.float32)
    values[:, 16:] = 3.0
    values[0, 0] = 1.0
    pixels = loaded(zoo.encoded(Image.fromarray(values), "TIFF"))
    assert [int(pixels[row, column, 0]) for row, column in [(1, 0), (0, 0), (0, 20)]] == [0, 128, 255]


def test_an_infinite_float_makes_a_picture_unusable():
    values = np.zeros((24, 32), np.float32)
    values[3, 3] = np.inf
    with pytest.raises(BadImage, match="not numbers"):
        loaded(zoo.encoded(Image.fromarray(values), "TIFF"))


def srgb_of(linear):
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


XYZ_D50_TO_SRGB = np.array([[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]])


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("profile", "to_xyz", "gamma", "color"),
    [
        (zoo.display_p3(), zoo.P3_TO_XYZ_D50, 2.2, (90, 160, 110)),
        (zoo.adobe_rgb(), zoo.ADOBE_TO_XYZ_D50, zoo.ADOBE_GAMMA, (120, 140, 110)),
    ],
    ids=["Display P3", "Adobe RGB"],
)
def test_a_wide_gamut_profile_is_converted_to_srgb(format_name, profile, to_xyz, gamma, color):
    """Against the matrices: to XYZ by the profile, XYZ (D50) to linear sRGB of IEC 61966-2-1, Bradford-adapted."""
    expected = srgb_of(XYZ_D50_TO_SRGB @ to_xyz @ (np.array(color) / 255) ** gamma)
    assert np.abs(expected - color).max() > 7
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}, "AVIF": {"quality": 100}}.get(format_name, {})
    data = zoo.encoded(zoo.plain(color), format_name, icc_profile=profile, **options)
    assert header(data).notices == ()
    np.testing.assert_allclose(loaded(data)[0, 0], expected, atol=2 if format_name in ("PNG", "TIFF", "WEBP") else 3)


@pytest.mark.parametrize("lab", [(60, 30, -20), (30, -15, 25), (85, 0, 0)])
def test_lab_colours_are_converted_by_their_definition(lab):
    """CIE 15: L*, a*, b* under D50 to XYZ, and from there as above."""
    f = (lab[0] + 16) / 116
    curves = np.array([f + lab[1] / 500, f, f - lab[2] / 200])
    xyz = np.array(zoo.WHITE_D50) * np.where(curves > 6 / 29, curves**3, 3 * (6 / 29) ** 2 * (curves - 4 / 29))
    data = zoo.encoded(zoo.plain((round(lab[0] * 2.55), lab[1] + 128, lab[2] + 128), mode="LAB"), "TIFF")
    np.testing.assert_allclose(loaded(data)[0, 0], srgb_of(XYZ_D50_TO_SRGB @ xyz), atol=3)


def test_a_cmyk_picture_is_the_same_by_every_road():
    """JPEG stores its inks inverted, as Adobe does; TIFF does not. Without a profile, inks are plain complements."""
    channels = [channel.point(lambda value: value // 2) for channel in zoo.textured((24, 32)).split()]
    inks = Image.merge("CMYK", [*channels, zoo.plain(30, mode="L")])
    plain = (255 - np.asarray(inks)[:, :, :3].astype(int)) * (255 - 30) / 255
    np.testing.assert_allclose(loaded(zoo.encoded(inks, "TIFF")), plain, atol=2)
    np.testing.assert_allclose(loaded(zoo.encoded(inks, "JPEG", quality=100, subsampling=0)), plain, atol=6)


def test_a_profile_is_applied_under_transparency_too():
    image = zoo.plain((90, 160, 110, 255), mode="RGBA")
    opaque = loaded(zoo.encoded(zoo.plain((90, 160, 110)), "PNG", icc_profile=zoo.display_p3()))
    assert (loaded(zoo.encoded(image, "PNG", icc_profile=zoo.display_p3())) == opaque).all()


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_is_converted_to_srgb(mode):
    image = zoo.plain(128, mode="L").convert(mode)
    pixels = loaded(zoo.encoded(image, "PNG", icc_profile=zoo.grey_gamma(1.0)))
    np.testing.assert_allclose(pixels[0, 0], [srgb_of(128 / 255)] * 3, atol=1)


def test_an_srgb_profile_changes_no_pixel():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = zoo.textured((24, 32))
    assert (loaded(zoo.encoded(image, "PNG", icc_profile=profile)) == np.asarray(image)).all()


def test_pictures_with_one_profile_load_the_same_in_many_threads():
    data = zoo.encoded(zoo.textured((64, 96)), "PNG", icc_profile=zoo.display_p3())
    alone = loaded(data)
    start = threading.Barrier(8)

    def load(_):
        start.wait()
        return loaded(data)

    with ThreadPoolExecutor(8) as pool:
        assert all((pixels == alone).all() for pixels in pool.map(load, range(8)))


def test_running_out_of_memory_is_not_blamed_on_the_picture(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        loaded(zoo.encoded(zoo.plain(), "BMP"))


def test_formats_that_run_other_programs_are_never_opened():
    with pytest.raises(BadImage, match="not a picture that can be read"):
        header(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n")


# Opacity and masks


@pytest.mark.parametrize(
    "data",
    [
        zoo.encoded(zoo.half_transparent("RGBA"), "PNG"),
        zoo.encoded(zoo.half_transparent("LA"), "PNG"),
        zoo.encoded(zoo.half_transparent("RGBA"), "WEBP", lossless=True),
        zoo.encoded(zoo.half_transparent("RGBA"), "TIFF"),
        zoo.palette_with_key(as_bytes=False),
        zoo.palette_with_key(as_bytes=True),
    ],
    ids=["RGBA", "LA", "WebP", "TIFF", "P", "P with alpha"],
)
def test_the_opacity_of_every_kind_of_picture(data):
    assert (alpha(data)[:, :16] == 255).all()
    assert (alpha(data)[:, 16:] == 0).all()


@pytest.mark.parametrize("value", [0, 1, 77, 254, 255])
def test_opacity_is_exact(value):
    assert (alpha(zoo.encoded(zoo.plain((1, 2, 3, value), mode="RGBA"), "PNG")) == value).all()


def test_a_picture_without_transparency_is_opaque_everywhere():
    for image, format_name in [
        (zoo.plain(), "JPEG"),
        (zoo.plain(9, mode="L"), "PNG"),
        (zoo.ramp_16(), "PNG"),
        (zoo.plain(mode="CMYK"), "TIFF"),
    ]:
        assert (alpha(zoo.encoded(image, format_name)) == 255).all()


def test_opacity_turns_with_its_picture():
    image = zoo.half_transparent("RGBA").rotate(90, expand=True)
    data = zoo.encoded(image, "PNG", exif=zoo.exif_with(6))
    assert header(data).size_hw == (24, 32)
    assert (alpha(data)[:, :16] == 255).all()
    assert (alpha(data)[:, 16:] == 0).all()


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (zoo.plain(200, mode="L"), 200),
        (zoo.plain((200, 200, 200)), 200),
        (zoo.plain((255, 0, 0)), 76),  # 0.299 of it
        (zoo.plain(1, mode="1"), 255),
        (zoo.plain((200, 128), mode="LA"), 100),
        (zoo.plain((200, 200, 200, 0), mode="RGBA"), 0),
        (zoo.plain((200, 200, 200)).quantize(4), 200),
        (zoo.plain(32768, mode="I;16"), 128),
        (zoo.plain(0, mode="L"), 0),
    ],
    ids=["L", "RGB", "red", "1", "LA", "transparent", "P", "16 bits", "black"],
)
def test_a_mask_is_as_bright_as_it_looks(image, value):
    found = mask(zoo.encoded(image, "PNG"))
    assert found.shape == (24, 32)
    assert np.abs(found.astype(int) - value).max() <= 1


def test_a_grey_mask_is_taken_exactly_and_its_profile_ignored():
    ramp = Image.fromarray(np.arange(24 * 32, dtype=np.uint32).astype(np.uint8).reshape(24, 32))
    assert (mask(zoo.encoded(ramp, "PNG", icc_profile=zoo.grey_gamma(1.0))) == np.asarray(ramp)).all()


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_a_mask_of_zeros_and_ones_is_refused_and_not_taken_for_black(mode):
    labels = np.zeros((24, 32), np.uint8 if mode == "L" else np.uint16)
    labels[:9, :9] = 1
    with pytest.raises(BadImage, match="no values but 0 and 1"):
        mask(zoo.encoded(Image.fromarray(labels), "PNG"))


def test_a_mask_of_one_bit_is_black_and_white():
    image = zoo.plain(0, mode="1")
    image.paste(1, (0, 0, 9, 9))
    assert set(np.unique(mask(zoo.encoded(image, "PNG")))) == {0, 255}


def test_of_an_animated_mask_the_first_frame_counts():
    assert (mask(zoo.animation("GIF")) == 76).all()


def test_exif_data_behind_the_pixels_does_not_turn_a_picture_whose_header_was_read_without_it():
    whole = zoo.encoded(zoo.plain(), "PNG")
    exif = zoo.png_chunk(b"eXIf", zoo.exif_with(6).removeprefix(b"Exif\0\0"))
    data = whole[:-12] + exif + whole[-12:]
    assert header(data).size_hw == loaded(data).shape[:2] == alpha(data).shape == mask(data).shape == (24, 32)


# At a fraction of the size


def decoded(data, reduction):
    return decode_image(io.BytesIO(data), "#ffffff", MAX_PIXELS, reduction=reduction)


JPEGS = {
    "baseline": lambda: zoo.encoded(zoo.textured((61, 43)), "JPEG", subsampling=2),
    "progressive": lambda: zoo.encoded(zoo.textured((61, 43)), "JPEG", progressive=True),
    "full colour": lambda: zoo.encoded(zoo.textured((61, 43)), "JPEG", subsampling=0),
    "grey": lambda: zoo.encoded(zoo.textured((61, 43)).convert("L"), "JPEG"),
    "inks": lambda: zoo.encoded(zoo.textured((61, 43)).convert("CMYK"), "JPEG"),
    "camera": lambda: zoo.encoded(zoo.textured((61, 43)), "MPO", save_all=True, append_images=[zoo.textured((16, 16))]),
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_jpeg_can_be_decoded_at_a_fraction_of_its_size(kind, reduction):
    data = JPEGS[kind]()
    assert header(data).is_reducible
    picture = decoded(data, reduction)
    assert picture.size_hw == (61, 43)
    assert picture.pixels.shape == (-(-61 // reduction), -(-43 // reduction), 3)
    assert reduction > 1 or (picture.pixels == loaded(data)).all()
    np.testing.assert_allclose(picture.pixels.mean(axis=(0, 1)), loaded(data).mean(axis=(0, 1)), atol=4)


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_nothing_but_a_jpeg_is_decoded_at_a_fraction_of_its_size(format_name):
    data = zoo.encoded(zoo.textured((61, 43)), format_name)
    assert not header(data).is_reducible
    with pytest.raises(ValueError, match=f"a {format_name} picture cannot be decoded at 1/2 of its size"):
        decoded(data, 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_colours_are_those_of_the_whole_picture(mode):
    profile, color = {
        "RGB": (zoo.display_p3(), (90, 160, 110)), "L": (zoo.grey_gamma(1.0), 128), "CMYK": (zoo.cmyk_to_grey(), (40, 80, 20, 60)),
    }[mode]  # fmt: skip
    data = zoo.encoded(zoo.plain(color, (48, 64), mode), "JPEG", icc_profile=profile, quality=100)
    whole = loaded(data)
    assert np.ptp(whole.reshape(-1, 3), axis=0).max() == 0
    for reduction in (2, 4, 8):
        assert (decoded(data, reduction).pixels == whole[0, 0]).all()


def test_damage_is_found_at_a_fraction_of_the_size_too():
    data = JPEGS["baseline"]()
    with pytest.raises(BadImage, match="damaged JPEG"):
        decoded(data[: len(data) // 2], 4)


@pytest.mark.parametrize(("orientation", "reduction"), [*((orientation, 4) for orientation in range(1, 9)), (3, 2), (7, 8)])
def test_what_is_cut_out_is_in_its_place_at_any_size_and_orientation(orientation, reduction):
    """Of sides that leave 1 over. The shift is the one whose first-order change is nearest to the difference (least squares)."""
    down, right = np.meshgrid(np.arange(801), np.arange(1281), indexing="ij")
    waves = 128 + 60 * np.sin(down / 43 + right / 131) + 50 * np.cos(right / 61 - down / 170)
    stored = Image.fromarray(np.repeat(waves.astype(np.uint8)[:, :, None], 3, axis=2))
    data = zoo.encoded(stored, "JPEG", exif=zoo.exif_with(orientation), quality=97)
    whole, reduced = (decoded(data, one) for one in (1, reduction))
    height, width = whole.size_hw
    assert (height, width) == reduced.size_hw == header(data).size_hw
    for box in (0.0, 0.0, 0.4 * height, 0.4 * width), (0.59 * height, 0.61 * width, height, width):
        size_hw = (int(0.4 * height / (1.4 * reduction)), int(0.4 * width / (1.4 * reduction)))
        there, here = (cut(one, box, size_hw).astype(np.float64).mean(axis=2) for one in (whole, reduced))
        slopes = np.stack([slope.ravel() for slope in np.gradient(there)], axis=1)
        shift_px, *_ = np.linalg.lstsq(slopes, (here - there).ravel())
        assert np.abs(shift_px).max() < 0.02
        np.testing.assert_allclose(here, there, atol=3)


# Sizes


def test_resizing_keeps_means_and_shape():
    image = np.asarray(zoo.textured((90, 120)))
    small = resize(image, (30, 40))
    assert small.shape == (30, 40, 3)
    np.testing.assert_allclose(small.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=1)


def test_resizing_down_does_not_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    np.testing.assert_allclose(resize(stripes, (16, 16))[4:-4, 4:-4].astype(int), 128, atol=2)


def test_resizing_to_the_same_size_is_the_same_picture():
    image = np.asarray(zoo.textured((24, 32)))
    assert (resize(image, (24, 32)) == image).all()


def test_resizing_a_box_is_resizing_everything_and_cropping():
    image = np.asarray(zoo.textured((200, 300)))
    whole = resize(image, (100, 150))
    part = cut(Decoded.of(image), (20.0, 40.0, 140.0, 180.0), (60, 70))
    assert np.abs(part.astype(int) - whole[10:70, 20:90]).max() <= 1


def test_a_saved_png_loads_as_it_was(tmp_path):
    image = np.asarray(zoo.textured((24, 32)))
    save_png(tmp_path / "samples" / "a.png", image)
    assert (loaded((tmp_path / "samples" / "a.png").read_bytes()) == image).all()


def test_a_small_picture_for_a_page_is_a_webp_file():
    image = np.asarray(zoo.textured((60, 80)))
    data = encode_webp(image)
    assert data[8:12] == b"WEBP"
    assert np.abs(loaded(data).astype(int) - image).mean() < 4
    assert len(encode_webp(image, quality=10)) < len(data)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "QOI", "AVIF"])
def test_wherever_a_file_is_damaged_it_is_a_bad_image_or_a_picture_of_its_size(format_name):
    """Never another exception. Bytes are changed and files are cut all over, from a fixed seed."""
    rng = np.random.default_rng(7)
    whole = zoo.encoded(zoo.textured((24, 32)), format_name)
    outcomes = {"bad": 0, "fine": 0}
    for attempt in range(40):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= rng.integers(1, 256)
        harmed = bytes(data[: rng.integers(8, len(data))] if attempt % 4 == 0 else data)
        try:
            with quiet_decoders():
                size = header(harmed, 1_000_000).size_hw
                assert load_image(io.BytesIO(harmed), "#ffffff", 1_000_000).shape == (*size, 3)
            outcomes["fine"] += 1
        except BadImage:
            outcomes["bad"] += 1
    assert min(outcomes.values()) > 0


def test_decoders_remarks_are_not_shown(recwarn):
    data = zoo.encoded(zoo.plain(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with quiet_decoders():
        assert header(data).size_hw == (24, 32)
    assert len(recwarn) == 0
