"""LoRA files: names that other programs read, bits that come back, and refusals that say what to do."""

import json
from types import SimpleNamespace

import pytest
import torch

from aquatint.errors import ModelFileError, NumericalError
from aquatint.models.adapter_export import write_adapter
from aquatint.models.adapter_files import PEFT_KEY, check_adapter, file_layer, read_adapter, start_values
from aquatint.models.adapter_metadata import adapter_metadata
from aquatint.models.adapter_shapes import AdapterSpec, adapter_shapes, layer_shapes, target_layers
from aquatint.models.sdxl.export import modelspec_metadata
from aquatint.models.sdxl.model import predict, sdxl_spec
from aquatint.models.sdxl.process import Process
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, qualified
from aquatint.tensor_file import TensorFile, write_tensors
from tests.models.sdxl.small import small_spec
from tests.models.test_adapters import SPECS, adapted, inputs, trained

EPSILON = Process()
UNET = small_spec().shapes("unet")


def write(path, unet, spec, *, names="kohya", dtype=torch.float32, **metadata):
    write_adapter(path, trained(unet), spec, UNET, names=names, dtype=dtype, metadata=metadata)
    return path


def start_from(path, unet, spec):
    values = start_values(path, UNET, spec)
    assert values.keys() == trained(unet).keys()
    with torch.no_grad():
        for name, parameter in trained(unet).items():
            parameter.copy_(values[name])


def with_texts(encoders):
    """The shapes of the UNet, and of what it hears of these text encoders."""
    return UNET | {qualified(one, name): shape for one in encoders for name, shape in small_spec().heard_shapes(one).items()}


def tensors_of(path):
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
        ),
        ("mid_block.attentions.0.proj_in", "lora_unet_middle_block_1_proj_in"),
        ("up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj", "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_0_proj"),
        ("down_blocks.2.resnets.1.conv1", "lora_unet_input_blocks_8_0_in_layers_2"),
        ("up_blocks.1.resnets.0.conv_shortcut", "lora_unet_output_blocks_3_0_skip_connection"),
        ("down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
        ("up_blocks.1.upsamplers.0.conv", "lora_unet_output_blocks_5_2_conv"),
        ("mid_block.resnets.1.time_emb_proj", "lora_unet_middle_block_2_emb_layers_1"),
    ],
)
def test_names_are_those_of_sd_scripts(layer, expected):
    assert layer in target_layers(sdxl_spec().shapes("unet"), "all")
    assert file_layer("kohya", layer) == expected


def test_no_two_layers_share_a_name_in_any_spelling():
    layers = layer_shapes(sdxl_spec().shapes("unet"))
    names = [(name, layer) for layer in layers for name in (file_layer("kohya", layer), "lora_unet_" + layer.replace(".", "_"))]
    assert len(dict(names)) == len(names)


def test_diffusers_own_conversion_comes_to_the_same_layers():
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    layers = list(target_layers(sdxl_spec().shapes("unet"), "all"))
    state = {
        f"{file_layer('kohya', layer)}.{part}": torch.tensor(float(number))
        for number, layer in enumerate(layers)
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    state = _maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=2))
    found, alphas = _convert_non_diffusers_lora_to_diffusers(state)
    converted = convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in found.items()})
    assert {name: int(value) for name, value in converted.items()} == {
        f"{layer}.{part}.weight": number for number, layer in enumerate(layers) for part in ("lora_A", "lora_B")
    }
    assert sorted(alphas.values()) == [float(number) for number in range(len(layers))]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_what_is_written_comes_back(tmp_path, name, names):
    spec = SPECS[name]
    unet = adapted(spec)
    path = write(tmp_path / "a.safetensors", unet, spec, names=names)
    again = adapted(spec, moved=False)
    start_from(path, again, spec)
    is_exact = names == "kohya" or spec.scale in (0.5, 1.0, 2.0)
    for key, value in trained(unet).items():
        assert torch.equal(trained(again)[key], value) if is_exact else torch.allclose(trained(again)[key], value, rtol=1e-6), key
    write(tmp_path / "b.safetensors", again, spec, names=names)
    if is_exact:
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_kohya_s_tensors_have_their_shapes_and_the_alpha_of_the_run(tmp_path):
    spec = SPECS["rslora"]
    tensors = tensors_of(write(tmp_path / "a.safetensors", adapted(spec), spec, dtype=torch.float16))
    conv = "lora_unet_input_blocks_1_0_in_layers_2"
    assert tuple(tensors[f"{conv}.lora_down.weight"].shape) == (4, 8, 3, 3)
    assert tuple(tensors[f"{conv}.lora_up.weight"].shape) == (8, 4, 1, 1)
    alpha = tensors[f"{conv}.alpha"]
    assert (alpha.dtype, tuple(alpha.shape), alpha.item() / 4) == (torch.float32, (), pytest.approx(spec.scale))
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")} == {torch.float16}


