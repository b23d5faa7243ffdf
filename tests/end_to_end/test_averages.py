"""An average that nobody asked for during the run is made of its snapshots, and equals the one of the weights themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.cli.main import run
from aquatint.config.schema import Config
from aquatint.errors import ResumeError
from aquatint.models.sdxl.load import open_base
from aquatint.optim.power_average import gamma_of_std
from aquatint.tensor_file import TensorFile
from aquatint.training import trainer
from aquatint.training.build import train_run
from tests.runs import small_config

Weights = dict[str, torch.Tensor]
EMA = {"decay": 0.9999, "power_stds": [0.05, 0.1], "snapshot_every": "2 steps"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Config, Path, list[Weights]]:
    """A run of 12 steps with a snapshot at every second, and the weights after each step."""
    folder, seen = tmp_path_factory.mktemp("averages"), []
    config = small_config(folder, tiny_base, ema=EMA, validation={"every": None})
    real = trainer.train_step

    def recording(parts, batches, step):
        report = real(parts, batches, step)
        seen.append({name: p.detach().double() for name, p in parts.unet.named_parameters()})
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", recording)
        train_run(config)
    return config, config.run.folder / config.run.name, seen


def direct(seen: list[Weights], std: float) -> Weights:
    """Each step weighs the integral of the profile over its samples."""
    shares = np.diff((np.arange(len(seen) + 1) / len(seen)) ** (gamma_of_std(std) + 1))
    return {name: sum(share * weights[name] for share, weights in zip(shares, seen, strict=True)) for name in seen[0]}


def distance(one: Weights, other: Weights) -> float:
    return sum(((one[name].double() - other[name].double()) ** 2).sum().item() for name in one) ** 0.5


@pytest.mark.parametrize(("std", "step", "words"), [(0.08, None, "step 12, from 12"), (0.12, 10, "step 10, from 10")])
def test_the_verb_exports_the_average_of_the_weights(finished, capsys, std: float, step: int | None, words: str):
    _, folder, seen = finished
    seen = seen[:step]
    chosen = ["--step", str(step)] if step else []
    assert run(["ema", str(folder), "--std", str(std), *chosen, "--output", str(folder / "chosen")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"exported {folder / 'chosen.safetensors'}\n"
    assert f"an average of width {std} at {words} snapshots, shares from" in captured.err
    expected = direct(seen, std)
    found = {name: tensor.load() for name, tensor in open_base(folder / "chosen.safetensors").component("unet").items()}
    assert found.keys() == expected.keys()
    away = distance(seen[-1], expected)
    assert distance(found, expected) < 0.03 * away
    assert distance(direct(seen, 0.05), expected) > 0.5 * away


def test_a_snapshot_and_the_base_are_the_average_of_its_own_width(finished):
    config, folder, seen = finished
    origin = open_base(config.model.base).component("unet")
    with TensorFile(folder / "ema" / "step-000012-std-0.100.safetensors") as file:
        found = {name: origin[name].load() + file.read(name) for name in file.tensors}
    expected = direct(seen, 0.1)
    assert distance(found, expected) < 5e-3 * distance(seen[-1], expected)


def test_a_further_average_cannot_join_a_run_in_the_middle(finished):
    config, _, _ = finished
    longer = config.training.model_copy(update={"length": type(config.training.length)(30, "steps")})
    more = config.ema.model_copy(update={"power_stds": (0.05, 0.1, 0.15)})
    with pytest.raises(ResumeError, match=r"power-0\.150"):
        train_run(config.model_copy(update={"ema": more, "training": longer}), accept_changes=True)


def test_a_run_without_snapshots_is_told_how_to_get_them(tmp_path: Path, tiny_base: Path, capsys):
    (tmp_path / "run.toml").write_text(f'[model]\nbase = "{tiny_base}"\n[[data.sources]]\npath = "pictures"\n')
    assert run(["ema", str(tmp_path / "run.toml"), "--std", "0.08"]) == 2
    assert "ema.power_stds" in capsys.readouterr().err
