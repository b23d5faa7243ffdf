"""What a run says about itself before its first step, with the numbers written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from aquatint.config.schema import Config
from aquatint.config.sections.methods import NoiseSection, TimestepsSection
from aquatint.data.buckets import report_text
from aquatint.data.captions import caption_report, render
from aquatint.data.downloads import public_name
from aquatint.data.ledger import summary
from aquatint.models.adapters import adapted_layers
from aquatint.models.sdxl.process import Process
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, Shape
from aquatint.models.sdxl.tokenizer import chunk_reports
from aquatint.planning.groups import table
from aquatint.planning.schedule import count, plan_steps
from aquatint.training.layout import Layout
from aquatint.training.parallelize import trained_parameters
from aquatint.training.prepare import Prepared
from aquatint.training.process import ZERO_AT_PURE_NOISE
from aquatint.training.step import Parts
from aquatint.utils.seeds import generator

MAX_COUNTED_CAPTIONS = 20_000  # counting the tokens of so many takes a second

NAMES = {
    "epsilon": "epsilon (the noise)", "v_prediction": "v_prediction", "x0": "x0 (the picture)", "edm": "EDM's F",
    "flow": "rectified flow (noise less picture)",
}  # fmt: skip


def announcement(config: Config, data: Prepared, parts: Parts, process: Process, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """One line per fact: pictures, buckets, steps, objective, and what will train. `shapes` are of all that groups can name."""
    manifest = data.manifest
    yield f"pictures    {summary(manifest).replace(' pictures', '', 1)} (see ledger.txt)"
    if len(data.held_out):
        which = "of the training set are used for validation" if data.layout.held_out_is_trained else "held out for validation"
        yield f"            {len(data.held_out)} {which}"
    yield f"buckets     {report_text(data.layout.report).splitlines()[-1]} (see buckets.txt)"
    yield f"captions    {captions_text(data.layout).splitlines()[0]} (see captions.txt)"
    if data.train.captions is not None:
        yield f"{'':<12}rendered anew and encoded at every step"
    if data.train.mask_keys is not None:
        floor = f"{config.data.mask_floor:g} of the loss" if config.data.mask_floor else "nothing"
        yield f"masks       {int(data.train.mask_keys[:, 0].any(axis=1).sum()):,} pictures have one; outside of it, {floor} counts"
    if len(manifest.warnings) == 1:
        yield f"warning     {manifest.warnings[0]}"
    if len(manifest.warnings) > 1:
        yield f"warnings    {len(manifest.warnings)} about the pictures, in ledger.txt; the first: {manifest.warnings[0]}"
    for index, line in enumerate(mix_lines(data.layout)):
        yield f"{'' if index else 'sources':<12}{line}"
    section = config.training
    for index, line in enumerate(plan_steps(data.samples_per_epoch, section.at_once, section.accumulation_steps, section.length).lines()):
        yield f"{'' if index else 'steps':<12}{line}"
    for index, line in enumerate(objective_lines(config, process, parts)):
        yield f"{'' if index else 'objective':<12}{line}"
    yield f"trains      {trained_text(parts.unet)}"
    yield f"            with {config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}"
    for line in table(config, shapes) if config.training.groups or config.text_encoders.train else ():
        yield f"{'':<12}{line}"
    if parts.texts is not None and parts.texts.end is not None:
        yield f"{'':<12}text encoders only for the first {count(parts.texts.end, 'step')}"
    yield f"stays       {' and '.join(still_networks(config))}"


def still_networks(config: Config) -> Iterator[str]:
    """What no weight changes in: beside an adapter, all."""
    texts = [name for name in TEXT_ENCODERS if config.adapter.kind != "none" or name not in config.text_encoders.train]
    named = "text encoders" if len(texts) == len(TEXT_ENCODERS) else "".join(texts)
    first = "the UNet, " if config.adapter.kind != "none" else ""
    if named:
        yield first + named
    yield "autoencoder"


def trained_text(unet: torch.nn.Module) -> str:
    """How much is trained, and where."""
    trained, layers = list(trained_parameters(unet).values()), len(adapted_layers(unet))
    total, dtype = sum(p.numel() for p in trained), str(trained[0].dtype).removeprefix("torch.")
    if layers:
        return f"{total:,} adapter weights in {dtype}, in {count(layers, 'layer')}"
    frozen = sum(p.numel() for p in unet.parameters()) - total
    texts = [name for name, _ in unet.named_children() if name in TEXT_ENCODERS]
    where = " and ".join([", ".join(["the UNet", *texts[:-1]]), *texts[-1:]])
    return f"{where}: {total:,} weights in {dtype}" + (f"; {frozen:,} are frozen" if frozen else "")


def objective_lines(config: Config, process: Process, parts: Parts) -> Iterator[str]:
    """What is learned, and what is special about how."""
    terminal = "" if process.prediction in ("flow", "edm") else f", {'with' if process.zero_terminal_snr else 'without'} zero terminal SNR"
    loss = "" if config.diffusion.loss == "mse" else f", {config.diffusion.loss} loss"
    yield f"{NAMES[process.prediction]}{terminal}{loss}, loss weight {weighting_text(config.diffusion.weighting, parts.objective.weights)}"
    section, weighting = config.timesteps, config.diffusion.weighting
    if section != TimestepsSection():
        changed = ", ".join(f"{name} {value}" for name, value in section.model_dump().items() if value != getattr(TimestepsSection(), name))
        yield f"timesteps: {changed}"
    if config.noise != NoiseSection():
        changed = ", ".join(
            f"{name} {value}" for name, value in config.noise.model_dump().items() if value != getattr(NoiseSection(), name)
        )
        yield f"noise: {changed}"
    if weighting in ZERO_AT_PURE_NOISE and parts.objective.schedule.zero_terminal_snr:
        yield f"{weighting} would give pure noise, the last timestep, the weight 0: it gets {parts.objective.weights[-1]:g}"


def mix_lines(layout: Layout) -> Iterator[str]:
    """What each source gives, if there are several."""
    sources, counts = layout.manifest.sources, np.bincount(layout.train.samples.sources, minlength=len(layout.manifest.sources)).tolist()
    samples = [float(count * times) for count, times in zip(counts, layout.repeats, strict=True)]
    for source, pictures, part in zip(sources, counts, samples, strict=True):
        if source.role != "validation" and sum(one.role != "validation" for one in sources) > 1:
            role = ", for regularization" if source.role == "regularization" else ""
            yield f"{public_name(source.path)}: {pictures:,} pictures, {part / sum(samples):.1%} of the samples{role}"


def captions_text(layout: Layout) -> str:
    """How long the captions are and what some of them are like, as they are rendered; of a large set, a part that is spread over it."""
    samples, policies = layout.train.samples, layout.policies
    step = -(-len(samples) // MAX_COUNTED_CAPTIONS)
    names, texts = [], []
    for row in range(0, len(samples), step):
        names.append(samples.names[row])
        if samples.captions is None:
            texts.append(layout.train.texts[samples.text_of[row][0]])
        else:
            written = [samples.captions[text] for text in samples.text_of[row]]
            policy = policies[int(samples.sources[row])]
            texts.append(render(written, policy, generator(0, "announcement", row), drop_probs=layout.drop_probs))
    return caption_report(names, texts, list(chunk_reports(texts)))


def weighting_text(weighting: str, weights: torch.Tensor) -> str:
    """The range of the loss weights."""
    if weighting in ("learned", "adaptive"):
        return f"{weighting} from the loss itself"
    low, high = weights.min().item(), weights.max().item()
    return "1 everywhere" if low == high == 1.0 else f"{low:.3g} to {high:.3g}"
