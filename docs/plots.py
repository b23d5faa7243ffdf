"""Draws the plots of these pages with the tables that a run uses: `python docs/plots.py`. Needs no model and no pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from aquatint.config.schema import Config
from aquatint.models.sdxl.load import BaseModel
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.models.sdxl.process import Process
from aquatint.storage import write_bytes
from aquatint.tracking import plots
from aquatint.training import plotting
from aquatint.training.plot_words import loss_words

IMAGES = Path(__file__).parent / "images"
COLORS_KEPT = 200  # lines on white need no more, and files become half as large
EPSILON, ZERO_TERMINAL = Process(), Process("v_prediction", zero_terminal_snr=True)
FLOW, EDM = Process("flow"), Process("edm", edm_ve_sigmas=(0.002, 80.0))

Sections = Mapping[str, Mapping[str, Any]]


def base_of(process: Process) -> BaseModel:
    """A base model of this process, as far as its header tells."""
    return BaseModel(Path("base.safetensors"), sdxl_spec(), "single_file", replace(process, declared=True), {})


def config_of(sections: Sections) -> Config:
    """A config with these settings."""
    batch = {"training": {"batch_size": 8, "accumulation_steps": 2}}
    return Config.model_validate({"model": {"base": "base.safetensors"}, "data": {"sources": [{"path": "pictures"}]}, **batch, **sections})


def weights(name: str, process: Process, **diffusion: Any) -> plots.Weights:
    """The weights of a run with these settings, with all timesteps drawn alike."""
    config = config_of({"diffusion": diffusion, "timesteps": {"terminal_prob": 0.0}})
    return replace(plotting.weights_of(config, base_of(process)), name=name)


def draws(name: str, process: Process, **timesteps: Any) -> plots.Draws:
    """The draws of a run with these settings."""
    return replace(plotting.draws_of(config_of({"timesteps": timesteps}), base_of(process))[0], name=name)


def grid(name: str, process: Process, **samples: Any) -> plots.Grid:
    """The sampling steps of a run with these settings."""
    return replace(plotting.grid_of(config_of({"samples": {"steps": 20, **samples}}), base_of(process)), name=name)


def default_weights() -> bytes:
    """As `aquatint plot` draws it for a model with zero terminal SNR."""
    config, base = config_of({}), base_of(ZERO_TERMINAL)
    return plots.plot_weights(f"Loss: {loss_words(config, base)}", [plotting.weights_of(config, base)])


def schedules() -> bytes:
    names = {"SDXL": EPSILON, "SDXL, zero terminal SNR": ZERO_TERMINAL, "EDM, 0.002 to 80": EDM, "flow": FLOW}
    levels = [replace(plotting.levels_of(config_of({}), base_of(process))[0], name=name) for name, process in names.items()]
    return plots.plot_schedule("Noise levels", levels)


def weightings() -> bytes:
    names = ("none", "clamped_v", "min_snr", "soft_min_snr", "debiased", "truncated")
    tables = [weights(name, ZERO_TERMINAL, weighting=name) for name in names]
    return plots.plot_weights("Weightings of v_prediction with zero terminal SNR, gamma 5", tables)


def timesteps() -> bytes:
    first = draws("uniform, 1 % at the last", ZERO_TERMINAL)
    others = {
        "logit_normal (0, 1)": {"density": "logit_normal"}, "uniform, shift 3": {"shift": 3.0}, "cosmap": {"density": "cosmap"},
        "log_normal (-0.4, 1)": {"density": "log_normal", "mean": -0.4},
    }  # fmt: skip
    tables = [replace(draws(name, EPSILON, **settings), drawn=None) for name, settings in others.items()]
    return plots.plot_timesteps("Densities of timesteps, and the draws of the first in strata of 16 samples", [first, *tables])


def noise() -> bytes:
    names = {"plain": {}, "offset 0.05": {"offset": 0.05}, "pyramid 0.3": {"pyramid": 0.3}}
    tables = [replace(plotting.noise_of(config_of({"noise": settings})), name=name) for name, settings in names.items()]
    return plots.plot_noise("How strong the slow patterns of noise are", tables)


def sampling() -> bytes:
    tables = [
        grid("trailing, zero terminal SNR", ZERO_TERMINAL), grid("trailing, SDXL", EPSILON), grid("leading, SDXL", EPSILON, grid="leading"),
        grid("karras, SDXL", EPSILON, grid="karras"), grid("trailing, flow, shift 3", FLOW, shift=3.0),
    ]  # fmt: skip
    return plots.plot_sampling("Twenty sampling steps", tables)


def small(png: bytes) -> bytes:
    """The same picture with fewer colours."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLORS_KEPT, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        file, "png", optimize=True
    )
    return file.getvalue()


PLOTS: Mapping[str, Callable[[], bytes]] = {
    "weights": default_weights, "schedules": schedules, "weightings": weightings, "noise": noise, "timesteps": timesteps,
    "sampling": sampling,
}  # fmt: skip


def main() -> None:
    """Draws all of them."""
    for name, draw in PLOTS.items():
        path = IMAGES / f"{name}.png"
        write_bytes(path, small(draw()))
        print(f"wrote {path}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
