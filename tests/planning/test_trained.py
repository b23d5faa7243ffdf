"""What an adapter costs: of the frozen UNet its weights and nothing else, of what is trained all the rest."""

import contextlib
from dataclasses import asdict
from math import prod

import pytest
import torch

from aquatint.models.adapter_shapes import AdapterSpec
from aquatint.models.adapters import attach
from aquatint.models.sdxl.model import build_unet, sdxl_spec
from aquatint.optim.create import create_optimizer
from aquatint.planning import trace
from aquatint.planning.disk import checkpoint_bytes, export_bytes, exported_part, snapshot_bytes
from aquatint.planning.memory import GIB, plan_memory, state_parts
from aquatint.planning.trace import trace_step
from aquatint.planning.trained import adapter_spec, num_trained, trained_shapes, unet_dtype, weight_dtype
from aquatint.training.parallelize import trained_parameters

from .small import StubTracer, config, small_spec

LORA = {"kind": "lora", "rank": 4}
SPEC = AdapterSpec("lora", 4, 4.0, "all")
SMALL = {"dtype": torch.float32, "autocast": False, "checkpointing": False, "batch_size": 1, "size_hw": (64, 96)}


def test_the_config_s_adapter_has_its_alpha_or_as_much_as_its_rank():
    assert adapter_spec(config()) is None
    assert adapter_spec(config(adapter=LORA)) == AdapterSpec("lora", 4, 4.0, "transformer")
    asked = {"kind": "dora", "rank": 8, "alpha": 2, "targets": "all", "rslora": True}
    assert adapter_spec(config(adapter=asked)) == AdapterSpec("dora", 8, 2.0, "all", rslora=True)


def test_without_an_adapter_the_unet_is_what_is_trained():
    assert trained_shapes(config(), small_spec()) == small_spec().shapes("unet")
    assert num_trained(config(), sdxl_spec()) == sdxl_spec().num_parameters("unet")


@pytest.mark.parametrize(
    ("precision", "unet", "adapter"),
    [("bf16_mixed", "bfloat16", "float32"), ("bf16_pure", "bfloat16", "bfloat16"), ("fp32", "float32", "float32")],
)
def test_a_frozen_unet_is_in_bf16_unless_nothing_is(precision, unet, adapter):
    settings = config(adapter=LORA, training={"precision": precision})
    assert (unet_dtype(settings), weight_dtype(settings)) == (unet, adapter)
    assert unet_dtype(config(training={"precision": precision})) == adapter


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw8bit"])
def test_weights_and_optimizer_state_are_those_of_the_real_thing(optimizer):
    settings = config(adapter={**LORA, "targets": "all"}, optimizer={"name": optimizer})
    unet = attach(build_unet(small_spec()).to_empty(device="cpu"), adapter_spec(settings), torch.float32)
    trained = trained_parameters(unet)
    real = create_optimizer(optimizer, trained.items(), seed=0, **settings.optimizer.model_dump(exclude={"name"}))
    for weight in trained.values():
        weight.data.zero_()
        weight.grad = torch.zeros_like(weight)
    real.step()
    weights, state, _ = state_parts(settings, small_spec())
    assert weights.bytes == sum(p.nbytes for p in trained.values())
    assert state.bytes == sum(t.nbytes for entry in real.state.values() for t in entry.values() if isinstance(t, torch.Tensor))


def test_the_plan_counts_the_frozen_unet_once():
    memory = plan_memory(config(adapter=LORA), sdxl_spec(), StubTracer(sdxl_spec()))
    parts = {part.name: part.bytes / GIB for part in next(phase for phase in memory.phases if phase.name == "training").parts}
    assert parts["frozen UNet"] == pytest.approx(4.78, abs=0.01)
    assert parts["adapter weights"] + parts["optimizer state"] + parts["moving average"] < 0.2
    assert checkpoint_bytes(config(adapter=LORA), sdxl_spec()) < 0.2 * GIB


def test_exports_and_snapshots_are_those_of_the_adapter():
    number = num_trained(config(adapter=LORA), sdxl_spec())
    assert exported_part(config(adapter=LORA), sdxl_spec()).bytes == 2 * number
    whole = config(adapter=LORA, export={"lora_names": ["kohya", "diffusers"], "merged": True})
    assert exported_part(whole, sdxl_spec()).bytes == 4 * number + export_bytes(whole, sdxl_spec())
    power = {"power_stds": [0.05, 0.1]}
    assert snapshot_bytes(config(adapter=LORA, ema=power), sdxl_spec()) == 2 * 4 * number
    assert exported_part(config(), sdxl_spec()).bytes == export_bytes(config(), sdxl_spec())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, True), (torch.float32, False)], ids=["mixed", "fp32"])
def test_tensors_without_memory_give_the_bytes_of_real_ones(monkeypatch, kind, dtypes):
    adapter = AdapterSpec(kind, 4, 4.0, "all")
    settings = {**SMALL, "dtype": dtypes[0], "autocast": dtypes[1], "adapter": adapter, "adapter_dtype": torch.float32}
    fake = trace_step(small_spec(), **settings)
    monkeypatch.setattr(trace, "_fake", contextlib.nullcontext)
    real = trace_step(small_spec(), **settings)
    assert {**asdict(fake), "peak": 0} == {**asdict(real), "peak": 0}
    assert fake.peak == pytest.approx(real.peak, rel=0.02)


def test_a_step_beside_a_frozen_unet_makes_no_gradients_of_it():
    plain = trace_step(small_spec(), **{**SMALL, "checkpointing": True})
    beside = trace_step(small_spec(), **{**SMALL, "checkpointing": True}, adapter=SPEC, adapter_dtype=torch.float32)
    assert beside.peak < plain.peak - 2 * sum(map(prod, small_spec().shapes("unet").values()))
    assert plain.forward_flops < beside.forward_flops < 1.3 * plain.forward_flops
    assert beside.flops < plain.flops
