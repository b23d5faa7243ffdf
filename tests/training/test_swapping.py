"""Frozen blocks in main memory: the same bits as on the device, brought once for each pass, and room for two of them."""

import pytest
import torch
from torch import nn

from aquatint.models.adapters import attach, start
from aquatint.models.frozen import FrozenLinear
from aquatint.models.frozen_shapes import compact_layers, largest_blocks, transformer_blocks
from aquatint.models.recompute import recompute
from aquatint.models.sdxl.model import predict
from aquatint.training.swapping import Swapper, in_forward_order, swap_blocks
from tests.models.sdxl.small import small_spec
from tests.models.test_adapters import SPECS, inputs
from tests.models.test_frozen import compacted

CPU = torch.device("cpu")
LAYERS = compact_layers(small_spec().shapes("unet"), "own")


def row(count, *, width=8, kept="own"):
    """Blocks of two layers each, the weights they began with, and what swaps them."""
    blocks, weights = [], []
    for number in range(count):
        layers = []
        for seed in range(2):
            frozen = FrozenLinear(nn.Linear(width, width, bias=False), kept, torch.float32)
            frozen.take(torch.randn(width, width, generator=torch.Generator().manual_seed(10 * number + seed)))
            layers.append(frozen)
        weights.append([layer.weight.clone() for layer in layers])
        blocks.append(layers)
    return blocks, weights, Swapper(blocks, CPU, slab_bytes=1 << 12)


def passes(blocks, *, backward=True):
    """The order in which blocks ask for their weights."""
    order = [*range(len(blocks)), *(reversed(range(len(blocks))) if backward else ())]
    for number in order:
        for layer in blocks[number]:
            yield number, layer


@pytest.mark.parametrize("kept", ["own", "int8"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_layer_gets_its_own_weight_in_any_order(kept, count):
    blocks, weights, swapper = row(count, kept=kept)
    order = torch.randint(count, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    for number in order:
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(blocks[number], weights[number], strict=True))
    assert len(swapper._room_of) == min(2, count)


@pytest.mark.parametrize(("count", "each_pass"), [(1, 0), (2, 0), (3, 1), (7, 5)])
def test_a_pass_brings_each_block_once_but_the_two_that_are_there(count, each_pass):
    blocks, _, swapper = row(count)
    for _, layer in passes(blocks):
        layer.parts  # noqa: B018
    loads = []
    for _ in range(3):
        before = swapper.num_loads
        for _, layer in passes(blocks):
            layer.parts  # noqa: B018
        loads.append(swapper.num_loads - before)
    assert loads == [2 * each_pass] * 3


def test_the_next_block_is_there_before_it_is_asked_for(monkeypatch):
    blocks, _, _ = row(5)
    missing = []
    enter = Swapper._enter
    monkeypatch.setattr(Swapper, "_enter", lambda self, block: missing.append(block not in self._room_of) or enter(self, block))
    for _ in range(2):
        for _, layer in passes(blocks):
            layer.parts  # noqa: B018
    assert missing[0]
    assert not any(missing[1:])


def test_layers_give_their_weights_away_and_take_the_bytes_of_two_blocks():
    blocks, _, swapper = row(4, width=16)
    assert [list(layer.buffers()) for block in blocks for layer in block] == [[]] * 8
    assert swapper.device_bytes == 2 * 2 * 16 * 16 * 4


def test_blocks_are_taken_in_the_order_of_the_forward_pass():
    names = ["up_blocks.0.a", "down_blocks.1.b", "down_blocks.1.a", "mid_block.c"]
    assert in_forward_order(names) == ["down_blocks.1.b", "down_blocks.1.a", "mid_block.c", "up_blocks.0.a"]


@pytest.mark.parametrize(("kept", "what", "count"), [("own", "pointwise", 5), ("int8", True, 3)])
def test_a_unet_with_swapped_blocks_learns_with_the_same_bits(kept, what, count):
    found = []
    for blocks in ({}, largest_blocks(LAYERS, count)):
        unet, _ = compacted(kept)
        attach(unet.train(), SPECS["dora"], torch.float32)
        start(unet, seed=5)
        if blocks:
            swap_blocks(unet, blocks, CPU)
        recompute(unet, what)
        with torch.no_grad():
            for trained in (p for p in unet.parameters() if p.requires_grad):
                trained.mul_(1.01).add_(0.01)
        output = predict(unet, *inputs())
        output.square().mean().backward()
        found.append((output, {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}))
    (output, gradients), (expected, others) = found
    assert torch.equal(output, expected)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_all_blocks_of_a_unet_can_be_swapped():
    assert len(largest_blocks(LAYERS, len(transformer_blocks(LAYERS)))) == len(transformer_blocks(LAYERS)) > 4
