"""Small runs for tests: pictures, a tiny base model and a config in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aquatint.config.schema import Config
from aquatint.demo.pictures import write_pictures

SMALL: dict[str, Any] = {
    "run": {"name": "test"},
    "model": {"prediction": "v_prediction", "zero_terminal_snr": True},
    "data": {},
    "buckets": {"resolution": 64, "min_side": 32, "max_side": 128},
    "loader": {"workers": 0},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "training": {"length": "12 steps", "batch_size": 2, "precision": "fp32", "device": "cpu", "gradient_checkpointing": False},
    "ema": {"decay": 0.9},
    "validation": {"every": "4 steps", "share": 0.2, "max_pictures": 2, "timesteps": 2, "train_pictures": 2},
    "samples": {"every": None},
    "checkpoints": {"every": "5 steps"},
    "tracking": {"log_every": "2 steps"},
    "export": {"single_file": True, "dtype": "float32"},
}


def small_config(folder: Path, base: Path, *, pictures: int = 12, **sections: dict[str, Any]) -> Config:
    """A config whose run takes seconds. `sections` replace single settings of it: `training={"batch_size": 3}`."""
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures", count=pictures, seed=3)
    values = {name: {**section, **sections.get(name, {})} for name, section in SMALL.items()}
    values |= {name: section for name, section in sections.items() if name not in SMALL}
    values["run"].setdefault("folder", str(folder / "runs"))
    values["model"].setdefault("base", str(base))
    values["data"].setdefault("sources", [{"path": str(folder / "pictures")}])
    values.setdefault("cache", {}).setdefault("folder", str(folder / "cache"))
    return Config.model_validate(values)


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
