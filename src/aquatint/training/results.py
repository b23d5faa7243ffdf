"""What a run gives, during it and after: pictures from its weights, and exports. A part of the composition root."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from aquatint.config.schema import Config, dump
from aquatint.config.sections.looks import ExportSection
from aquatint.config.sections.methods import AdapterSection
from aquatint.data.contact_sheet import contact_sheet
from aquatint.data.image import save_png
from aquatint.errors import UsageError
from aquatint.models.adapters import attach, merged
from aquatint.models.sdxl.conditioning import TextEncoders, take_off_unheard
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, is_text
from aquatint.planning.shapes import sample_size
from aquatint.planning.trained import adapter_spec, trained_encoders, trained_shapes, weight_shapes
from aquatint.tensor_file import LazyTensor
from aquatint.training import checkpoint
from aquatint.training.ema_snapshots import NOTABLE_RESIDUAL, rebuilt
from aquatint.training.exports import export_adapter, export_model
from aquatint.training.free_average import averages_of
from aquatint.training.objective import Objective
from aquatint.training.objectives import choose_objective, choose_process, sampling_schedule, sampling_steps
from aquatint.training.parallelize import choose_device
from aquatint.training.sampling import Encode, SampleRequest, looked_up, make_samples
from aquatint.utils.progress import say

WEIGHT_FILES = ("unet.safetensors", "text_encoders.safetensors")  # of a checkpoint; the second only if text encoders are trained
TAGS_FILE = "tags.json"  # of an adapter's run: how often each tag is in its captions, for the metadata of the LoRA


def trained_weights(config: Config, name: str | None, *, averaged: bool = True) -> tuple[Path, dict[str, LazyTensor]]:
    """The weights of a checkpoint (the newest if no name is given): the average if there is one and it is wanted. Raises UsageError."""
    checkpoints = config.run.folder / config.run.name / "checkpoints"
    path = checkpoints / name if name else checkpoint.newest(checkpoints)[0]
    if path is None or not path.is_dir():
        known = ", ".join(entry.name for entry in checkpoint.sorted_checkpoints(checkpoints)) or "none"
        raise UsageError(
            f"there is no checkpoint {name or ''} in {checkpoints}".replace("  ", " "),
            hint=f"checkpoints there: {known}; `aquatint train` makes them",
        )
    files = [path / "ema.safetensors"] if averaged and (path / "ema.safetensors").exists() else list(map(path.joinpath, WEIGHT_FILES))
    weights = [checkpoint.lazy_weights(file) for file in files if file.exists()]
    named = {name: tensor for table in weights for name, tensor in table.items()}
    if averaged and (beta1 := free_average_beta(config)) is not None:
        return path, averages_of(named, checkpoint.lazy_weights(path / "optimizer.safetensors"), beta1)
    return path, named


def free_average_beta(config: Config) -> float | None:
    """The first beta of a run that makes its average by itself, as the run has it, whatever the config says now; None of any other."""
    section = as_trained(config)["optimizer"]
    return float(section["betas"][0]) if section["name"] == "schedule_free" else None


def as_trained(config: Config) -> Mapping[str, Any]:
    """The settings that the run of this name was trained with, or these if there is none."""
    path = config.run.folder / config.run.name / "config.json"
    return json.loads(path.read_text()) if path.exists() else dump(config)  # type: ignore[no-any-return]


def load_unet(config: Config, base: BaseModel, checkpoint_name: str | None, device: torch.device) -> torch.nn.Module:
    """The UNet to draw with: the base's, or with a checkpoint's weights, the average or the raw ones as `samples.weights` says."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    unet = base.load_unet(dtype)
    if checkpoint_name is not None:
        weights = _drawing_weights(config, base, checkpoint_name)
        _fill(config, unet, {name: tensor for name, tensor in weights.items() if not is_text(name)}, dtype)
    return unet.to(device).eval()  # type: ignore[no-any-return]


def load_caption_encoder(config: Config, base: BaseModel, checkpoint_name: str | None, device: torch.device) -> TextEncoders:
    """The text encoders that go with `load_unet`, in float32."""
    encoder = base.caption_encoder(device)
    if checkpoint_name is not None and (trained := trained_encoders(config)):
        take_off_unheard(encoder.clip)
        modules = dict(zip(TEXT_ENCODERS, (encoder.clip, encoder.bigg), strict=True))
        weights = _drawing_weights(config, base, checkpoint_name)
        named = {name: tensor for name, tensor in weights.items() if is_text(name)}
        _fill(config, torch.nn.ModuleDict({name: modules[name] for name in trained}), named, torch.float32)
    return encoder


def _drawing_weights(config: Config, base: BaseModel, checkpoint_name: str) -> dict[str, LazyTensor]:
    path, weights = trained_weights(config, checkpoint_name, averaged=config.samples.weights == "average")
    check_fits(config, base, path, weights)
    return weights


@torch.no_grad()
def _fill(config: Config, model: torch.nn.Module, weights: Mapping[str, LazyTensor], dtype: torch.dtype) -> None:
    """Puts trained weights into a model, with adapters beside its layers if they are those of an adapter."""
    if (spec := adapter_spec(config)) is not None:
        attach(model, spec, dtype)
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor.load())


def check_fits(config: Config, base: BaseModel, path: Path, weights: Mapping[str, LazyTensor]) -> None:
    """Raises UsageError if a checkpoint does not hold what the config trains."""
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    adapter = AdapterSection.model_validate(as_trained(config).get("adapter", {}))
    same_scale = scale_of(config) == scale_of(config.model_copy(update={"adapter": adapter}))  # which no tensor tells
    if found != trained_shapes(config, base.spec) or not same_scale:
        raise UsageError(
            f"{path} does not hold what this config trains",
            hint="set `model.base`, `adapter`, `text_encoders.train` and `training.groups` as they were in the run: "
            "its folder has them in config.json, and can stand for the config",
        )


