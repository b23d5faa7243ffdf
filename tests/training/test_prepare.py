import json

import pytest

from aquatint.data import indexing
from aquatint.errors import DataError
from aquatint.models.sdxl.load import open_base
from aquatint.training import prepare as module
from aquatint.training.prepare import prepare
from tests import zoo
from tests.runs import small_config

SHAPES_HW = [(96, 96), (80, 120), (120, 80)]
CUT = zoo.cut(zoo.encoded(zoo.textured((96, 96), seed=5), "PNG"), 0.6)  # its header is fine


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(9):
        (folder / f"{index}.png").write_bytes(zoo.encoded(zoo.textured(SHAPES_HW[index % 3], seed=index), "PNG"))
        (folder / f"{index}.txt").write_text(f"number {index}, paper")
    return folder


@pytest.fixture
def prepared(tmp_path, tiny_base):
    """Prepares a run over the pictures, and returns it with what it said."""

    def run(source=None, **sections):
        sections = {"validation": {"every": None}, "buckets": {"resolution": 64, "min_side": 32, "max_side": 128}, **sections}
        sections["data"] = {
            "sources": [{"path": str(tmp_path / "pictures"), **(source or {})}],
            "max_bad_share": 0.5,
            **sections.get("data", {}),
        }
        config, said = small_config(tmp_path, tiny_base, **sections), []
        return prepare(config, open_base(config.model.base), say=said.append), said

    return run


def used(data):
    return {picture.name for picture in data.manifest.pictures()}


def test_everything_that_is_wanted_is_there_and_a_second_time_nothing_is_said(pictures, prepared, monkeypatch):
    data, said = prepared(validation={"every": "4 steps", "share": 0.3})
    assert [line.partition(" to ")[0].split() for line in said] == [["captions", "10"], ["pictures", "7"], ["held", "out", "2"]]
    for side in (data.train, data.held_out):
        assert data.stores.latents.has(side.latent_keys.reshape(-1, 16)).all()
        assert data.stores.texts.has(side.text_keys).all()
    assert data.entries.empty_text_key in data.stores.texts
    monkeypatch.setattr(module, "open_base", lambda *arguments: pytest.fail("no encoder is needed"))
    again, said = prepared(validation={"every": "4 steps", "share": 0.3})
    assert said == []
    assert again.digest == data.digest


def test_what_is_encoded_is_counted_by_content_and_crop(pictures, prepared):
    """Crops of a picture that fits are all alike, and so are those of its copy."""
    for index in range(9):
        (pictures / f"{index}.png").write_bytes(zoo.encoded(zoo.textured((64, 64), seed=index), "PNG"))
    for ending in (".png", ".txt"):
        (pictures / f"copy{ending}").write_bytes((pictures / f"0{ending}").read_bytes())
    data, said = prepared(crop={"mode": "random", "variants": 3, "flip_prob": 0.5})
    assert said[-1].startswith("pictures    18 views of 10 pictures to encode: 10 new")
    assert len(data.stores.latents) == 18


def test_with_another_way_of_decoding_nothing_but_large_jpegs_is_encoded_anew(pictures, prepared):
    for index, size_hw in ((1, (300, 400)), (2, (120, 80))):
        (pictures / f"{index}.png").write_bytes(zoo.encoded(zoo.textured(size_hw, seed=index), "JPEG"))
    before, _ = prepared(data={"decode": "whole"})
    after, said = prepared()
    assert said == ["pictures    1 to encode: 1 that are decoded at another size"]
    assert after.digest != before.digest
    again, said = prepared(data={"decode": "whole"})
    assert (again.digest, said) == (before.digest, [])


