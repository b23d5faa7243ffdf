"""Optimizers, and how a run goes step by step."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from aquatint.config.duration import Duration
from aquatint.config.sections.fields import PowerStds, Section, Share


class AdamWSection(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW (arXiv 1711.05101) of torch, fused, with float32 state."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""


class AdamWBF16Section(Section):
    name: Literal["adamw_bf16"]
    """AdamW for bf16 weights: float32 math, weights and moments rounded so that nothing is lost (6 bytes a parameter in all)."""
    rounding: Literal["stochastic", "kahan"] = "stochastic"
    """Of the weights. `kahan` rounds to the nearest and keeps what that leaves, for 2 more bytes a parameter: far less noise."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    kernel: Literal["auto", "none"] = "auto"
    """`auto` updates a tensor with one Triton kernel on a GPU, where Triton is installed; `none` with plain torch. Same bits."""


class AdafactorSection(Section):
    name: Literal["adafactor"]
    """Adafactor (arXiv 1804.04235) with a fixed learning rate and almost no state."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate: the size of a step, not scaled by the size of the weights."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    clip_threshold: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest root mean square of one tensor's update."""
    decay_power: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Second-moment decay at step t is 1 - t**-decay_power."""


class AdamW8bitSection(Section):
    name: Literal["adamw8bit"]
    """AdamW with moments of 8 bits (arXiv 2110.02861), for float32 or bf16 weights (4 bytes a parameter in all with bf16)."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    kernel: Literal["auto", "none"] = "auto"
    """`auto` updates a tensor with one Triton kernel on a GPU, where Triton is installed; `none` with plain torch. Same bits."""


class SoapSection(Section):
    name: Literal["soap"]
    """SOAP (arXiv 2409.11321): Adam in a rotated basis. Large state and much arithmetic; for large batches."""
    learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.95, 0.95)
    """Decay of the first and second moment; the second is that of the bases too."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    max_precond_dim: Annotated[int, Field(ge=0)] = 1280
    """Longest side of a matrix that is rotated. On SDXL, 1280 takes 13 GiB beside the moments, 2048 takes 18, 10240 takes 83."""
    precond_every: Annotated[int, Field(ge=1)] = 10
    """Steps between two refreshes of a tensor's bases; tensors take turns."""


def _optimizer_name(value: Any) -> Any:
    return value.get("name", "adamw") if isinstance(value, dict) else getattr(value, "name", None)


Optimizer = Annotated[
    Annotated[AdamWSection, Tag("adamw")]
    | Annotated[AdamWBF16Section, Tag("adamw_bf16")]
    | Annotated[AdamW8bitSection, Tag("adamw8bit")]
    | Annotated[AdafactorSection, Tag("adafactor")]
    | Annotated[SoapSection, Tag("soap")],
    Discriminator(_optimizer_name),
]


class LearningRateSection(Section):
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "constant"
    """Shape of the learning rate after the warm-up. `inverse_sqrt` needs no end: a long run can be stopped or made longer at will."""
    reference: Duration = Duration(1000, "steps")
    """Where inverse_sqrt begins to fall: from there on it is the peak times sqrt(reference / time)."""
    warmup: Duration = Duration(0, "steps")
    """How long the learning rate takes to rise to its peak."""
    end_factor: Share = 0.0
    """Where cosine and linear end, as a share of the peak."""


class GroupSection(Section):
    match: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Names of blocks, layers or tensors, with `*` for any text: "down_blocks.0", "*.attn2". docs/groups.md has a list."""
    learning_rate_factor: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0
    """Times `optimizer.learning_rate`; 0 freezes."""
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """Instead of `optimizer.weight_decay`; norms and biases are left out."""


class TrainingSection(Section):
    length: Duration = Duration(1000, "steps")
    """When the run ends, counted from its beginning, also after a resume."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Pictures per forward pass. All of a batch have the same shape."""
    accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step."""
    precision: Literal["bf16_mixed", "bf16_pure", "fp32"] = "bf16_mixed"
    """bf16_mixed: float32 weights, bf16 math. bf16_pure: bf16 weights, with stochastic rounding. fp32: no half precision."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: far less memory, about a quarter more time."""
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    clip: Literal["global", "per_tensor", "delayed"] = "global"
    """Of the whole gradient, or of each tensor's; `delayed` goes by the whole norm of the step before, and leaves the first one."""
    fused_backward: bool = False
    """Step each tensor in the backward pass and free its gradient: 4 GB less. A gradient that is not finite comes too late for some."""
    groups: tuple[GroupSection, ...] = ()
    """Parts with a learning rate of their own, or frozen: one `[[training.groups]]` table each. The first that fits a tensor counts."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 10
    """The run stops after this many steps in a row with a loss or gradient that is not finite. Such steps change no weight."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    dry_step: Literal["auto"] | bool = "auto"
    """Try the largest batch before the first step, without changing anything, so that what does not fit fails at once. `auto`: on a GPU."""


class EmaSection(Section):
    enabled: bool = True
    """Keep a float32 moving average of the weights; it is what gets sampled and exported."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999
    """Share of the average that is kept at each step."""
    half_life: Duration | None = None
    """Or: after so much training, weights count half as much in the average, such as "20000 samples", whatever the batch."""
    warmup: bool = True
    """Start with a short memory: decay min(decay, (1 + t) / (10 + t)), so that short runs profit too."""
    device: Literal["model", "cpu"] = "model"
    """Where the averages live. `cpu` saves 10 GB of GPU memory for each."""
    power_stds: PowerStds = ()
    """Keep further averages, each over this share of the run so far (arXiv 2312.02696); `aquatint ema` makes others of them afterwards."""
    snapshot_every: Duration = Duration(1000, "steps")
    """How often those are written to the run's `ema` folder, and at its end: 5 GB each time for each of `power_stds`."""
