"""Optimizer state in main memory: the bits of a step beside the weights, and on the device only what is being stepped."""

import copy

import pytest
import torch

from aquatint.errors import full_memory
from aquatint.optim import tensorwise
from aquatint.optim.clipping import Clipping
from aquatint.optim.offload import MainMemory, settle
from aquatint.optim.packed import Arena, Layout
from aquatint.optim.sizes import packed_bytes

from .test_create import EACH_KIND, make, model, train
from .test_fused import assert_same, run, run_fused

CPU = torch.device("cpu")


def offloaded(name, module):
    optimizer = make(name, module)
    optimizer.keeper = MainMemory(CPU, slab_bytes=1 << 16)
    return optimizer


def kept(optimizer):
    """The state of an optimizer but for its counts."""
    return [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]


@EACH_KIND
def test_a_step_has_the_bits_of_one_beside_the_weights(name, dtype):
    plain, other = model(dtype), model(dtype)
    optimizers = make(name, plain), offloaded(name, other)
    for module, optimizer in zip((plain, other), optimizers, strict=True):
        train(module, optimizer, range(5))
    assert_same(plain, optimizers[0], other, optimizers[1])


@EACH_KIND
def test_so_has_one_inside_the_backward_pass(name, dtype, monkeypatch):
    monkeypatch.setattr(tensorwise, "JOINED_ELEMENTS", 300)
    plain, other = model(dtype), model(dtype)
    optimizers = make(name, plain), offloaded(name, other)
    run(plain, optimizers[0], Clipping("per_tensor", 0.05), 4)
    run_fused(other, optimizers[1], Clipping("per_tensor", 0.05), 4)
    assert_same(plain, optimizers[0], other, optimizers[1])


@EACH_KIND
def test_a_state_that_was_loaded_goes_on_with_the_same_bits(name, dtype):
    plain, other = model(dtype), model(dtype)
    optimizers = make(name, plain), offloaded(name, other)
    for module, optimizer in zip((plain, other), optimizers, strict=True):
        train(module, optimizer, range(2))
        train(module, optimizer, range(7, 9))
    fresh = model(dtype)
    again = offloaded(name, fresh)
    train(fresh, again, range(3))  # of another state, which must leave no trace
    fresh.load_state_dict(other.state_dict())
    again.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for module, optimizer in (plain, optimizers[0]), (other, optimizers[1]), (fresh, again):
        train(module, optimizer, range(9, 11))
    assert_same(plain, optimizers[0], other, optimizers[1])
    assert_same(plain, optimizers[0], fresh, again)


def test_weights_without_a_gradient_keep_their_state():
    plain, other = model(), model()
    optimizers = make("adamw_bf16", plain), offloaded("adamw_bf16", other)
    for module, optimizer in zip((plain, other), optimizers, strict=True):
        train(module, optimizer, range(2))
        module[3].weight.grad = module[0].bias.grad = None
        optimizer.step()
        train(module, optimizer, range(2, 3))
    assert_same(plain, optimizers[0], other, optimizers[1])


def test_a_step_that_is_left_out_changes_nothing():
    module = model(torch.bfloat16)
    optimizer = offloaded("adamw8bit", module)
    train(module, optimizer, range(2))
    before = [value.clone() for value in kept(optimizer)]
    optimizer.step(finite=torch.tensor(False))
    assert all(torch.equal(value, old) for value, old in zip(kept(optimizer), before, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16"])
def test_between_steps_the_state_is_in_main_memory_and_two_rooms_are_on_the_device(name):
    module = model()
    optimizer = offloaded(name, module)
    for step in range(3):
        train(module, optimizer, range(step, step + 1))
        settle(optimizer)
        whole = {value.untyped_storage().data_ptr() for value in kept(optimizer)}
        assert whole <= {slab.untyped_storage().data_ptr() for slab, _ in optimizer.keeper._arena._slabs}
    largest = max(sum(param.nbytes for param in unit.params) for unit in optimizer.units())
    assert optimizer.keeper.device_bytes <= 2 * packed_bytes([2 * largest]) + 2 * packed_bytes([1]) * len(list(module.parameters()))


def test_what_comes_next_is_on_its_way_before_it_is_asked_for(monkeypatch):
    module = model()
    optimizer = offloaded("adamw", module)
    train(module, optimizer, range(2))  # the first makes the state, the second knows what comes after what
    asked, load = [], MainMemory._load
    monkeypatch.setattr(MainMemory, "_load", lambda self, box, room: asked.append(room) or load(self, box, room))
    train(module, optimizer, range(2, 3))
    units = len(optimizer.units())
    assert asked == [(asked[0] + turn) % 2 for turn in range(units)]  # each was brought once, in turns into the two rooms


def test_packed_tensors_keep_their_values_types_and_order_of_dimensions():
    tensors = [
        torch.arange(5, dtype=torch.uint8), torch.randn(3, 2), torch.tensor(2.0, dtype=torch.bfloat16),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ]  # fmt: skip
    layout = Layout.of(tensors)
    views = layout.views(torch.zeros(layout.num_bytes, dtype=torch.uint8))
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
        assert view.stride() == tensor.stride()
    assert all(torch.equal(view, tensor) for view, tensor in zip(views, tensors, strict=True))
    assert layout.num_bytes == packed_bytes(tensor.nbytes for tensor in tensors) == 64 + 64 + 64 + 512


def test_an_arena_fills_its_slabs_before_it_takes_another():
    arena = Arena(pinned=False, slab_bytes=256)
    taken = [arena.take(size) for size in (100, 200, 64, 300, 1)]
    assert [len(vector) for vector in taken] == [100, 200, 64, 300, 1]
    assert [(used, len(slab)) for slab, used in arena._slabs] == [(128, 128), (256, 256), (128, 256), (320, 512)]
    for number, vector in enumerate(taken):
        vector.fill_(number)
    assert all((vector == number).all() for number, vector in enumerate(taken))


@pytest.mark.parametrize(("words", "kind"), [("CUDA error: out of memory", MemoryError), ("CUDA error: unknown error", RuntimeError)])
def test_what_an_arena_lacks_is_main_memory_though_cuda_does_not_say_so(words, kind, monkeypatch):
    def no_memory(*_, **__):
        raise torch.AcceleratorError(words)

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(kind) as caught:
        Arena(pinned=True).take(1000)
    assert full_memory(caught.value) == ("main" if kind is MemoryError else None)


@pytest.mark.parametrize("num_bytes", [1, 1000, 5000, 30000])
def test_an_arena_takes_no_more_than_twice_what_is_asked_for(num_bytes):
    arena = Arena(pinned=False, slab_bytes=4096)
    for _ in range(0, num_bytes, 192):
        arena.take(192)
    assert sum(len(slab) for slab, _ in arena._slabs) <= 2 * max(256, sum(used for _, used in arena._slabs))
