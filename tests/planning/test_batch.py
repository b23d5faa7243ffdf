import pytest

from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning.batch import batch_sizes, is_open, largest_batch_size, with_batch_size
from aquatint.planning.fit_report import plan_to_fit, vram_text
from aquatint.planning.memory import GIB, plan_memory
from aquatint.planning.report import plan_text
from aquatint.planning.sources import Listing

from .small import StubTracer, config

SPEC = sdxl_spec()
TRACER = StubTracer(SPEC)
HALF = {"precision": "bf16_pure", "pictures_per_step": 12, "batch_size": "auto"}


def auto(**training):
    return config(training={**HALF, **training}, optimizer={"name": "adafactor"}, ema={"enabled": False}, cache={"batch_size": 1})


def test_a_step_is_made_of_equal_parts():
    assert batch_sizes(12) == [12, 6, 4, 3, 2, 1]
    assert batch_sizes(1) == [1]
    settled = [with_batch_size(auto(), size).training for size in batch_sizes(12)]
    assert [(one.at_once, one.accumulation_steps, one.per_step) for one in settled][:3] == [(12, 1, 12), (6, 2, 12), (4, 3, 12)]


@pytest.mark.parametrize("recomputing", ["pointwise", True])
def test_it_is_the_largest_that_the_plan_has_room_for(recomputing):
    wanted = auto(gradient_checkpointing=recomputing)
    needed = {size: plan_memory(with_batch_size(wanted, size), SPEC, TRACER).needed for size in batch_sizes(12)}
    for size, limit in needed.items():
        assert largest_batch_size(wanted, SPEC, limit, TRACER) == size
        assert largest_batch_size(wanted, SPEC, limit - 1, TRACER) == max((other for other in needed if other < size), default=1)


def test_all_at_once_may_need_less_than_half_of_them_twice():
    freed = auto(fused_backward=True, clip="delayed", pictures_per_step=2)
    needed = {size: plan_memory(with_batch_size(freed, size), SPEC, TRACER).needed for size in (1, 2)}
    assert needed[2] < needed[1]
    assert largest_batch_size(freed, SPEC, needed[2], TRACER) == 2


def test_the_plan_says_what_a_card_would_take():
    needed = plan_memory(with_batch_size(auto(), 4), SPEC, TRACER).needed
    text = vram_text(auto(), SPEC, needed, TRACER)
    assert '`training.batch_size = "auto"` would be 4, 3 times a step' in text
    assert "too much" not in text


def test_without_a_card_the_plan_is_for_one_picture_at_a_time(monkeypatch):
    monkeypatch.setattr("aquatint.planning.report.Tracer", StubTracer)
    monkeypatch.setattr("aquatint.planning.report.list_source", lambda source: Listing(12))
    text = plan_text(auto())
    assert "this is for one picture at a time, and `--vram 24GiB` says" in text
    assert "and a batch of 1" in text


def test_settings_that_fit_have_a_number_for_it(monkeypatch):
    monkeypatch.setattr("aquatint.planning.fit_report.Tracer", StubTracer)
    text, file = plan_to_fit(auto(), SPEC, 16 * GIB)
    assert "training.batch_size=4 training.accumulation_steps=3" in text
    assert "pictures_per_step = 12" in file
    assert is_open(auto())
    assert "auto" not in [line.partition(" = ")[2] for line in file.splitlines() if line.startswith("batch_size")]
