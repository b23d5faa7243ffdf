import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.cli.main import run
from aquatint.config.schema import dump
from aquatint.data.crop import fit
from aquatint.data.image import load_image
from aquatint.data.places import Place
from aquatint.diffusion.metrics import clip_score, cmmd, frechet_distance, moments
from aquatint.errors import DataError, UsageError
from aquatint.models.judges import Clip, Dinov2, Inception
from aquatint.models.sdxl.load import open_base
from aquatint.storage import digest_file
from aquatint.tensor_file import TensorFile
from aquatint.training import comparison
from aquatint.training.build import train_run
from aquatint.training.evaluation import LABELS, choose_subjects, evaluate_run, load_model, maker, reader, recipe, remarks
from aquatint.training.preview import planned
from tests.encoders import write_clip, write_dinov2, write_inception
from tests.runs import small_config

CPU = torch.device("cpu")
SAMPLES = {"steps": 2, "guidance_scale": 2.0, "seed": 4}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    paths = {
        "clip": write_clip(root / "clip"),
        "dinov2": write_dinov2(root / "dinov2"),
        "inception": write_inception(root / "inception.safetensors"),
    }
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a run of two steps in it."""
    folder = tmp_path_factory.mktemp("run")
    train_run(config_of(folder, tiny_base, {}))
    return folder


def config_of(folder: Path, base: Path, evaluation: dict, **sections):
    evaluation = {"source": "train", "pictures": 5, "batch_size": 2, **evaluation}
    return small_config(
        folder, base, evaluation=evaluation, samples={**SAMPLES, **sections.pop("samples", {})},
        training={"length": "2 steps"}, **sections,
    )  # fmt: skip


def pixels_in(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return load_image(file, "#ffffff", 1 << 20)


def test_the_verb_prints_what_it_writes(trained, tiny_base, encoders, tmp_path, capsys):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(dump(config_of(trained, tiny_base, encoders))))
    assert run(["evaluate", str(config)]) == 0
    shown = capsys.readouterr().out
    path = trained / "runs" / "test" / "evaluation" / "step-000002.json"
    report = json.loads(path.read_text())
    assert list(report["scores"]) == list(LABELS)
    for name, value in report["scores"].items():
        assert f"{LABELS[name][0]:<20}{value:>12.4f}" in shown
    assert shown.startswith("step-000002: 5 trained pictures, and as many made of their captions\n")
    assert "note: FID wants 10,000 pictures or more" in shown
    assert shown.endswith(f"wrote {path}\n")
    assert (report["pictures"], report["checkpoint"], report["source"], report["left_out"]) == (5, "step-000002", "train", {})
    assert report["encoders"]["dinov2"] == {"path": encoders["dinov2"], "sha256": Dinov2(Path(encoders["dinov2"]), CPU).digest}
    assert report["samples"]["steps"] == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["step-000002.json"]


def test_scores_are_those_of_the_kept_pictures(trained, tiny_base, encoders):
    """From the files alone: what is scored is what was drawn, beside its own picture and caption."""
    config = config_of(trained, tiny_base, encoders)
    result = evaluate_run(config, keep_pictures=True)
    folder = trained / "runs" / "test" / "evaluation" / "step-000002"
    listed = json.loads((folder / "captions.json").read_text())
    assert {path.name for path in folder.glob("*.png")} == set(listed)
    subjects = {one.name: one for one in choose_subjects(config, planned(config))[0]}
    made = [pixels_in(folder / name) for name in listed]
    whose = [subjects[entry["picture"]] for entry in listed.values()]
    assert [picture.shape[:2] for picture in made] == [one.crop.target_hw for one in whose]
    assert [entry["caption"] for entry in listed.values()] == [one.caption for one in whose]
    real = [reader(config)(one) for one in whose]
    clip, dinov2 = Clip(Path(encoders["clip"]), CPU), Dinov2(Path(encoders["dinov2"]), CPU)
    inception = Inception(Path(encoders["inception"]), CPU)
    captions = clip.embed_texts([one.caption for one in whose])
    expected = {
        "clip_score": clip_score(clip.embed(made), captions),
        "clip_score_real": clip_score(clip.embed(real), captions),
        "cmmd": cmmd(clip.embed(real), clip.embed(made)),
        "fd_dinov2": frechet_distance(moments(dinov2.embed(real)), moments(dinov2.embed(made))),
        "fid": frechet_distance(moments(inception.embed(real)), moments(inception.embed(made))),
    }
    assert result.report["scores"] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_repeat_gives_the_same_numbers_whatever_the_batch_size(trained, tiny_base, encoders, monkeypatch):
    """Of the same pictures to 1e-5. In those drawn anew, a pixel that lies between two of 256 levels may get the other one."""
    small, large = (config_of(trained, tiny_base, {**encoders, "batch_size": size}) for size in (2, 5))
    one = evaluate_run(small, keep_pictures=True).report
    assert evaluate_run(small).report == one
    assert evaluate_run(large).report["scores"] == pytest.approx(one["scores"], rel=1e-3)
    monkeypatch.setattr(comparison, "generate", None)  # what is kept is not drawn again
    assert evaluate_run(large, keep_pictures=True).report["scores"] == pytest.approx(one["scores"], rel=1e-5, abs=1e-5)


def test_the_base_is_measured_by_its_name_and_where_there_is_no_checkpoint(trained, tiny_base, encoders, tmp_path):
    by_name = evaluate_run(config_of(trained, tiny_base, {"clip": encoders["clip"]}), "base").report
    shutil.copytree(trained / "pictures", tmp_path / "pictures")
    untrained = evaluate_run(config_of(tmp_path, tiny_base, {"clip": encoders["clip"]}))
    assert untrained.path == tmp_path / "runs" / "test" / "evaluation" / "base.json"
    assert untrained.report["scores"] == by_name["scores"]
    assert untrained.report["weights"] == by_name["weights"]
    assert list(by_name["scores"]) == ["clip_score", "clip_score_real", "cmmd"]  # those of the encoders that are given


@pytest.mark.parametrize(("which", "table"), [("average", "ema"), ("raw", "unet")])
def test_the_weights_that_samples_names_are_loaded(trained, tiny_base, which, table):
    config = config_of(trained, tiny_base, {}, samples={"weights": which})
    unet, name, digests = load_model(config, open_base(tiny_base), None, CPU)
    folder = trained / "runs" / "test" / "checkpoints" / name
    with TensorFile(folder / f"{table}.safetensors") as file:
        assert all(torch.equal(parameter, file.read(key)) for key, parameter in unet.named_parameters())
    assert digests["checkpoint"] == digest_file(folder / "manifest.json")


def test_a_checkpoint_that_is_not_there_is_named(trained, tiny_base, encoders):
    with pytest.raises(UsageError, match="there is no checkpoint step-9"):
        evaluate_run(config_of(trained, tiny_base, {"clip": encoders["clip"]}), "step-9")


def test_without_an_encoder_it_says_what_to_set(trained, tiny_base, tmp_path, capsys):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(dump(config_of(trained, tiny_base, {}))))
    assert run(["evaluate", str(config)]) == 2
    assert "evaluation.clip, evaluation.dinov2 or evaluation.inception" in capsys.readouterr().err


# Which pictures


def test_held_out_pictures_are_those_that_training_measures(trained, tiny_base):
    config = config_of(trained, tiny_base, {"source": "held_out"})
    layout = planned(config)
    subjects, notes = choose_subjects(config, layout)
    assert {one.digest for one in subjects} == {row.tobytes() for row in layout.manifest.digests[layout.held_out.rows]}
    assert notes == [f"evaluation.pictures asks for 5, and there are {len(subjects)}"]
    crops = {one.digest: one.crop for one in subjects}
    for row, crop in zip(layout.held_out.rows, layout.held_out.crops[:, 0], strict=True):
        assert crops[layout.manifest.digests[row].tobytes()].to_row() == tuple(crop.tolist())


def test_a_source_for_validation_is_taken_as_a_whole(tmp_path, tiny_base):
    config = config_of(tmp_path, tiny_base, {"source": "held_out", "pictures": 100})
    own = shutil.copytree(tmp_path / "pictures", tmp_path / "own")
    for path in sorted(own.iterdir())[: len(list(own.iterdir())) // 2]:
        path.unlink()
    sources = [{"path": str(tmp_path / "pictures")}, {"path": str(own), "role": "validation"}]
    config = config_of(tmp_path, tiny_base, {"source": "held_out", "pictures": 100}, data={"sources": sources}, validation={"share": 0.0})
    subjects, _ = choose_subjects(config, planned(config))
    assert len(subjects) == len(list(own.glob("*.png"))) > config.validation.max_pictures


def test_captions_are_plain_and_pictures_without_one_are_passed_over(tmp_path, tiny_base):
    captions = {"style": "tags", "shuffle": True, "tag_drop_prob": 0.5}
    config = config_of(tmp_path, tiny_base, {"pictures": 100}, captions=captions, data={"max_uncaptioned_share": 1.0})
    texts = sorted((tmp_path / "pictures").glob("*.txt"))
    texts[0].write_text("")
    subjects, notes = choose_subjects(config, planned(config))
    assert "1 pictures without a caption were passed over" in notes
    assert {one.caption for one in subjects} <= {path.read_text().strip() for path in texts}


def test_a_picture_that_cannot_be_decoded_is_left_out_by_name(tmp_path, tiny_base, encoders):
    config = config_of(tmp_path, tiny_base, {"clip": encoders["clip"], "pictures": 100}, validation={"share": 0.0})
    name = choose_subjects(config, planned(config))[0][3].name
    path = tmp_path / name if (tmp_path / name).exists() else next(tmp_path.rglob(Path(name).name))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    report = evaluate_run(config).report
    assert list(report["left_out"]) == [name]
    assert report["pictures"] == 11


def test_too_few_pictures_are_refused(tmp_path, tiny_base, encoders):
    config = config_of(tmp_path, tiny_base, {"clip": encoders["clip"], "source": "held_out"}, validation={"max_pictures": 1})
    with pytest.raises(DataError, match="two is the least"):
        evaluate_run(config)


def test_remarks_are_made_of_scores_that_need_more_pictures():
    found = {"clip_score": 30.0, "cmmd": 0.5, "fd_dinov2": 200.0, "fid": 20.0}
    assert [text.split()[0] for text in remarks(found, 999)] == ["CMMD", "FD-DINOv2", "FID"]
    assert [text.split()[0] for text in remarks(found, 1000)] == ["FID"]
    assert remarks(found, 10_000) == []
    assert remarks({"clip_score": 30.0}, 2) == []


# Drawing


def subject(number: int, size_hw: tuple[int, int] = (64, 64)) -> comparison.Subject:
    return comparison.Subject(f"{number}.png", Place(f"/{number}.png"), bytes([number]) * 16, fit(size_hw, size_hw), f"picture {number}")


class Echo:
    """Draws each subject's number, and counts."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def paint(self, subjects, embeds):
        assert len(subjects) == len(embeds)
        self.drawn += [one.name for one in subjects]
        return [np.full((*one.crop.target_hw, 3), one.digest[0], dtype=np.uint8) for one in subjects]


