import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.config.schema import Config
from aquatint.models.sdxl.load import open_base
from aquatint.training import objective, tasks, trainer
from aquatint.training.build import Built, build_run, train_run
from aquatint.training.build_tasks import build_validation
from aquatint.training.checkpoint import sorted_checkpoints
from aquatint.training.objective import Objective
from aquatint.training.prepare import prepare
from aquatint.training.tasks import Validation, validate
from aquatint.training.trainer import StopRequest, train
from aquatint.training.validation import Errors, factors, figures, measure, number_of, validation_timesteps, worst_text
from tests.runs import rows, small_config

SAMPLES = {"every": "4 steps", "prompts": ["a red circle"], "height": 64, "width": 64, "steps": 2}


@dataclass
class Trained:
    """A run after two steps, and what it measures: two held-out pictures and two trained ones."""

    config: Config
    built: Built
    chosen: Validation

    @property
    def objective(self) -> Objective:
        return self.built.run.parts.objective


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("validation")
    config = small_config(folder, tiny_base, training={"length": "2 steps"}, validation={"share": 0.4}, samples=SAMPLES)
    run_folder = config.run.folder / config.run.name
    with contextlib.ExitStack() as stack:
        built = build_run(config, run_folder, stack, accept_changes=False)
        built.run.state = train(built.run, StopRequest()).state
        data = prepare(config, open_base(config.model.base), say=lambda text: None)
        yield Trained(config, built, build_validation(config, built.run.parts.objective, data, run_folder))


# What is measured


@pytest.mark.parametrize(
    ("number", "lowest", "highest", "terminal", "expected"),
    [
        (8, 0, 999, True, (62, 187, 312, 437, 562, 687, 812, 937, 999)),
        (8, 0, 999, False, (62, 187, 312, 437, 562, 687, 812, 937)),
        (8, 400, 700, True, (437, 562, 687)),
        (8, 900, 999, True, (937, 999)),
        (8, 200, 300, True, (250,)),
        (1, 999, 999, False, (999,)),
    ],
)
def test_noise_levels_are_midpoints_of_strata_as_far_as_they_are_trained(number, lowest, highest, terminal, expected):
    assert validation_timesteps(number, lowest, highest, terminal=terminal) == expected


def test_the_same_weights_give_the_same_numbers_bit_for_bit(trained: Trained):
    assert validate(trained.built.run.parts, trained.chosen)[0] == validate(trained.built.run.parts, trained.chosen)[0]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_does_not_matter(trained: Trained, batch_size: int):
    parts, chosen = trained.built.run.parts, trained.chosen.held_out
    expected = figures(trained.objective, measure(parts, chosen))
    found = figures(trained.objective, measure(parts, replace(chosen, batch_size=batch_size)))
    assert chosen.batch_size == 2
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_model_that_answers_nothing_has_the_error_of_the_target(trained: Trained, monkeypatch: pytest.MonkeyPatch):
    """At the terminal step v = -x0, so both errors are the mean square of the latents; the weighted loss is the sum written out."""
    monkeypatch.setattr(objective, "predict", lambda unet, noisy, *conditions: torch.zeros_like(noisy))
    parts, chosen = trained.built.run.parts, trained.chosen.held_out
    assert chosen.timesteps == (250, 750, 999)
    errors = measure(parts, chosen)
    latents = torch.cat([chosen.entries.fixed(chosen.samples, [row]).latents.double().square().mean()[None] for row in range(2)])
    np.testing.assert_allclose(errors.output[:, 2], latents.numpy(), rtol=1e-6)
    np.testing.assert_allclose(errors.x0[:, 2], errors.output[:, 2], rtol=1e-12)
    snr = trained.objective.schedule.snr[list(chosen.timesteps)].numpy()
    np.testing.assert_allclose(errors.x0, errors.output / (1 + snr), rtol=1e-6)
    values = figures(replace(trained.objective, weights=torch.linspace(1, 2, 1000)), errors)
    weights = 1 + np.array(chosen.timesteps) / 999
    assert values["val_loss"] == pytest.approx(errors.output.sum() / 6, rel=1e-12)
    assert values["val_loss_weighted"] == pytest.approx((errors.output * weights).sum() / (2 * weights.sum()), rel=1e-6)
    assert values["val_loss_t250"] == pytest.approx(errors.output[:, 0].mean(), rel=1e-12)
    assert values["val_x0_t750"] == pytest.approx(errors.x0[:, 1].mean(), rel=1e-12)


