import numpy as np
import pytest

from aquatint.data.image import save_png
from aquatint.errors import StorageError
from aquatint.training import focus_points as module
from aquatint.training.find import find_pictures, opener_of
from aquatint.training.focus_points import CENTRE, focus_points
from tests.runs import small_config

pytest.importorskip("smartcrop")


def scene(down: float, right: float, seed: int) -> np.ndarray:
    """A skin-coloured disc on a plain ground."""
    height, width = 96, 160
    rows, columns = np.mgrid[:height, :width]
    pixels = np.full((height, width, 3), (90, 110, 100 + seed), np.uint8)
    pixels[(rows - down * height) ** 2 + (columns - right * width) ** 2 < 14**2] = (222, 171, 140)
    return pixels


PLACES = {"left": (0.5, 0.15), "right": (0.5, 0.85)}


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "pictures"
    for seed, (name, place) in enumerate(PLACES.items()):
        save_png(folder / f"{name}.png", scene(*place, seed))
        (folder / f"{name}.txt").write_text(name)
    return lambda **sections: small_config(tmp_path, tmp_path / "base.safetensors", **{"crop": {"mode": "focus"}, **sections})


def points_of(config):
    opener = opener_of(config)
    manifest = find_pictures(config, opener, {})
    points = focus_points(config, manifest, opener)
    assert points is not None
    return {manifest.name(row).partition("/")[2][:-4]: points[manifest.digests[row].tobytes()] for row in range(len(manifest))}


def test_the_points_are_where_something_stands_out(config):
    points = points_of(config())
    for name, place in PLACES.items():
        assert points[name] == pytest.approx(place, abs=0.15)


def test_they_are_worked_out_once(config, monkeypatch):
    first = points_of(config())
    monkeypatch.setattr(module, "focus_point", lambda pixels: pytest.fail("was worked out before"))
    assert points_of(config()) == first


def test_another_colour_behind_transparent_pictures_is_another_picture(config, monkeypatch):
    points_of(config())
    monkeypatch.setattr(module, "focus_point", lambda pixels: (0.25, 0.75))
    assert set(points_of(config(data={"alpha_color": "#000000"})).values()) == {(0.25, 0.75)}


def test_other_crops_need_no_points(config):
    plain = config(crop={"mode": "center"})
    opener = opener_of(plain)
    assert focus_points(plain, find_pictures(plain, opener, {}), opener) is None
    assert not (plain.cache.folder / "focus").exists()


def test_a_picture_that_cannot_be_decoded_has_its_centre(config, tmp_path):
    """Who encodes it will say what is wrong with it."""
    path = tmp_path / "pictures" / "left.png"
    path.write_bytes(path.read_bytes()[:-60])
    points = points_of(config())
    assert points["left"] == CENTRE
    assert points["right"] == pytest.approx(PLACES["right"], abs=0.15)


def test_trouble_with_the_disk_is_not_remembered(config, monkeypatch):
    def fail(file, *settings):
        raise StorageError("the disk does not answer", hint="wait")

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_image", fail)
        assert set(points_of(config()).values()) == {CENTRE}
    assert points_of(config())["left"] == pytest.approx(PLACES["left"], abs=0.15)


def test_many_points_lie_in_several_shards(config, monkeypatch):
    whole = points_of(config())
    monkeypatch.setattr(module, "POINTS_PER_SHARD", 1)
    assert points_of(config(cache={"folder": str(config().cache.folder) + "2"})) == whole