def test_a_picture_that_cannot_be_decoded_is_left_out_and_remembered_by_its_content(pictures, prepared, tmp_path):
    (pictures / "4.png").write_bytes(CUT)
    data, said = prepared()
    assert [line for line in said if line.startswith("quarantined")] == [
        "quarantined: pictures/4.png: is a damaged PNG file: image file is truncated"
    ]
    assert len(data.manifest) == len(data.train) == 8
    (one,) = data.manifest.rejected
    assert (one.name, one.bad) == ("pictures/4.png", True)
    (reason,) = json.loads((tmp_path / "cache" / "quarantine.json").read_text()).values()
    assert reason == one.reason
    again, said = prepared()
    assert said == []
    assert again.manifest.rejected == data.manifest.rejected
    (pictures / "4.png").write_bytes(zoo.encoded(zoo.textured((96, 96), seed=4), "PNG"))
    assert len(prepared()[0].train) == 9


def test_a_mask_that_cannot_be_decoded_keeps_its_picture_out_until_it_is_repaired(pictures, prepared, tmp_path):
    (pictures / "3-masklabel.png").write_bytes(zoo.encoded(zoo.textured((96, 96), seed=30), "PNG"))
    (pictures / "6-masklabel.png").write_bytes(CUT)
    data, said = prepared({"masks": "files"})
    reason = "its mask is a damaged PNG file: image file is truncated"
    assert [line for line in said if line.startswith("quarantined")] == [f"quarantined: pictures/6.png: {reason}"]
    assert [(one.name, one.reason) for one in data.manifest.rejected] == [("pictures/6.png", reason)]
    assert len(data.train) == 8
    again, said = prepared({"masks": "files"})
    assert said == []
    assert again.digest == data.digest
    (pictures / "6-masklabel.png").write_bytes(zoo.encoded(zoo.textured((96, 96), seed=40), "PNG"))
    assert len(prepared({"masks": "files"})[0].train) == 9
    assert len(prepared({"masks": "none"})[0].train) == 9


def test_too_many_that_turn_out_to_be_bad_are_refused_by_name(pictures, prepared):
    for index in (2, 4, 6):
        (pictures / f"{index}.png").write_bytes(CUT + bytes([index]))
    with pytest.raises(DataError, match=r"3 of 9 pictures cannot be used.*pictures/2\.png \(is a damaged PNG"):
        prepared(data={"max_bad_share": 0.2})


def test_a_picture_that_changes_while_it_is_encoded_is_looked_at_again(pictures, prepared, tmp_path, monkeypatch):
    """It is no fault of its content, and nothing of it is remembered."""
    monkeypatch.setattr(indexing, "_has_settled", lambda identities, now_ns: False)  # as if the clock had not moved on
    real, changed = module.build_latents, []

    def change_first(*arguments, **settings):
        if not changed:
            changed.append((pictures / "4.png").write_bytes(zoo.encoded(zoo.textured((96, 96), seed=77), "PNG")))
        return real(*arguments, **settings)

    monkeypatch.setattr(module, "build_latents", change_first)
    data, said = prepared()
    assert "quarantined: pictures/4.png: was changed while the pictures were being encoded" in said
    assert len(data.train) == 9
    assert data.manifest.rejected == ()
    assert json.loads((tmp_path / "cache" / "quarantine.json").read_text()) == {}


def test_a_damaged_file_of_the_cache_is_named_and_made_again(pictures, prepared, tmp_path):
    data, _ = prepared()
    (shard, *_) = sorted((tmp_path / "cache" / "latents").glob("????????????????????????????????.safetensors"))
    shard.write_bytes(shard.read_bytes()[:200])
    again, said = prepared()
    assert said[0].startswith(f"warning: the cache file {shard.name}")
    assert said[1].endswith("no longer in the cache")
    assert again.digest == data.digest
    assert again.stores.latents.has(again.train.latent_keys.reshape(-1, 16)).all()


@pytest.mark.parametrize(("repeats", "expected"), [(1, 9), (0.5, 4), (2, 18), (0.34, 3), (0.01, 1)])
def test_an_epoch_has_as_many_samples_as_the_repeats_say(pictures, prepared, repeats, expected):
    data, _ = prepared({"repeats": repeats})
    assert data.samples_per_epoch == expected
