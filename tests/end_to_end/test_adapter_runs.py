"""Runs that train an adapter: exact after a kill, the base untouched, and every verb works on what they leave."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.cli.main import run
from aquatint.config.schema import Config, dump
from aquatint.errors import ModelFileError, UsageError
from aquatint.models.adapter_files import read_adapter
from aquatint.models.adapter_shapes import adapter_shapes
from aquatint.models.adapters import Frozen, merged
from aquatint.models.sdxl.load import open_base
from aquatint.planning.trained import adapter_spec
from aquatint.tensor_file import TensorFile
from aquatint.training import trainer
from aquatint.training.build import train_run
from aquatint.training.results import export_run, load_unet, sample_pictures, trained_weights
from tests.runs import small_config

ADAPTER = {"kind": "lora", "rank": 2, "alpha": 4.0, "targets": "all"}
TAGS = {"style": "tags", "shuffle": True, "variants": 2}


def config_of(folder: Path, base: Path, name: str, **sections) -> Config:
    defaults = {
        "run": {"name": name}, "adapter": ADAPTER, "captions": TAGS, "training": {"length": "6 steps"},
        "checkpoints": {"every": "3 steps"}, "validation": {"every": "6 steps", "max_pictures": 1, "train_pictures": 1, "timesteps": 1},
    }  # fmt: skip
    return small_config(folder, base, **{**defaults, **sections})


class Killed(BaseException):
    """Like a kill between two steps: nothing is caught, nothing is saved."""


def killed_and_resumed(config: Config, monkeypatch: pytest.MonkeyPatch, at: int) -> Path:
    real = trainer.train_step

    def until(parts, batches, step):
        if step == at:
            raise Killed
        return real(parts, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", until)
        with pytest.raises(Killed):
            train_run(config)
    return train_run(config).folder


CASES = {
    "lora-mixed": {"adapter": {"kind": "lora", "rank": 2, "rslora": True}, "training": {"length": "6 steps", "precision": "bf16_mixed"}},
    "dora-bf16": {
        "adapter": {"kind": "dora", "rank": 2},
        "training": {
            "length": "6 steps",
            "precision": "bf16_pure",
            "fused_backward": True,
            "clip": "delayed",
            "gradient_checkpointing": True,
        },
        "optimizer": {"name": "adamw_bf16", "learning_rate": 1e-3},
    },
    "int8-swapped": {
        "adapter": {"kind": "lora", "rank": 2},
        "memory": {"frozen_format": "int8", "swapped_blocks": 0.6, "optimizer_state": "cpu"},
        "training": {
            "length": "6 steps",
            "precision": "bf16_mixed",
            "gradient_checkpointing": "pointwise",
            "groups": [
                {"match": ["mid_block"], "learning_rate_factor": 0},
                {"match": ["*.attn2"], "learning_rate_factor": 0.5},
            ],
        },
    },
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Pictures that are encoded once."""
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("name", [name if name == "lora-mixed" else pytest.param(name, marks=pytest.mark.long) for name in CASES])
def test_a_killed_and_resumed_run_equals_a_straight_one(shared, tiny_base, name, monkeypatch):
    sections = {key: dict(value) for key, value in CASES[name].items()}
    optimizer = sections.pop("optimizer", None)
    configs = [config_of(shared, tiny_base, f"{name}-{kind}", **sections) for kind in ("straight", "killed")]
    if optimizer:
        configs = [Config.model_validate(dump(config) | {"optimizer": optimizer}) for config in configs]
    straight = train_run(configs[0]).folder
    resumed = killed_and_resumed(configs[1], monkeypatch, at=4)
    files = sorted(path.name for path in (straight / "checkpoints" / "step-000006").iterdir())
    for file in files:
        path = f"checkpoints/step-000006/{file}"
        assert (straight / path).read_bytes() == (resumed / path).read_bytes(), file
    assert (straight / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    with TensorFile(straight / "checkpoints" / "step-000006" / "unet.safetensors") as file:
        shapes = {name: info.shape for name, info in file.tensors.items()}
    assert shapes == adapter_shapes(open_base(tiny_base).spec.shapes("unet"), adapter_spec(configs[0]))


@pytest.mark.long
def test_what_waits_in_main_memory_changes_no_bit_of_a_run(shared, tiny_base):
    kept = {"frozen_format": "nf4"}
    away = {**kept, "swapped_blocks": 1.0, "optimizer_state": "cpu"}
    training = {"length": "4 steps", "precision": "bf16_mixed", "gradient_checkpointing": True}
    folders = [
        train_run(config_of(shared, tiny_base, f"place-{number}", memory=memory, training=training)).folder
        for number, memory in enumerate((kept, away))
    ]
    here, there = (folder / "checkpoints" / "step-000004" for folder in folders)
    for file in ("unet.safetensors", "optimizer.safetensors", "ema.safetensors"):
        assert (here / file).read_bytes() == (there / file).read_bytes(), file


@pytest.fixture(scope="module")
def finished(shared, tiny_base) -> tuple[Config, list]:
    """A run with everything exported, and the parts that it ended with."""
    seen: list = []
    config = config_of(
        shared, tiny_base, "run", export={"merged": True, "diffusers_folder": True, "lora_names": ["kohya", "diffusers"]},
        ema={"decay": 0.5, "power_stds": [0.1], "snapshot_every": "1 step"}, samples={"prompts": ["a circle"], "steps": 2, "every": None},
    )  # fmt: skip
    real = trainer.train_step

    def recording(parts, batches, step):
        report = real(parts, batches, step)
        seen.append(parts)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", recording)
        train_run(config)
    return config, seen


def test_only_the_adapter_was_trained(finished, tiny_base):
    config, seen = finished
    unet, base = seen[-1].unet, open_base(tiny_base).component("unet")
    parameters = dict(unet.named_parameters())
    assert all(torch.equal(parameters[name], tensor.load()) for name, tensor in base.items())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert trained == parameters.keys() - base.keys()
    grouped = [p for group in seen[-1].optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(parameters[name]) for name in trained}
    assert all(parameters[name].abs().max() > 0 for name in trained if name.endswith("up"))
    log = (config.run.folder / config.run.name / "run.log").read_text()
    assert f"{sum(parameters[name].numel() for name in trained):,} adapter weights in float32, in" in log
    assert "the UNet, text encoders and autoencoder" in log


def test_the_files_hold_the_average_and_say_what_they_are(finished, tiny_base):
    config, _ = finished
    folder, spec = config.run.folder / "run", open_base(tiny_base).spec
    average = {name: tensor.load() for name, tensor in trained_weights(config, None)[1].items()}
    files = {path.name for path in (folder / "export").iterdir()}
    assert files == {"run-lora.safetensors", "run-lora-diffusers.safetensors", "run.safetensors", "run"}
    for name in ("run-lora.safetensors", "run-lora-diffusers.safetensors"):
        for layer, added in read_adapter(folder / "export" / name, spec.shapes("unet")).items():
            assert torch.equal(added.down, average[f"{layer}.lora.down"])
            assert torch.equal(added.scale * added.up, 2.0 * average[f"{layer}.lora.up"])
    with TensorFile(folder / "export" / "run-lora.safetensors") as file:
        metadata = file.metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_v_parameterization"]) == ("2", "4", "True")
    assert metadata["ss_output_name"] == "run-lora"
    assert sum(json.loads(metadata["ss_tag_frequency"])["pictures"].values()) > 10


def test_the_merged_model_answers_like_the_base_with_the_adapter(finished, tiny_base):
    config, _ = finished
    base = open_base(tiny_base)
    whole = open_base(config.run.folder / "run" / "export" / "run.safetensors")
    expected = merged(base.component("unet"), trained_weights(config, None)[1], adapter_spec(config))
    found = whole.component("unet")
    assert all(torch.equal(found[name].load(), tensor.load()) for name, tensor in expected.items())
    assert whole.process.prediction == "v_prediction"
    assert whole.digest("vae") == base.digest("vae")
    assert open_base(config.run.folder / "run" / "export" / "run").digest("unet") == whole.digest("unet")
    before = sample_pictures(config, "step-000006")
    after = sample_pictures(config.model_copy(update={"model": config.model.model_copy(update={"base": whole.path})}))
    assert np.abs(before.astype(int) - after.astype(int)).max() <= 1


def test_the_verbs_work_on_its_checkpoints(finished, capsys):
    config, _ = finished
    folder = config.run.folder / "run"
    assert run(["export", str(folder), "--checkpoint", "step-000003"]) == 0
    assert "run-step-000003-lora.safetensors" in capsys.readouterr().out
    assert run(["export", str(folder), "--format", "single_file", "--output", str(folder / "whole")]) == 0
    assert capsys.readouterr().out == f"exported {folder / 'whole.safetensors'}\n"
    assert open_base(folder / "whole.safetensors").digest("unet") == open_base(folder / "export" / "run.safetensors").digest("unet")
    assert run(["sample", str(folder), "a square"]) == 0
    assert (folder / "samples" / "sample.png").exists()
    assert run(["ema", str(folder), "--std", "0.1", "--output", str(folder / "wide")]) == 0
    with TensorFile(folder / "wide-lora.safetensors") as file, TensorFile(folder / "ema" / "step-000006-std-0.100.safetensors") as snapshot:
        assert len(file.tensors) > len(snapshot.tensors)  # the alphas too
        assert {info.dtype for info in snapshot.tensors.values()} == {"F32"}


def test_an_average_of_its_own_width_is_the_tracked_one(finished, tiny_base):
    config, seen = finished
    from aquatint.training.ema_snapshots import rebuilt

    with rebuilt(config.run.folder / "run" / "ema", 0.1, None, open_base(tiny_base)) as average:
        found = {name: tensor.load() for name, tensor in average.weights.items()}
    track = seen[-1].ema.tracks[0.1]
    assert found.keys() == track.keys()
    difference, size = (sum(t.square().sum().item() for t in ts) ** 0.5 for ts in ([found[n] - track[n] for n in track], track.values()))
    assert difference < 1e-3 * size


def test_a_config_that_trains_something_else_is_told_so(finished, tiny_base):
    config, _ = finished
    other = config.model_copy(update={"adapter": config.adapter.model_copy(update={"rank": 3})})
    with pytest.raises(UsageError, match="does not hold what this config trains"):
        export_run(other)
    with pytest.raises(UsageError, match="does not hold what this config trains"):
        load_unet(other, open_base(tiny_base), "step-000006", torch.device("cpu"))


def test_training_goes_on_from_a_lora_file(finished, tiny_base, shared):
    config, _ = finished
    file = config.run.folder / "run" / "export" / "run-lora.safetensors"
    section = {**ADAPTER, "start_from": str(file)}
    still = config_of(shared, tiny_base, "still", adapter=section, optimizer={"learning_rate": 0.0}, ema={"enabled": False})
    train_run(still)
    again = still.run.folder / "still" / "export" / "still-lora.safetensors"
    shapes = open_base(tiny_base).spec.shapes("unet")
    one, other = read_adapter(file, shapes), read_adapter(again, shapes)
    assert all(torch.equal(one[layer].up, other[layer].up) and torch.equal(one[layer].down, other[layer].down) for layer in one)


def test_a_file_that_does_not_fit_is_refused_before_anything_is_encoded(finished, tiny_base, tmp_path):
    file = finished[0].run.folder / "run" / "export" / "run-lora.safetensors"
    config = config_of(tmp_path, tiny_base, "other", adapter={**ADAPTER, "rank": 4, "start_from": str(file)})
    with pytest.raises(ModelFileError, match="has rank 2"):
        train_run(config)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_outside_of_masks_the_frozen_unet_answers_itself(tiny_base, tmp_path, monkeypatch):
    from tests.zoo import Image

    config_of(tmp_path, tiny_base, "none")
    for path in sorted((tmp_path / "pictures").glob("*.png")):
        Image.open(path).convert("L").save(path.with_name(f"{path.stem}-masklabel.png"))
    seen = []
    real = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda parts, batches, step: seen.append(parts) or real(parts, batches, step))
    sources = [{"path": str(tmp_path / "pictures"), "masks": "files"}]
    config = config_of(tmp_path, tiny_base, "prior", diffusion={"mask_prior_weight": 0.5}, data={"sources": sources})
    train_run(config)
    assert isinstance(seen[-1].frozen, Frozen)
    assert seen[-1].frozen.unet is seen[-1].unet
