import json
import os
from pathlib import Path

import pytest
import torch

from aquatint import storage
from aquatint.errors import ResumeError, StorageError
from aquatint.optim.clipping import Clipping, tensor_norms, whole_norm
from aquatint.optim.create import create_optimizer
from aquatint.optim.fused import FusedBackward
from aquatint.training import checkpoint
from aquatint.training.checkpoint import Trained
from aquatint.training.ema import Ema
from aquatint.training.state import TrainState


def trained(seed: int = 0, *, steps: int = 0, power_stds: tuple[float, ...] = ()) -> Trained:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = Ema(dict(model.named_parameters()), decay=0.9, warmup=False, device=None, power_stds=power_stds)
    for step in range(steps):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    return Trained(model, optimizer, ema)


def everything(parts: Trained) -> dict[str, torch.Tensor]:
    assert parts.ema is not None
    weights = {f"weights/{name}": p.detach().clone() for name, p in parts.model.named_parameters()}
    average = {f"{file}/{name}": tensor.clone() for file, table in parts.ema.tables().items() for name, tensor in table.items()}
    return weights | average | {f"optimizer/{k}": v.clone() for k, v in checkpoint.optimizer_tensors(parts).items()}


def save(folder: Path, parts: Trained, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, parts, TrainState(step=step, samples_seen=4 * step), plan_digest="plan", keep=keep)


def test_everything_comes_back_bit_for_bit(tmp_path: Path):
    before, fresh = trained(0, steps=3, power_stds=(0.05, 0.1)), trained(1, power_stds=(0.05, 0.1))
    path = save(tmp_path, before, 3)
    state = checkpoint.restore(path, fresh, plan_digest="plan")
    assert state == TrainState(step=3, samples_seen=12)
    expected, found = everything(before), everything(fresh)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) and expected[name].dtype == found[name].dtype for name in expected)


def test_text_encoders_that_were_not_trained_before_are_named(tmp_path: Path):
    path, fresh = save(tmp_path, trained(0, steps=1), 1), trained(1)
    fresh.model.add_module("text_encoder", torch.nn.Linear(2, 2))
    with pytest.raises(ResumeError, match="does not hold the text encoders") as error:
        checkpoint.restore(path, fresh, plan_digest="plan")
    assert "text_encoders.train" in error.value.hint


def test_the_best_is_kept_beside_the_newest(tmp_path: Path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, trained(steps=1), TrainState(step=step), plan_digest="plan", keep=2, best_step=min(step, 2))
    assert [checkpoint.step_of(path) for path in checkpoint.sorted_checkpoints(tmp_path)] == [4, 3, 2]
    checkpoint.save(tmp_path, trained(steps=1), TrainState(step=5), plan_digest="plan", keep=2, best_step=5)
    assert [checkpoint.step_of(path) for path in checkpoint.sorted_checkpoints(tmp_path)] == [5, 4]


