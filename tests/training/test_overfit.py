import json

import pytest

from aquatint.training.overfit import Verdict, Watch, best_step, ending_text, judge


def rows_of(losses, known=(), val_set=7):
    """A measurement every 10 steps, and a row of training between any two."""
    rows = []
    for place, loss in enumerate(losses):
        values = {"train_val_loss": known[place]} if known else {}
        rows += [{"step": 10 * place, "val_loss": loss, "val_set": val_set, **values}, {"step": 10 * place + 5, "loss": 1.0}]
    return rows


def verdict_on(losses, known=(), overfit_after=2, stop_after=0):
    return judge(rows_of(losses, known), overfit_after=overfit_after, stop_after=stop_after)


@pytest.mark.parametrize("losses", [[], [None], [None, None]])
def test_there_is_no_verdict_before_a_loss_that_is_a_number(losses):
    assert verdict_on(losses, stop_after=1) is None


def test_the_best_is_the_first_of_the_lowest():
    assert verdict_on([0.5, 0.3, 0.4, 0.3, 0.6]) == Verdict(10, 0.3, 3, overfits=False, ends=False)


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([0.5, 0.3, 0.4, 0.4], False),
        ([0.5, 0.3, 0.4, 0.4, 0.4], True),
        ([0.5, 0.3, 0.3, 0.3, 0.3], True),
        ([0.5, 0.3, 0.4, 0.4, 0.2], False),
        ([0.5, 0.3, None, None, None], True),
        ([0.2, 0.3, 0.2999, 0.2998], True),
    ],
    ids=["twice", "three times", "only as low", "a new best", "not finite", "falling, but above the best"],
)
def test_a_run_ends_after_so_many_measurements_without_a_new_best(losses, ends):
    assert verdict_on(losses, stop_after=3).ends == ends
    assert not verdict_on(losses, stop_after=0).ends


@pytest.mark.parametrize(
    ("losses", "known", "overfits"),
    [
        ([0.5, 0.3, 0.4, 0.35], [0.5, 0.3, 0.25, 0.2], True),
        ([0.5, 0.3, 0.4], [0.5, 0.3, 0.25], False),
        ([0.5, 0.3, 0.4, 0.3], [0.5, 0.3, 0.25, 0.2], False),
        ([0.5, 0.3, 0.4, 0.35], [0.5, 0.3, 0.3, 0.3], False),
        ([0.5, 0.3, 0.4, 0.35], [0.5, 0.3, 0.2, 0.31], False),
        ([0.5, 0.3, 0.4, 0.35], [], False),
    ],
    ids=["both", "once only", "back at the best", "trained ones stay", "trained ones rise", "no trained ones"],
)
def test_a_run_overfits_when_held_out_pictures_get_worse_while_trained_ones_get_better(losses, known, overfits):
    assert verdict_on(losses, known).overfits == overfits


def test_losses_of_other_pictures_are_not_compared():
    """The first four rows are of another set, where all was lower."""
    rows = rows_of([0.1, 0.1], val_set=1) + [{**row, "step": row["step"] + 100} for row in rows_of([0.5, 0.4], val_set=2)]
    assert judge(rows, overfit_after=1, stop_after=1) == Verdict(110, 0.4, 0, overfits=False, ends=False)
    assert best_step(rows) == 110


def test_the_best_step_can_be_asked_for_among_those_that_were_saved():
    rows = rows_of([0.5, 0.2, 0.3, None, 0.4])
    assert best_step(rows) == 10
    assert best_step(rows, {20, 30, 40, 45}) == 20
    assert best_step(rows, {30, 45}) is None
    assert best_step([]) is None


def test_the_warning_comes_once_and_again_when_it_begins_anew(tmp_path):
    held_out = [0.5, 0.3, 0.4, 0.4, 0.4, 0.2, 0.3, 0.3]
    known = [0.5, 0.4, 0.3, 0.2, 0.1, 0.09, 0.08, 0.07]
    rows, notes = rows_of(held_out, known), []
    watch = Watch(tmp_path / "metrics.jsonl", 2, 3, notes.append)
    watch.decide()
    warned, ended = [], []
    for count in range(1, len(rows), 2):
        watch.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        watch.look()
        warned.append(len(notes))
        ended.append(watch.ended)
    assert warned == [0, 0, 0, 1, 1, 1, 1, 2]
    assert ended == [False, False, False, False, True, False, False, False]
    assert "lowest at step 10 (0.3000)" in notes[0]
    assert "lowest at step 50 (0.2000)" in notes[1]


@pytest.mark.parametrize(
    ("best_at", "kept", "words"),
    [
        (500, {500, 900}, "aquatint export run.toml --checkpoint step-000500"),
        (500, {800, 900}, "`checkpoints.keep_best = true`"),
        (0, {800, 900}, "the base model itself"),
    ],
)
def test_a_run_that_ended_early_says_where_its_best_weights_are(best_at, kept, words):
    text = ending_text(Verdict(best_at, 0.25, 4, overfits=True, ends=True), kept)
    assert words in text
    assert f"step {best_at} (0.2500)" in text
