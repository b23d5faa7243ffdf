"""Adapters from a config: what is checked beforehand, and what a LoRA file says of the captions."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from aquatint.data.captions import CaptionPolicy
from aquatint.models.adapter_export import write_adapter
from aquatint.models.adapter_shapes import AdapterSpec, adapter_shapes
from aquatint.models.sdxl.load import open_base
from aquatint.training.adapting import MAX_TAGS, adapting, tag_frequency
from aquatint.training.announce import trained_text
from aquatint.training.parallelize import ready_for_training, trained_parameters
from aquatint.training.preflight import Inspection, inspect, preflight
from tests.runs import small_config


def layout(captions, sources, paths, styles):
    """As much of a layout as the captions need."""
    side = SimpleNamespace(
        samples=SimpleNamespace(captions=None, sources=np.array(sources), text_of=[[row] for row in range(len(captions))]), texts=captions
    )
    return SimpleNamespace(
        train=side,
        manifest=SimpleNamespace(sources=[SimpleNamespace(path=path) for path in paths]),
        policies=[CaptionPolicy(style=style) for style in styles],
    )


def test_tags_are_counted_by_source_and_prose_is_not():
    captions = ["cat, black", "cat, white, cat", "A dog.", "red, cat"]
    found = tag_frequency(
        layout(captions, [0, 0, 1, 2], ["/home/me/cats", "/x/dogs", "s3://user:secret@bucket/more/?key=1"], ["tags", "prose", "tags"])
    )
    assert found == {"cats": {"cat": 2, "black": 1, "white": 1}, "more": {"red": 1, "cat": 1}}


def test_sources_of_the_same_name_are_added_up_and_the_rarest_tags_left_out():
    rare = ", ".join(f"tag {number}" for number in range(MAX_TAGS + 5))
    found = tag_frequency(layout(["cat", "cat", rare], [0, 1, 1], ["/a/cats", "/b/cats"], ["tags", "tags"]))
    assert found["cats"]["cat"] == 2
    assert len(found["cats"]) == MAX_TAGS


def write_lora(path, base, spec):
    shapes = open_base(base).spec.shapes("unet")
    values = {name: torch.ones(shape) for name, shape in adapter_shapes(shapes, spec).items()}
    write_adapter(path, values, spec, shapes, names="kohya", dtype=torch.float16, metadata={})
    return path


def test_a_file_to_start_from_is_looked_at_before_the_run(tmp_path, tiny_base):
    path = write_lora(tmp_path / "a.safetensors", tiny_base, AdapterSpec("lora", 2, 2.0, "attention"))
    good = {"kind": "lora", "rank": 2, "targets": "attention", "start_from": str(path)}
    found = inspect(Inspection(small_config(tmp_path, tiny_base, adapter=good)))
    assert (found.problems, f"adapter: {path}: lora of rank 2" in found.looked_at) == ([], True)
    (problem,) = preflight(small_config(tmp_path, tiny_base, adapter={**good, "rank": 3}))
    assert "rank 2" in problem.message
    assert problem.hint == "set `adapter.rank = 2`"
    (problem,) = preflight(small_config(tmp_path, tiny_base, adapter={**good, "start_from": str(tmp_path / "b.safetensors")}))
    assert "there is no file" in problem.message


def test_looking_at_it_needs_no_torch(tmp_path, tiny_base):
    path = write_lora(tmp_path / "a.safetensors", tiny_base, AdapterSpec("lora", 2, 2.0, "attention"))
    code = (
        "import sys\nfrom pathlib import Path\nfrom aquatint.models.adapter_files import check_adapter\n"
        "from aquatint.models.adapter_shapes import AdapterSpec\nfrom aquatint.models.sdxl.load import open_base\n"
        f"shapes = open_base(Path({str(tiny_base)!r})).spec.shapes('unet')\n"
        f"check_adapter(Path({str(path)!r}), shapes, AdapterSpec('lora', 2, 2.0, 'attention'))\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0


def test_a_run_that_goes_on_needs_no_file_to_start_from(tmp_path, tiny_base):
    adapter = {"kind": "lora", "rank": 2, "targets": "attention", "start_from": str(tmp_path / "gone.safetensors")}
    config, base = small_config(tmp_path, tiny_base, adapter=adapter), open_base(tiny_base)
    unet = nn.ModuleDict({"a": nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(4, 4)})})})
    ready_for_training(unet, gradient_checkpointing=False, device=torch.device("cpu"), adapt=adapting(config, base, resuming=True))
    assert set(trained_parameters(unet)) == {"a.attn1.to_q.lora.down", "a.attn1.to_q.lora.up"}
    assert trained_text(unet) == "16 adapter weights in float32, in 1 layer"
    assert adapting(small_config(tmp_path, tiny_base), base, resuming=False) is None