OPTIMIZERS = {
    "adamw": ({}, torch.float32), "adamw_bf16": ({}, torch.bfloat16), "adamw_bf16 kahan": ({"rounding": "kahan"}, torch.bfloat16),
    "adamw8bit": ({}, torch.bfloat16), "adafactor": ({}, torch.bfloat16), "soap": ({"precond_every": 2}, torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fused", [False, True], ids=["after", "inside"])
def test_a_restored_run_goes_on_bit_for_bit_with_every_optimizer(tmp_path: Path, name: str, fused: bool):
    settings, dtype = OPTIMIZERS[name]

    def start(seed: int) -> tuple[Trained, FusedBackward | None]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 3)).to(dtype)
        optimizer = create_optimizer(name.split()[0], model.named_parameters(), seed=0, learning_rate=1e-2, weight_decay=0.1, **settings)
        clipping = Clipping("delayed", 0.05)
        return Trained(model, optimizer, None, None, clipping), FusedBackward(optimizer, clipping) if fused else None

    def steps(parts: Trained, inside: FusedBackward | None, numbers: range) -> None:
        for step in numbers:
            pictures = torch.randn(5, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
            if inside is not None:
                inside.arm(torch.tensor(True))
            parts.model(pictures).float().square().mean().backward()
            if inside is not None:
                inside.finish()
                continue
            params = list(parts.model.parameters())
            norms = tensor_norms(params)
            parts.clipping.clip_(params, norms)
            parts.clipping.remember(whole_norm(norms))
            parts.optimizer.step()
            parts.optimizer.zero_grad()

    straight, resumed = start(0), start(1)
    steps(*straight, range(4))
    checkpoint.restore(save(tmp_path, straight[0], 4), resumed[0], plan_digest="plan")
    steps(*straight, range(4, 8))
    steps(*resumed, range(4, 8))
    tables, again = straight[0].tables(), resumed[0].tables()
    assert tables.keys() == again.keys() == {"unet", "optimizer", "clipping"}
    for file, table in tables.items():
        assert table.keys() == again[file].keys()
        assert all(torch.equal(value, again[file][key]) and value.dtype == again[file][key].dtype for key, value in table.items())


def test_only_the_newest_are_kept(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, trained(steps=1), step)
    assert [path.name for path in checkpoint.sorted_checkpoints(tmp_path)] == ["step-000003", "step-000002"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "unreadable"),
        (lambda path: (path / "manifest.json").write_text('{"schema": 99, "files": {}}'), "format 99"),
        (lambda path: os.truncate(path / "unet.safetensors", 10), "wrong size"),
        (lambda path: flip_last_byte(path / "optimizer.safetensors"), "damaged"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage, reason: str):
    save(tmp_path, trained(steps=1), 1)
    damage(save(tmp_path, trained(steps=2), 2))
    path, notes = checkpoint.newest(tmp_path)
    assert path == tmp_path / "step-000001"
    assert len(notes) == 1
    assert reason in notes[0]


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_if_all_are_damaged_the_run_does_not_start_anew_in_silence(tmp_path: Path):
    flip_last_byte(save(tmp_path, trained(), 1) / "unet.safetensors")
    with pytest.raises(ResumeError, match="no checkpoint") as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.exit_code == 6


def test_no_checkpoint_is_no_error(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "missing") == (None, [])


def test_other_pictures_are_refused_unless_accepted(tmp_path: Path):
    path = save(tmp_path, trained(steps=1), 1)
    with pytest.raises(ResumeError, match="pictures"):
        checkpoint.restore(path, trained(), plan_digest="other")
    assert checkpoint.restore(path, trained(), plan_digest="other", accept_changes=True).step == 1


def test_an_average_that_was_not_kept_from_the_start_is_named(tmp_path: Path):
    path = save(tmp_path, trained(steps=1, power_stds=(0.05,)), 1)
    assert checkpoint.restore(path, trained(), plan_digest="plan").step == 1
    with pytest.raises(ResumeError, match=r"does not hold the average `power-0\.100`") as caught:
        checkpoint.restore(path, trained(power_stds=(0.05, 0.1)), plan_digest="plan")
    assert "another name" in caught.value.hint


def test_another_model_is_refused_by_name(tmp_path: Path):
    path = save(tmp_path, trained(steps=1), 1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
    with pytest.raises(ResumeError, match=r"0\.bias"):
        checkpoint.restore(path, Trained(model, torch.optim.AdamW(model.parameters()), None), plan_digest="plan")


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = save(tmp_path, trained(steps=1), 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path, trained(steps=2), 2)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == [good.name]
    assert checkpoint.newest(tmp_path) == (good, [])


@pytest.mark.parametrize("operation", ["fsync", "replace", "rename"])
def test_a_save_that_fails_at_any_call_leaves_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str):
    save(tmp_path, trained(steps=1), 1)
    real = getattr(os, operation)
    for fail_at in range(1, 40):
        calls = [0]

        def failing(*arguments, calls=calls, fail_at=fail_at):
            calls[0] += 1
            if calls[0] == fail_at:
                raise OSError(5, "Input/output error")
            return real(*arguments)

        monkeypatch.setattr(storage.os, operation, failing)
        try:
            save(tmp_path, trained(steps=1), 1 + fail_at, keep=1)
            failed = False
        except StorageError:
            failed = True
        monkeypatch.undo()
        assert checkpoint.newest(tmp_path)[0] is not None
        if not failed:
            return
    raise AssertionError("the save never got through")


def test_the_manifest_names_every_file_with_size_and_digest(tmp_path: Path):
    path = save(tmp_path, trained(steps=1), 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert path.name == "step-000007"
    assert manifest["files"].keys() == {entry.name for entry in path.iterdir()} - {"manifest.json"}
    assert all(entry["bytes"] == (path / name).stat().st_size for name, entry in manifest["files"].items())
