"""Text encoders that are trained with the UNet: captions are encoded in each step, with gradients, by the encoders as they are then.

Those that are trained are children of the UNet, by their own names: its weights keep theirs, and the names of the encoders' have the
encoder before them (`text_encoder.encoder.layers.0…`). So whatever goes through the weights of a model goes through all that is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aquatint.data.batch import Batch, join_texts
from aquatint.models.sdxl.conditioning import TextEncoders, take_off_unheard
from aquatint.models.sdxl.load import BaseModel
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, TextEncoder
from aquatint.models.sdxl.tokenizer import num_chunks
from aquatint.training.objective import half_precision


@dataclass(frozen=True)
class TextTraining:
    """The text encoders of a run that trains one or both of them. From step `end` on, if there is one, they stay as they are."""

    encoders: TextEncoders
    autocast: bool
    end: int | None = None

    def told(self, batch: Batch, step: int = 0) -> Batch:
        """The batch with the embeddings of its captions, each different one encoded once; a caption of None is zeros.

        Where they are of several lengths, the empty text is encoded too, which follows the shorter ones.
        """
        assert batch.captions is not None, "a batch without captions"
        texts = sorted({caption for caption in batch.captions if caption is not None})
        if len(set(num_chunks(texts))) != 1:
            texts = sorted({"", *texts})
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.end is None or step < self.end)), self._half_precision():
            found = dict(zip(texts, self.encoders.embed(texts), strict=True))
        first = found[texts[0]]  # the empty text, where one is needed
        chosen = [first if caption is None else found[caption] for caption in batch.captions]
        prompt_embeds, pooled = join_texts(chosen, first, [caption is None for caption in batch.captions])
        return replace(batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)

    def encode(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Embeddings of prompts on the CPU, without gradients."""
        with self._half_precision():
            return self.encoders.encode(texts)

    def _half_precision(self) -> Any:
        return half_precision(self.encoders.clip.device, self.autocast)


def join_encoders(
    unet: torch.nn.Module, base: BaseModel, trained: Collection[TextEncoder], *, dtype: torch.dtype, device: torch.device
) -> TextEncoders:
    """Both text encoders of a base, without what the UNet hears nothing of; those that are to be trained become children of the UNet.

    So they recompute activations if it is asked to.
    """
    clip, bigg = base.load_text_encoders(dtype)
    take_off_unheard(clip)
    for name, encoder in zip(TEXT_ENCODERS, (clip, bigg), strict=True):
        encoder.to(device)
        if name in trained:
            unet.add_module(name, encoder)
    return TextEncoders(clip, bigg, digest=base.digest("text_encoders"))
