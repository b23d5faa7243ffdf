"""Frozen weights in fewer bytes or in main memory: the plan has the bytes of the real tensors."""

from math import prod

import pytest
import torch

from aquatint.models.frozen import freeze_compactly, halve
from aquatint.models.sdxl.model import build_unet, sdxl_spec
from aquatint.optim.create import create_optimizer
from aquatint.optim.offload import MainMemory
from aquatint.planning.kept import (
    JOINING,
    compact_layers_of,
    frozen_bytes,
    half_frozen,
    made_bytes,
    optimizer_room_bytes,
    swap_room_bytes,
    swapped_blocks,
    swapped_bytes,
)
from aquatint.planning.memory import GIB, resident_parts
from aquatint.planning.trace import trace_step
from aquatint.planning.trained import adapter_spec, trained_shapes, unet_dtype
from aquatint.training.swapping import swap_blocks

from .small import config, small_spec

LORA = {"kind": "lora", "rank": 4}
HALF = {"match": ["down_blocks", "mid_block"], "learning_rate_factor": 0}


def parts(settings, spec):
    return {part.name: part.bytes for part in resident_parts(settings, spec)}


@pytest.mark.parametrize("precision", ["bf16_mixed", "fp32"])
@pytest.mark.parametrize("memory", [{"frozen_format": "int8"}, {"frozen_format": "nf4"}, {"swapped_blocks": 0.4},
                                    {"frozen_format": "int8", "swapped_blocks": 1.0}])  # fmt: skip
def test_frozen_weights_are_those_of_the_real_thing(memory, precision):
    settings, spec = config(adapter=LORA, memory=memory, training={"precision": precision}), small_spec()
    dtype = getattr(torch, unet_dtype(settings))
    unet = build_unet(spec).to(dtype).to_empty(device="cpu")
    for take in freeze_compactly(unet, compact_layers_of(settings, spec), settings.memory.frozen_format, dtype).values():
        take(torch.ones(take.__self__.shape))
    blocks = swapped_blocks(settings, spec)
    swapper = swap_blocks(unet, blocks, torch.device("cpu")) if blocks else None
    assert frozen_bytes(settings, spec) == sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    assert swap_room_bytes(settings, spec) == (swapper.device_bytes if swapper else 0)
    assert sum(swapped_bytes(settings, spec)) == (sum(map(len, swapper._stored)) if swapper else 0)


def test_frozen_groups_are_in_bf16_where_autocast_would_make_them_so():
    settings, spec = config(training={"groups": [HALF]}), small_spec()
    unet = build_unet(spec).to_empty(device="cpu")
    halve(unet, half_frozen(settings, spec))
    trained = sum(4 * prod(shape) for shape in trained_shapes(settings, spec).values())
    assert frozen_bytes(settings, spec) == sum(p.nbytes for p in unet.parameters()) - trained
    assert all(p.dtype == torch.float32 for p in unet.parameters() if p.dim() == 1)
    assert half_frozen(config(training={"groups": [HALF], "precision": "fp32"}), spec) == frozenset()


def test_the_plan_of_sdxl_has_what_is_left_on_the_gpu():
    def gib(**memory):
        found = parts(config(adapter=LORA, memory=memory), sdxl_spec())
        return [round(found.get(name, 0) / GIB, 2) for name in ("frozen UNet", "room for two frozen blocks")]

    assert gib() == [4.78, 0]
    assert gib(frozen_format="int8") == [2.73, 0]
    assert gib(frozen_format="nf4") == [1.83, 0]
    assert gib(swapped_blocks=1.0) == [0.71, 0.13]
    assert gib(swapped_blocks=1.0, frozen_format="nf4") == [0.68, 0.04]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "adamw_bf16"])
def test_the_room_for_state_is_at_least_that_of_the_real_thing_and_not_much_more(name):
    precision = "bf16_pure" if name == "adamw_bf16" else "fp32"
    settings, spec = config(memory={"optimizer_state": "cpu"}, optimizer={"name": name}, training={"precision": precision}), small_spec()
    weights = {key: torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, unet_dtype(settings))))
               for key, shape in trained_shapes(settings, spec).items()}  # fmt: skip
    optimizer = create_optimizer(name, weights.items(), seed=0, **settings.optimizer.model_dump(exclude={"name"}))
    optimizer.keeper = MainMemory(torch.device("cpu"), slab_bytes=1 << 20)
    for _ in range(2):
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.keeper.device_bytes <= 1.02 * optimizer_room_bytes(settings, spec)
    assert name in JOINING or optimizer.keeper.device_bytes >= 0.7 * optimizer_room_bytes(settings, spec)


def test_state_in_main_memory_leaves_room_for_the_largest_two():
    here, there = (parts(config(memory={"optimizer_state": place}), sdxl_spec()) for place in ("model", "cpu"))
    assert round(here["optimizer state"] / GIB, 1) == 19.1
    assert "optimizer state" not in there
    assert round(there["room for optimizer state"] / GIB, 2) == 0.44
    on_cpu = parts(config(memory={"optimizer_state": "cpu"}, training={"device": "cpu"}), sdxl_spec())
    assert on_cpu["optimizer state"] == here["optimizer state"]


def test_a_weight_that_is_made_for_a_moment_counts():
    largest = 10240 * 1280
    assert made_bytes(config(adapter=LORA), sdxl_spec()) == 0
    assert made_bytes(config(adapter=LORA, memory={"frozen_format": "int8"}), sdxl_spec()) == 2 * largest
    assert made_bytes(config(adapter=LORA, memory={"frozen_format": "nf4"}), sdxl_spec()) == 8 * largest


@pytest.mark.long
def test_a_traced_pass_leaves_as_much_behind_as_beside_plain_layers():
    kept = "int8"
    settings, spec = config(adapter=LORA, memory={"frozen_format": kept}), small_spec()
    common = {"dtype": torch.bfloat16, "autocast": True, "checkpointing": False, "batch_size": 1, "size_hw": (64, 64)}
    adapter = {"adapter": adapter_spec(settings), "adapter_dtype": torch.float32}
    plain = trace_step(spec, **common, **adapter)
    compact = trace_step(spec, **common, **adapter, compact=(tuple(compact_layers_of(settings, spec)), kept))
    assert compact.flops == plain.flops
    assert 0.98 * plain.activations <= compact.activations <= plain.activations