def test_magnitudes_are_columns_for_kohya_and_outputs_for_peft(tmp_path):
    spec = SPECS["dora"]
    kohya = tensors_of(write(tmp_path / "a.safetensors", adapted(spec), spec))
    assert tuple(kohya["lora_unet_input_blocks_1_0_in_layers_2.dora_scale"].shape) == (8, 1, 1, 1)
    assert tuple(kohya["lora_unet_middle_block_1_proj_in.dora_scale"].shape) == (16, 1)
    peft = tensors_of(write(tmp_path / "b.safetensors", adapted(spec), spec, names="diffusers"))
    assert tuple(peft["unet.mid_block.resnets.0.conv1.lora_magnitude_vector"].shape) == (1, 16, 1, 1)
    assert tuple(peft["unet.mid_block.attentions.0.proj_in.lora_magnitude_vector"].shape) == (16,)


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_a_reader_that_knows_only_the_formula_gets_the_same_weights(tmp_path, names, name):
    """dW = alpha / rank * up @ down, and a factor of 1 where there is no alpha."""
    spec = SPECS[name]
    unet = adapted(spec)
    tensors = tensors_of(write(tmp_path / "a.safetensors", unet, spec, names=names))
    down, up = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B")}[names]
    for layer in target_layers(UNET, spec.targets):
        stem = file_layer(names, layer)
        one, other = tensors[f"{stem}.{up}.weight"].flatten(1), tensors[f"{stem}.{down}.weight"].flatten(1)
        factor = tensors[f"{stem}.alpha"].item() / len(other) if names == "kohya" else 1.0
        parts = trained(unet)
        expected = spec.scale * parts[f"{layer}.lora.up"].flatten(1) @ parts[f"{layer}.lora.down"].flatten(1)
        assert torch.allclose(factor * one @ other, expected, atol=1e-6)


@pytest.mark.parametrize("spelling", ["peft", "old diffusers", "kohya with diffusers' layers"])
def test_other_spellings_are_read(tmp_path, spelling):
    spec, ends = AdapterSpec("lora", 4, 4.0, "attention"), {
        "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        "old diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
        "kohya with diffusers' layers": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    }[spelling]  # fmt: skip
    unet = adapted(spec)
    tensors = {}
    for layer in target_layers(UNET, "attention"):
        name = layer.replace(".", "_") if "lora_unet" in ends[0] else layer
        for end, part in zip(ends, ("down", "up"), strict=True):
            tensors[end.format(name)] = trained(unet)[f"{layer}.lora.{part}"].detach()
    write_tensors(tmp_path / "a.safetensors", tensors)
    again = adapted(spec, moved=False)
    start_from(tmp_path / "a.safetensors", again, spec)
    assert torch.equal(predict(again, *inputs()), predict(unet, *inputs()))


