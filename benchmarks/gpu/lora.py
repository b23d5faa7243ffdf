"""How many pictures a second does a LoRA of SDXL's UNet make on one GPU: ours, and diffusers' script with peft?

    PYTHONPATH=src python3 -m benchmarks.gpu.lora --row 7 --contender ours [--dry]

Rows 7 and 8 of the plan: rank 32 on all linear layers of the transformers, bf16 base, float32 matrices under autocast. The script is left
out where peft is not installed. Behind a comma are settings of `[speed]`, or CUDA graphs, which are an experiment.
"""

from __future__ import annotations

from typing import Any

import torch

from aquatint.models.adapter_shapes import AdapterSpec, target_layers
from aquatint.models.adapters import attach
from aquatint.models.sdxl.model import build_unet
from aquatint.training.parallelize import Speed
from benchmarks.gpu.full_tune import LEARNING_RATE, SETTINGS, WEIGHT_DECAY, compiled, graphed, our_optimizer, sped_up
from benchmarks.gpu.rig import Build, Contender, Row, Scene, filled, main_of, training_flops
from benchmarks.machine import has
from benchmarks.ours import our_parts, our_steps
from benchmarks.peers import script, script_loop, script_loop_accelerate

RANK = 32
GRAPHS = ("ours, CUDA graph of the passes", "ours, CUDA graph of the step")
PEERS = ("script", "script, reduce-overhead")
WAYS = ("ours", "ours, channels_last", "ours, kernels", "ours, compiled")
ROWS = {
    row.number: row
    for row in (
        Row(7, "LoRA, rank 32, four pictures", 1024, (4,), ("script", *WAYS, *GRAPHS)),
        Row(8, "LoRA, rank 32, one picture", 1024, (1,), (*PEERS, "ours", *GRAPHS)),
    )
}


def adapted(unet: Any, scene: Scene) -> Any:
    """Our adapters beside a frozen UNet, with random values."""
    attach(unet, AdapterSpec("lora", RANK, RANK, "transformer"), torch.float32)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad and not parameter.is_meta:
                parameter.normal_(std=0.01)
    return unet.train()


def with_peft(unet: Any) -> Any:
    """The same layers with peft's adapters, as the script adds them: matrices in float32."""
    from peft import LoraConfig

    layers = list(target_layers({name: tuple(value.shape) for name, value in unet.named_parameters()}, "transformer"))
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unet.train()


def scripted(*, reduces: bool = False) -> Build:
    def build(row: Row, scene: Scene, batch_size: int) -> Contender:
        if not has("peft"):
            raise SystemExit("peft is not installed")
        unet = with_peft(filled(build_unet(scene.spec), scene, torch.bfloat16))
        if reduces:
            compiled(unet, scene, mode="reduce-overhead")
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        made = script(unet, optimizer, device=scene.device, weight_dtype=torch.bfloat16)
        loop = script_loop_accelerate(made) if has("accelerate") else script_loop(made)
        notes = {"loop": "accelerate" if has("accelerate") else "plain torch", "trained": sum(p.numel() for p in trained)}
        return Contender(loop, unet, optimizer, notes)

    return build


def ours(speed: Speed) -> Build:
    def build(row: Row, scene: Scene, batch_size: int) -> Contender:
        unet = sped_up(adapted(filled(build_unet(scene.spec), scene, torch.bfloat16), scene), speed, scene)
        optimizer = our_optimizer(unet, "adamw")
        parts = our_parts(unet, optimizer, learning_rate=LEARNING_RATE, autocast=True, device=scene.device)
        trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        return Contender(our_steps(parts), unet, optimizer, {"trained": trained})

    return build


def graphed_ours(*, whole: bool) -> Build:
    def build(row: Row, scene: Scene, batch_size: int) -> Contender:
        unet = adapted(filled(build_unet(scene.spec), scene, torch.bfloat16), scene)
        return graphed(unet, row, scene, batch_size, autocast=True, whole=whole)

    return build


BUILDS: dict[str, Build] = {
    "script": scripted(),
    "script, reduce-overhead": scripted(reduces=True),
    **{name: ours(SETTINGS[name]) for name in WAYS},
    "ours, CUDA graph of the passes": graphed_ours(whole=False),
    "ours, CUDA graph of the step": graphed_ours(whole=True),
}


def flops(row: Row, scene: Scene) -> int:
    return training_flops(adapted(build_unet(scene.spec), scene), row, scene)


if __name__ == "__main__":
    main_of(__doc__, ROWS, BUILDS, flops)
