"""Change one thing, and exactly the entries that depend on it are made again, with the reason printed. Touch, rename, move: none."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from aquatint.config.schema import Config
from aquatint.data.crop import Crop
from aquatint.demo.model import write_tiny_base
from aquatint.models.sdxl.load import open_base
from aquatint.training.caching import cache_run
from aquatint.training.prepare import Stores
from tests import zoo
from tests.runs import small_config

COUNT = 8
SHAPES_HW = [(96, 96), (80, 120), (120, 80), (72, 128)]
TAGS = {"style": "tags", "shuffle": True, "variants": 2, "keep_first": 0}


@dataclass
class Set:
    """A folder of pictures with captions and masks, a base model, and the settings of a run."""

    folder: Path
    base: Path
    other_base: Path
    sections: dict[str, dict] = field(default_factory=dict)
    vae: Path | None = None

    def config(self) -> Config:
        buckets = {"resolution": 128, "min_side": 64, "max_side": 256, **self.sections.get("buckets", {})}
        sections = {"validation": {"every": None}, **{name: dict(values) for name, values in self.sections.items()}, "buckets": buckets}
        sections["data"] = {"sources": [{"path": str(self.folder / "pictures"), "masks": "files"}], **sections.get("data", {})}
        sections["model"] = {"vae": self.vae and str(self.vae), **sections.get("model", {})}
        return small_config(self.folder, self.base, **sections)

    def picture(self, index: int) -> Path:
        return self.folder / "pictures" / f"{index:02}.png"

    def keys(self) -> dict[str, set[bytes]]:
        return {name: set(map(bytes, store.keys())) for name, store in Stores.of(self.folder / "cache").all().items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_base):
    other = tmp_path_factory.mktemp("other") / "other.safetensors"
    write_tiny_base(other, seed=1)
    return tiny_base, other


@pytest.fixture(scope="module")
def original(tmp_path_factory, bases):
    """A set whose cache is complete; tests work on copies."""
    made = Set(tmp_path_factory.mktemp("set"), *bases)
    (made.folder / "pictures").mkdir()
    for index in range(COUNT):
        path = made.picture(index)
        path.write_bytes(zoo.encoded(zoo.textured(SHAPES_HW[index % 4], seed=index), "PNG"))
        path.with_suffix(".txt").write_text(f"number {index}, paper, ink")
        if index < 2:
            mask = zoo.textured(SHAPES_HW[index % 4], seed=100 + index)
            path.with_name(f"{index:02}-masklabel.png").write_bytes(zoo.encoded(mask, "PNG"))
    cache_run(made.config())
    return made


@pytest.fixture
def ours(original, tmp_path):
    shutil.copytree(original.folder, tmp_path / "set", copy_function=os.link)  # same inode, same dates
    return Set(tmp_path / "set", original.base, original.other_base)


def rewrite(path: Path, data: bytes) -> None:
    """A new file under the same name: the copies share their bytes with the original's."""
    path.unlink()
    path.write_bytes(data)


def other_pixels(ours: Set) -> None:
    rewrite(ours.picture(3), zoo.encoded(zoo.textured(SHAPES_HW[3], seed=77), "PNG"))


def other_mask(ours: Set) -> None:
    rewrite(ours.folder / "pictures" / "01-masklabel.png", zoo.encoded(zoo.textured(SHAPES_HW[1], seed=78), "PNG"))


def other_caption(ours: Set) -> None:
    rewrite(ours.picture(5).with_suffix(".txt"), b"another caption")


def other_autoencoder(ours: Set) -> None:
    ours.vae = ours.other_base


def other_text_encoders(ours: Set) -> None:
    ours.base, ours.vae = ours.other_base, ours.base


def setting(section: str, **values):
    def change(ours: Set) -> None:
        ours.sections[section] = {**ours.sections.get(section, {}), **values}

    return change


@dataclass(frozen=True)
class Case:
    """A change, how many entries of each kind are new after it, and what is printed about them."""

    change: object
    latents: int
    texts: int
    masks: int
    words: str


