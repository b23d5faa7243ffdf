"""What is made of a checkpoint goes by how its run was trained, and not by what the config says since then."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aquatint.config.schema import Config, dump
from aquatint.errors import UsageError
from aquatint.storage import write_json
from aquatint.tensor_file import LazyTensor, write_tensors
from aquatint.training.results import check_fits, trained_weights
from tests.runs import small_config

Y, Z = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
NO_BASE = SimpleNamespace(spec=None)
FREE = {"name": "schedule_free", "learning_rate": 1e-3, "betas": [0.5, 0.99]}


def begun(folder: Path, **sections) -> Config:
    """A config whose run has begun: its folder says how."""
    config = small_config(folder, folder / "base.safetensors", pictures=1, **sections)
    write_json(config.run.folder / "test" / "config.json", dump(config))
    return config


def checkpoint_of(config: Config) -> None:
    path = config.run.folder / "test" / "checkpoints" / "step-000001"
    path.mkdir(parents=True)
    write_tensors(path / "unet.safetensors", {"conv_in.bias": Y})
    write_tensors(path / "optimizer.safetensors", {"conv_in.bias/z": Z})


@pytest.mark.parametrize("now", [FREE, {**FREE, "betas": [0.9, 0.99]}, {"name": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.99]}])
def test_a_schedule_free_run_gives_its_own_average_whatever_the_optimizer_is_now(tmp_path, now):
    config = begun(tmp_path, optimizer=FREE, ema={"enabled": False})
    checkpoint_of(config)
    changed = Config.model_validate(dump(config) | {"optimizer": now})
    averaged, raw = (trained_weights(changed, "step-000001", averaged=averaged)[1]["conv_in.bias"].load() for averaged in (True, False))
    assert averaged.tolist() == ((Y - 0.5 * Z) / 0.5).tolist()
    assert raw.tolist() == Y.tolist()


def test_a_run_that_was_not_schedule_free_gives_its_weights(tmp_path):
    config = begun(tmp_path)
    checkpoint_of(config)
    changed = Config.model_validate(dump(config) | {"optimizer": FREE, "ema": {"enabled": False}})
    assert trained_weights(changed, "step-000001")[1]["conv_in.bias"].load().tolist() == Y.tolist()


@pytest.mark.parametrize(("now", "fits"), [({}, True), ({"alpha": 2.0}, True), ({"alpha": 4.0}, False), ({"rslora": True}, False)])
def test_an_adapter_is_not_read_with_another_scale_than_it_was_trained_with(tmp_path, monkeypatch, now, fits):
    config = begun(tmp_path, adapter={"kind": "lora", "rank": 2})
    shapes = {"mid_block.attentions.0.proj_in.lora.down": (2, 8)}
    monkeypatch.setattr("aquatint.training.results.trained_shapes", lambda config, spec: shapes)
    weights = {name: LazyTensor(torch.float32, shape, lambda: torch.zeros(2, 8)) for name, shape in shapes.items()}
    changed = config.model_copy(update={"adapter": config.adapter.model_copy(update=now)})
    if fits:
        check_fits(changed, NO_BASE, tmp_path, weights)
    else:
        with pytest.raises(UsageError, match="does not hold what this config trains") as error:
            check_fits(changed, NO_BASE, tmp_path, weights)
        assert "`adapter`, `text_encoders.train`" in error.value.hint