def test_a_noise_level_of_no_weight_does_not_spoil_the_weighted_loss(trained: Trained):
    weights = torch.zeros(1000)
    weights[20] = 2.0
    errors = Errors(("a",), (10, 20), np.array([[np.inf, 0.5]]), np.array([[np.inf, 0.5]]))
    assert figures(replace(trained.objective, weights=weights), errors)["val_loss_weighted"] == 0.5
    assert "val_loss_weighted" not in figures(replace(trained.objective, weights=torch.zeros(1000)), errors)


def test_a_row_has_the_loss_of_both_weights_and_of_trained_pictures(trained: Trained):
    values, (held_out, known) = validate(trained.built.run.parts, trained.chosen)
    levels = [f"{name}_t{timestep}" for name in ("val_loss", "val_x0") for timestep in (250, 750, 999)]
    assert list(values) == [
        "val_loss", "val_loss_weighted", *levels, "train_val_loss", "val_gap", "val_loss_raw", "val_loss_weighted_raw", "val_set",
    ]  # fmt: skip
    assert values["train_val_loss"] == known.output.mean()
    assert values["val_gap"] == held_out.output.mean() - known.output.mean()
    assert values["val_loss_raw"] == measure(trained.built.run.parts, trained.chosen.held_out).output.mean() != values["val_loss"]
    assert not set(held_out.names) & set(known.names)


def test_the_change_since_the_first_measurement_is_in_later_rows(trained: Trained):
    measured = [row for row in rows(trained.built.run.folder) if "val_loss" in row]
    trained.built.looks[0].run(trained.built.run.state, None)
    last = rows(trained.built.run.folder)[-1]
    assert "val_change" not in measured[0]
    assert last["step"] == 2
    assert last["val_change"] == last["val_loss"] - measured[0]["val_loss"] != 0


def test_losses_are_compared_only_where_pictures_captions_noise_levels_and_prediction_are_the_same(trained: Trained):
    chosen, own = trained.chosen.held_out, number_of(trained.chosen.held_out, trained.objective)
    texts = replace(chosen.samples, text_keys=chosen.samples.text_keys ^ 1)
    others = [
        number_of(replace(chosen, timesteps=(250, 750)), trained.objective),
        number_of(chosen, replace(trained.objective, prediction="epsilon")),
        number_of(replace(chosen, samples=texts), trained.objective),
        number_of(trained.chosen.trained, trained.objective),
    ]
    assert own == number_of(replace(chosen, batch_size=1), trained.objective)
    assert len({own, *others}) == 5


# What it leaves alone


