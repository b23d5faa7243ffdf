from functools import partial

import pytest
import torch
from torch import nn

from aquatint.models.adapter_shapes import AdapterSpec
from aquatint.models.adapters import attach
from aquatint.models.recompute import ATTENTION, ROWS, keeping_products, recompute
from aquatint.models.sdxl.model import build_unet, predict
from aquatint.planning.trace import Tally, with_fake_weights
from tests.planning.small import small_spec

ALL = partial(keeping_products, shortest_row=1)
INPUTS = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 4, 8, 8), (2, 77, 40), (2, 24), (2, 6))]


def unet_of(adapter: str | None = None) -> nn.Module:
    unet = with_fake_weights(build_unet(small_spec()), torch.float32).train()
    if adapter is not None:
        attach(unet, AdapterSpec(adapter, 4, 4.0, "all", False), torch.float32)
    for weight in unet.parameters():
        nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(weight.numel()))
    return unet


def one_pass(unet: nn.Module, *, autocast: bool = False) -> tuple[torch.Tensor, Tally, int]:
    """The loss of a pass, what it took, and what waits for the backward pass."""
    latents, text, pooled, time_ids = INPUTS
    tally = Tally(unet.parameters())
    with tally.counting():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = predict(unet, latents, torch.tensor([10, 700]), text, pooled, time_ids).float().square().mean()
        waiting = tally.now
        loss.backward()
    return loss.detach(), tally, waiting


def gradients(unet: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in unet.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    ("adapter", "autocast", "function"),
    [(None, False, keeping_products), (None, True, ALL), ("lora", True, ALL), ("dora", False, keeping_products)],
)
def test_losses_and_gradients_keep_every_bit(adapter, autocast, function):
    plain, again = unet_of(adapter), unet_of(adapter)
    again.enable_gradient_checkpointing(function)
    for unet in (plain, again):
        unet.conv_in.requires_grad_(False)
        unet.get_parameter("mid_block.resnets.0.conv1.weight").requires_grad_(False)
    losses = [one_pass(unet, autocast=autocast)[0] for unet in (plain, again)]
    assert torch.equal(*losses)
    expected, found = gradients(plain), gradients(again)
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_less_waits_for_the_backward_pass_and_no_product_is_made_twice():
    waiting, flops = {}, {}
    for name, prepare in {"plain": lambda unet: None, "pointwise": lambda unet: unet.enable_gradient_checkpointing(ALL),
                          "whole": partial(recompute, what=True)}.items():  # fmt: skip
        unet = unet_of()
        prepare(unet)
        _, tally, waiting[name] = one_pass(unet)
        flops[name] = tally.flops
    assert waiting["whole"] < waiting["pointwise"] < 0.75 * waiting["plain"]
    assert flops["pointwise"] == flops["plain"] < flops["whole"]


def test_what_is_kept_goes_as_the_backward_pass_takes_it():
    """Otherwise all blocks' results would be there until the last one's backward pass is done."""
    unet = unet_of()
    unet.enable_gradient_checkpointing(ALL)
    _, tally, waiting = one_pass(unet)
    assert tally.now < 0.2 * waiting + sum(grad.nbytes for grad in gradients(unet).values())


def test_a_second_backward_pass_computes_what_the_first_took():
    inputs = torch.ones(3, 256)
    found = []
    for function in (lambda block, x: block(x), ALL):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block = Block()
        output = function(block, inputs).sum()
        output.backward(retain_graph=True)
        output.backward()
        found.append(gradients(block))
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


class Block(nn.Module):
    """Two layers with an activation between, and one of four inputs, as an adapter has, behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.up = nn.Linear(256, 256), nn.Linear(256, 4), nn.Linear(4, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.second(nn.functional.silu(self.first(x))))


def test_products_of_short_rows_are_made_again_and_a_last_one_is_not_kept():
    inputs = torch.ones(3, 256)
    tally = Tally([*(block := Block()).parameters(), inputs])
    with tally.counting():
        output = keeping_products(block, inputs)
        assert tally.now == 4 * 3 * (256 + 256 + 4)  # the output, and what `first` and `second` gave
        forward = tally.flops
        output.sum().backward()
    assert forward == 2 * 3 * 256 * (256 + 4 + 4)
    assert tally.flops == 3 * forward - 2 * 3 * 256 * 256  # the inputs have no gradient


def test_every_operator_that_is_kept_exists_in_this_torch():
    assert len(ROWS) == 5
    assert len(ATTENTION) == 5
