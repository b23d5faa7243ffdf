"""The program as a user meets it: exit codes, what it says, and that nothing is lost."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from aquatint.cli.main import run
from aquatint.config.schema import Config, dump
from aquatint.errors import StorageError
from aquatint.models.sdxl.load import open_base
from aquatint.tensor_file import TensorFile, write_tensors
from aquatint.training import saver, tasks, trainer
from tests.runs import rows, small_config


def write_config(folder: Path, base: Path, **sections) -> Path:
    config = small_config(folder, base, **{"validation": {"every": None}, **sections})
    path = folder / "run.json"
    path.write_text(json.dumps(dump(config)))
    return path


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action) -> None:
    real = trainer.train_step

    def train_step(parts, batches, step):
        if step == number:
            action()
        return real(parts, batches, step)

    monkeypatch.setattr(trainer, "train_step", train_step)


def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_goes_on(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path, tiny_base, training={"length": "4 steps"}, tracking={"log_every": "1 step"})
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run(["train", str(config)]) == 75
    said = capsys.readouterr().err
    assert "stopped at step 3 of 4" in said
    assert "run the same command again to go on exactly there" in said
    assert run(["train", str(config)]) == 0
    assert "going on from step-000003" in capsys.readouterr().err
    folder = tmp_path / "runs" / "test"
    assert [row["step"] for row in rows(folder) if "loss" in row] == [1, 2, 3, 4]
    assert "going on from step-000003" in (folder / "run.log").read_text()


def test_a_finished_run_can_be_asked_again_and_made_longer(tmp_path: Path, tiny_base: Path):
    shown = {"tracking": {"log_every": "1 step"}, "export": {"diffusers_folder": True}}
    config = write_config(tmp_path, tiny_base, training={"length": "2 steps"}, **shown)
    assert run(["train", str(config)]) == 0
    assert run(["train", str(config)]) == 0
    assert run(["train", str(config), "training.length=3 steps"]) == 0
    assert max(row["step"] for row in rows(tmp_path / "runs" / "test")) == 3


def test_a_changed_setting_is_refused_with_both_values_until_it_is_accepted(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path, tiny_base, training={"length": "2 steps"})
    assert run(["train", str(config)]) == 0
    changed = ["train", str(config), "training.length=3 steps", "optimizer.learning_rate=2e-3"]
    assert run(changed) == 6
    assert "optimizer.learning_rate: 0.001 -> 0.002" in capsys.readouterr().err
    assert run([*changed, "--accept-changes"]) == 0


def test_the_export_is_the_average_in_the_official_layout_with_markers(tmp_path: Path, tiny_base: Path):
    config = write_config(tmp_path, tiny_base, training={"length": "2 steps"})
    assert run(["train", str(config)]) == 0
    folder = tmp_path / "runs" / "test"
    exported = open_base(folder / "export" / "test.safetensors")
    assert (exported.process.prediction, exported.process.zero_terminal_snr) == ("v_prediction", True)
    unet = exported.component("unet")
    with TensorFile(folder / "checkpoints" / "step-000002" / "ema.safetensors") as average:
        assert all(torch.equal(average.read(name), tensor.load()) for name, tensor in unet.items())
    with TensorFile(tiny_base) as before, TensorFile(folder / "export" / "test.safetensors") as after:
        untrained = [name for name in before.tensors if not name.startswith("model.diffusion_model.")]
        assert untrained
        assert all(torch.equal(before.read(name), after.read(name)) for name in untrained)
        assert {"v_pred", "ztsnr"} <= after.tensors.keys()
        assert after.metadata["modelspec.title"] == "test"
        assert not any(str(tmp_path) in value for value in after.metadata.values())


def test_sample_and_export_work_on_a_checkpoint(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]):
    samples = {"height": 64, "width": 64, "steps": 2, "guidance_scale": 2.0, "every": "1 step", "prompts": ["a red circle"]}
    config = write_config(tmp_path, tiny_base, training={"length": "2 steps"}, samples=samples)
    assert run(["train", str(config)]) == 0
    folder = tmp_path / "runs" / "test"
    assert {path.name for path in (folder / "samples").iterdir()} == {f"step-{step:06}.png" for step in range(3)}
    assert run(["sample", str(config), "a blue square", "a green circle", "--output", str(tmp_path / "two.png")]) == 0
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    assert run(["export", str(config), "--output", str(tmp_path / "out"), "--format", "diffusers"]) == 0
    assert open_base(tmp_path / "out").layout == "diffusers"
    capsys.readouterr()
    assert run(["sample", str(config), "--checkpoint", "step-000077"]) == 2
    assert "step-000002" in capsys.readouterr().err


def test_failing_samples_and_a_full_disk_in_the_middle_do_not_stop_training(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path, tiny_base, training={"length": "4 steps"}, checkpoints={"every": "2 steps"},
                          samples={"every": "2 steps", "prompts": ["a red circle"], "height": 64, "width": 64})  # fmt: skip
    real = saver.checkpoint.save

    def full_once(folder, trained, state, **settings):
        if state.step == 2:
            raise StorageError("could not write x: No space left on device", hint="free some space")
        return real(folder, trained, state, **settings)

    def broken(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(saver.checkpoint, "save", full_once)
    monkeypatch.setattr(tasks, "write_samples", broken)
    assert run(["train", str(config)]) == 0
    said = capsys.readouterr().err
    assert "step 2 was not saved (could not write x: No space left on device); free some space" in said
    assert "no sample pictures at step 2: out of memory" in said
    assert (tmp_path / "runs" / "test" / "checkpoints" / "step-000004").is_dir()


def test_a_full_disk_at_the_end_is_exit_5_and_the_last_checkpoint_stays(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path, tiny_base, training={"length": "3 steps"}, checkpoints={"every": "2 steps"})
    real = saver.checkpoint.write_tensors

    def full(path, *arguments, **settings):
        if "step-000003" in str(path):
            raise StorageError(f"could not write {path}: No space left on device", hint="free some space")
        return real(path, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(saver.checkpoint, "write_tensors", full)
        assert run(["train", str(config)]) == 5
    assert "No space left on device" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "runs" / "test" / "checkpoints").iterdir()] == ["step-000002"]
    assert run(["train", str(config)]) == 0


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.safetensors", None, "missing.safetensors"),
        ("model.ckpt", b"\x80\x02}q\x00.", "pickle"),
        ("lora.safetensors", {"lora_unet_down_blocks_1.lora_down.weight": (4, 8)}, "LoRA"),
        ("sd15.safetensors", {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (9, 768)}, "Stable Diffusion 1"),
        ("broken.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "safetensors"),
    ],
)
def test_a_base_that_is_something_else_is_refused_in_one_sentence_with_a_hint(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], name: str, content, expected: str
):
    base = tmp_path / name
    if isinstance(content, dict):
        write_tensors(base, {key: torch.zeros(shape) for key, shape in content.items()})
    elif content is not None:
        base.write_bytes(content)
    config = write_config(tmp_path, base)
    assert run(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "hint: " in said
    assert "Traceback" not in said


def test_an_output_folder_that_is_a_file_is_exit_2_or_5_with_a_hint(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "taken").write_text("")
    config = write_config(tmp_path, tiny_base, run={"name": "test", "folder": str(tmp_path / "taken")})
    assert run(["train", str(config)]) in (2, 5)
    said = capsys.readouterr().err
    assert str(tmp_path / "taken") in said
    assert "hint: " in said
    assert (tmp_path / "taken").read_text() == ""


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]):
    from aquatint.storage import folder_lock

    config = write_config(tmp_path, tiny_base)
    with folder_lock(tmp_path / "runs" / "test"):
        assert run(["train", str(config)]) == 7
    assert "another process" in capsys.readouterr().err


def test_the_config_of_a_run_can_be_loaded_again(tmp_path: Path, tiny_base: Path):
    config = write_config(tmp_path, tiny_base, training={"length": "1 step"})
    assert run(["train", str(config)]) == 0
    again = Config.model_validate(json.loads((tmp_path / "runs" / "test" / "config.json").read_text()))
    assert again == Config.model_validate(json.loads(config.read_text()))


def test_the_last_step_is_measured_once_however_often_the_run_is_asked_for(tmp_path: Path, tiny_base: Path):
    """With an epoch of 10 pictures and 2 a step: due inside the loop at step 5, and at the end without being due at step 6."""
    for length, times in (("5 steps", 2), ("6 steps", 2)):
        config = write_config(tmp_path, tiny_base, training={"length": length}, validation={"every": "1 epoch"})
        for _ in range(times):
            assert run(["train", str(config)]) == 0
    measured = [row["step"] for row in rows(tmp_path / "runs" / "test") if "val_loss" in row]
    assert measured == [0, 5, 6]
