"""What torch.compile makes of an update for a CPU has the bits of plain torch, and what it does by arithmetic has those of look-ups."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from aquatint.errors import UsageError
from aquatint.optim import adamw_bf16, blockwise, compiled
from aquatint.optim.adamw8bit import AdamW8bit
from aquatint.optim.adamw_bf16 import AdamWBF16
from aquatint.optim.rounding import draw_bits, round_stochastic

CPU = torch.device("cpu")
SHAPES = [(20_001,), (129, 130), (128, 256), (16, 128, 3, 3), (7,), (300, 256, 9)]
EVERY_BFLOAT16 = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
KINDS = {
    "stochastic": (AdamWBF16, torch.bfloat16, {}),
    "kahan": (AdamWBF16, torch.bfloat16, {"rounding": "kahan"}),
    "8 bits": (AdamW8bit, torch.bfloat16, {}),
    "8 bits, float32": (AdamW8bit, torch.float32, {}),
}


def as_bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def around(values: Tensor) -> Tensor:
    """Each of them, and the float32 just below and above."""
    return torch.cat([values, torch.nextafter(values, torch.tensor(-2.0)), torch.nextafter(values, torch.tensor(2.0))])


@pytest.mark.parametrize("signed", [True, False])
def test_each_code_is_the_value_of_its_map_bit_for_bit(signed):
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_bits(compiled._value(codes, signed=signed)), as_bits(blockwise.dynamic_map(signed=signed)))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_two_look_ups_for_every_bfloat16_and_on_both_sides_of_every_border(signed):
    book = blockwise.codebook(signed, CPU)
    shares = torch.cat([EVERY_BFLOAT16.float(), around(EVERY_BFLOAT16.float()), around(book.border[:-1]), around(book.value)])
    shares = shares[shares.abs() <= 1]
    shares = shares if signed else shares.abs()
    rows = torch.nn.functional.pad(shares, (0, -len(shares) % 255)).view(-1, 255)
    values = torch.nn.functional.pad(rows, (1, 0), value=1.0)  # blocks with a scale of 1
    expected, scale = blockwise.quantise(values.flatten(), signed=signed)
    assert (scale == 1).all()
    codes = compiled._codes(values, blockwise.code_table(signed, CPU)).to(torch.uint8)
    assert torch.equal(codes.flatten(), expected)
    assert len(expected.unique()) == 256


def test_random_numbers_of_pairs_are_those_that_are_drawn_one_by_one():
    _, places = compiled._numbers((2**31 - 5, 2**32 - 7), {"step": 1, "lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0})
    words = compiled._words(torch.arange(100, dtype=torch.int32), places)
    drawn = torch.stack([torch.stack([word & 65535, word >> 16 & 65535], dim=1).flatten() for word in words])
    assert torch.equal(drawn, draw_bits((2**31 - 5, 2**32 - 7), 0, 200, CPU))


def test_pairs_are_rounded_as_single_numbers_are():
    every, finite = EVERY_BFLOAT16.float(), as_bits(EVERY_BFLOAT16[EVERY_BFLOAT16.isfinite()].float())
    values = torch.cat([every, *((finite + rest).view(torch.float32) for rest in (1, 0x7FFF, 0x8000, 0x8001, 0xFFFF))])
    word = torch.randint(-(2**31), 2**31, (len(values),), generator=torch.Generator().manual_seed(0), dtype=torch.int64).to(torch.int32)
    pairs = compiled._rounded((values, values.flip(0)), word).view(torch.bfloat16).view(-1, 2)
    for found, value, random_bits in ((pairs[:, 0], values, word & 65535), (pairs[:, 1], values.flip(0), word >> 16 & 65535)):
        assert torch.equal(found.nan_to_num(0.0), round_stochastic(value, random_bits).nan_to_num(0.0))
        assert torch.equal(found.isnan(), value.isnan())
    nearest = compiled._nearest(values).view(torch.float32)
    assert torch.equal(nearest.nan_to_num(0.0, -1.0, 1.0), values.bfloat16().float().nan_to_num(0.0, -1.0, 1.0))
    assert torch.equal(nearest.isnan(), values.isnan())


def trained(kernel: str, kind: str, steps: int) -> dict[str, Tensor]:
    """Weights and state after some steps, one of them left out, one with subnormal moments."""
    optimizer_of, dtype, settings = KINDS[kind]
    bits = torch.Generator().manual_seed(0)
    params = [Parameter((0.02 * torch.randn(shape, generator=bits)).to(dtype)) for shape in SHAPES]
    params[3].data = params[3].data.to(memory_format=torch.channels_last)
    optimizer = optimizer_of(params, lr=1e-3, weight_decay=0.1, kernel=kernel, seed=3, **settings)
    for step in range(steps):
        for param in params:
            decades = 22 * torch.rand(param.shape, generator=bits)
            param.grad = (torch.randn(param.shape, generator=bits) * 10**-decades).to(dtype)
        optimizer.step(finite=torch.tensor(step != 2))
    state = {f"{index}.{name}": value for index, param in enumerate(params) for name, value in optimizer.state[param].items()}
    return {**{str(index): param.detach() for index, param in enumerate(params)}, **state}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler warns of it
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_compiled_steps_have_the_bits_of_plain_ones_and_are_compiled_once(kind):
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    expected, found = (trained(kernel, kind, 20) for kernel in ("none", "compiled"))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_auto_compiles_for_many_weights_on_a_cpu_only_where_it_can(monkeypatch):
    few, many = [torch.zeros(5)], [torch.zeros(1).expand(adamw_bf16.WORTH_COMPILING)]
    monkeypatch.setattr(compiled, "has_compiler", lambda: True)
    assert [adamw_bf16.chosen_kernel(kernel, few) for kernel in ("auto", "compiled", "none")] == ["auto", "compiled", "none"]
    assert [adamw_bf16.chosen_kernel(kernel, many) for kernel in ("auto", "compiled", "none")] == ["compiled", "compiled", "none"]
    assert adamw_bf16.chosen_kernel("compiled", [torch.zeros(5, device="meta")]) == "auto"  # not on a CPU
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)
    assert adamw_bf16.chosen_kernel("auto", many) == "auto"
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        adamw_bf16.chosen_kernel("compiled", few)


def test_the_compiler_is_the_one_that_torch_calls(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiled.has_compiler()
    monkeypatch.setenv("CXX", "sh")
    assert compiled.has_compiler()
