import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.data.image import save_png
from aquatint.data.manifest import Manifest, scan
from aquatint.data.places import Opener
from aquatint.data.sampler import Order
from aquatint.data.sources.listing import Source
from aquatint.demo.pictures import write_pictures
from aquatint.errors import DataError
from aquatint.training.vae_pictures import CropReader, CropStream, by_source, square


def scanned(folder: Path) -> Manifest:
    source = Source(path=str(folder), kind="folder")
    return scan([source], opener=Opener(), max_pixels=10**6, index_folder=None, quarantine={})


def stream_of(folder: Path, *, batch_size: int = 2, seed: int = 0) -> CropStream:
    manifest = scanned(folder)
    rows, groups = by_source(manifest, np.arange(len(manifest)), [Fraction(1)])
    reader = CropReader(Opener(), seed, side_px=32, area_side_px=64, alpha_color="#ffffff", max_pixels=10**6)
    return CropStream(manifest, rows, Order(seed, (groups,), batch_size), reader)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "pictures"
    write_pictures(path, count=6, seed=3)
    return path


@pytest.mark.parametrize(
    ("size_hw", "resized_hw"),
    [
        ((128, 128), (64, 64)),  # as much smaller as its area is too large
        ((40, 60), (40, 60)),  # never enlarged
        ((32, 512), (32, 512)),  # of the area that is asked for it would be narrower than the crop
        ((40, 512), (32, 410)),
        ((32, 32), (32, 32)),
    ],
)
def test_a_picture_is_reduced_to_the_size_that_is_trained_and_never_enlarged(size_hw, resized_hw):
    crop = square(size_hw, 32, 64, (0.999, 0.0))
    assert (crop.resized_hw, crop.target_hw, crop.flipped) == (resized_hw, (32, 32), False)
    assert (crop.top, crop.left) == (resized_hw[0] - 32, 0)


def test_a_crop_is_the_picture_s_own_pixels_where_nothing_is_reduced(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", pixels)
    batch = next(stream_of(tmp_path, batch_size=1).batches(3, 4, workers=0, prefetch=1))
    image = ((batch.images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    found = [(top, left) for top in range(9) for left in range(19) if np.array_equal(pixels[top : top + 32, left : left + 32], image)]
    assert len(found) == 1


def test_a_sample_depends_on_its_position_alone(folder: Path):
    """Neither threads, nor where the stream is begun, nor what else is in the batch change it."""
    straight = list(stream_of(folder).batches(0, 6, workers=0, prefetch=1))
    threads = list(stream_of(folder).batches(2, 6, workers=2, prefetch=2))
    for one, other in zip(straight[2:], threads, strict=True):
        assert one.names == other.names
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.noise, other.noise)
    pictures = list(scanned(folder).pictures([0, 1, 2]))
    reader = stream_of(folder).reader
    assert torch.equal(reader.read(pictures, 7).images[1:], reader.read(pictures[1:], 8).images)
    assert torch.equal(reader.read(pictures, 7).noise[1:], reader.read(pictures[1:], 8).noise)


def test_every_picture_comes_once_per_epoch_and_differently_each_time(folder: Path):
    batches = list(stream_of(folder).batches(0, 6, workers=0, prefetch=1))
    names = [name for batch in batches for name in batch.names]
    assert sorted(names[:6]) == sorted(names[6:]) == sorted({*names})
    images = torch.cat([batch.images for batch in batches])
    noise = torch.cat([batch.noise for batch in batches])
    assert len({image.numpy().tobytes() for image in images}) > 6
    assert len({one.numpy().tobytes() for one in noise}) == 12
    assert noise.shape == (12, 4, 4, 4)


def test_a_stream_that_is_left_leaves_no_thread(folder: Path):
    stream = stream_of(folder).batches(0, 100, workers=2, prefetch=4)
    next(stream)
    stream.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("crops")] == []


def test_what_is_measured_is_the_same_every_time_and_from_the_middle(folder: Path):
    pictures = list(scanned(folder).pictures([0, 1]))
    one, other = (stream_of(folder, seed=seed).reader.fixed(pictures) for seed in (0, 5))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.noise, other.noise)
    assert not torch.equal(one.noise[0], one.noise[1])


def test_the_digest_changes_with_what_decides_a_batch(folder: Path, tmp_path: Path):
    write_pictures(tmp_path / "pictures", count=6, seed=4)
    first = stream_of(folder)
    assert stream_of(folder).digest == first.digest
    others = [stream_of(folder, seed=1), stream_of(folder, batch_size=3), stream_of(tmp_path / "pictures")]
    assert first.digest not in {other.digest for other in others}


def test_a_picture_that_changed_or_cannot_be_decoded_is_named(tmp_path: Path):
    write_pictures(tmp_path, count=1, seed=3)
    (path,) = tmp_path.glob("*.png")
    stream = stream_of(tmp_path, batch_size=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=f"{path.name} changed"):
        next(stream.batches(0, 1, workers=0, prefetch=1))
    stream = stream_of(tmp_path, batch_size=1)
    with pytest.raises(DataError, match=f"{path.name} is a damaged PNG") as caught:
        next(stream.batches(0, 1, workers=1, prefetch=1))
    assert "--accept-changes" in caught.value.hint