@pytest.mark.parametrize(
    ("noted", "scale"), [({"unet.r": 4, "unet.lora_alpha": 2}, 0.5), ({"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0), (None, 1.0)]
)
def test_the_alpha_that_diffusers_notes_is_honoured(tmp_path, noted, scale):
    layer = next(iter(target_layers(UNET, "attention")))
    shape = UNET[f"{layer}.weight"]
    tensors = {f"unet.{layer}.lora_A.weight": torch.ones(4, shape[1]), f"unet.{layer}.lora_B.weight": torch.ones(shape[0], 4)}
    write_tensors(tmp_path / "a.safetensors", tensors, {} if noted is None else {PEFT_KEY: json.dumps(noted)})
    assert read_adapter(tmp_path / "a.safetensors", UNET)[layer].scale == scale


def test_another_alpha_goes_into_the_matrices(tmp_path):
    spec, other = AdapterSpec("lora", 4, 8.0, "transformer"), AdapterSpec("lora", 4, 1.0, "transformer", rslora=True)
    unet, again = adapted(spec), adapted(other, moved=False)
    start_from(write(tmp_path / "a.safetensors", unet, spec), again, other)
    assert torch.allclose(predict(again, *inputs()), predict(unet, *inputs()), atol=1e-5)


LAYER = "lora_unet_middle_block_1_proj_in"
GOOD = {f"{LAYER}.lora_down.weight": torch.ones(4, 16), f"{LAYER}.lora_up.weight": torch.ones(16, 4)}
BROKEN = {
    "text encoders": (GOOD | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, "text encoders"),
    "another kind": (GOOD | {f"{LAYER}.hada_w1_a": torch.ones(4, 4)}, "no part of a LoRA"),
    "another model": (GOOD | {"lora_unet_double_blocks_0.alpha": torch.ones(())}, "another model"),
    "nothing": ({}, "empty"),
    "half of it": ({f"{LAYER}.lora_up.weight": torch.ones(16, 4)}, "lacks the `down`"),
    "other sizes": (GOOD | {f"{LAYER}.lora_up.weight": torch.ones(12, 4)}, "does not fit"),
    "no rank": ({f"{LAYER}.lora_down.weight": torch.ones(0, 16), f"{LAYER}.lora_up.weight": torch.ones(16, 0)}, "does not fit"),
    "a scalar": (GOOD | {f"{LAYER}.lora_down.weight": torch.ones(())}, "does not fit"),
    "magnitudes of inputs": (GOOD | {f"{LAYER}.dora_scale": torch.ones(1, 16)}, "one magnitude for each output|as \\[1, 16\\]"),
    "not a number": (GOOD | {f"{LAYER}.lora_up.weight": torch.full((16, 4), torch.nan)}, "not finite"),
    "several alphas": (GOOD | {f"{LAYER}.alpha": torch.ones(3)}, "several alphas"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path, case):
    tensors, message = BROKEN[case]
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ModelFileError, match=message):
        read_adapter(tmp_path / "a.safetensors", UNET)


@pytest.mark.parametrize("noted", ["[]", "no json", '{"r": 0, "lora_alpha": 1}', '{"alpha_pattern": {"x": 1}}'])
def test_a_note_that_cannot_be_followed_is_refused(tmp_path, noted):
    write_tensors(tmp_path / "a.safetensors", GOOD, {PEFT_KEY: noted})
    with pytest.raises(ModelFileError):
        read_adapter(tmp_path / "a.safetensors", UNET)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"targets": "attention"}, 'adapter.targets = "transformer"'),
        ({"rank": 8}, "adapter.rank = 4"),
        ({"kind": "dora"}, 'adapter.kind = "lora"'),
    ],
)
def test_settings_that_do_not_fit_the_file_are_named(tmp_path, changes, hint):
    spec = SPECS["lora"]
    path = write(tmp_path / "a.safetensors", adapted(spec), spec)
    other = AdapterSpec(**{"kind": "lora", "rank": 4, "alpha": 8.0, "targets": "transformer", **changes})
    with pytest.raises(ModelFileError) as error:
        check_adapter(path, UNET, other)
    assert hint in error.value.hint


