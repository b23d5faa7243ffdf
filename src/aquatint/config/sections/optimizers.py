"""Our optimizers and their settings, and the choice among all there are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from aquatint.config.sections.fields import Section
from aquatint.config.sections.library_optimizers import (
    BnbAdamW8bitSection,
    BnbLion8bitSection,
    BnbPagedAdamW8bitSection,
    CameSection,
    LionSection,
    MuonSection,
    ProdigySection,
    ScheduleFreeSection,
    TorchAdafactorSection,
    TorchaoAdamW4bitSection,
    TorchaoAdamW8bitSection,
    TorchaoAdamWFp8Section,
)


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
    kernel: Literal["auto", "none", "compiled"] = "auto"
    """`auto`: one Triton kernel a tensor on a GPU; compiled on a CPU from 10 million weights on (`compiled`: any). `none`: plain torch."""


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
    kernel: Literal["auto", "none"] = "auto"
    """`auto`: three Triton kernels a tensor on a GPU. `none`: plain torch."""


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
    kernel: Literal["auto", "none", "compiled"] = "auto"
    """`auto`: one Triton kernel a tensor on a GPU; compiled on a CPU from 10 million weights on (`compiled`: any). `none`: plain torch."""


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
    kernel: Literal["auto", "none", "compiled"] = "auto"
    """`auto`: rounding of bf16 weights is compiled on a CPU from 10 million weights on (`compiled`: any). `none`: plain torch."""


def _optimizer_name(value: Any) -> Any:
    return value.get("name", "adamw") if isinstance(value, dict) else getattr(value, "name", None)


Optimizer = Annotated[
    Annotated[AdamWSection, Tag("adamw")]
    | Annotated[AdamWBF16Section, Tag("adamw_bf16")]
    | Annotated[AdamW8bitSection, Tag("adamw8bit")]
    | Annotated[AdafactorSection, Tag("adafactor")]
    | Annotated[SoapSection, Tag("soap")]
    | Annotated[MuonSection, Tag("muon")]
    | Annotated[ScheduleFreeSection, Tag("schedule_free")]
    | Annotated[ProdigySection, Tag("prodigy")]
    | Annotated[LionSection, Tag("lion")]
    | Annotated[CameSection, Tag("came")]
    | Annotated[TorchAdafactorSection, Tag("torch_adafactor")]
    | Annotated[BnbAdamW8bitSection, Tag("bnb_adamw8bit")]
    | Annotated[BnbPagedAdamW8bitSection, Tag("bnb_paged_adamw8bit")]
    | Annotated[BnbLion8bitSection, Tag("bnb_lion8bit")]
    | Annotated[TorchaoAdamW8bitSection, Tag("torchao_adamw8bit")]
    | Annotated[TorchaoAdamW4bitSection, Tag("torchao_adamw4bit")]
    | Annotated[TorchaoAdamWFp8Section, Tag("torchao_adamw_fp8")],
    Discriminator(_optimizer_name),
]
