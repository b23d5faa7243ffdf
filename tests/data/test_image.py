import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from aquatint.data import image as module
from aquatint.data.image import BadImage, contact_sheet, load_image, quiet_decoders, read_header, resize, save_png
from aquatint.errors import StorageError
from tests import zoo

MAX_PIXELS = 100_000_000


def written(folder, data, name="a.png"):
    path = folder / name
    path.write_bytes(data)
    return path


def loaded(folder, data, alpha_color="#ffffff"):
    return load_image(written(folder, data), alpha_color, MAX_PIXELS)


@pytest.mark.parametrize("specimen", zoo.REFUSED, ids=lambda specimen: specimen.name)
def test_a_hopeless_file_is_refused_from_its_header(tmp_path, specimen):
    path = written(tmp_path, specimen.make(), specimen.name)
    with pytest.raises(BadImage, match=specimen.reason):
        read_header(path, MAX_PIXELS)
    with pytest.raises(BadImage, match=specimen.reason):
        load_image(path, "#ffffff", MAX_PIXELS)


@pytest.mark.parametrize("specimen", zoo.BROKEN, ids=lambda specimen: specimen.name)
def test_a_damaged_file_is_found_when_it_is_decoded(tmp_path, specimen):
    path = written(tmp_path, specimen.make(), specimen.name)
    assert read_header(path, MAX_PIXELS).size_hw == specimen.size_hw
    with pytest.raises(BadImage, match=specimen.reason):
        load_image(path, "#ffffff", MAX_PIXELS)


@pytest.mark.parametrize("specimen", zoo.USED, ids=lambda specimen: specimen.name)
def test_an_odd_file_becomes_the_picture_a_person_would_see(tmp_path, specimen):
    path = written(tmp_path, specimen.make(), specimen.name)
    with quiet_decoders():
        header = read_header(path, MAX_PIXELS)
        pixels = load_image(path, "#ffffff", MAX_PIXELS)
    assert header.size_hw == specimen.size_hw
    assert pixels.shape == (*specimen.size_hw, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), specimen.mean_rgb, atol=specimen.tolerance)
    assert (specimen.notice in " ".join(header.notices)) if specimen.notice else header.notices == ()


def test_a_file_is_never_changed_by_reading_it(tmp_path):
    before = {specimen.name: specimen.make() for specimen in (*zoo.USED, *zoo.BROKEN)}
    for name, data in before.items():
        path = written(tmp_path, data, name)
        try:
            with quiet_decoders():
                read_header(path, MAX_PIXELS)
                load_image(path, "#ffffff", MAX_PIXELS)
        except BadImage:
            assert name in {specimen.name for specimen in zoo.BROKEN}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_file_is_trouble_with_the_disk_and_not_with_the_picture(tmp_path):
    with pytest.raises(StorageError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png", "#ffffff", MAX_PIXELS)


def test_the_pixel_limit_is_ours_and_not_the_decoders(tmp_path):
    path = written(tmp_path, zoo.png(20_000, 20_000, 1, 0, b""))
    assert read_header(path, max_pixels=400_000_000).size_hw == (20_000, 20_000)
    with pytest.raises(BadImage, match=r"more than the 399,999,999 that data\.max_pixels allows"):
        read_header(path, max_pixels=399_999_999)


def test_no_bomb_is_decoded_to_be_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("decoded"))
    with pytest.raises(BadImage):
        load_image(written(tmp_path, zoo.png(12_000, 12_000, 1, 0, b"")), "#ffffff", MAX_PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation, format_name):
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
    path = written(tmp_path, data)
    assert read_header(path, MAX_PIXELS).size_hw == (32, 48)
    np.testing.assert_allclose(load_image(path, "#ffffff", MAX_PIXELS).astype(int), upright, atol=40)