def everything(built: Built) -> dict[str, torch.Tensor]:
    """All weights, averages and optimizer state, which modules are in training mode, and every random state."""
    parts = built.run.parts
    tensors = {f"{table}/{name}": tensor.clone() for table, values in built.trained.tables().items() for name, tensor in values.items()}
    tensors["training"] = torch.tensor([module.training for module in parts.unet.modules()])
    tensors["requires_grad"] = torch.tensor([parameter.requires_grad for parameter in parts.unet.parameters()])
    tensors["no gradient"] = torch.tensor([parameter.grad is None for parameter in parts.unet.parameters()])
    tensors["torch"] = torch.get_rng_state()
    tensors["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    tensors["python"] = torch.tensor([number % 2**31 for number in random.getstate()[1]])
    return tensors


def test_a_validation_and_a_sampling_event_change_nothing(trained: Trained):
    sheet = trained.built.run.folder / "samples" / "step-000002.png"
    sheet.unlink(missing_ok=True)
    before = everything(trained.built)
    for look in trained.built.looks:
        look.run(trained.built.run.state, None)
    after = everything(trained.built)
    assert len(trained.built.looks) == 2
    assert sheet.exists(), "the sampling event failed"
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# The pictures with the highest loss


def errors_of(names: str, output: list[list[float]]) -> Errors:
    table = np.array(output, dtype=np.float64).reshape(len(names), 2)
    return Errors(tuple(names), (250, 750), table, table)


def test_a_factor_is_the_loss_over_the_mean_at_the_same_noise_level():
    """At the first level the mean is 2, at the second 0.2: each picture's factor is the mean of its two."""
    held_out, known = errors_of("ab", [[4.0, 0.2], [1.0, 0.1]]), errors_of("c", [[1.0, 0.3]])
    found = factors((held_out, known))
    assert [(part, name) for _, part, name in found] == [(0, "a"), (1, "c"), (0, "b")]
    assert [factor for factor, _, _ in found] == pytest.approx([1.5, 1.0, 0.5], rel=1e-12)


def test_a_loss_that_is_not_finite_is_the_highest_and_leaves_the_others_alone():
    found = factors((errors_of("abc", [[np.nan, 1.0], [3.0, 1.0], [1.0, 1.0]]), errors_of("", [])))
    assert found == [(np.inf, 0, "a"), (1.25, 0, "b"), (0.75, 0, "c")]


def test_a_model_without_any_error_has_no_worst_picture():
    assert [factor for factor, _, _ in factors((errors_of("ab", [[0.0, 0.0], [0.0, 0.0]]),))] == [0.0, 0.0]


def test_the_worst_are_named_with_their_factor_and_whether_they_are_trained(trained: Trained):
    parts = errors_of("ab", [[4.0, 0.2], [1.0, 0.1]]), errors_of("c", [[1.0, 0.3]])
    text = worst_text(parts, trained.chosen.kinds, step=7, number=2)
    title, *lines = text.splitlines()
    assert title.startswith("step 7: ")
    assert [line.split() for line in lines] == [["1.500", "held", "out", "a"], ["1.000", "trained", "c"]]
    trained.built.looks[0].run(trained.built.run.state, None)
    written = (trained.built.run.folder / "worst.txt").read_text().splitlines()
    assert len(written) == 1 + 4
    assert written[0].startswith("step 2: ")


# When it ends the run


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The held-out loss of each measurement of a run, in order; that of trained pictures falls all the time."""
    losses: list[float] = []

    def validate(parts, chosen):
        errors = errors_of("a", [[1.0, 1.0]])
        metrics = chosen.worst_path.with_name("metrics.jsonl")
        count = sum("val_loss" in row for row in rows(metrics.parent)) if metrics.exists() else 0
        return {"val_loss": losses[count], "train_val_loss": 1 / (1 + count), "val_set": 1}, (errors, errors)

    monkeypatch.setattr(tasks, "validate", validate)
    return losses


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted_checkpoints(folder / "checkpoints")]


def test_a_run_that_gets_worse_ends_early_and_is_finished(
    tmp_path: Path, tiny_base: Path, scripted: list[float], monkeypatch: pytest.MonkeyPatch
):
    """Measured every other step: best at step 2, worse at 4 and 6. Asked again it does nothing, and without the setting it goes on."""
    scripted += [0.5, 0.3, 0.4, 0.35, 0.2, 0.6, 0.6]
    settings = {"validation": {"every": "2 steps", "stop_after": 2, "overfit_after": 2}, "checkpoints": {"every": "5 steps", "keep": 1}}
    config = small_config(tmp_path, tiny_base, training={"length": "8 steps"}, **settings)
    result = train_run(config)
    assert (result.state.step, result.stopped) == (6, False)
    assert result.exported[0].exists()
    assert steps_of(result.folder) == [6]
    log = (result.folder / "run.log").read_text()
    assert "warning: the held-out loss was lowest at step 2 (0.3000)" in log
    assert "ended early: 2 measurements without a lower held-out loss than that of step 2 (0.3000); there is no checkpoint" in log
    before = (result.folder / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as untrained:
        untrained.setattr(trainer, "train_step", lambda *arguments: pytest.fail("it trains on"))
        again = train_run(config)
    assert (again.state.step, again.stopped) == (6, False)
    assert (result.folder / "metrics.jsonl").read_bytes() == before
    on = config.model_copy(update={"validation": config.validation.model_copy(update={"stop_after": 0})})
    assert train_run(on).state.step == 8


def test_the_best_step_is_saved_and_kept(tmp_path: Path, tiny_base: Path, scripted: list[float]):
    """Measured at 0, 2, 4, 5, 6 and 8. Step 2 is the best until step 6 is; the newest are 5 and, with a longer run, 8."""
    scripted += [0.5, 0.3, 0.4, 0.35, 0.2, 0.6]
    settings = {"validation": {"every": "2 steps"}, "checkpoints": {"every": "5 steps", "keep": 1, "keep_best": True}}
    folder = train_run(small_config(tmp_path, tiny_base, training={"length": "5 steps"}, **settings)).folder
    assert steps_of(folder) == [5, 2]
    train_run(small_config(tmp_path, tiny_base, training={"length": "8 steps"}, **settings))
    assert steps_of(folder) == [8, 6]