def scale_of(config: Config) -> float | None:
    """What an adapter's product is multiplied by; None without an adapter."""
    spec = adapter_spec(config)
    return None if spec is None else spec.scale


def export_weights(
    config: Config, base: BaseModel, weights: Mapping[str, torch.Tensor | LazyTensor], target: Path, section: ExportSection
) -> tuple[Path, ...]:
    """Writes trained weights as the section asks for it: the model, or the adapter and on request the model with it. Returns the paths.

    What groups froze is the base's.
    """
    spec, process, resolution = adapter_spec(config), choose_process(config, base), config.buckets.resolution
    origin = base.tensors(("unet", *trained_encoders(config)))
    if spec is None:
        return export_model(base, {**origin, **weights}, target, section, config.run.name, process, resolution)
    tags = config.run.folder / config.run.name / TAGS_FILE
    frequency = json.loads(tags.read_text()) if tags.exists() else {}
    shapes = weight_shapes(config, base.spec)
    written = export_adapter(base, weights, spec, shapes, target, section, config.run.name, process, resolution, frequency)
    if section.merged:
        whole = {**origin, **merged({name: origin[name] for name in shapes}, weights, spec)}
        written += export_model(base, whole, target, section, config.run.name, process, resolution)
    return written


def export_run(
    config: Config,
    checkpoint_name: str | None = None,
    output: Path | None = None,
    formats: tuple[Literal["single_file", "diffusers"], ...] = (),
) -> tuple[Path, ...]:
    """Exports a checkpoint of a run. `output` is a path without its ending; `formats` are the config's if none are given.

    Of a run with an adapter, `formats` are those of the whole model with the adapter in it.
    """
    base = open_base(config.model.base, config.model.vae)
    path, weights = trained_weights(config, checkpoint_name)
    check_fits(config, base, path, weights)
    section = config.export
    if formats:
        chosen = {"single_file": "single_file" in formats, "diffusers_folder": "diffusers" in formats}
        section = section.model_copy(update={**chosen, "lora_names": (), "merged": True})
    target = output or config.run.folder / config.run.name / "export" / f"{config.run.name}-{path.name}"
    return export_weights(config, base, weights, target, section)


def average_run(config: Config, std: float, step: int | None = None, output: Path | None = None) -> tuple[Path, ...]:
    """Exports an average of any width, made of a run's snapshots. `output` is a path without its ending. Raises UsageError."""
    base = open_base(config.model.base, config.model.vae)
    folder = config.run.folder / config.run.name
    with rebuilt(folder / "ema", std, step, base) as average:
        say(str(average))
        if average.mix.residual > NOTABLE_RESIDUAL:
            say("warning: that is far from what was asked for; more snapshots, or a width nearer to those that were kept, come nearer")
        target = output or folder / "export" / f"{config.run.name}-step-{average.step:06}-std-{std:.3f}"
        return export_weights(config, base, average.weights, target, config.export)


def sample_request(
    config: Config,
    base: BaseModel,
    objective: Objective,
    device: torch.device,
    encode: Encode,
    trained_size_hw: tuple[int, int],
) -> SampleRequest:
    """The prompts of the config and what encodes them; in the trained size if the config names none."""
    section, process = config.samples, choose_process(config, base)
    height, width = trained_size_hw if section.height is None or section.width is None else (section.height, section.width)
    return SampleRequest(
        base=base, device=device, prompts=section.prompts, negative_prompt=section.negative_prompt, encode=encode,
        height=height, width=width, schedule=sampling_schedule(config, process, (height, width), objective),
        steps=sampling_steps(config, process), seed=section.seed,
    )  # fmt: skip


def sample_pictures(config: Config, checkpoint_name: str | None = None) -> np.ndarray:
    """A picture per prompt of the config, uint8 (B, H, W, 3): from a checkpoint, or from the base if no run goes by its name."""
    base = open_base(config.model.base, config.model.vae)
    device = choose_device(config.training.device)
    unet = load_unet(config, base, checkpoint_name, device)
    section = config.samples
    texts = sorted({"", *section.prompts, *([section.negative_prompt] if section.negative_prompt is not None else [])})
    embeds = dict(zip(texts, load_caption_encoder(config, base, checkpoint_name, device).encode(texts), strict=True))
    objective = choose_objective(config, base)
    return make_samples(unet, objective, sample_request(config, base, objective, device, looked_up(embeds), sample_size(config)))


def sample_run(config: Config, prompts: list[str], checkpoint_name: str | None = None, output: Path | None = None) -> Path:
    """Writes a sheet of pictures of `prompts` (the config's if none are given), from the newest checkpoint or, without one, the base."""
    folder = config.run.folder / config.run.name
    chosen = tuple(prompts) or config.samples.prompts
    if not chosen:
        raise UsageError("there is no prompt", hint='give one: aquatint sample run.toml "a photo of ..."')
    if checkpoint_name is None and checkpoint.sorted_checkpoints(folder / "checkpoints"):
        checkpoint_name = trained_weights(config, None)[0].name
    say(f"sampling from {checkpoint_name or config.model.base.name}")
    pictures = sample_pictures(
        config.model_copy(update={"samples": config.samples.model_copy(update={"prompts": chosen})}), checkpoint_name
    )
    target = output or folder / "samples" / "sample.png"
    save_png(target, contact_sheet(list(pictures), list(chosen), columns=min(4, len(chosen))))
    return target
