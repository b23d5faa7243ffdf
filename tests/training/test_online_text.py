from collections.abc import Iterator

import pytest
import torch

from aquatint.data.batch import Batch
from aquatint.training.online_text import encoded, with_embeddings

LENGTHS = {"": 1, "short": 1, "long": 2}


class Encoder:
    """Two numbers of a caption's own in every place. Keeps what it was asked for."""

    def __init__(self):
        self.asked = []

    def encode(self, captions):
        self.asked.append(list(captions))
        return [(torch.full((77 * LENGTHS[text], 4), len(text) + 1.0), torch.full((3,), -len(text) - 1.0)) for text in captions]


def batch(*captions):
    size = len(captions)
    return Batch(
        latents=torch.zeros(size, 4, 8, 8), noise=torch.zeros(size, 4, 8, 8), timesteps=torch.zeros(size, dtype=torch.int64),
        prompt_embeds=None, pooled_prompt_embeds=None, time_ids=torch.zeros(size, 6), loss_weights=torch.ones(size),
        names=tuple(map(str, range(size))), positions=tuple(range(size)), sources=(0,) * size, captions=captions,
    )  # fmt: skip


def test_every_sample_gets_the_embeddings_of_its_caption():
    (done,) = encoded(iter([batch("short", "", None, "short")]), Encoder())
    assert done.prompt_embeds.shape == (4, 77, 4)
    assert done.prompt_embeds[:, 0, 0].tolist() == [6.0, 1.0, 0.0, 6.0]
    assert done.pooled_prompt_embeds[:, 0].tolist() == [-6.0, -1.0, 0.0, -6.0]
    assert done.captions == ("short", "", None, "short")


def test_none_is_zeros_in_both_embeddings_and_the_empty_text_is_not():
    (done,) = encoded(iter([batch(None, "")]), Encoder())
    assert not done.prompt_embeds[0].any()
    assert not done.pooled_prompt_embeds[0].any()
    assert done.prompt_embeds[1].all()
    assert done.pooled_prompt_embeds[1].all()


def test_short_captions_are_padded_with_the_encoded_empty_text():
    (done,) = encoded(iter([batch("short", "long", None)]), Encoder())
    assert done.prompt_embeds.shape == (3, 154, 4)
    assert done.prompt_embeds[0, :, 0].tolist() == [6.0] * 77 + [1.0] * 77
    assert done.prompt_embeds[1, :, 0].tolist() == [5.0] * 154
    assert not done.prompt_embeds[2].any()


def test_each_different_caption_is_encoded_once_and_the_empty_one_once_in_all():
    encoder = Encoder()
    list(encoded(iter([batch("short", "short", None, ""), batch(None, ""), batch("long", "short")]), encoder))
    assert encoder.asked == [[""], ["short"], [], ["long", "short"]]


def test_the_order_of_the_captions_changes_nothing():
    empty = Encoder().encode([""])[0]
    one, other = batch("long", "short"), batch("short", "long")
    first, second = (with_embeddings(each, each.captions, Encoder(), empty).prompt_embeds for each in (one, other))
    assert torch.equal(first, second.flip(0))


def test_closing_it_closes_what_it_reads_from():
    closed = []

    def source() -> Iterator[Batch]:
        try:
            while True:
                yield batch("short")
        finally:
            closed.append(True)

    stream = encoded(source(), Encoder())
    next(stream)
    stream.close()
    assert closed == [True]


def test_an_error_in_the_source_arrives_as_it_is():
    def source() -> Iterator[Batch]:
        yield batch("short")
        raise ZeroDivisionError

    stream = encoded(source(), Encoder())
    next(stream)
    with pytest.raises(ZeroDivisionError):
        next(stream)
