import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from aquatint.config.load import read_draft
from aquatint.config.schema import Config
from aquatint.models.sdxl.process import Process
from aquatint.optim import library
from aquatint.training import preflight as module
from aquatint.training.preflight import Inspection, checkpoint_bytes, gib, inspect, inspect_vae, preflight


@pytest.fixture
def config_of(tmp_path, tiny_base):
    """A config with four captioned pictures, and what `sections` change."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "abcd":
        (pictures / f"{name}.png").touch()
        (pictures / f"{name}.txt").touch()

    def build(**sections):
        values = {
            "model": {"base": tiny_base},
            "data": {"sources": [{"path": str(pictures)}]},
            "run": {"folder": tmp_path / "runs"},
            "cache": {"folder": tmp_path / "cache"},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return Config.model_validate(values)

    return build


@pytest.fixture(scope="session")
def v_base(tmp_path_factory):
    from aquatint.demo.model import write_tiny_base

    path = tmp_path_factory.mktemp("v") / "v.safetensors"
    write_tiny_base(path, seed=0, process=Process("v_prediction", zero_terminal_snr=True))
    return path


def only(config):
    (problem,) = preflight(config)
    assert problem.hint
    return problem


def test_a_run_that_can_begin_has_no_problems_and_says_what_was_looked_at(config_of, tmp_path):
    found = inspect(Inspection(config_of()))
    assert found.problems == found.notices == []
    assert [line.partition(":")[0] for line in found.looked_at] == ["base model", "pictures", "disk of `run.folder` and `cache.folder`"]
    assert "4 in" in found.looked_at[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"], "a check makes nothing"


def test_a_base_that_is_no_model_is_refused_as_the_loader_says_it(config_of, tmp_path):
    problem = only(config_of(model={"base": tmp_path / "none.safetensors"}))
    assert "none.safetensors" in problem.message


def test_the_vae_is_blamed_only_if_the_base_is_whole(config_of, tmp_path):
    draft = Inspection(config_of(model={"vae": tmp_path / "vae.safetensors"}), place=lambda key: key)
    assert inspect(draft).problems[0].where == "model.vae"
    both = config_of(model={"vae": tmp_path / "vae.safetensors", "base": tmp_path / "base.safetensors"})
    assert inspect(Inspection(both, place=lambda key: key)).problems[0].where == "model.base"


@pytest.mark.parametrize(
    ("settings", "problem", "notice"),
    [
        ({}, "", ""),
        ({"prediction": "epsilon"}, "trained for v_prediction", ""),
        ({"prediction": "v_prediction"}, "", ""),
        ({"zero_terminal_snr": False}, "", "turns off"),
    ],
)
def test_a_v_prediction_base_is_not_trained_as_epsilon(config_of, v_base, settings, problem, notice):
    found = inspect(Inspection(config_of(model={"base": v_base, **settings})))
    assert [problem in one.message for one in found.problems] == [True] * bool(problem)
    assert [notice in one for one in found.notices] == [True] * bool(notice)


@pytest.mark.parametrize(
    ("settings", "problem", "notice"),
    [
        ({"prediction": "epsilon"}, "", ""),
        ({"prediction": "v_prediction"}, "", "retrained for v_prediction"),
        ({"prediction": "v_prediction", "zero_terminal_snr": True}, "", "retrained for v_prediction"),
        ({"zero_terminal_snr": True}, "cannot go with", ""),
    ],
)
def test_an_epsilon_base_can_be_retrained_but_not_by_accident(config_of, settings, problem, notice):
    found = inspect(Inspection(config_of(model=settings)))
    assert [problem in one.message for one in found.problems] == [True] * bool(problem)
    assert [notice in one for one in found.notices] == [True] * bool(notice)


def test_a_missing_folder_is_named_with_the_one_that_was_meant(config_of, tmp_path):
    problem = only(config_of(data={"sources": [{"path": str(tmp_path / "pictuers")}]}))
    assert "there is no folder" in problem.message
    assert str(tmp_path / "pictures") in problem.hint


def test_a_file_in_place_of_a_folder_is_named(config_of, tmp_path):
    assert "is a file" in only(config_of(data={"sources": [{"path": str(tmp_path / "pictures" / "a.png")}]})).message


def test_a_folder_without_pictures_tells_what_lies_there(config_of, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.md").touch()
    assert "only other files (1 .md)" in only(config_of(data={"sources": [{"path": str(tmp_path / "texts")}]})).message


def test_every_source_is_looked_at(config_of, tmp_path):
    sources = [{"path": str(tmp_path / "x")}, {"path": str(tmp_path / "pictures")}, {"path": str(tmp_path / "y")}]
    found = inspect(Inspection(config_of(data={"sources": sources}), place=lambda key: key))
    assert [problem.where for problem in found.problems] == ["data.sources.0.path", "data.sources.2.path"]


def test_missing_captions_are_counted_over_all_pictures_as_the_run_does(config_of, tmp_path):
    (tmp_path / "pictures" / "a.txt").unlink()
    problem = only(config_of())
    assert problem.message == "1 of 4 pictures have no caption (pictures/a.png)"
    assert "max_uncaptioned_share = 1" in problem.hint
    assert preflight(config_of(data={"max_uncaptioned_share": 0.25})) == []


def test_captions_in_other_files_are_pointed_out(config_of, tmp_path):
    for path in list((tmp_path / "pictures").glob("*.txt")):
        path.rename(path.with_suffix(".caption"))
    assert 'set `caption_extensions = [".caption"]`' in only(config_of()).hint


def test_pictures_that_need_no_caption_are_not_asked_for_one(config_of, tmp_path):
    """As in the run: those of a source with trigger words, and those that are only measured."""
    for folder in ("bare", "measured"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").touch()
    bare, measured = ({"path": str(tmp_path / name)} for name in ("bare", "measured"))
    own = {"path": str(tmp_path / "pictures")}
    assert "1 of 5 pictures have no caption (bare/x.png)" in only(config_of(data={"sources": [own, bare]})).message
    assert preflight(config_of(data={"sources": [own, bare | {"trigger": "ohwx"}]})) == []
    assert preflight(config_of(data={"sources": [own, measured | {"role": "validation"}]})) == []


def test_fewer_pictures_than_a_step_takes_is_worth_a_word(config_of, tmp_path):
    (notice,) = inspect(Inspection(config_of(training={"batch_size": 8}))).notices
    assert "only 4" in notice
    (tmp_path / "measured").mkdir()
    for index in range(8):
        (tmp_path / "measured" / f"{index}.png").touch()
    sources = [{"path": str(tmp_path / "pictures")}, {"path": str(tmp_path / "measured"), "role": "validation"}]
    (notice,) = inspect(Inspection(config_of(training={"batch_size": 8}, data={"sources": sources}))).notices
    assert "only 4" in notice, "pictures for validation are not trained"


def test_what_is_elsewhere_is_not_fetched_and_not_counted(config_of, tmp_path):
    sources = [{"path": str(tmp_path / "pictures")}, {"path": "https://user:secret@example.invalid/set.parquet?token=secret"}]
    found = inspect(Inspection(config_of(training={"batch_size": 8}, data={"sources": sources})))
    assert found.problems == found.notices == []
    assert found.looked_at[2] == "pictures: https://example.invalid/set.parquet is elsewhere, and is looked at when the run begins"


def test_a_table_is_read_and_its_bad_rows_are_worth_a_word(config_of, tmp_path):
    table = tmp_path / "pictures" / "metadata.jsonl"
    table.write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": "y"}\n{"file_name": "none.png", "text": "z"}\n')
    found = inspect(Inspection(config_of()))
    assert f"pictures: 2 in {tmp_path / 'pictures'}, 2 with a caption" in found.looked_at
    (notice,) = found.notices
    assert notice.startswith(f"1 of what {tmp_path / 'pictures'} lists cannot be used: ")
    assert "none.png" in notice
    table.write_text("not a table\n")
    assert str(table) in only(config_of()).message


@pytest.mark.parametrize("key", ["run", "cache"])
def test_a_folder_that_cannot_be_made_is_found_before_it_is_needed(config_of, tmp_path, key):
    (tmp_path / "file").touch()
    problem = only(config_of(**{key: {"folder": tmp_path / "file" / "deeper"}}))
    assert "is a file" in problem.message


def test_a_read_only_disk_is_found_too(config_of, monkeypatch):
    from aquatint.errors import StorageError

    def refuse(folder):
        raise StorageError(f"could not write to {folder}: Read-only file system", hint="choose another folder")

    monkeypatch.setattr(module, "check_writable", refuse)
    assert [problem.message.rpartition(": ")[2] for problem in preflight(config_of())] == ["Read-only file system"] * 2


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(config_of, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1 << 20)
    problem = only(config_of())
    assert "1.0 MiB free" in problem.message
    assert "`checkpoints.keep`" in problem.hint


def test_what_is_on_disk_already_is_not_needed_again(config_of, tmp_path, monkeypatch):
    config = config_of()
    needed = inspect(Inspection(config)).looked_at[2]
    old = tmp_path / "runs" / "run" / "checkpoints" / "step-000100" / "unet.safetensors"
    old.parent.mkdir(parents=True)
    with old.open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "cache").mkdir()
    assert "about 0.0 MiB needed" not in needed
    with (tmp_path / "cache" / "x.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    assert "about 0.0 MiB needed" in inspect(Inspection(config)).looked_at[2]


@pytest.mark.parametrize(
    ("precision", "optimizer", "bytes_each"),
    [
        ("bf16_mixed", "adamw", 4 + 8),
        ("fp32", "adamw", 4 + 8),
        ("bf16_pure", "adamw_bf16", 2 + 4),
        ("bf16_pure", "adamw8bit", 2 + 2),
        ("bf16_pure", "adafactor", 2),
    ],
)
@pytest.mark.parametrize("ema", [True, False])
def test_a_checkpoint_holds_weights_moments_and_the_float32_average(config_of, precision, optimizer, bytes_each, ema):
    from aquatint.models.sdxl.model import sdxl_spec

    config = config_of(training={"precision": precision}, optimizer={"name": optimizer}, ema={"enabled": ema})
    expected = sdxl_spec().num_parameters("unet") * (bytes_each + 4 * ema)
    assert checkpoint_bytes(config, sdxl_spec()) == pytest.approx(expected, rel=0.02)  # scales and small moments are the rest


def test_packages_that_are_asked_for_must_be_there(config_of, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("wandb", "tensorboard") else find_spec(name))
    problems = preflight(config_of(tracking={"tensorboard": True, "wandb": {"enabled": True}}))
    assert [problem.message.split("`")[1] for problem in problems] == ["tracking.tensorboard", "tracking.wandb.enabled"]
    assert "pip install aquatint[wandb]" in problems[1].hint
    assert preflight(config_of()) == []


@pytest.mark.parametrize(("section", "package"), [({"cache": {"engine": "ray"}}, "ray"), ({"crop": {"mode": "focus"}}, "smartcrop")])
def test_packages_of_the_data_half_must_be_there_too(config_of, monkeypatch, section, package):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else find_spec(name))
    problem = only(config_of(**section))
    assert package in problem.message
    assert "pip install aquatint[" in problem.hint


def test_the_library_of_an_optimizer_must_be_there_too(config_of, monkeypatch):
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    problem = only(config_of(optimizer={"name": "lion"}))
    assert problem.message == 'the package pytorch_optimizer is not installed, and it is needed for `optimizer.name = "lion"`'
    assert problem.hint.startswith("`pip install 'aquatint[optimizers]'`")


def test_groups_that_fit_nothing_are_found(config_of):
    groups = [{"match": ["conv_in", "mid_blok"], "learning_rate_factor": 0.0}, {"match": ["conv_in.bias"], "learning_rate_factor": 2.0}]
    unknown, taken = preflight(config_of(training={"groups": groups}))
    assert unknown.message == '"mid_blok" fits no tensor of the UNet'
    assert unknown.hint.startswith('did you mean "mid_block" or ')
    assert taken.message == "earlier groups have all that `training.groups.1` fits"
    assert inspect(Inspection(config_of(training={"groups": groups}), broken={"training.groups"})).problems == []
    everything = config_of(training={"groups": [{"match": ["*"], "learning_rate_factor": 0.0}]})
    assert only(everything).message == "`training.groups` freezes everything"


def test_settings_without_a_value_are_not_looked_at(config_of, tmp_path):
    config = config_of(model={"base": tmp_path / "missing"}, data={"sources": [{"path": str(tmp_path / "missing")}]})
    assert inspect(Inspection(config, broken={"model.base", "data.sources"})).problems == []
    assert inspect(Inspection(config, broken={"model", "data"})).problems == []
    assert len(inspect(Inspection(config, broken={"ema.decay"})).problems) == 2


def test_problems_have_the_place_of_their_setting(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "none"\n\n[[data.sources]]\npath = "nowhere"\n')
    draft = read_draft(path, [f"run.folder={os.fspath(path)}/x"])
    problems = inspect(Inspection(draft.config, draft.place, draft.broken)).problems
    assert sorted(problem.where.rpartition(", ")[2] for problem in problems) == ["line 2", "line 5", "the command line"]


def test_looking_needs_no_torch():
    code = "import sys, aquatint.training.preflight; print('torch' in sys.modules, 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def test_sizes_are_said_in_the_unit_that_fits():
    assert [gib(value) for value in (0, 5 << 20, 1 << 30, 1500 << 30)] == ["0.0 MiB", "5.0 MiB", "1.0 GiB", "1,500.0 GiB"]


def test_the_decoders_training_is_inspected_too_without_captions_and_cache(config_of, tmp_path, monkeypatch):
    (tmp_path / "pictures" / "a.txt").unlink()
    found = inspect_vae(Inspection(config_of(data={"max_uncaptioned_share": 0.0})))
    assert found.problems == found.notices == []
    assert [line.partition(":")[0] for line in found.looked_at] == ["base model", "pictures", "disk of `run.folder`"]
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1)
    (problem,) = inspect_vae(Inspection(config_of())).problems
    assert problem.message.startswith("the disk of `run.folder` is too small: about ")
    assert "2 + 1 checkpoints of " in problem.hint


def test_too_little_main_memory_is_a_notice_for_a_gpu(config_of, monkeypatch):
    monkeypatch.setattr(module, "machine_bytes", lambda: 1 << 20)
    (notice,) = inspect(Inspection(config_of())).notices
    assert notice.startswith("the run takes ")
    assert notice.endswith("of main memory, and this machine has 0.00 GiB: `aquatint plan` shows what for")
    open_batch = config_of(training={"batch_size": "auto", "pictures_per_step": 8})
    assert len(inspect(Inspection(open_batch)).notices) == 2, "and more pictures per step than there are"
    assert inspect(Inspection(config_of(training={"device": "cpu"}))).notices == []
