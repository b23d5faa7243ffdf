"""Schedule-free training, whole runs: killed and resumed it is the same bit for bit, and what is exported is its average."""

import json
from pathlib import Path

import pytest
import torch

from aquatint.config.schema import Config
from aquatint.tensor_file import TensorFile
from aquatint.training import trainer
from aquatint.training.build import train_run
from aquatint.training.results import export_run
from tests.runs import rows, small_config

pytestmark = pytest.mark.long


class Killed(BaseException):
    """Like a kill between two steps: nothing is caught, nothing is saved."""


def config_of(folder: Path, base: Path, name: str) -> Config:
    return small_config(
        folder, base, run={"name": name}, training={"length": "8 steps"}, checkpoints={"every": "3 steps"}, ema={"enabled": False},
        optimizer={"name": "schedule_free", "learning_rate": 1e-3}, lr={"warmup": "3 steps"},
        samples={"prompts": ["a red square"], "every": "4 steps", "steps": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Config:
    config = config_of(tmp_path_factory.mktemp("free"), tiny_base, "straight")
    train_run(config)
    return config


def run_folder(config: Config) -> Path:
    return config.run.folder / config.run.name


def saved(config: Config) -> dict[str, torch.Tensor]:
    files = [TensorFile(path) for path in sorted((run_folder(config) / "checkpoints" / "step-000008").glob("*.safetensors"))]
    return {f"{file.path.stem}/{name}": file.read(name) for file in files for name in file.tensors}


def test_a_killed_and_resumed_run_is_the_straight_one(straight, tiny_base, monkeypatch):
    other, real = config_of(straight.run.folder.parent, tiny_base, "other"), trainer.train_step

    def until(parts, batches, step):
        if step == 5:
            raise Killed
        return real(parts, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", until)
        with pytest.raises(Killed):
            train_run(other)
    train_run(other)
    expected, found = saved(straight), saved(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert json.dumps(rows(run_folder(straight))) == json.dumps(rows(run_folder(other)))
    sheets = [(run_folder(config) / "samples" / "step-000008.png").read_bytes() for config in (straight, other)]
    assert sheets[0] == sheets[1]


def test_what_is_exported_and_measured_is_the_average(straight, tmp_path):
    (afterwards,) = export_run(straight, "step-000008", tmp_path / "again")
    one, two = TensorFile(run_folder(straight) / "export" / "straight.safetensors"), TensorFile(afterwards)
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.tensors)
    y, z = saved(straight)["unet/conv_in.weight"], saved(straight)["optimizer/conv_in.weight/z"]
    found = one.read("model.diffusion_model.input_blocks.0.0.weight")
    torch.testing.assert_close(found, (y - 0.1 * z) / 0.9, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, y)
    last = [row for row in rows(run_folder(straight)) if "val_loss_raw" in row][-1]
    assert last["val_loss"] != last["val_loss_raw"]
