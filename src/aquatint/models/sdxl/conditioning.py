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
        with torch.no_grad():
            return [(hidden.clone(), pooled.clone()) for hidden, pooled in self._embeddings(captions, torch.device("cpu"))]

    def embed(self, captions: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """The same on the encoders' device, and through them gradients go."""
        return self._embeddings(captions, self.clip.device)

    def _embeddings(self, captions: Sequence[str], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        if not captions:
            return []
        chunks = [chunk(caption) for caption in captions]
        parts = [self._encode_chunks(some, device) for some in _batches(list(chain.from_iterable(chunks)))]
        hidden, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        bounds = pairwise(accumulate(map(len, chunks), initial=0))
        return [(hidden[start:end].flatten(0, 1), pooled[start]) for start, end in bounds]

    def _encode_chunks(self, chunks: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        clip_ids, bigg_ids = (torch.tensor([padded(ids, pad) for ids in chunks]) for pad in (PAD, PAD_2))
        hidden, pooled = encode_ids(self.clip, self.bigg, clip_ids, bigg_ids)
        return hidden.to(device), pooled.to(device)


def encode_ids(clip: CLIPTextModel, bigg: CLIPTextModelWithProjection, clip_ids: Tensor, bigg_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (N, 77, 2048) and pooled embeddings (N, 1280) of N chunks of ids (N, 77), float32."""
    state = before_last_layer(clip, clip_ids.to(clip.device))
    found = bigg(bigg_ids.to(bigg.device), output_hidden_states=True)
    ends = (bigg_ids == EOS).int().argmax(dim=1).to(bigg.device)  # the first one
    at_end = found.last_hidden_state[torch.arange(len(ends), device=bigg.device), ends]  # after the final norm
    return torch.cat([state.float(), found.hidden_states[-2].float()], dim=-1), bigg.text_projection(at_end).float()


def before_last_layer(clip: CLIPTextModel, ids: Tensor) -> Tensor:
    """CLIP-L's state (N, 77, 768) before its last layer, whether that was taken off or not."""
    if len(clip.encoder.layers) < clip.config.num_hidden_layers:
        return clip(ids).last_hidden_state
    return clip(ids, output_hidden_states=True).hidden_states[-2]


def take_off_unheard(clip: CLIPTextModel) -> None:
    """Takes off what the UNet is told nothing by, see `heard_shapes`: what is left is trained to its last tensor."""
    clip.encoder.layers = clip.encoder.layers[:-1]
    clip.final_layer_norm = torch.nn.Identity()


def time_ids_tensor(time_ids: Sequence[tuple[int, ...]]) -> Tensor:
    """Original height and width, crop top and left, target height and width of each sample: (B, 6) float32.

    float32 holds them exactly; half precision would round 1025 to 1024.
    """
    return torch.tensor(time_ids, dtype=torch.float32).reshape(-1, 6)


def _batches(chunks: list[list[int]]) -> list[list[list[int]]]:
    return [chunks[start : start + MAX_CHUNKS_AT_ONCE] for start in range(0, len(chunks), MAX_CHUNKS_AT_ONCE)]