def test_what_is_kept_is_not_drawn_again(tmp_path):
    subjects = [subject(number) for number in range(4)]
    embeds = [(torch.zeros(77, 4), torch.zeros(4))] * 4
    painter, shelf = Echo(), comparison.Shelf(tmp_path, "recipe")
    assert [picture[0, 0, 0] for picture in maker(painter, subjects, embeds, shelf)([2, 0])] == [2, 0]
    assert [picture[0, 0, 0] for picture in maker(painter, subjects, embeds, shelf)([0, 1, 2, 3])] == [0, 1, 2, 3]
    assert painter.drawn == ["2.png", "0.png", "1.png", "3.png"]
    maker(painter, subjects, embeds, None)([0])
    assert painter.drawn[4:] == ["0.png"]


def test_the_recipe_changes_with_all_that_decides_a_picture(tmp_path, tiny_base):
    base, weights = open_base(tiny_base), {"checkpoint": "a"}

    def of(weights=weights, **sections) -> str:
        return recipe(config_of(tmp_path, tiny_base, sections.pop("evaluation", {}), **sections), base, weights, CPU)

    recipes = {of(), of({"checkpoint": "b"}), of(samples={"steps": 3}), of(samples={"seed": 5}), of(model={"zero_terminal_snr": False})}
    assert len(recipes) == 5
    assert of() == of(evaluation={"batch_size": 1}) == of(samples={"prompts": ["a"], "every": "5 steps"})
