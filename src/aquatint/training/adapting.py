"""From a config to adapters beside a UNet, and what their files say of the captions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from aquatint.config.schema import Config
from aquatint.data.downloads import public_name
from aquatint.data.tags import count_tags
from aquatint.models.adapter_files import check_adapter, start_values
from aquatint.models.adapters import attach, start
from aquatint.models.frozen import freeze_compactly
from aquatint.models.sdxl.load import BaseModel, Change
from aquatint.planning.kept import compact_layers_of, swapped_blocks
from aquatint.planning.trained import adapter_spec, unet_dtype, weight_shapes
from aquatint.training.layout import Layout
from aquatint.training.parallelize import choose_device, trained_parameters, weight_dtype
from aquatint.training.swapping import swap_blocks

MAX_TAGS = 2000  # of a source, in the metadata of a LoRA: the most frequent ones


def check_start(config: Config, base: BaseModel) -> None:
    """Raises ModelFileError if the file that an adapter is to start from does not fit."""
    spec = adapter_spec(config)
    if spec is not None and config.adapter.start_from is not None:
        check_adapter(config.adapter.start_from, weight_shapes(config, base.spec), spec)


def compacting(config: Config, base: BaseModel) -> Change | None:
    """What keeps frozen layers in fewer bytes, or out of the way, while a UNet is loaded; None if they stay as they are."""
    layers = compact_layers_of(config, base.spec)
    dtype: torch.dtype = getattr(torch, unet_dtype(config))
    return partial(freeze_compactly, layers=layers, kept=config.memory.frozen_format, dtype=dtype) if layers else None


def adapting(config: Config, base: BaseModel, *, resuming: bool) -> Callable[[Any], None] | None:
    """What puts adapters beside a UNet and gives them their first values; None if the UNet itself is trained.

    A run that is going on takes its values from its checkpoint, and needs no file to start from.
    """
    spec = adapter_spec(config)
    if spec is None:
        return None
    swapped, device = swapped_blocks(config, base.spec), choose_device(config.training.device)

    def adapt(unet: torch.nn.Module) -> None:
        attach(unet, spec, weight_dtype(config.training.precision))
        start(unet, config.run.seed)
        if config.adapter.start_from is not None and not resuming:
            values = start_values(config.adapter.start_from, weight_shapes(config, base.spec), spec)
            with torch.no_grad():
                for name, parameter in trained_parameters(unet).items():
                    parameter.copy_(values[name])
        if swapped:
            swap_blocks(unet, swapped, device)

    return adapt


def tag_frequency(layout: Layout) -> dict[str, dict[str, int]]:
    """Source -> tag -> how many of its captions have it, for captions that are made of tags; of each picture its first one.

    A source goes by the last part of its path: the file is for others to see.
    """
    samples, found = layout.train.samples, defaultdict[str, Counter[str]](Counter)
    texts = layout.train.texts if samples.captions is None else samples.captions
    for number, (source, policy) in enumerate(zip(layout.manifest.sources, layout.policies, strict=True)):
        rows = np.flatnonzero(samples.sources == number)
        if policy.style == "tags" and len(rows):
            captions = [texts[samples.text_of[row][0]] for row in rows]
            found[PurePath(public_name(source.path)).name] += count_tags(captions, policy.separator, keep_separator=policy.keep_separator)
    return {name: dict(counts.most_common(MAX_TAGS)) for name, counts in found.items()}
