"""Adapters beside the text encoders: which layers, what they are called in files, and what comes back."""

from types import SimpleNamespace

import pytest
import torch

from aquatint.errors import ModelFileError
from aquatint.models.adapter_export import write_adapter
from aquatint.models.adapter_files import PEFT_KEY, file_layer, read_adapter, start_values
from aquatint.models.adapter_shapes import AdapterSpec, adapter_shapes, target_layers
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, Shape, qualified
from aquatint.tensor_file import TensorFile, write_tensors
from tests.models.sdxl.small import small_spec

SPEC = AdapterSpec("lora", 2, 1.0, "transformer")
LINEAR = ("mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj")


def heard(spec, encoders=TEXT_ENCODERS) -> dict[str, Shape]:
    return {qualified(one, name): shape for one in encoders for name, shape in spec.heard_shapes(one).items()}


def everything(spec) -> dict[str, Shape]:
    return spec.shapes("unet") | heard(spec)


SHAPES = everything(small_spec())


def values(shapes=SHAPES, spec=SPEC) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in adapter_shapes(shapes, spec).items()}


def write(path, *, names="kohya", shapes=SHAPES, spec=SPEC):
    write_adapter(path, values(shapes, spec), spec, shapes, names=names, dtype=torch.float32, metadata={})
    return path


def tensors_of(path) -> dict[str, torch.Tensor]:
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


@pytest.mark.parametrize(("targets", "per_layer"), [("attention", 4), ("transformer", 6), ("all", 6)])
def test_all_linear_layers_but_projections_have_one(targets, per_layer):
    found = target_layers(heard(sdxl_spec()), targets)
    assert len(found) == (11 + 32) * per_layer
    assert target_layers(everything(sdxl_spec()), targets) == target_layers(sdxl_spec().shapes("unet"), targets) | found


def test_kohya_s_names_are_these(tmp_path):
    stems = {name.partition(".")[0] for name in tensors_of(write(tmp_path / "a.safetensors"))}
    places = [("te1", 0), ("te2", 0), ("te2", 1)]
    expected = [f"lora_{te}_text_model_encoder_layers_{n}_{layer.replace('.', '_')}" for te, n in places for layer in LINEAR]
    assert sorted(stem for stem in stems if stem.startswith("lora_te")) == expected


def test_diffusers_names_are_those_of_its_text_encoders(tmp_path):
    names = {name for name in tensors_of(write(tmp_path / "a.safetensors", names="diffusers")) if name.startswith("text")}
    places = [("text_encoder", 0), ("text_encoder_2", 0), ("text_encoder_2", 1)]
    stems = [f"{encoder}.text_model.encoder.layers.{n}.{layer}" for encoder, n in places for layer in LINEAR]
    assert sorted(names) == [f"{stem}.lora_{part}.weight" for stem in stems for part in "AB"]


def test_diffusers_own_conversion_of_kohya_s_names_comes_to_the_same_layers():
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft

    layers = list(target_layers(heard(sdxl_spec()), "transformer"))
    state = {
        f"{file_layer('kohya', layer)}.{part}": torch.tensor(float(number))
        for number, layer in enumerate(layers)
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    found, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=2)))
    converted = {name: int(value) for name, value in convert_state_dict_to_peft(found).items()}
    wanted = {f"{file_layer('diffusers', layer)}.lora_{part}.weight": n for n, layer in enumerate(layers) for part in "AB"}
    assert converted == wanted


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_what_is_written_comes_back(tmp_path, names):
    found = start_values(write(tmp_path / "a.safetensors", names=names), SHAPES, SPEC)
    assert found.keys() == values().keys()
    assert all(torch.equal(found[name], value) for name, value in values().items())


def test_the_layer_that_other_programs_train_for_nothing_is_passed_over(tmp_path):
    own = tensors_of(write(tmp_path / "a.safetensors"))
    last = {name.replace("layers_0", "layers_1"): tensor for name, tensor in own.items() if name.startswith("lora_te1")}
    write_tensors(tmp_path / "b.safetensors", own | last, {})
    one, other = (read_adapter(tmp_path / f"{name}.safetensors", SHAPES) for name in "ab")
    assert one.keys() == other.keys()


def test_each_network_has_the_scale_that_a_note_gives_it(tmp_path):
    own = tensors_of(write(tmp_path / "a.safetensors", names="diffusers"))
    note = '{"unet.r": 2, "unet.lora_alpha": 4, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}'
    write_tensors(tmp_path / "b.safetensors", own, {PEFT_KEY: note})
    found = {layer.partition(".")[0]: added.scale for layer, added in read_adapter(tmp_path / "b.safetensors", SHAPES).items()}
    assert (found["mid_block"], found["text_encoder"], found["text_encoder_2"]) == (2.0, 0.5, 1.0)


def test_a_file_with_more_or_fewer_networks_says_what_to_set(tmp_path):
    unet = small_spec().shapes("unet")
    with pytest.raises(ModelFileError, match="text encoders too") as caught:
        start_values(write(tmp_path / "a.safetensors"), unet, SPEC)
    assert "text_encoders.train" in caught.value.hint
    with pytest.raises(ModelFileError, match="is only in one of them") as caught:
        start_values(write(tmp_path / "b.safetensors", shapes=unet), SHAPES, SPEC)
    assert "set `text_encoders.train = []`" in caught.value.hint
