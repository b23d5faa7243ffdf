"""How many pictures a second does a full fine-tune of SDXL's UNet make on one GPU: ours, diffusers' script, and a strong baseline?

    PYTHONPATH=src python3 -m benchmarks.gpu.full_tune --row 1 --contender ours [--dry]

Rows 1 to 6 of the plan; `run` goes through them. `script` is diffusers' script with float32 weights under bf16 autocast and AdamW as
it comes; `strong` has bf16 weights, channels_last, compiled blocks and the fused AdamW, and is the one to beat. `ours` is what the
package does; behind a comma are settings of `[speed]`, which are off unless they are asked for, or CUDA graphs, which are an experiment of
this benchmark and no setting of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from aquatint.data.batch import Batch
from aquatint.models.sdxl.model import build_unet
from aquatint.models.sdxl.speed import compile_blocks
from aquatint.optim.create import create_optimizer
from aquatint.training.objective import denoise, sample_losses
from aquatint.training.parallelize import Speed, rearrange
from aquatint.training.step import Parts
from benchmarks.gpu.rig import Build, Contender, Row, Scene, filled, main_of, training_flops
from benchmarks.machine import has
from benchmarks.ours import draw_batches, our_parts, our_steps
from benchmarks.peers import script, script_loop, script_loop_accelerate, strong_loop

LEARNING_RATE, WEIGHT_DECAY = 1e-5, 1e-2
SETTINGS: dict[str, Speed] = {  # of `[speed]`
    "ours": Speed(),
    "ours, channels_last": Speed(channels_last=True),
    "ours, kernels": Speed(channels_last=True, kernels=True),
    "ours, fused_qkv": Speed(fused_qkv=True),
    "ours, compiled": Speed(compile="blocks"),
    "ours, all but compiled": Speed(channels_last=True, kernels=True, fused_qkv=True),
    "ours, all": Speed(channels_last=True, kernels=True, fused_qkv=True, compile="blocks"),
}
BEST = "ours, all"
GRAPHS = ("ours, CUDA graph of the passes", "ours, CUDA graph of the step")
ROWS = {
    row.number: row
    for row in (
        Row(1, "full fine-tune, 1024 px", 1024, (16, 12, 8, 4), ("script", "ours", "ours in bf16_mixed")),
        Row(2, "row 1 against the strong baseline", 1024, (16, 12, 8, 4), ("strong", *(name for name in SETTINGS if name != "ours"))),
        Row(3, "full fine-tune, all computed again", 1024, (32, 16), ("script", "strong", "ours", BEST), checkpointing=True),
        Row(4, "full fine-tune, one picture", 1024, (1,), ("script", "strong, reduce-overhead", "ours", *GRAPHS)),
        Row(5, "full fine-tune, four pictures", 1024, (4,), ("script", "strong", "ours", BEST, *GRAPHS)),
        Row(6, "full fine-tune, 512 px", 512, (48, 32, 16), ("script", "strong", "ours", BEST)),
    )
}


def made_unet(row: Row, scene: Scene, dtype: torch.dtype, *, channels_last: bool = False) -> Any:
    unet = filled(build_unet(scene.spec), scene, dtype).requires_grad_(True).train()
    if row.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(memory_format=torch.channels_last) if channels_last else unet


def compiled(unet: Any, scene: Scene, **options: Any) -> Any:
    """Every transformer block compiled, all of a kind once. A dry run traces them and compiles nothing."""
    unet.compile_repeated_blocks(**({"backend": "eager"} if scene.is_dry else {"fullgraph": True, **options}))
    return unet


def scripted(row: Row, scene: Scene, batch_size: int) -> Contender:
    unet = made_unet(row, scene, torch.float32)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    made = script(unet, optimizer, device=scene.device, weight_dtype=torch.bfloat16)
    accelerated = has("accelerate")
    loop = script_loop_accelerate(made) if accelerated else script_loop(made)
    return Contender(loop, unet, optimizer, {"loop": "accelerate" if accelerated else "plain torch"})


def strong(**options: Any) -> Build:
    def build(row: Row, scene: Scene, batch_size: int) -> Contender:
        unet = compiled(made_unet(row, scene, torch.bfloat16, channels_last=True), scene, **options)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        made = script(unet, optimizer, device=scene.device, weight_dtype=torch.bfloat16)
        return Contender(strong_loop(made), unet, optimizer)

    return build


def ours(speed: Speed, *, mixed: bool = False) -> Build:
    def build(row: Row, scene: Scene, batch_size: int) -> Contender:
        unet = sped_up(made_unet(row, scene, torch.float32 if mixed else torch.bfloat16), speed, scene, lean=not row.checkpointing)
        optimizer = our_optimizer(unet, "adamw" if mixed else "adamw_bf16")
        parts = our_parts(unet, optimizer, learning_rate=LEARNING_RATE, autocast=mixed, device=scene.device)
        return Contender(our_steps(parts), unet, optimizer)

    return build


def sped_up(unet: Any, speed: Speed, scene: Scene, *, lean: bool = True) -> Any:
    """With these settings of `[speed]`. A dry run traces blocks and compiles nothing."""
    rearrange(unet, speed, scene.device, lean=lean)
    if speed.compile == "blocks":
        compile_blocks(unet, speed.num_shapes, backend="eager" if scene.is_dry else "inductor")
    return unet


def our_optimizer(unet: Any, name: str) -> Any:
    named = [(key, parameter) for key, parameter in unet.named_parameters() if parameter.requires_grad]
    return create_optimizer(name, named, seed=0, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def graphed_ours(*, whole: bool) -> Build:
    def build(row: Row, scene: Scene, batch_size: int) -> Contender:
        unet = made_unet(row, scene, torch.bfloat16)
        return graphed(unet, row, scene, batch_size, autocast=False, whole=whole)

    return build


# The experiment with CUDA graphs


def graphed(unet: Any, row: Row, scene: Scene, batch_size: int, *, autocast: bool, whole: bool) -> Contender:
    """Forward and backward pass as one graph, then our clip and optimizer; or, if `whole`, all of it, with torch's fused AdamW."""
    if whole:
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        settings = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "fused": True, "capturable": scene.device.type == "cuda"}
        optimizer: Any = torch.optim.AdamW(trained, **settings)
    else:
        optimizer = our_optimizer(unet, "adamw" if autocast else "adamw_bf16")
    parts = our_parts(unet, optimizer, learning_rate=LEARNING_RATE, autocast=autocast, device=scene.device)
    batch = draw_batches(scene.spec.unet, 1, batch_size, row.side_px // 8)[0].to(scene.device)
    return Contender(graph_loop(parts, batch, whole=whole))


def graph_loop(parts: Parts, batch: Batch, *, whole: bool) -> Any:
    """A loop over batches of the size of `batch`, whose memory they are copied into."""
    trained = [parameter for group in parts.optimizer.param_groups for parameter in group["params"]]

    def passes() -> torch.Tensor:
        for parameter in trained:
            parameter.grad = None
        found = denoise(parts.unet, parts.objective, batch, autocast=parts.autocast)
        loss = sample_losses(parts.objective, batch, found).mean()
        loss.backward()
        return loss.detach()

    def move() -> None:
        torch.nn.utils.clip_grad_norm_(trained, parts.clipping.max_norm)
        parts.optimizer.step()

    def everything() -> torch.Tensor:
        loss = passes()
        move()
        return loss

    replay = captured(everything if whole else passes, parts.device)

    def loop(batches: Iterator[Batch], steps: int) -> list[torch.Tensor]:
        losses = []
        for _ in range(steps):
            take(batch, next(batches))
            losses.append(replay().clone())
            if not whole:
                move()
        return losses

    return loop


def take(batch: Batch, other: Batch) -> None:
    for name in ("latents", "noise", "timesteps", "prompt_embeds", "pooled_prompt_embeds", "time_ids"):
        getattr(batch, name).copy_(getattr(other, name), non_blocking=True)


def captured(action: Any, device: torch.device) -> Any:
    """What replays `action`, whose result stays where it is. Without a GPU it is the action itself."""
    if device.type != "cuda":
        return action
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = action()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


BUILDS: dict[str, Build] = {
    "script": scripted,
    "strong": strong(),
    "strong, reduce-overhead": strong(mode="reduce-overhead"),
    **{name: ours(speed) for name, speed in SETTINGS.items()},
    "ours in bf16_mixed": ours(SETTINGS["ours"], mixed=True),
    "ours, CUDA graph of the passes": graphed_ours(whole=False),
    "ours, CUDA graph of the step": graphed_ours(whole=True),
}


def flops(row: Row, scene: Scene) -> int:
    return training_flops(build_unet(scene.spec).requires_grad_(True).train(), row, scene)


if __name__ == "__main__":
    main_of(__doc__, ROWS, BUILDS, flops)
