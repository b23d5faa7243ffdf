"""Small runs of `train-vae`."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from aquatint.config.schema import Config
from aquatint.demo.model import tiny_spec, write_tiny_base
from aquatint.tensor_file import TensorFile
from tests.runs import small_config

SMALL = {
    "length": "6 steps", "batch_size": 2, "resolution": 32, "learning_rate": 1e-3, "warmup": "1 step", "precision": "fp32",
    "ema_decay": 0.5, "validation_every": "3 steps", "samples_every": "never", "checkpoints_every": "3 steps",
}  # fmt: skip


def write_base(path: Path) -> None:
    """The demo's model and autoencoder, with a hundred words."""
    spec = tiny_spec()
    texts = {name: {**getattr(spec, name), "vocab_size": 100} for name in ("text_encoder", "text_encoder_2")}
    with as_file(files("aquatint.demo") / "assets" / "autoencoder.safetensors") as asset, TensorFile(asset) as file:
        vae = {name: file.read(name) for name in file.tensors}
    write_tiny_base(path, seed=0, spec=replace(spec, **texts), vae_tensors=vae)


def vae_config(folder: Path, base: Path, *, name: str = "test", vae: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A config whose decoder is trained within seconds. `vae` replaces settings of SMALL."""
    return small_config(folder, base, run={"name": name}, vae_training={**SMALL, **(vae or {})}, **sections)
