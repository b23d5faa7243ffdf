"""12 steps straight equal 7 steps, SIGKILL, and a resume from the checkpoint of step 5: bit for bit."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aquatint.config.schema import Config, dump
from aquatint.training import trainer
from aquatint.training.build import train_run
from tests.runs import small_config

CASES = {
    "adamw-accumulation-1": {"training": {"accumulation_steps": 1}},
    "adamw-accumulation-3": {"training": {"accumulation_steps": 3}, "crop": {"mode": "random", "variants": 2, "flip_prob": 0.5}},
    "adamw_bf16": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "adamw_bf16", "learning_rate": 1e-3}},
    "adafactor": {
        "training": {"precision": "bf16_pure", "accumulation_steps": 3},
        "optimizer": {"name": "adafactor", "learning_rate": 1e-3},
    },
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums are in the same order in this process and in the killed one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(folder: Path, base: Path, name: str, kind: str) -> Config:
    sections = {section: dict(values) for section, values in CASES[name].items()}
    optimizer = sections.pop("optimizer", None)
    config = small_config(folder, base, run={"name": f"{name}-{kind}"}, lr={"schedule": "cosine", "warmup": "1 step"}, **sections)
    return Config.model_validate(dump(config) | ({"optimizer": optimizer} if optimizer else {}))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with runs of every case that were killed in the middle of step 8."""
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for name in CASES:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(dump(config_of(folder, tiny_base, name, "killed"))))
        paths.append(str(path))
    script = Path(__file__).with_name("killed_runs.py")
    subprocess.run([sys.executable, str(script), "7", *paths], check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_killed_and_resumed_run_equals_a_straight_one(killed: Path, tiny_base: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, tuple[str, ...]]] = []
    real = trainer.train_step

    def recording(parts, batches, step):
        seen.append((step, tuple(name for batch in batches for name in batch.names)))
        return real(parts, batches, step)

    monkeypatch.setattr(trainer, "train_step", recording)
    straight = train_run(config_of(killed, tiny_base, name, "straight")).folder
    straight_samples = seen.copy()
    seen.clear()
    resumed = train_run(config_of(killed, tiny_base, name, "killed")).folder
    assert [step for step, _ in seen] == list(range(5, 12))
    assert seen == straight_samples[5:]
    for file in ("unet.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"):
        path = f"checkpoints/step-000012/{file}"
        assert (straight / path).read_bytes() == (resumed / path).read_bytes(), file
    assert (straight / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    rates = [row["learning_rate"] for row in map(json.loads, (straight / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(rates) == 6
    assert rates == sorted(set(rates), reverse=True)