@pytest.mark.parametrize("there", [("text_encoder_2",), ()])
def test_text_encoders_that_the_file_does_not_change_are_named(tmp_path, there):
    spec, (some, every) = SPECS["lora"], (with_texts(there), with_texts(TEXT_ENCODERS))
    weights = {name: torch.ones(shape) for name, shape in adapter_shapes(some, spec).items()}
    write_adapter(tmp_path / "a.safetensors", weights, spec, some, names="kohya", dtype=torch.float32, metadata={})
    check_adapter(tmp_path / "a.safetensors", some, spec)
    with pytest.raises(ModelFileError) as error:
        check_adapter(tmp_path / "a.safetensors", every, spec)
    assert f"text_encoders.train = {json.dumps(there)}" in error.value.hint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match="there is no file"):
        read_adapter(tmp_path / "a.safetensors", UNET)


def test_numbers_that_do_not_fit_are_named_and_nothing_is_written(tmp_path):
    spec = SPECS["lora"]
    unet = adapted(spec)
    name = "mid_block.attentions.0.proj_in.lora.up"
    with torch.no_grad():
        trained(unet)[name].fill_(1e6)
    with pytest.raises(NumericalError, match=name):
        write(tmp_path / "a.safetensors", unet, spec, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def metadata_of(process=EPSILON, **changes):
    spec = AdapterSpec(**{"kind": "lora", "rank": 16, "alpha": 8.0, "targets": "transformer", **changes})
    known = {"output_name": "run-lora", "base_name": "base.safetensors", "resolution": 1024, "tag_frequency": {"cats": {"cat": 3}}}
    return adapter_metadata(spec, modelspec_metadata(title="Cats", process=process), names="kohya", process=process, **known)


def test_metadata_is_what_lora_pages_look_for():
    found = metadata_of()
    assert all(isinstance(value, str) for value in found.values())
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora", "ss_network_dim": "16", "ss_network_alpha": "8",
        "ss_output_name": "run-lora", "ss_sd_model_name": "base.safetensors", "ss_resolution": "(1024, 1024)", "ss_v2": "False",
        "ss_zero_terminal_snr": "False", "ss_network_args": "{}", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "sgm", "modelspec.title": "Cats", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert json.loads(found["ss_tag_frequency"]) == {"cats": {"cat": 3}}
    assert "modelspec.usage_hint" not in found


def test_metadata_tells_the_prediction_and_the_kind_of_network():
    found = metadata_of(Process("v_prediction", zero_terminal_snr=True), kind="dora", targets="all", rslora=True)
    assert (found["ss_v_parameterization"], found["ss_zero_terminal_snr"], found["modelspec.prediction_type"]) == ("True", "True", "v")
    assert "v_prediction, zero terminal SNR" in found["modelspec.usage_hint"]
    assert json.loads(found["aquatint.process"])["zero_terminal_snr"] is True
    assert (found["ss_network_module"], found["ss_network_alpha"]) == ("lycoris.kohya", "32")
    assert json.loads(found["ss_network_args"])["dora_wd"] == "True"


def test_the_hashes_are_those_of_the_data(tmp_path):
    import hashlib

    spec = SPECS["lora"]
    data = write(tmp_path / "a.safetensors", adapted(spec), spec, **metadata_of()).read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert (file.metadata["sshs_model_hash"], file.metadata["modelspec.hash_sha256"]) == (digest, f"0x{digest}")


def test_a_lora_is_still_refused_as_a_base(tmp_path):
    from aquatint.models.sdxl.load import open_base

    spec = SPECS["lora"]
    for names in ("kohya", "diffusers"):
        with pytest.raises(ModelFileError, match="is a LoRA"):
            open_base(write(tmp_path / f"{names}.safetensors", adapted(spec), spec, names=names))
