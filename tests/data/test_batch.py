from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from aquatint.data.batch import Batch, join_texts, pad_prompts


def batch() -> Batch:
    return Batch(
        latents=torch.ones(2, 4, 3, 5),
        noise=torch.zeros(2, 4, 3, 5),
        timesteps=torch.tensor([1, 999]),
        prompt_embeds=torch.ones(2, 77, 8),
        pooled_prompt_embeds=torch.ones(2, 6),
        time_ids=torch.tensor([[3007.0, 1025, 0, 0, 24, 40]] * 2),
        loss_weights=torch.ones(2),
        names=("a", "b"),
        positions=(6, 7),
        sources=(0, 0),
    )


def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest() -> None:
    moved = batch().to("meta")
    tensors = [value for field in fields(moved) if isinstance(value := getattr(moved, field.name), torch.Tensor)]
    assert len(tensors) == 7
    assert all(tensor.is_meta for tensor in tensors)
    assert (moved.names, moved.positions) == (("a", "b"), (6, 7))


def test_moving_a_batch_to_where_it_is_changes_no_number_and_no_format() -> None:
    before, after = batch(), batch().to(torch.device("cpu"))
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        assert (torch.equal(old, new) and old.dtype == new.dtype) if isinstance(old, torch.Tensor) else old == new


def test_pinning_asks_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = batch().pin_memory()
    assert pinned.timesteps.tolist() == [2, 1000]
    assert pinned.names == ("a", "b")


def test_short_captions_are_followed_by_encoded_empty_chunks() -> None:
    empty = torch.full((77, 2), -1.0)
    prompts = [torch.full((77, 2), 1.0), torch.full((231, 2), 3.0), torch.full((154, 2), 2.0)]
    padded = pad_prompts(prompts, empty)
    assert padded.shape == (3, 231, 2)
    assert [[float(row[77 * chunk].sum() / 2) for chunk in range(3)] for row in padded] == [[1, -1, -1], [3, 3, 3], [2, 2, -1]]
    assert all(bool((row.reshape(3, 154) == row.reshape(3, 154)[:, :1]).all()) for row in padded)


def test_captions_of_one_length_are_not_padded() -> None:
    prompts = [torch.randn(77, 2), torch.randn(77, 2)]
    assert torch.equal(pad_prompts(prompts, torch.zeros(77, 2)), torch.stack(prompts))


def test_texts_are_joined_with_zeros_where_asked_for() -> None:
    texts = [(torch.ones(154, 2).half(), torch.ones(3).half()), (torch.full((77, 2), 2.0).half(), torch.full((3,), 2.0).half())]
    empty = (torch.full((77, 2), -1.0).half(), torch.full((3,), -1.0).half())
    prompt_embeds, pooled = join_texts([*texts, empty], empty, [False, False, True])
    assert prompt_embeds.dtype == pooled.dtype == torch.float32
    assert prompt_embeds[:, [0, 77], 0].tolist() == [[1, 1], [2, -1], [0, 0]]
    assert pooled[:, 0].tolist() == [1, 2, 0]