CASES = {
    "image bytes": Case(other_pixels, 1, 0, 0, "1 whose file changed"),
    "resolution": Case(setting("buckets", resolution=96), COUNT, 0, 2, "8 whose bucket, crop or flip changed"),
    "bucket set": Case(setting("buckets", set="novelai", step=64), 6, 0, 1, "6 whose bucket, crop or flip changed"),
    "crop mode": Case(setting("crop", mode="random"), 6, 0, 1, "whose bucket, crop or flip changed"),
    "flip": Case(setting("crop", flip_prob=0.5), COUNT, 0, 2, "8 whose bucket, crop or flip changed"),
    "autoencoder weights": Case(other_autoencoder, COUNT, 0, 0, "8 because the autoencoder changed"),
    "autoencoder precision": Case(setting("cache", vae_precision="bfloat16"), COUNT, 0, 0, "8 because cache.vae_precision changed"),
    "latent format": Case(setting("cache", latent_dtype="float32"), COUNT, 0, 0, "8 because cache.latent_dtype changed"),
    "background colour": Case(setting("data", alpha_color="#000000"), COUNT, 0, 0, "8 because data.alpha_color changed"),
    "caption": Case(other_caption, 0, 1, 0, "1 whose caption changed"),
    "text encoder weights": Case(other_text_encoders, 0, COUNT + 1, 0, "8 because the text encoders changed"),
    "text format": Case(setting("cache", text_dtype="float32"), 0, COUNT + 1, 0, "8 because cache.text_dtype changed"),
    "mask": Case(other_mask, 0, 0, 1, "masks       1 to make"),
}


@pytest.mark.parametrize("name", CASES)
def test_exactly_what_depends_on_a_change_is_made_again(ours: Set, name: str, capsys):
    before, case = ours.keys(), CASES[name]
    case.change(ours)
    cache_run(ours.config())
    after = ours.keys()
    new = {kind: len(after[kind] - before[kind]) for kind in after}
    if name == "crop mode":  # where a crop falls is drawn: some may fall where they were
        assert 0 < new["latents"] <= case.latents
    else:
        assert new == {"latents": case.latents, "texts": case.texts, "masks": case.masks}
    assert all(before[kind] <= after[kind] for kind in before), "what is there stays: another run may use it"
    assert case.words in capsys.readouterr().err
    cache_run(ours.config())
    assert "to encode" not in capsys.readouterr().err


def touch(ours: Set) -> None:
    for path in (ours.folder / "pictures").iterdir():
        os.utime(path, ns=(1, 1))


def rename(ours: Set) -> None:
    for ending in (".png", ".txt"):
        ours.picture(4).with_suffix(ending).rename(ours.folder / "pictures" / f"another name{ending}")


def move(ours: Set) -> None:
    (ours.folder / "pictures").rename(ours.folder / "elsewhere")
    ours.sections["data"] = {"sources": [{"path": str(ours.folder / "elsewhere"), "masks": "files"}]}


def copy_without_dates(ours: Set) -> None:
    shutil.copytree(ours.folder / "pictures", ours.folder / "copy", copy_function=shutil.copyfile)
    ours.sections["data"] = {"sources": [{"path": str(ours.folder / "copy"), "masks": "files"}]}


@pytest.mark.parametrize(
    "change",
    [touch, rename, move, copy_without_dates, setting("optimizer", learning_rate=1e-5), setting("training", length="99 steps")],
)
def test_what_changes_no_content_makes_nothing_again(ours: Set, change, capsys):
    before = ours.keys()
    change(ours)
    cache_run(ours.config())
    assert ours.keys() == before
    assert "to encode" not in capsys.readouterr().err


def test_pictures_that_are_gone_and_come_back_are_not_encoded_again(ours: Set, capsys):
    hidden = ours.folder / "hidden"
    hidden.mkdir()
    for path in (ours.folder / "pictures").glob("07*"):
        path.rename(hidden / path.name)
    cache_run(ours.config())
    for path in hidden.iterdir():
        path.rename(ours.folder / "pictures" / path.name)
    cache_run(ours.config())
    assert "to encode" not in capsys.readouterr().err


def test_the_encoder_that_a_key_names_is_the_one_that_was_used(ours: Set):
    """The digest in the recipe is that of the weights, wherever they lie."""
    base = open_base(ours.base, ours.other_base)
    assert base.digest("vae_encoder") == open_base(ours.other_base).digest("vae_encoder") != open_base(ours.base).digest("vae_encoder")
    assert base.digest("text_encoders") == open_base(ours.base).digest("text_encoders")


def test_masks_are_cut_as_their_pictures_are(ours: Set):
    data = cache_run(ours.config())
    masked = [row for row in range(len(data.train)) if data.train.mask_key(row, 0) is not None]
    assert len(masked) == 2
    for row in masked:
        crop = Crop.from_row(data.layout.train.crops[row, 0])
        mask = data.stores.masks.read(data.train.mask_key(row, 0))["mask"]
        assert mask.shape == (1, crop.target_hw[0] // 8, crop.target_hw[1] // 8)
