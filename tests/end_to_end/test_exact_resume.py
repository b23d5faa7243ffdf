"""12 steps straight equal 7 steps, SIGKILL, and a resume from the checkpoint of step 5: bit for bit."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.cli.main import run as run_command
from aquatint.config.schema import Config, dump
from aquatint.demo.pictures import write_pictures
from aquatint.errors import ResumeError
from aquatint.models.sdxl.load import open_base
from aquatint.tensor_file import TensorFile
from aquatint.training import trainer
from aquatint.training.build import build_reader, train_run
from aquatint.training.caching import cache_run
from aquatint.training.results import load_unet
from tests import zoo
from tests.runs import small_config

CASES = {
    "adamw-accumulation-1": {
        "training": {"accumulation_steps": 1},
        "ema": {"decay": 0.9999, "half_life": "20 samples", "power_stds": [0.05, 0.1], "snapshot_every": "3 steps"},
        "timesteps": {"importance": True, "importance_ranges": 2, "spread": "lattice"},
        "model": {"prediction": "flow", "zero_terminal_snr": False, "standardise_latents": True},
    },
    "adamw-accumulation-3": {
        "training": {"accumulation_steps": 3},
        "crop": {"mode": "random", "variants": 2, "flip_prob": 0.5},
        "diffusion": {"weighting": "learned", "loss": "huber"},
        "noise": {"input_perturbation": 0.1},
        "timesteps": {"density": "logit_normal", "resolution_noise": "reindex"},
    },
    "adamw_bf16": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "adamw_bf16", "learning_rate": 1e-3}},
    "adafactor": {
        "training": {"precision": "bf16_pure", "accumulation_steps": 3},
        "optimizer": {"name": "adafactor", "learning_rate": 1e-3},
        "diffusion": {"weighting": "adaptive"},
        "noise": {"immiscible": True},
        "model": {"prediction": "x0"},
    },
    "adamw8bit-fused": {
        "training": {
            "precision": "bf16_pure",
            "fused_backward": True,
            "clip": "delayed",
            "clip_norm": 0.01,
            "groups": [
                {"match": ["conv_in", "down_blocks.0", "mid_block.attentions"], "learning_rate_factor": 0.0},
                {"match": ["*.attn2"], "learning_rate_factor": 0.5, "weight_decay": 0.2},
            ],
        },
        "optimizer": {"name": "adamw8bit", "learning_rate": 1e-3},
    },
    "soap": {
        "optimizer": {"name": "soap", "learning_rate": 1e-3, "precond_every": 3, "max_precond_dim": 32},
        "diffusion": {"mask_prior_weight": 0.5},
        "data": {"max_uncaptioned_share": 1.0},
        "captions": {"style": "tags", "tag_weights": {"enabled": True}},
        "crop": {"flip_prob": 0.5},
    },
    "speed": {
        "training": {"precision": "bf16_pure", "gradient_checkpointing": True},
        "speed": {"channels_last": True, "kernels": True, "fused_qkv": True},
        "optimizer": {"name": "adamw8bit", "learning_rate": 1e-3},
    },
    "online-captions": {
        "captions": {"style": "tags", "shuffle": True, "keep_first": 0, "tag_drop_prob": 0.2, "dropout_prob": 0.3, "text": "online"},
        "loader": {"workers": 1},
    },
}
QUICK = ("adamw-accumulation-1",)  # what every test run looks at; the others take a minute
MIXED = "soap"  # the case with masks, weights and several sources
MASKED = 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums are in the same order in this process and in the killed one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(folder: Path, base: Path, name: str, kind: str) -> Config:
    sections = {section: dict(values) for section, values in CASES[name].items()}
    optimizer = sections.pop("optimizer", None)
    if "data" in sections:
        sections["data"]["sources"] = [
            {"path": str(folder / "pictures"), "masks": "files", "trigger": "ohwx"},
            {"path": str(folder / "general"), "role": "regularization", "repeats": 0.5, "loss_weight": 0.25},
            {"path": str(folder / "more"), "share": 0.2},
        ]
    config = small_config(folder, base, run={"name": f"{name}-{kind}"}, lr={"schedule": "cosine", "warmup": "1 step"}, **sections)
    return Config.model_validate(dump(config) | ({"optimizer": optimizer} if optimizer else {}))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with runs of every case that is asked for, killed in the middle of step 8."""
    mine = (item.callspec for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    asked = {callspec.params["name"] for callspec in mine}
    folder = tmp_path_factory.mktemp("runs")
    write_pictures(folder / "pictures", count=12, seed=3)
    write_pictures(folder / "general", count=7, seed=4)
    write_pictures(folder / "more", count=5, seed=5)
    for path in sorted((folder / "pictures").glob("*.png"))[:MASKED]:
        mask = zoo.Image.open(path).convert("L")
        mask.save(path.with_name(f"{path.stem}-masklabel.png"))
    paths = []
    for name in CASES.keys() & asked:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(dump(config_of(folder, tiny_base, name, "killed"))))
        paths.append(str(path))
    script = Path(__file__).with_name("killed_runs.py")
    subprocess.run([sys.executable, str(script), "7", *paths], check=True, capture_output=True, timeout=400)
    return folder


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CASES])
def test_a_killed_and_resumed_run_equals_a_straight_one(killed: Path, tiny_base: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, tuple[str, ...]]] = []
    real = trainer.train_step

    def recording(parts, batches, step):
        seen.append((step, tuple(name for batch in batches for name in batch.names)))
        return real(parts, batches, step)

    monkeypatch.setattr(trainer, "train_step", recording)
    straight = train_run(config_of(killed, tiny_base, name, "straight")).folder
    straight_samples = seen.copy()
    seen.clear()
    resumed = train_run(config_of(killed, tiny_base, name, "killed")).folder
    assert [step for step, _ in seen] == list(range(5, 12))
    assert seen == straight_samples[5:]
    files = sorted(path.name for path in (straight / "checkpoints" / "step-000012").iterdir())
    assert {"unet.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"} <= set(files)
    assert ("loss.safetensors" in files) == (name in ("adamw-accumulation-1", "adamw-accumulation-3", "adafactor"))
    for file in files:
        path = f"checkpoints/step-000012/{file}"
        assert (straight / path).read_bytes() == (resumed / path).read_bytes(), file
    snapshots = [path.relative_to(straight) for path in sorted(straight.glob("ema/*"))]
    assert len(snapshots) == 4 * len(CASES[name].get("ema", {}).get("power_stds", ()))
    assert snapshots == [path.relative_to(resumed) for path in sorted(resumed.glob("ema/*"))]
    for path in snapshots:
        assert (straight / path).read_bytes() == (resumed / path).read_bytes(), path
    assert (straight / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    rates = [row["learning_rate"] for row in map(json.loads, (straight / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(rates) == 6
    assert rates == sorted(set(rates), reverse=True)


def test_what_is_frozen_is_in_no_file_and_is_the_base_s_in_exports(tmp_path: Path, tiny_base: Path):
    groups = [
        {"match": ["down_blocks", "*.attn2", "conv_in.bias"], "learning_rate_factor": 0.0},
        {"match": ["*.attn1"], "weight_decay": 0.5},
    ]
    config = small_config(
        tmp_path, tiny_base, training={"length": "2 steps", "groups": groups, "gradient_checkpointing": True},
        ema={"decay": 0.5, "power_stds": [0.1]}, validation={"every": None}, export={"diffusers_folder": True},
        samples={"prompts": ["a circle"], "steps": 1},
    )  # fmt: skip
    folder, base = train_run(config).folder, open_base(tiny_base)
    origin = {name: tensor.load() for name, tensor in base.component("unet").items()}
    frozen = {name for name in origin if name.startswith("down_blocks.") or ".attn2." in name or name == "conv_in.bias"}
    for table in ("checkpoints/step-000002/unet", "checkpoints/step-000002/ema", "ema/step-000002-std-0.100"):
        with TensorFile(folder / f"{table}.safetensors") as file:
            assert file.tensors.keys() == origin.keys() - frozen, table
    with TensorFile(folder / "checkpoints/step-000002/optimizer.safetensors") as file:
        assert {name.rpartition("/")[0] for name in file.tensors} == origin.keys() - frozen
    assert run_command(["ema", str(folder), "--std", "0.1", "--output", str(folder / "wide")]) == 0
    for path in (folder / "export" / "test.safetensors", folder / "export" / "test", folder / "wide.safetensors"):
        exported = open_base(path).component("unet")
        assert {name for name, tensor in exported.items() if torch.equal(tensor.load(), origin[name])} == frozen, path
    drawn = dict(load_unet(config, base, "step-000002", torch.device("cpu")).named_parameters())
    assert {name for name, tensor in drawn.items() if torch.equal(tensor, origin[name])} == frozen
    log = (folder / "run.log").read_text()
    assert f"none of {len(frozen)} frozen" in log
    assert f"step 1 moved {len(origin) - len(frozen)} of {len(origin) - len(frozen)} trained tensors" in log
    assert "part             tensors" in log
    with pytest.raises(ResumeError, match=r"training\.groups"):
        train_run(config.model_copy(update={"training": config.training.model_copy(update={"groups": ()})}))


def test_the_mixed_sources_are_trained_as_the_config_says(killed: Path, tiny_base: Path):
    """What the case above runs on: masks, weights and shares are all there."""
    config = config_of(killed, tiny_base, MIXED, "mix")
    data = cache_run(config)
    reader = build_reader(config, open_base(config.model.base), data)
    batches = [reader.read(index) for index in range(reader.order.batches_before_epoch(10))]
    counts = np.bincount([source for batch in batches for source in batch.sources])
    shares = np.array([float(count * times) for count, times in zip(np.bincount(data.train.sources), data.layout.repeats, strict=True)])
    assert shares[2] / shares.sum() == pytest.approx(0.2, abs=1e-3)
    assert counts == pytest.approx(10 * shares, abs=2)
    masks = torch.cat([batch.masks for batch in batches])
    weights = torch.cat([batch.loss_weights for batch in batches])
    assert masks.min() < 0.1
    is_masked = (masks < 1).flatten(1).any(dim=1)
    sources = torch.tensor([source for batch in batches for source in batch.sources])
    assert set(sources[is_masked].tolist()) == {0}
    assert 4 * weights[sources == 1].mean() == pytest.approx(weights[sources != 1].mean().item(), rel=0.2)
    assert (weights.double() * torch.where(sources == 1, 4.0, 1.0)).mean().item() == pytest.approx(1.0, abs=0.02)
