"""What a LoRA file says about itself: the keys of sd-scripts, which A1111's and Forge's LoRA pages show, and ModelSpec's.

A LoRA has no markers, since programs take from the base how to sample, and warn of tensors that they do not know. So what it was
trained for stands here alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from aquatint.models.adapter_files import Names
from aquatint.models.adapter_shapes import AdapterSpec
from aquatint.models.sdxl.markers import PROCESS_KEY
from aquatint.models.sdxl.process import Process

ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"
IMPLEMENTATIONS: Mapping[Names, str] = {"kohya": "sgm", "diffusers": "diffusers"}

TagFrequency = Mapping[str, Mapping[str, int]]  # source -> tag -> how many pictures have it


def adapter_metadata(
    spec: AdapterSpec,
    modelspec: Mapping[str, str],
    *,
    names: Names,
    output_name: str,
    base_name: str,
    resolution: int,
    process: Process,
    tag_frequency: TagFrequency,
) -> dict[str, str]:
    """All of it, texts only. `modelspec` is what `modelspec_metadata` says of the whole model."""
    modelspec = {key: value for key, value in modelspec.items() if key != "modelspec.usage_hint"}
    return {
        **modelspec,
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": IMPLEMENTATIONS[names],
        **_process_words(process),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": base_name,
        "ss_output_name": output_name,
        **_network(spec),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_clip_skip": "None",
        "ss_v2": "False",
        "ss_v_parameterization": str(process.prediction == "v_prediction"),
        "ss_zero_terminal_snr": str(process.zero_terminal_snr),
        "ss_tag_frequency": json.dumps(tag_frequency),
    }


def _network(spec: AdapterSpec) -> dict[str, str]:
    """The network in sd-scripts' words. DoRA is one of LyCORIS there."""
    arguments: dict[str, str] = {"conv_dim": str(spec.rank), "conv_alpha": f"{spec.file_alpha:g}"} if spec.targets == "all" else {}
    if spec.kind == "dora":
        arguments = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True", **arguments}
    return {
        "ss_network_module": "lycoris.kohya" if spec.kind == "dora" else "networks.lora",
        "ss_network_dim": str(spec.rank),
        "ss_network_alpha": f"{spec.file_alpha:g}",
        "ss_network_args": json.dumps(arguments),
    }


def _process_words(process: Process) -> dict[str, str]:
    if process.prediction == "epsilon" and process.edm_ve_sigmas is None:
        return {}
    values = {name: value for name, value in asdict(process).items() if name not in ("latents", "declared")}
    return {
        PROCESS_KEY: json.dumps(values),
        "modelspec.usage_hint": f"use it with a base model of the kind that it was trained on: {process.words()}",
    }
