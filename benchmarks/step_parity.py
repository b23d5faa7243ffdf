"""Does our step compute what the step of diffusers' SDXL training script computes?

    python -m benchmarks.step_parity

gives the same tiny UNet (float32), the same latents, noise and timesteps to our loop and to the script's (see `peers`), with epsilon and
with v-prediction. Compared are the loss and all gradients of one step (relative error of the whole and of the worst tensor), and the losses
of 50 steps of AdamW. Goals: 1e-5 for loss and gradients, 1e-4 for every loss of the curve. Exits with 1 if they are missed.
In the script every weight decays; here the same do as in ours, all but norms and biases, so that one thing is measured at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aquatint.data.batch import Batch
from aquatint.diffusion.parameterization import Prediction
from aquatint.optim.create import create_optimizer, parameter_groups
from benchmarks.machine import has, keep, load, versions
from benchmarks.ours import Loop, draw_batches, our_loop, our_parts, repeated, tiny_unet
from benchmarks.peers import script, script_loop, script_loop_accelerate

STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 50, 4, 1e-4, 1e-2
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction")
LIMITS = {"loss": 1e-5, "gradient": 1e-5, "curve": 1e-4}
Make = Callable[[Any, Any, Prediction], Loop]


def makers() -> dict[str, Make]:
    """Ours first, then what it is compared with."""

    def ours(unet: Any, optimizer: Any, prediction: Prediction) -> Loop:
        return our_loop(our_parts(unet, optimizer, prediction=prediction, learning_rate=optimizer.defaults["lr"]))

    found: dict[str, Make] = {
        "ours": ours,
        "script": lambda unet, optimizer, prediction: script_loop(script(unet, optimizer, prediction=prediction)),
    }
    if has("accelerate"):
        found["script with accelerate"] = lambda unet, optimizer, prediction: script_loop_accelerate(
            script(unet, optimizer, prediction=prediction)
        )
    return found


def adamw(name: str, unet: Any, learning_rate: float) -> Any:
    """The AdamW that the loop in question uses: ours fused, the others' not."""
    if name == "ours":
        return create_optimizer("adamw", unet.named_parameters(), seed=0, learning_rate=learning_rate, weight_decay=WEIGHT_DECAY)
    return torch.optim.AdamW(parameter_groups(unet.named_parameters(), WEIGHT_DECAY), lr=learning_rate)


def one_step(name: str, batch: Batch, prediction: Prediction) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step and the gradients it goes down, after the clip."""
    unet = tiny_unet()
    optimizer = adamw(name, unet, learning_rate=0.0)
    found: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        found.update((name, parameter.grad.clone()) for name, parameter in unet.named_parameters() if parameter.grad is not None)

    optimizer.register_step_pre_hook(look)
    (loss,) = makers()[name](unet, optimizer, prediction)(iter([batch]), 1)
    return float(loss), found


def curve(name: str, batches: list[Batch], prediction: Prediction, steps: int = STEPS) -> list[float]:
    """The losses of so many steps."""
    unet = tiny_unet()
    optimizer = adamw(name, unet, LEARNING_RATE)
    return [float(loss) for loss in makers()[name](unet, optimizer, prediction)(repeated(batches), steps)]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the larger, so that a tensor whose gradient is 0 is no division by 0."""
    scale = max(ours.double().norm().item(), theirs.double().norm().item())
    return (ours.double() - theirs.double()).norm().item() / scale if scale else 0.0


def compare(prediction: Prediction) -> dict[str, Any]:
    batches = draw_batches(dict(tiny_unet().config), 10, BATCH_SIZE, side_latent=16)
    steps = {name: one_step(name, batches[0], prediction) for name in makers()}
    curves = {name: curve(name, batches, prediction) for name in makers()}
    found: dict[str, Any] = {}
    for name in [name for name in steps if name != "ours"]:
        (loss, gradients), (other_loss, other_gradients) = steps["ours"], steps[name]
        assert gradients.keys() == other_gradients.keys()
        whole = [torch.cat([part.flatten() for part in side.values()]) for side in (gradients, other_gradients)]
        gaps = [abs(own - other) / other for own, other in zip(curves["ours"], curves[name], strict=True)]
        found[name] = {
            "loss": abs(loss - other_loss) / other_loss,
            "gradient": distance(whole[0], whole[1]),
            "gradient_of_worst_tensor": max(distance(gradients[key], other_gradients[key]) for key in gradients),
            "curve": max(gaps),
            "curve_at_last_step": gaps[-1],
        }
    found["losses"] = {"first": round(curves["ours"][0], 6), "last": round(curves["ours"][-1], 6)}
    return found


def main() -> None:
    torch.set_num_threads(1)
    before = load()
    found = {prediction: compare(prediction) for prediction in PREDICTIONS}
    peers = [values for one in found.values() for name, values in one.items() if name != "losses"]
    met = all(values[key] < limit for values in peers for key, limit in LIMITS.items())
    result = {
        "versions": versions(), "load": {"before": before, "after": load()}, "steps": STEPS, "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE, "weights": sum(p.numel() for p in tiny_unet().parameters()),
        "relative_difference": found, "limits": LIMITS, "met": met,
    }  # fmt: skip
    keep("step_parity_cpu", result)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
