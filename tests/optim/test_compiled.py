"""What a C++ compiler makes of an update for a CPU has the bits of plain torch."""

import logging

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from aquatint.errors import UsageError
from aquatint.optim import adamw_bf16, blockwise, compiled
from aquatint.optim.adamw8bit import AdamW8bit, adamw8bit_
from aquatint.optim.adamw_bf16 import AdamWBF16, adamw_
from aquatint.optim.sizes import BLOCK
from aquatint.optim.soap import Soap, round_rows_

CPU = torch.device("cpu")
SHAPES = [(20_001,), (129, 130), (128, 256), (16, 128, 3, 3), (7,), (300, 256, 9)]
EVERY_BFLOAT16 = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
LARGEST = torch.finfo(torch.bfloat16).max
KINDS = {
    "stochastic": (AdamWBF16, torch.bfloat16, {}),
    "kahan": (AdamWBF16, torch.bfloat16, {"rounding": "kahan"}),
    "8 bits": (AdamW8bit, torch.bfloat16, {}),
    "8 bits, float32": (AdamW8bit, torch.float32, {}),
}
SETTINGS = {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
STILL = {"step": 1, "lr": 0.0, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 0.0}  # leaves a weight and makes moments g and g^2


def drawn(count: int, seed: int = 0) -> list[Tensor]:
    """A gradient, a weight and its moments, bfloat16."""
    bits = torch.Generator().manual_seed(seed)
    grad, param, exp_avg = (torch.randn(count, generator=bits).bfloat16() for _ in range(3))
    return [grad, param, exp_avg, torch.rand(count, generator=bits).bfloat16()]


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but that one NaN is as good as another."""
    number = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    is_nan = expected.isnan()
    return torch.equal(found.isnan(), is_nan) and torch.equal(found.view(number)[~is_nan], expected.view(number)[~is_nan])


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


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_have_the_bits_of_plain_ones(kind):
    expected, found = (trained(kernel, kind, 6) for kernel in ("none", "compiled"))
    assert [name for name in expected if not same(found[name], expected[name])] == []


@pytest.mark.parametrize("start", [0, 1, 2 * 10**9 + 1])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 999, 70_000])
@pytest.mark.parametrize("compensates", [False, True])
def test_a_part_of_any_length_at_any_place_is_stepped_and_nothing_beside_it(count, start, compensates, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tensors = drawn(count + 3) + ([torch.full((count + 3,), 1e-3).bfloat16()] if compensates else [])
    for number, offset in enumerate((1, 2, 1, 0, 1)[: len(tensors)]):  # odd addresses too
        tensors[number] = tensors[number][offset : offset + count]
    wholes = [tensor._base.clone() for tensor in tensors]
    parts = [whole[tensor.storage_offset() :][:count] for whole, tensor in zip(wholes, tensors, strict=True)]
    if count:
        adamw_(*parts, key=(5, 7), start=start, **SETTINGS)
    assert compiled.adamw_(*tensors, key=(5, 7), start=start, **SETTINGS)
    assert all(same(tensor._base, whole) for tensor, whole in zip(tensors, wholes, strict=True))


def test_every_bfloat16_and_what_lies_beyond_is_rounded_as_in_plain_torch():
    """Gradients that are infinite, NaN, subnormal or of the largest size, and moments and weights of all sizes, compensated or not."""
    special = torch.tensor([0.0, -0.0, LARGEST, -LARGEST, torch.inf, -torch.inf, torch.nan, 1e-39, -1e-45, 3e38, 1.0]).bfloat16()
    every = EVERY_BFLOAT16.repeat_interleave(len(special))
    grads = special.repeat(len(EVERY_BFLOAT16))
    huge = {**SETTINGS, "weight_decay": -1e3}  # so that weights outgrow bfloat16
    for others in ([], [torch.full_like(every, 1e-3)]):
        expected = [tensor.clone() for tensor in (every, every, every.abs(), *others)]
        found = [tensor.clone() for tensor in expected]
        adamw_(grads, *expected, key=(1, 2), **huge)
        assert compiled.adamw_(grads, *found, key=(1, 2), **huge)
        assert all(same(one, other) for one, other in zip(found, expected, strict=True))
        assert (expected[0].abs() == (torch.inf if others else LARGEST)).sum() > 1000


def around(values: Tensor) -> Tensor:
    """Each of them, and the float32 just below and above."""
    return torch.cat([values, torch.nextafter(values, torch.tensor(-2.0)), torch.nextafter(values, torch.tensor(2.0))])


@pytest.mark.parametrize("scale", [1.0, -0.37])
def test_codes_are_those_of_plain_torch_for_every_bfloat16_and_on_both_sides_of_every_border(scale):
    """A step whose first moments are the gradients, in blocks that begin with their largest."""
    book = blockwise.codebook(True, CPU)
    shares = torch.cat([EVERY_BFLOAT16.float(), around(EVERY_BFLOAT16.float()), around(book.border[:-1]), around(book.value)])
    shares = shares[shares.abs() <= 1]
    rows = torch.nn.functional.pad(shares, (0, -len(shares) % (BLOCK - 1))).view(-1, BLOCK - 1)
    grad = (torch.nn.functional.pad(rows, (1, 0), value=1.0) * scale).flatten()
    expected, found = state_of(grad, adamw8bit_), state_of(grad, compiled.adamw8bit_)
    assert [name for name in expected if not same(found[name], expected[name])] == []
    assert len(expected["exp_avg_code"].unique()) == BLOCK


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42])
def test_blocks_of_nothing_or_of_what_is_no_number_are_those_of_plain_torch(value):
    grad = torch.zeros(3 * BLOCK)
    grad[BLOCK + 5] = value
    expected, found = state_of(grad, adamw8bit_), state_of(grad, compiled.adamw8bit_)
    for name in ("exp_avg_scale", "exp_avg_sq_scale"):
        assert same(found[name], expected[name])
    is_finite = expected["exp_avg_scale"].isfinite().repeat_interleave(BLOCK)
    assert all(torch.equal(found[name][is_finite], expected[name][is_finite]) for name in ("exp_avg_code", "exp_avg_sq_code"))


def state_of(grad: Tensor, update) -> dict[str, Tensor]:
    """State whose first moments are a gradient, by an update in plain torch or compiled."""
    param, state = torch.zeros_like(grad), {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        state[f"{name}_code"], state[f"{name}_scale"] = blockwise.quantise(torch.zeros_like(grad), signed=signed)
    if update is adamw8bit_:
        adamw8bit_(param, grad, state, slice(0, len(grad)), key=(1, 2), **STILL)
    else:
        assert update(param, grad, state, key=(1, 2), **STILL)
    return state


@pytest.mark.parametrize("count", [1, 255, 256, 300_001])
def test_three_vectors_are_rounded_as_in_plain_torch(count):
    bits = torch.Generator().manual_seed(0)
    values = [torch.randn(count, generator=bits) * scale for scale in (1.0, 1e-40, 1e38)]
    for value in values[:: 1 if count > 1 else 3]:
        value[-1] = torch.nan
    expected, found = ([torch.zeros(count, dtype=torch.bfloat16) for _ in values] for _ in range(2))
    rows = [value.view(1, -1) for value in values]
    round_rows_([target.view(1, -1) for target in expected], rows, (3, 4))
    assert compiled.round_rows_(found, values, (3, 4))
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_soap_has_the_same_bits_with_compiled_rounding(dtype):
    results = []
    for kernel in ("none", "compiled"):
        bits = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(shape, generator=bits).to(dtype)) for shape in ((5, 7), (6, 3, 3, 3), (9,))]
        params[1].data = params[1].data.to(memory_format=torch.channels_last)
        optimizer = Soap(params, lr=1e-2, precond_every=2, kernel=kernel, seed=1)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape, generator=bits).to(dtype)
            optimizer.step()
        results.append([*params, *(optimizer.state[param][name] for param in params for name in ("exp_avg", "exp_avg_sq"))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_is_not_for_it_is_left_as_it_is():
    tensors = drawn(50)
    before = [tensor.clone() for tensor in tensors]
    assert not compiled.adamw_(*tensors, key=(1, 2), finite=torch.tensor(False), **SETTINGS)
    assert not compiled.adamw_(tensors[0], tensors[1].float(), *tensors[2:], key=(1, 2), **SETTINGS)
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def test_auto_compiles_for_many_weights_on_a_cpu_only_where_it_can(monkeypatch, caplog):
    few, many = [torch.zeros(5)], [torch.zeros(1).expand(adamw_bf16.WORTH_COMPILING)]
    assert [adamw_bf16.chosen_kernel(kernel, few) for kernel in ("auto", "compiled", "none")] == ["auto", "compiled", "none"]
    assert [adamw_bf16.chosen_kernel(kernel, many) for kernel in ("auto", "compiled", "none")] == ["compiled", "compiled", "none"]
    assert adamw_bf16.chosen_kernel("compiled", [torch.zeros(5, device="meta")]) == "auto"  # not on a CPU
    compiled.library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert adamw_bf16.chosen_kernel("auto", many) == "auto"
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        adamw_bf16.chosen_kernel("compiled", few)
    monkeypatch.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING, "aquatint"):
        assert adamw_bf16.chosen_kernel("auto", many) == "auto"
    assert "the C++ compiler false fails: exit code 1" in caplog.text
    with pytest.raises(UsageError, match="exit code 1"):
        adamw_bf16.chosen_kernel("compiled", few)
    monkeypatch.setenv("CXX", "true")  # makes nothing that could be loaded
    with pytest.raises(UsageError, match=r"true fails: .*adamw\.so"):
        adamw_bf16.chosen_kernel("compiled", few)
