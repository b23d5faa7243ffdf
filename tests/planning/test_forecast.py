import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.config.duration import Duration
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.planning.forecast import (
    CARDS,
    Card,
    Speed,
    Work,
    card_lines,
    forecast_lines,
    measured_speed,
    plan_extras,
    plan_work,
    read_timings,
    seconds_on,
    split_by_process,
    tflop,
    time_text,
    validation_pictures,
    work_lines,
)
from aquatint.planning.schedule import plan_steps

from .small import TERA, StubTracer, config

SIZE = (1024, 1024)
PURE = {"training": {"precision": "bf16_pure", "batch_size": 2, "accumulation_steps": 3, "length": "100 steps"}}


def work_of(settings):
    training = settings.training
    plan = plan_steps(60, training.batch_size, training.accumulation_steps, training.length)
    return plan_work(settings, StubTracer(sdxl_spec()), SIZE, plan)


def lines_of(settings, num_pictures=60):
    training = settings.training
    plan = plan_steps(60, training.batch_size, training.accumulation_steps, training.length)
    return forecast_lines(settings, StubTracer(sdxl_spec()), plan, num_pictures)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_a_step_is_all_its_samples_and_a_run_all_its_steps(batch_size, accumulation_steps):
    training = {"batch_size": batch_size, "accumulation_steps": accumulation_steps, "length": "100 steps"}
    work = work_of(config(training=training))
    assert (work.forward, work.sample) == (7 * TERA, 28 * TERA)
    assert work.step == 28 * TERA * batch_size * accumulation_steps
    assert work.run == 100 * work.step
    assert work_of(config(training={**training, "gradient_checkpointing": False})).sample == 21 * TERA


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 2000), st.integers(1, 64), st.integers(1, 10**6), st.floats(0.05, 1))
def test_a_card_takes_the_work_divided_by_its_share_of_the_peak(peak, samples, steps, share):
    work = Work(7e12, 2e13, samples, steps)
    step, run = seconds_on(Card("a", peak), work, share)
    assert step == pytest.approx(20 * samples / (peak * share))
    assert run == pytest.approx(step * steps)


def test_the_arithmetic_is_written_out():
    work = Work(6.76e12, 25.44e12, 4, 1000)
    lines = work_lines(work, (896, 1152), recomputes=True)
    assert "(1152 × 896 pixels)" in lines[0]
    assert lines[1:] == [
        "a sample: forward pass 6.76 TFLOP + backward pass, which computes much of it again, 18.68 TFLOP = 25.44 TFLOP",
        "a step: 25.44 TFLOP × 4 samples = 101.76 TFLOP",
        "the run: 101.76 TFLOP × 1,000 steps = 101,760 TFLOP (1 TFLOP is 10¹² floating-point operations)",
    ]
    assert "again" not in work_lines(work, (8, 8), recomputes=False)[1]


def test_the_forecast_names_its_share_and_every_card():
    lines = card_lines(Work(6.76e12, 25.44e12, 1, 1000))
    assert lines[0].startswith("a forecast, not a promise: divided by 30% of a card's bf16 peak")
    assert [line.split("  ")[1] for line in lines[3:]] == [card.name for card in CARDS]
    assert lines[3].split() == ["RTX", "3090", "71", "TFLOP/s", "1.19", "s", "20", "min"]  # 25.44 / (71 × 0.3) = 1.194 s


def test_work_beside_the_steps_is_counted_in_steps():
    prompts = {"prompts": ["a", "b"], "steps": 10}
    sections = {"crop": {"flip_prob": 0.5}, "validation": {"share": 0.1, "timesteps": 8}, "samples": prompts}
    settings = config(**sections, training={"length": "100 steps"})
    work = work_of(settings)
    extras = {extra.name: extra for extra in plan_extras(settings, StubTracer(sdxl_spec()), SIZE, work, 60)}
    assert extras["encoding what is not in the cache"].flops == 60 * 2 * 5 * TERA
    assert extras["each validation"].flops == (2 * 6 + 16) * 8 * 7 * TERA
    assert extras["each set of sample pictures"].flops == 2 * 10 * 2 * 7 * TERA
    measured = "(6 pictures × 2 (average and raw) + 16 trained ones) × 8 noise levels"
    assert f"  each validation: {measured} × 7 TFLOP = 1,568 TFLOP, as much as 56 steps" in lines_of(settings)
    unguided = config(samples={**prompts, "guidance_scale": 1.0}, validation={"every": "never"})
    names = {extra.name: extra for extra in plan_extras(unguided, StubTracer(sdxl_spec()), SIZE, work, 60)}
    assert names["each set of sample pictures"].flops == 2 * 10 * 7 * TERA
    assert "each validation" not in names


@pytest.mark.parametrize(("share", "expected"), [(0.1, 20), (0.0, 64), (0.5, 64)])
def test_validation_measures_held_out_pictures_or_some_of_the_training_set(share, expected):
    assert validation_pictures(config(validation={"share": share, "max_pictures": 64}), 200) == expected


