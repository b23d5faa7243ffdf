"""Runs that train the text encoders: exact after a kill, and every verb works with the encoders as they were trained."""

from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.cli.main import run as run_command
from aquatint.config.schema import Config, dump
from aquatint.models.adapter_files import read_adapter
from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, is_text
from aquatint.planning.trained import trained_shapes, weight_shapes
from aquatint.training import trainer
from aquatint.training.build import train_run
from aquatint.training.results import load_caption_encoder, sample_pictures, trained_weights
from tests.runs import rows, small_config

from .test_adapter_runs import killed_and_resumed

pytestmark = pytest.mark.long
BOTH = {"train": list(TEXT_ENCODERS), "learning_rate_factor": 0.5}
CAPTIONS = {"dropout_prob": 0.4}
CPU = torch.device("cpu")


def config_of(folder: Path, base: Path, name: str, *, optimizer=None, **sections) -> Config:
    defaults = {
        "run": {"name": name}, "text_encoders": BOTH, "captions": CAPTIONS, "checkpoints": {"every": "3 steps"},
        "validation": {"every": "3 steps", "max_pictures": 1, "train_pictures": 1, "timesteps": 1},
        "training": {"length": "6 steps"}, "ema": {"decay": 0.5, "power_stds": [0.1]},
        "samples": {"every": "3 steps", "prompts": ["a circle", "a square BREAK blue"], "negative_prompt": "", "steps": 1},
    }  # fmt: skip
    config = small_config(folder, base, **{**defaults, **sections})
    return Config.model_validate(dump(config) | {"optimizer": optimizer}) if optimizer else config


CASES = {
    "full": {
        "text_encoders": {**BOTH, "stop_after": "4 steps"},
        "training": {"length": "6 steps", "accumulation_steps": 2, "groups": [{"match": ["*.embeddings"], "learning_rate_factor": 0.0}]},
    },
    "one-fused-bf16": {
        "text_encoders": {"train": ["text_encoder_2"]},
        "training": {
            "length": "6 steps", "precision": "bf16_pure", "fused_backward": True, "clip": "delayed", "gradient_checkpointing": True,
        },
        "optimizer": {"name": "adamw8bit", "learning_rate": 1e-3},
    },
    "lora": {"adapter": {"kind": "lora", "rank": 2}, "training": {"length": "6 steps", "precision": "bf16_mixed"}},
    "dora": {"adapter": {"kind": "dora", "rank": 2, "targets": "attention"}, "training": {"length": "6 steps", "dry_step": True}},
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.mark.parametrize("name", CASES)
def test_a_killed_and_resumed_run_equals_a_straight_one(shared, tiny_base, name, monkeypatch):
    configs = [config_of(shared, tiny_base, f"{name}-{kind}", **CASES[name]) for kind in ("straight", "killed")]
    straight = train_run(configs[0]).folder
    resumed = killed_and_resumed(configs[1], monkeypatch, at=5)
    files = sorted(path.name for path in (straight / "checkpoints" / "step-000006").iterdir())
    assert {"unet.safetensors", "text_encoders.safetensors", "ema.safetensors", "power-0.100.safetensors"} <= set(files)
    for path in [*(f"checkpoints/step-000006/{file}" for file in files), "metrics.jsonl", "ema/step-000006-std-0.100.safetensors"]:
        assert (straight / path).read_bytes() == (resumed / path).read_bytes(), path
    weights = trained_weights(configs[0], None, averaged=False)[1]
    assert {name: tensor.shape for name, tensor in weights.items()} == trained_shapes(configs[0], open_base(tiny_base).spec)
    early = trained_weights(configs[0], "step-000003", averaged=False)[1]
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor.load(), early[name].load())}
    if configs[0].training.precision == "bf16_pure":  # in which a bias may stay for a while
        assert sum(map(is_text, moved)) > 10
    else:
        assert moved >= {name for name in weights if not name.endswith("k_proj.bias")}
    assert not list((shared / "cache" / "texts").glob("*.safetensors"))


def test_from_its_end_on_a_text_encoder_stays_as_it_is(shared, tiny_base):
    texts = {**BOTH, "stop_after": "3 steps"}
    config = config_of(shared, tiny_base, "stops", text_encoders=texts)
    train_run(config)
    assert "text encoders only for the first 3 steps" in (config.run.folder / "stops" / "run.log").read_text()
    last, middle = (trained_weights(config, f"step-00000{step}", averaged=False)[1] for step in (6, 3))
    still = {name for name, tensor in last.items() if torch.equal(tensor.load(), middle[name].load())}
    assert still == {name for name in last if is_text(name)}


