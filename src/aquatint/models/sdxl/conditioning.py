"""What the UNet is told beside the noisy picture: text embeddings and sizes.

SDXL (arXiv 2307.01952, section 2) reads the penultimate hidden states of CLIP-L (768 wide) and OpenCLIP bigG (1280), side
by side and without a final norm, and bigG's pooled text embedding. Long captions are encoded in chunks of 77 positions, as
image generation programs do it; the pooled embedding is the first chunk's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aquatint.models.sdxl.tokenizer import EOS, PAD, PAD_2, chunk, padded

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

MAX_CHUNKS_AT_ONCE = 64


class TextEncoders:
    """Captions to embeddings, on the text encoders' device and in their dtype."""

    def __init__(self, clip: CLIPTextModel, bigg: CLIPTextModelWithProjection, *, digest: str) -> None:
        self.clip = clip
        self.bigg = bigg
        self.digest = digest

    def encode(self, captions: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """For each caption of n chunks, prompt_embeds (77 n, 2048) and pooled (1280,), float32 on the CPU."""
        if not captions:
            return []
        chunks = [chunk(caption) for caption in captions]
        parts = [self._encode_chunks(some) for some in _batches(list(chain.from_iterable(chunks)))]
        hidden, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        bounds = pairwise(accumulate(map(len, chunks), initial=0))
        return [(hidden[start:end].flatten(0, 1).clone(), pooled[start].clone()) for start, end in bounds]

    def _encode_chunks(self, chunks: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states (N, 77, 2048) and pooled embeddings (N, 1280) of N chunks."""
        clip_ids, bigg_ids = (torch.tensor([padded(ids, pad) for ids in chunks]) for pad in (PAD, PAD_2))
        with torch.no_grad():
            clip = self.clip(clip_ids.to(self.clip.device), output_hidden_states=True)
            bigg = self.bigg(bigg_ids.to(self.bigg.device), output_hidden_states=True)
            hidden = torch.cat([clip.hidden_states[-2].float().cpu(), bigg.hidden_states[-2].float().cpu()], dim=-1)
            ends = (bigg_ids == EOS).int().argmax(dim=1)  # the first one
            at_end = bigg.last_hidden_state[torch.arange(len(chunks)), ends.to(self.bigg.device)]  # after the final norm
            return hidden, self.bigg.text_projection(at_end).float().cpu()


def time_ids_tensor(time_ids: Sequence[tuple[int, ...]]) -> Tensor:
    """Original height and width, crop top and left, target height and width of each sample: (B, 6) float32.

    float32 holds them exactly; half precision would round 1025 to 1024.
    """
    return torch.tensor(time_ids, dtype=torch.float32).reshape(-1, 6)


def _batches(chunks: list[list[int]]) -> list[list[list[int]]]:
    return [chunks[start : start + MAX_CHUNKS_AT_ONCE] for start in range(0, len(chunks), MAX_CHUNKS_AT_ONCE)]
