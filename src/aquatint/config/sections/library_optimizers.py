"""The optimizers of other libraries and their settings. `aquatint.optim.library` has where they are."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from aquatint.config.sections.fields import Section

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class MuonSection(Section):
    name: Literal["muon"]
    """Muon (arXiv 2502.16982) of torch for matrices, its step orthogonalised; AdamW for convolutions, embeddings, norms and biases."""
    learning_rate: Rate = 1e-5
    """Peak learning rate of both."""
    rate_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """What multiplies Muon's: 0.2 sqrt(longer side), so that steps are as large as AdamW's, or sqrt(max(1, outputs / inputs))."""
    momentum: Decay = 0.95
    """Decay of Muon's momentum, which is Nesterov's."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Rounds of Newton and Schulz that orthogonalise a step."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; norms and biases are left out."""


class TorchAdafactorSection(Section):
    name: Literal["torch_adafactor"]
    """Adafactor (arXiv 1804.04235) as torch has it: no momentum, and steps in proportion to a tensor's size."""
    learning_rate: Rate = 5e-4
    """Peak learning rate: a step over the root mean square of its tensor, some 0.02 in SDXL. 1 / sqrt(steps) is the most."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    clip_threshold: Positive = 1.0
    """Largest root mean square of one tensor's update."""


class LibraryAdamWSection(Section):
    name: str
    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; norms and biases are left out."""


class TorchaoAdamW8bitSection(LibraryAdamWSection):
    name: Literal["torchao_adamw8bit"]
    """AdamW with moments of 8 bits, of torchao, which compiles it in the first step."""


class TorchaoAdamW4bitSection(LibraryAdamWSection):
    name: Literal["torchao_adamw4bit"]
    """AdamW with moments of 4 bits (arXiv 2309.01507), of torchao, which compiles it in the first step."""


class TorchaoAdamWFp8Section(LibraryAdamWSection):
    name: Literal["torchao_adamw_fp8"]
    """AdamW with moments in float8, of torchao, which compiles it in the first step."""


class BnbAdamW8bitSection(LibraryAdamWSection):
    name: Literal["bnb_adamw8bit"]
    """AdamW with moments of 8 bits (arXiv 2110.02861), of bitsandbytes."""


class BnbPagedAdamW8bitSection(LibraryAdamWSection):
    name: Literal["bnb_paged_adamw8bit"]
    """AdamW with moments of 8 bits, of bitsandbytes, that the driver moves to main memory while a GPU's is full."""


class ScheduleFreeSection(LibraryAdamWSection):
    name: Literal["schedule_free"]
    """AdamW (arXiv 2405.15682, package schedulefree) that averages by itself: no schedule, no `ema`; the average is what counts."""


class LibraryLionSection(Section):
    name: str
    learning_rate: Rate = 1e-6
    """Peak learning rate and size of every step: a third to a tenth of AdamW's."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Share of the momentum in a step, and decay of the momentum."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay, three to ten times AdamW's; norms and biases are left out."""


class LionSection(LibraryLionSection):
    name: Literal["lion"]
    """Lion (arXiv 2302.06675), of pytorch_optimizer: the sign of a momentum."""


class BnbLion8bitSection(LibraryLionSection):
    name: Literal["bnb_lion8bit"]
    """Lion (arXiv 2302.06675) with a momentum of 8 bits, of bitsandbytes."""


class ProdigySection(Section):
    name: Literal["prodigy"]
    """Prodigy (arXiv 2306.06101, package prodigyopt): AdamW that finds its learning rate. Much state, and all weights share the rate."""
    learning_rate: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Multiplies the rate that it finds: leave it at 1, and set `d_coef` for more or less."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    d0: Positive = 1e-6
    """The rate that it begins with."""
    d_coef: Positive = 1.0
    """Multiplies what it finds: 0.5 for less, 2 for more."""
    safeguard_warmup: bool = True
    """Leave the learning rate out of what the rate is found by, so that a warm-up does not make it too high."""
    bias_correction: bool = True
    """Adam's correction of the first steps."""
    slice_p: Annotated[int, Field(ge=1)] = 1
    """Find the rate by every n-th weight alone: 11 takes 8.7 bytes a weight instead of 16."""


class CameSection(Section):
    name: Literal["came"]
    """CAME (arXiv 2307.02047), of pytorch_optimizer: Adafactor with a momentum and a measure of how far to trust it."""
    learning_rate: Rate = 1e-5
    """Peak learning rate. The first steps are large: let it warm up."""
    betas: tuple[Decay, Decay, Decay] = (0.9, 0.999, 0.9999)
    """Decay of the momentum, of the squares and of the distrust."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    clip_threshold: Positive = 1.0
    """Largest root mean square of one tensor's update before the momentum."""


SECTIONS = (
    MuonSection, ScheduleFreeSection, ProdigySection, LionSection, CameSection, TorchAdafactorSection, BnbAdamW8bitSection,
    BnbPagedAdamW8bitSection, BnbLion8bitSection, TorchaoAdamW8bitSection, TorchaoAdamW4bitSection, TorchaoAdamWFp8Section,
)  # fmt: skip
LIBRARY_NAMES: tuple[str, ...] = tuple(get_args(section.model_fields["name"].annotation)[0] for section in SECTIONS)
OWN_RATE = ("prodigy", "torch_adafactor")  # whose learning rate is not the size of a step
