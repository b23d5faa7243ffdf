"""Captions that are encoded when they are needed: every rendering is a new one, and none lies on disk."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from aquatint.data.batch import Batch, join_texts


class CaptionEncoder(Protocol):
    """The text encoders: prompt embeddings (77 n, D) and pooled embedding (P,) of each caption."""

    def encode(self, captions: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]: ...


def encoded(batches: Iterator[Batch], encoder: CaptionEncoder) -> Generator[Batch]:
    """The batches with the embeddings of their captions; a caption of None is zeros. To encode them, the host may wait for the device."""
    (empty,) = encoder.encode([""])
    try:
        for batch in batches:
            assert batch.captions is not None
            yield with_embeddings(batch, batch.captions, encoder, empty)
    finally:
        if isinstance(batches, Generator):
            batches.close()


def with_embeddings(
    batch: Batch, captions: Sequence[str | None], encoder: CaptionEncoder, empty: tuple[torch.Tensor, torch.Tensor]
) -> Batch:
    """Each different caption of the batch is encoded once."""
    different = sorted({caption for caption in captions if caption})
    found = dict(zip(different, encoder.encode(different), strict=True))
    texts = [found[caption] if caption else empty for caption in captions]
    prompt_embeds, pooled = join_texts(texts, empty, [caption is None for caption in captions])
    return replace(batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)
