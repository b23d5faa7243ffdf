"""How the UNet is computed."""

from __future__ import annotations

from typing import Literal

from aquatint.config.sections.fields import Section


class SpeedSection(Section):
    channels_last: bool = False
    """Pictures lie in memory with their channels last, as the convolutions of GPUs want them. Not measured on a GPU yet."""
    kernels: bool = False
    """Our own kernels for GroupNorm with SiLU, and for GEGLU; they need Triton on a GPU, and less memory. Not measured on a GPU yet."""
    fused_qkv: bool = False
    """One matrix product for query, key and value of an attention, instead of three. Not measured on a GPU yet."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks` compiles transformer and residual blocks, once for each shape of pictures, for minutes. Not measured on a GPU yet."""
