"""101 pictures over nine aspect ratios, twelve of them bad: each is used or quarantined with its reason, and seen once per lap."""

import json
from collections import Counter
from pathlib import Path

import pytest

from aquatint.config.schema import Config
from aquatint.data.ledger import ledger_text
from aquatint.errors import DataError
from aquatint.models.sdxl.load import open_base
from aquatint.training.build import build_reader, train_run
from aquatint.training.caching import cache_run
from aquatint.training.prepare import Prepared
from tests import zoo
from tests.runs import small_config

ASPECTS_HW = [(60, 60), (50, 75), (75, 50), (48, 64), (64, 48), (45, 80), (80, 45), (30, 100), (100, 30)]
BAD = zoo.REFUSED[:8] + zoo.BROKEN[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    pictures = folder / "pictures"
    pictures.mkdir()
    for index in range(89):
        path = pictures / f"good {index:03}.png"
        path.write_bytes(zoo.encoded(zoo.textured(ASPECTS_HW[index % 9], seed=index), "PNG"))
        path.with_suffix(".txt").write_text(f"picture {index}")
    zoo.write(pictures, BAD)
    for specimen in BAD:
        (pictures / specimen.name).with_suffix(".txt").write_text("a bad one")
    return folder


def config(folder: Path, base: Path, **sections) -> Config:
    sections = {"validation": {"share": 0.0, "every": None}, "training": {"batch_size": 4}, **sections}
    return small_config(folder, base, data={"max_bad_share": 0.2}, **sections)


@pytest.fixture(scope="module")
def data(folder: Path, tiny_base: Path) -> Prepared:
    return cache_run(config(folder, tiny_base))


def test_listed_equals_used_plus_quarantined(data: Prepared):
    manifest = data.manifest
    assert (manifest.listed, len(manifest), len(manifest.rejected)) == (101, 89, 12)
    text = ledger_text(manifest)
    assert text.startswith("101 pictures listed = 89 used + 12 quarantined")
    for specimen in BAD:
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"pictures/{specimen.name}:")]
        assert specimen.reason in line


def test_each_used_picture_is_visited_exactly_once_per_lap_and_no_batch_is_short(data: Prepared, folder: Path, tiny_base: Path):
    """In 4 epochs of n pictures, with 4 in a batch, every bucket ends its fourth lap with a full batch."""
    reader = build_reader(config(folder, tiny_base), open_base(tiny_base), data)
    batches = [reader.order.batch(index) for index in range(reader.order.batches_before_epoch(4))]
    names = Counter(data.train.names[data.train.bucket(bucket)[row]] for bucket, rows in batches for row in rows)
    assert all(len(items) == 4 for _, items in batches)
    assert set(names.values()) == {4}
    assert names.keys() == {picture.name for picture in data.manifest.pictures()}


def test_broken_pictures_are_remembered_by_content_and_not_decoded_again(data: Prepared, folder: Path, tiny_base: Path):
    remembered = json.loads((folder / "cache" / "quarantine.json").read_text())
    assert len(remembered) == 4
    again = cache_run(config(folder, tiny_base))
    assert again.digest == data.digest
    assert again.manifest.rejected == data.manifest.rejected


def test_nothing_of_the_users_is_touched(data: Prepared, folder: Path):
    for specimen in BAD:
        assert (folder / "pictures" / specimen.name).read_bytes() == specimen.make()
    assert len([path for path in (folder / "pictures").iterdir() if path.suffix != ".txt"]) == 101


def test_too_many_bad_pictures_are_refused_with_names(folder: Path, tiny_base: Path, data: Prepared):
    strict = small_config(folder, tiny_base, data={"max_bad_share": 0.05})
    with pytest.raises(DataError, match="12 of 101") as caught:
        cache_run(strict)
    assert caught.value.exit_code == 3


def test_a_run_over_them_trains_and_writes_its_ledger(data: Prepared, folder: Path, tiny_base: Path):
    result = train_run(config(folder, tiny_base, training={"batch_size": 4, "length": "3 steps"}))
    assert result.state.samples_seen == 12
    assert (result.folder / "ledger.txt").read_text() == ledger_text(data.manifest)
    assert (result.folder / "buckets.txt").read_text().splitlines()[0].strip().startswith("width x height")
    assert result.exported[0].exists()
    assert (result.folder / "loss.png").stat().st_size > 1000