def test_at_a_rate_of_zero_every_number_is_that_of_cached_captions(shared, tiny_base):
    settings = {"optimizer": {"name": "adamw", "learning_rate": 0.0}, "ema": {"enabled": False}, "samples": {"every": None}}
    train_run(config_of(shared, tiny_base, "live", **settings))
    cached = {"text_encoders": {}, "cache": {"text_dtype": "float32", "folder": str(shared / "cached")}}
    train_run(config_of(shared, tiny_base, "cached", **settings, **cached))
    for one, other in zip(rows(shared / "runs" / "live"), rows(shared / "runs" / "cached"), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"gradient_norm", "val_set"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4), key


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(request, tmp_path_factory, tiny_base) -> tuple[Config, list]:
    """A run with everything exported, and the parts that it ended with."""
    folder, seen = tmp_path_factory.mktemp("finished"), []
    export = {"diffusers_folder": True}
    sections = {}
    if request.param == "lora":
        sections, export = {"adapter": {"kind": "lora", "rank": 2}}, export | {"merged": True, "lora_names": ["kohya", "diffusers"]}
    config = config_of(folder, tiny_base, "run", **sections, export=export)
    real = trainer.train_step

    def recording(parts, batches, step):
        seen.append(parts)
        return real(parts, batches, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", recording)
        train_run(config)
    return config, seen


def test_exports_encode_and_draw_as_the_checkpoint_does(finished, tiny_base):
    config, seen = finished
    base, export = open_base(tiny_base), config.run.folder / "run" / "export"
    captions = ["a circle", "a square, red"]
    own = load_caption_encoder(config, base, "step-000006", CPU).encode(captions)
    parts = seen[-1]
    with parts.ema.applied():
        live = parts.texts.encode(captions)
    drawn = sample_pictures(config, "step-000006")
    plain = config.model_copy(update={"adapter": Config.model_fields["adapter"].default, "text_encoders": type(config.text_encoders)()})
    for path in (export / "run.safetensors", export / "run"):
        for one, other in zip(open_base(path).caption_encoder(CPU).encode(captions), own, strict=True):
            assert not torch.equal(one[1], base.caption_encoder(CPU).encode(captions)[0][1])
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        again = sample_pictures(plain.model_copy(update={"model": config.model.model_copy(update={"base": path})}))
        assert np.abs(drawn.astype(int) - again.astype(int)).max() <= 1
    for one, other in zip(live, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_lora_of_text_encoders_holds_the_average_and_can_be_gone_on_from(finished, tiny_base):
    config, _ = finished
    if config.adapter.kind == "none":
        return
    shapes, average = weight_shapes(config, open_base(tiny_base).spec), trained_weights(config, None)[1]
    for name in ("run-lora.safetensors", "run-lora-diffusers.safetensors"):
        found = read_adapter(config.run.folder / "run" / "export" / name, shapes)
        assert sum(map(is_text, found)) == 18
        assert all(torch.equal(added.down, average[f"{layer}.lora.down"].load()) for layer, added in found.items())
    section = {**dump(config)["adapter"], "start_from": str(config.run.folder / "run" / "export" / "run-lora.safetensors")}
    still = Config.model_validate(
        dump(config) | {"adapter": section, "ema": {"enabled": False}, "optimizer": {"name": "adamw", "learning_rate": 0.0}}
        | {"run": {**dump(config)["run"], "name": "still"}}
    )  # fmt: skip
    train_run(still)
    weights = trained_weights(still, None)[1]
    assert all(torch.equal(tensor.load(), average[name].load()) for name, tensor in weights.items())


def test_the_verbs_work_on_its_checkpoints(finished, tiny_base):
    config, _ = finished
    folder = config.run.folder / "run"
    assert run_command(["sample", str(folder), "a square"]) == 0
    assert run_command(["export", str(folder), "--format", "single_file", "--output", str(folder / "whole")]) == 0
    merged = [] if config.adapter.kind == "none" else ["export.merged=true"]
    whole, exported = open_base(folder / "whole.safetensors"), open_base(folder / "export" / "run.safetensors")
    assert all(whole.digest(part) == exported.digest(part) for part in ("unet", "text_encoders"))
    assert run_command(["ema", str(folder), "--std", "0.1", "--output", str(folder / "wide"), *merged]) == 0
    wide = open_base(folder / "wide.safetensors").tensors(TEXT_ENCODERS)
    assert any(not torch.equal(tensor.load(), exported.tensors(TEXT_ENCODERS)[name].load()) for name, tensor in wide.items())
    log = (folder / "run.log").read_text()
    number = len(trained_shapes(config, open_base(tiny_base).spec))
    assert f"step 1 moved {number:,} of {number:,} trained tensors" in log