@pytest.mark.parametrize(("apart", "expected"), [(10, 10), (100, 64)])
@pytest.mark.parametrize("share", [0.02, 0.0])
def test_validation_measures_the_sources_for_it_if_there_are_any(apart, expected, share):
    settings = config(validation={"share": share, "max_pictures": 64}, **PURE)
    assert validation_pictures(settings, 200, apart) == expected
    (each,) = [
        extra for extra in plan_extras(settings, StubTracer(sdxl_spec()), SIZE, work_of(settings), 200, apart) if "each" in extra.name
    ]
    assert each.how.startswith(f"({expected} pictures × 2 (average and raw) + 16 trained ones) × 8 noise levels")


def test_float32_gets_no_forecast():
    lines = lines_of(config(training={"precision": "fp32"}))
    assert lines[-1].startswith("there is no forecast for `training.precision = fp32`")
    assert not any("RTX" in line for line in lines)


def test_rows_of_two_processes_are_never_compared():
    assert split_by_process([(10, 5.0), (20, 9.0), (30, 4.0), (40, 8.0)]) == [[(10, 5.0), (20, 9.0)], [(30, 4.0), (40, 8.0)]]
    assert split_by_process([(10, 5.0), (10, 9.0)]) == [[(10, 5.0)], [(10, 9.0)]]
    assert split_by_process([]) == []


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.integers(1, 100), st.lists(st.integers(2, 6), min_size=1, max_size=4))
def test_a_steady_speed_is_found_whatever_the_restarts(each, every, processes):
    rows, step = [], 0
    for length in processes:
        start = step
        for _ in range(length):
            step += every
            rows.append((step, (step - start) * each + 1.5))
    speed = measured_speed(rows)
    assert speed.seconds_per_step == pytest.approx(each)
    assert speed.done == step


def test_the_latest_process_counts_unless_it_cannot_tell_yet():
    assert measured_speed([(10, 20.0), (20, 40.0), (30, 3.0), (40, 5.0)]) == Speed(30, 40, 2.0, done=40)
    assert measured_speed([(10, 20.0), (20, 40.0), (30, 3.0)]) == Speed(10, 20, 20.0, done=30)
    assert measured_speed([(10, 20.0), (20, 3.0)]) is None
    assert measured_speed([]) is None


def run_with_timings(folder, rows, **sections):
    (folder / "a").mkdir()
    (folder / "a" / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    return config(run={"name": "a", "folder": str(folder)}, **{**PURE, **sections})


def test_rows_without_a_time_and_lines_cut_short_are_left_out(tmp_path):
    run_with_timings(tmp_path, [{"step": 1, "seconds": 2}, {"step": 2}, {"step": 3, "seconds": None}, {"step": 4, "seconds": 2.5}])
    assert read_timings(tmp_path / "a" / "timings.jsonl") == [(1, 2.0), (4, 2.5)]
    assert read_timings(tmp_path / "none.jsonl") == []


def test_a_measured_speed_takes_the_place_of_the_forecast(tmp_path):
    rows = [{"step": 10, "seconds": 30.0}, {"step": 50, "seconds": 110.0}]
    lines = lines_of(run_with_timings(tmp_path, rows))
    assert lines[-4:] == [
        f"measured in {tmp_path / 'a'}, with all that is done between steps:",
        "  steps 10 to 50 took 80 s, 2 s a step",
        "  168 TFLOP ÷ 2 s = 84 TFLOP a second",
        "  left: 100 - 50 = 50 steps × 2 s = 1.7 min",
    ]
    assert not any("RTX" in line for line in lines)


def test_a_finished_run_has_no_time_left(tmp_path):
    rows = [{"step": 50, "seconds": 30.0}, {"step": 100, "seconds": 110.0}]
    assert lines_of(run_with_timings(tmp_path, rows))[-1] == "  all 100 steps are done"


def test_without_measurements_there_is_a_forecast(tmp_path):
    assert any("RTX 4090" in line for line in lines_of(run_with_timings(tmp_path, [{"step": 10, "seconds": 30.0}])))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00123, "0.00123 s"), (2.114, "2.11 s"), (59.6, "59.6 s"), (102, "1.7 min"), (599, "10 min"), (1260, "21 min"),
        (99.6 * 60, "1 h 40 min"), (12000, "3 h 20 min"), (47.9 * 3600, "2 days 0 h"), (100.2 * 3600, "4 days 4 h"),
    ],
)  # fmt: skip
def test_times_read_well(seconds, text):
    assert time_text(seconds) == text


def test_operations_have_no_useless_digits():
    assert [tflop(value) for value in (25.4428e12, 7e12, 1.2e9, 123456e12)] == ["25.44 TFLOP", "7 TFLOP", "0.0012 TFLOP", "123,456 TFLOP"]


def test_lengths_in_epochs_count_too():
    settings = config(training={"length": str(Duration(2, "epochs")), "batch_size": 6})
    assert work_of(settings).steps == 20
