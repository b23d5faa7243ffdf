"""What the plan of a run on a CPU says, against the peak of a process that really does it."""

import json
import os
import subprocess
import sys

import pytest

from aquatint.config.schema import Config, dump
from aquatint.demo.model import random_tensors
from aquatint.demo.pictures import write_pictures
from aquatint.models.sdxl.export import write_single_file
from aquatint.models.sdxl.model import ModelSpec
from aquatint.models.sdxl.process import Process
from aquatint.models.sdxl.shapes import COMPONENTS
from aquatint.planning.memory import plan_memory

from .small import small_spec

CODE = """
import json, resource, sys
from aquatint.config.schema import Config
from aquatint.training.build import train_run
train_run(Config.model_validate(json.loads(sys.argv[1])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def middle_spec() -> ModelSpec:
    """A UNet of 261 million weights, so that they and not the program take most of the memory."""
    small = small_spec()
    unet = {
        **small.unet, "block_out_channels": [320, 768], "attention_head_dim": [5, 12], "norm_num_groups": 32,
        "transformer_layers_per_block": [1, 4], "cross_attention_dim": 40,
    }  # fmt: skip
    return ModelSpec(unet, small.vae, small.text_encoder, small.text_encoder_2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("middle")
    spec = middle_spec()
    write_single_file(folder / "base.safetensors", spec, {c: random_tensors(c, spec, 0) for c in COMPONENTS}, process=Process())
    write_pictures(folder / "pictures", count=2, seed=0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "training", "ema"),
    [
        ("adamw", {"precision": "fp32"}, True),
        ("adafactor", {"precision": "bf16_pure", "fused_backward": True, "clip": "delayed"}, False),
        ("adafactor", {"precision": "bf16_mixed", "gradient_checkpointing": False, "batch_size": 2}, False),
    ],
)
def test_the_peak_of_a_process_is_the_planned_one_within_a_tenth(base, tmp_path, optimizer, training, ema):
    config = Config.model_validate({
        "run": {"name": "measured", "folder": tmp_path / "runs"},
        "model": {"base": base / "base.safetensors"},
        "data": {"sources": [{"path": str(base / "pictures")}], "max_uncaptioned_share": 1.0},
        "buckets": {"resolution": 256, "min_side": 128, "max_side": 512},
        "cache": {"folder": tmp_path / "cache", "batch_size": 1},
        "loader": {"workers": 0},
        "optimizer": {"name": optimizer, "learning_rate": 1e-5},
        "training": {"length": "2 steps", "device": "cpu", **training},
        "ema": {"enabled": ema},
        "validation": {"every": None, "share": 0.0},
        "samples": {"every": None},
        "export": {"dtype": "bfloat16"},
        "tracking": {"log_every": "1 step"},
    })  # fmt: skip
    threshold = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # which training sets itself if a model is larger
    command = [sys.executable, "-c", CODE, json.dumps(dump(config))]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **threshold})
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert plan_memory(config, middle_spec()).needed == pytest.approx(int(ended.stdout.splitlines()[-1]), rel=0.1)