def test_headers_of_png_files_are_read_without_decoding_them(tmp_path, monkeypatch):
    path = written(tmp_path, zoo.encoded(zoo.plain(), "PNG"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *args: pytest.fail("decoded"))
    assert read_header(path, MAX_PIXELS).size_hw == (24, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_the_colour_that_was_chosen(tmp_path, mode):
    pixels = loaded(tmp_path, zoo.encoded(zoo.half_transparent(mode), "PNG"), "#0A141e")
    assert (pixels[:, 16:] == (10, 20, 30)).all()
    assert (pixels[:, :16] == 0).all()


def test_half_opaque_pixels_are_mixed_and_rounded(tmp_path):
    pixels = loaded(tmp_path, zoo.encoded(zoo.plain((200, 100, 0, 64), mode="RGBA"), "PNG"), "#ffffff")
    expected = np.round((np.array([200, 100, 0]) * 64 + 255 * (255 - 64)) / 255)
    assert np.abs(pixels - expected).max() == 0


def test_floats_beyond_one_and_below_zero_are_scaled_and_not_clipped(tmp_path):
    values = np.full((24, 32), -1.0, np.float32)
    values[:, 16:] = 3.0
    values[0, 0] = 1.0
    pixels = loaded(tmp_path, zoo.encoded(Image.fromarray(values), "TIFF"))
    assert [int(pixels[row, column, 0]) for row, column in [(1, 0), (0, 0), (0, 20)]] == [0, 128, 255]


def test_an_infinite_float_makes_a_picture_unusable(tmp_path):
    values = np.zeros((24, 32), np.float32)
    values[3, 3] = np.inf
    with pytest.raises(BadImage, match="not numbers"):
        loaded(tmp_path, zoo.encoded(Image.fromarray(values), "TIFF"))


def srgb_of(linear):
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


def test_a_wide_gamut_profile_is_converted_to_srgb(tmp_path):
    """Against the matrices: P3 to XYZ of the profile, XYZ (D50) to linear sRGB of IEC 61966-2-1, Bradford-adapted."""
    color = (90, 160, 110)
    xyz_to_srgb = np.array([[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]])
    expected = srgb_of(xyz_to_srgb @ zoo.P3_TO_XYZ_D50 @ (np.array(color) / 255) ** 2.2)
    assert np.abs(expected - color).max() > 20
    pixels = loaded(tmp_path, zoo.encoded(zoo.plain(color), "PNG", icc_profile=zoo.display_p3()))
    np.testing.assert_allclose(pixels[0, 0], expected, atol=2)


def test_a_profile_is_applied_under_transparency_too(tmp_path):
    image = zoo.plain((90, 160, 110, 255), mode="RGBA")
    opaque = loaded(tmp_path, zoo.encoded(zoo.plain((90, 160, 110)), "PNG", icc_profile=zoo.display_p3()))
    assert (loaded(tmp_path, zoo.encoded(image, "PNG", icc_profile=zoo.display_p3())) == opaque).all()


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_is_converted_to_srgb(tmp_path, mode):
    image = zoo.plain(128, mode="L").convert(mode)
    pixels = loaded(tmp_path, zoo.encoded(image, "PNG", icc_profile=zoo.grey_gamma(1.0)))
    np.testing.assert_allclose(pixels[0, 0], [srgb_of(128 / 255)] * 3, atol=1)


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = zoo.textured((24, 32))
    assert (loaded(tmp_path, zoo.encoded(image, "PNG", icc_profile=profile)) == np.asarray(image)).all()


def test_pictures_with_one_profile_load_the_same_in_many_threads(tmp_path):
    path = written(tmp_path, zoo.encoded(zoo.textured((64, 96)), "PNG", icc_profile=zoo.display_p3()))
    alone = load_image(path, "#ffffff", MAX_PIXELS)
    start = threading.Barrier(8)

    def load(_):
        start.wait()
        return load_image(path, "#ffffff", MAX_PIXELS)

    with ThreadPoolExecutor(8) as pool:
        assert all((pixels == alone).all() for pixels in pool.map(load, range(8)))


def test_running_out_of_memory_is_not_blamed_on_the_picture(tmp_path, monkeypatch):
    def fail(self):
        raise MemoryError

    path = written(tmp_path, zoo.encoded(zoo.plain(), "BMP"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        load_image(path, "#ffffff", MAX_PIXELS)


def test_formats_that_run_other_programs_are_never_opened(tmp_path):
    path = written(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n")
    with pytest.raises(BadImage, match="not a picture that can be read"):
        read_header(path, MAX_PIXELS)


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
    part = resize(image, (60, 70), box_tlbr=(20.0, 40.0, 140.0, 180.0))
    assert np.abs(part.astype(int) - whole[10:70, 20:90]).max() <= 1


def test_a_saved_png_loads_as_it_was(tmp_path):
    image = np.asarray(zoo.textured((24, 32)))
    save_png(tmp_path / "samples" / "a.png", image)
    assert (load_image(tmp_path / "samples" / "a.png", "#ffffff", MAX_PIXELS) == image).all()


def test_a_contact_sheet_shows_every_picture_whole_and_labels_below_it():
    images = [np.full((60, 90, 3), (40 * index, 0, 0), np.uint8) for index in range(1, 6)]
    sheet = contact_sheet(images, [f"a red fox number {index} in the deep snow" for index in range(5)], columns=3)
    for image in images:
        assert (sheet == image[0, 0]).all(axis=-1).sum() == 60 * 90
    label = sheet[16 + 60 : 16 + 60 + 16, 16 : 16 + 90]
    assert label.min() < 60
    assert (sheet[-1] == 255).all()
    assert sheet.shape[1] == 3 * (90 + 16) + 16


def test_a_contact_sheet_takes_pictures_of_different_sizes_and_very_long_labels():
    images = [np.zeros((64, 32, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)]
    sheet = contact_sheet(images, ["w" * 5000, ""], columns=2)
    assert sheet.shape[1] == 2 * (64 + 16) + 16
    assert sheet.shape[0] < 400


def test_labels_are_wrapped_between_words_to_the_width():
    font = module.ImageFont.load_default(size=12)
    lines = module._wrap("the quick brown fox jumps over the lazy dog", font, 100)
    assert " ".join(lines) == "the quick brown fox jumps over the lazy dog"
    assert len(lines) > 1
    assert max(font.getlength(line) for line in lines) <= 100


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "QOI", "AVIF"])
def test_wherever_a_file_is_damaged_it_is_a_bad_image_or_a_picture_of_its_size(tmp_path, format_name):
    """Never another exception. Bytes are changed and files are cut all over, from a fixed seed."""
    rng = np.random.default_rng(7)
    whole = zoo.encoded(zoo.textured((24, 32)), format_name)
    outcomes = {"bad": 0, "fine": 0}
    for attempt in range(40):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= rng.integers(1, 256)
        path = written(tmp_path, bytes(data[: rng.integers(8, len(data))] if attempt % 4 == 0 else data))
        try:
            with quiet_decoders():
                size = read_header(path, 1_000_000).size_hw
                assert load_image(path, "#ffffff", 1_000_000).shape == (*size, 3)
            outcomes["fine"] += 1
        except BadImage:
            outcomes["bad"] += 1
    assert min(outcomes.values()) > 0


def test_decoders_remarks_are_not_shown(tmp_path, recwarn):
    path = written(tmp_path, zoo.encoded(zoo.plain(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    with quiet_decoders():
        assert read_header(path, MAX_PIXELS).size_hw == (24, 32)
    assert len(recwarn) == 0
