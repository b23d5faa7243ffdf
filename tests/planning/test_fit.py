import itertools

import pytest

from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning import memory
from aquatint.planning.fit import Search, advice, beyond, fit, helps, is_allowed, merged, mild_helps
from aquatint.planning.knobs import KNOBS, with_changes
from aquatint.planning.memory import GIB, Tracer, plan_memory

from .small import StubTracer, config, small_spec

SPEC = sdxl_spec()
TRACER = StubTracer(SPEC)
BATCHES = {"training": {"batch_size": 2, "accumulation_steps": 2}, "samples": {"prompts": ["a cat"]}}


def least_cost(settings, limit, spec, tracer):
    """By trying every way to turn every knob."""
    ways = itertools.product(*(((), *((level,) for level in knob.levels(settings))) for knob in KNOBS))
    joined = [[level for way in choice for level in way] for choice in ways]
    for levels in sorted(joined, key=lambda levels: sum(level.cost for level in levels)):
        changed = with_changes(settings, merged(levels))
        if is_allowed(changed) and plan_memory(changed, spec, tracer).needed <= limit:
            return sum(level.cost for level in levels)
    return None


def test_what_fits_already_is_left_as_it_is():
    found = fit(config(), SPEC, 80 * GIB, TRACER)
    assert (found.fits, found.levels, found.config) == (True, (), config())


@pytest.mark.parametrize("gib", [48, 24, 20])
def test_the_settings_that_are_found_fit_and_contradict_nothing(gib):
    found = fit(config(**BATCHES), SPEC, gib * GIB, TRACER)
    assert found.fits
    assert found.plan == plan_memory(with_changes(config(**BATCHES), found.changes), SPEC, TRACER)
    assert found.config.training.batch_size * found.config.training.accumulation_steps == 4


@pytest.mark.parametrize("gib", [40, 24, 14])
def test_no_other_settings_cost_less(gib):
    settings = config(cache={"batch_size": 1, "vae_precision": "bfloat16"}, training={"batch_size": 2})
    found = fit(settings, SPEC, gib * GIB, TRACER)
    assert sum(level.cost for level in found.levels) == least_cost(settings, gib * GIB, SPEC, TRACER)


@pytest.mark.parametrize(
    "training",
    [
        {"batch_size": 3, "gradient_checkpointing": "pointwise"},
        {"batch_size": 3, "fused_backward": True, "clip": "delayed", "precision": "fp32"},
    ],
)
def test_what_is_turned_down_without_a_full_trace_would_not_have_fitted(training):
    settings = config(buckets={"resolution": 64, "min_side": 64}, optimizer={"name": "adamw8bit"}, training=training)
    search = Search(settings, small_spec(), 100 * GIB, Tracer(small_spec()))
    real = memory.training(settings, small_spec(), search.tracer, search.size_hw).bytes
    assert 0.7 * real < search._least_bytes(settings) <= real


def test_if_nothing_fits_the_least_is_named():
    found = fit(config(**BATCHES), SPEC, 8 * GIB, TRACER)
    assert not found.fits
    assert found.config.optimizer.name == "adafactor"
    assert found.config.training.precision == "bf16_pure"
    assert found.plan.needed <= fit(config(**BATCHES), SPEC, 20 * GIB, TRACER).plan.needed


def test_what_else_would_fit_is_told_apart():
    found = fit(config(**BATCHES), SPEC, 8 * GIB, TRACER)
    ways = list(beyond(found, SPEC, TRACER))
    assert ways[0].level.changes == {"training.batch_size": 1, "training.accumulation_steps": 1}
    assert all(way.plan.needed <= 8 * GIB for way in ways)


def test_single_settings_are_tried_up_to_the_first_that_is_enough():
    before = plan_memory(config(), SPEC, TRACER).needed
    found = list(helps(config(), SPEC, before - 6 * GIB, TRACER))
    assert [one.level.cost for one in found] == sorted(one.level.cost for one in found)
    assert [one.plan.needed <= before - 6 * GIB for one in found] == [False] * (len(found) - 1) + [True]
    assert all(one.plan.needed < before for one in found)


def test_what_makes_no_phase_smaller_that_is_too_large_is_not_tried():
    keys = {key for one in helps(config(samples={"prompts": ["a"]}), SPEC, GIB, TRACER) for key in one.level.changes}
    assert "ema.device" in keys
    encoding = config(cache={"batch_size": 32})
    assert [list(one.level.changes) for one in helps(encoding, SPEC, 64 * GIB, TRACER)] == [["cache.batch_size"]]


def test_the_plan_names_one_level_of_each_knob():
    found = list(mild_helps(config(**BATCHES), SPEC, TRACER))
    knobs = [next(knob.name for knob in KNOBS if one.level in knob.levels(config(**BATCHES))) for one in found]
    assert len(knobs) == len(set(knobs)) > 3


def test_advice_after_running_out_of_memory_names_a_change_whatever_the_plan_said(monkeypatch):
    monkeypatch.setattr("aquatint.planning.fit.Tracer", StubTracer)
    assert "training.fused_backward=true" in advice(config(), SPEC, None)
    assert "training.fused_backward=true" in advice(config(), SPEC, 200 * GIB)
    assert "--fit" in advice(config(), SPEC, 10 * GIB)
