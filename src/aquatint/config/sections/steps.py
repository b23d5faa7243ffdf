"""How a run goes step by step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from aquatint.config.duration import Duration
from aquatint.config.sections.fields import PowerStds, Section, Share


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
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Pictures per forward pass. All of a batch have the same shape. `auto`: as many as fit into the memory when the run begins."""
    accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step."""
    pictures_per_step: Annotated[int, Field(ge=1)] | None = None
    """Pictures per optimizer step, for `batch_size = "auto"`, which then divides it. Shapes with fewer pictures are merged with others."""
    precision: Literal["bf16_mixed", "bf16_pure", "fp32"] = "bf16_mixed"
    """bf16_mixed: float32 weights, bf16 math. bf16_pure: bf16 weights, with stochastic rounding. fp32: no half precision."""
    gradient_checkpointing: Literal["pointwise"] | bool = True
    """Recompute activations in the backward pass: 0.6 GB a picture, not 7, for a quarter more time; `pointwise`: 4 GB, a few per cent."""
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

    @property
    def at_once(self) -> int:
        """The batch size as a number; whoever asks for it has settled what "auto" is."""
        assert self.batch_size != "auto"
        return self.batch_size

    @property
    def per_step(self) -> int:
        """Pictures per optimizer step."""
        return self.pictures_per_step or (1 if self.batch_size == "auto" else self.batch_size) * self.accumulation_steps


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
