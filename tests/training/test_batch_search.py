import json

import pytest
import torch

from aquatint.config.schema import dump
from aquatint.errors import ResumeError, UsageError
from aquatint.planning.batch import with_batch_size
from aquatint.tensor_file import TensorFile
from aquatint.training import batch_search, dry_step
from aquatint.training.batch_search import as_begun, free_bytes
from aquatint.training.build import train_run
from tests.runs import rows, small_config

AUTO = {"batch_size": "auto", "pictures_per_step": 4, "dry_step": True}


def holds(monkeypatch, pictures):
    """A stand-in for a card that holds so many."""
    pass_, tried = dry_step.one_pass, []

    def one_pass(parts, size):
        tried.append(size.batch_size)
        if size.batch_size > pictures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        pass_(parts, size)

    monkeypatch.setattr(dry_step, "one_pass", one_pass)
    monkeypatch.setattr(dry_step, "advice", lambda *_: "the cheapest help")
    monkeypatch.setattr(batch_search, "largest_batch_size", lambda config, spec, limit: config.training.per_step)
    return tried


@pytest.fixture
def settings(tmp_path, tiny_base):
    def make(name, **training):
        return small_config(
            tmp_path, tiny_base, run={"name": name}, training={"length": "1 step", **training},
            validation={"every": None, "share": 0.0}, tracking={"log_every": "1 step"},
        )  # fmt: skip

    return make


def result_of(config):
    result = train_run(config)
    with TensorFile(result.exported[0]) as file:
        return [row["loss"] for row in rows(result.folder)], {key: file.read(key) for key in file.tensors}


def test_it_goes_down_to_what_fits_and_a_resumed_run_stays_there(settings, monkeypatch, capsys):
    tried = holds(monkeypatch, 2)
    train_run(settings("auto", **AUTO))
    assert tried == [4, 2, 2, 2, 2]  # a step of two passes is tried with both, and by every run's own dry step
    said = capsys.readouterr().err
    assert "batch size  4 at once do not fit (CUDA out of memory. Tried to allocate 2.00 GiB)\n" in said
    assert "batch size  2 at once, 2 passes a step; " in said
    monkeypatch.undo()
    losses, tensors = result_of(settings("auto", **AUTO, length="2 steps"))
    written = json.loads((settings("auto").run.folder / "auto" / "config.json").read_text())["training"]
    assert (written["batch_size"], written["accumulation_steps"], written["pictures_per_step"]) == (2, 2, 4)
    numbers = {"batch_size": 2, "accumulation_steps": 2, "pictures_per_step": 4}
    other_losses, other_tensors = result_of(settings("numbers", **numbers, length="2 steps"))
    assert losses == other_losses
    assert all(torch.equal(tensor, other_tensors[key]) for key, tensor in tensors.items())


def test_if_not_even_one_fits_the_run_says_so_before_it_begins(settings, monkeypatch):
    tried = holds(monkeypatch, 0)
    with pytest.raises(UsageError, match="a batch of 1 with 64 × 64 pixels and 77 tokens does not fit") as caught:
        train_run(settings("none", **AUTO))
    assert caught.value.hint == "the cheapest help"
    assert tried == [4, 2, 1]


def test_without_a_dry_step_the_plan_decides(settings, monkeypatch):
    tried = holds(monkeypatch, 0)
    monkeypatch.setattr(batch_search, "largest_batch_size", lambda config, spec, limit: 2)
    train_run(settings("planned", **{**AUTO, "dry_step": False}))
    written = json.loads((settings("planned").run.folder / "planned" / "config.json").read_text())["training"]
    assert (written["batch_size"], written["accumulation_steps"], tried) == (2, 2, [])


def test_what_a_run_began_with_counts_only_for_that_run(settings, tmp_path):
    config = settings("auto", **AUTO)
    (tmp_path / "config.json").write_text(json.dumps(dump(with_batch_size(config, 2))))
    assert as_begun(config, tmp_path, resuming=True) == with_batch_size(config, 2)
    assert as_begun(config, tmp_path, resuming=False) is config
    assert as_begun(with_batch_size(config, 1), tmp_path / "elsewhere", resuming=True) == with_batch_size(config, 1)
    with pytest.raises(ResumeError, match=r"config\.json is missing, and with it the batch size") as caught:
        as_begun(config, tmp_path / "elsewhere", resuming=True)
    assert "run.log" in caught.value.hint
    other = settings("auto", **{**AUTO, "pictures_per_step": 3})
    assert as_begun(other, tmp_path, resuming=True) is other  # the change is reported where all are


def test_memory_that_nobody_knows_is_not_guessed(monkeypatch):
    monkeypatch.setattr(batch_search, "spare_bytes", lambda: None)
    with pytest.raises(UsageError, match="this system does not tell") as caught:
        free_bytes(torch.device("cpu"))
    assert caught.value.hint == "set `training.batch_size` to a number"
    monkeypatch.setattr(batch_search, "spare_bytes", lambda: 5000)
    monkeypatch.setattr(batch_search, "held_bytes", lambda: 300)
    assert free_bytes(torch.device("cpu")) == 5300
