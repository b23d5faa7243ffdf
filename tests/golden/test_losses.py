"""The losses of twenty steps, per objective, at full precision. A refactor leaves them as they are.

They change when order, randomness, noising, targets, weights, conditioning or an optimizer change: then say why in the
commit, and write them anew with `python -m tests.golden.test_losses`.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from aquatint.demo.model import write_tiny_base
from aquatint.training.build import train_run
from tests.runs import rows, small_config

GOLDEN = Path(__file__).with_name("losses.json")
RELATIVE = 1e-4  # float32 sums differ between processors in their last digits, and twenty steps add them up
OBJECTIVES = {
    "epsilon": {"model": {"prediction": "epsilon", "zero_terminal_snr": False}},
    "epsilon, min_snr": {"model": {"prediction": "epsilon", "zero_terminal_snr": False}, "diffusion": {"weighting": "min_snr"}},
    "v_prediction": {"model": {"zero_terminal_snr": False}},
    "v_prediction, zero terminal SNR, clamped_v": {"diffusion": {"weighting": "clamped_v"}},
    "x0, zero terminal SNR, soft_min_snr": {"model": {"prediction": "x0"}, "diffusion": {"weighting": "soft_min_snr"}},
    "edm, log_normal": {
        "model": {"prediction": "edm", "zero_terminal_snr": False},
        "timesteps": {"density": "log_normal", "mean": -0.4},
    },
    "flow, logit_normal": {
        "model": {"prediction": "flow", "zero_terminal_snr": False},
        "timesteps": {"density": "logit_normal", "shift": 3.0, "uniform_share": 0.1},
    },
    "epsilon, all kinds of noise, huber": {
        "model": {"prediction": "epsilon", "zero_terminal_snr": False},
        "noise": {"offset": 0.05, "pyramid": 0.3, "input_perturbation": 0.1, "immiscible": True},
        "diffusion": {"loss": "huber", "weighting": "debiased", "normalise_weights": True},
        "timesteps": {"resolution_noise": "tilt", "lowest": 10},
    },
}


def losses(folder: Path, base: Path, name: str) -> list[float]:
    settings = {
        "validation": {"every": None},
        "checkpoints": {"every": "20 steps"},
        "ema": {"enabled": False},
        "export": {"single_file": False},
        "tracking": {"log_every": "1 step"},
    }
    config = small_config(folder, base, training={"length": "20 steps"}, lr={"warmup": "2 steps"}, **settings, **OBJECTIVES[name])
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name.replace(", ", "-").replace(" ", "-")})})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row["loss"] for row in rows(train_run(config).folder)]
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_what_they_were(folder: Path, tiny_base: Path, name: str):
    expected = json.loads(GOLDEN.read_text())[name]
    found = losses(folder, tiny_base, name)
    assert len(found) == len(expected) == 20
    assert found == pytest.approx(expected, rel=RELATIVE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write_tiny_base(Path(temporary) / "base.safetensors", seed=0)
        golden = {name: losses(Path(temporary), Path(temporary) / "base.safetensors", name) for name in OBJECTIVES}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
