import pytest

from aquatint.demo.model import tiny_spec
from aquatint.models.sdxl.model import ModelSpec, build_text_encoders, build_unet, build_vae, sdxl_spec
from aquatint.models.sdxl.shapes import CARRIED, TEXT_ENCODERS, by_component, qualified


@pytest.mark.parametrize("spec", [sdxl_spec(), tiny_spec()], ids=["sdxl", "tiny"])
def test_names_and_shapes_are_those_of_the_built_modules(spec: ModelSpec):
    clip, bigg = build_text_encoders(spec)
    modules = {"unet": build_unet(spec), "vae": build_vae(spec), "text_encoder": clip, "text_encoder_2": bigg}
    for component, module in modules.items():
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        found = spec.shapes(component)
        found.pop(CARRIED.get(component), None)
        assert found == expected


def test_building_costs_no_memory():
    assert {parameter.device.type for parameter in build_unet(sdxl_spec()).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("component", "parameters"),
    [("unet", 2_567_463_684), ("vae", 83_653_863), ("text_encoder", 123_060_480), ("text_encoder_2", 694_659_840)],
)
def test_numbers_of_parameters_are_the_published_ones(component, parameters):
    assert sdxl_spec().num_parameters(component) == parameters


def test_sizes_tell_models_apart():
    assert sdxl_spec().same_sizes(sdxl_spec())
    assert not sdxl_spec().same_sizes(tiny_spec())


def test_the_unet_hears_nothing_of_clip_l_s_last_layer_and_all_of_bigg():
    spec = sdxl_spec()
    heard = {one: spec.heard_shapes(one) for one in TEXT_ENCODERS}
    unheard = spec.shapes("text_encoder").keys() - heard["text_encoder"].keys() - {CARRIED["text_encoder"]}
    assert {".".join(name.split(".")[:3]) for name in unheard} == {"encoder.layers.11", "final_layer_norm.weight", "final_layer_norm.bias"}
    assert spec.shapes("text_encoder_2").keys() - heard["text_encoder_2"].keys() == {CARRIED["text_encoder_2"]}


def test_names_tell_the_network_and_the_unet_s_are_its_own():
    names = {"unet": "conv_in.weight", "text_encoder": "encoder.layers.1.mlp.fc1.weight", "text_encoder_2": "text_projection.weight"}
    flat = {qualified(component, name): component for component, name in names.items()}
    assert list(flat) == ["conv_in.weight", "text_encoder.encoder.layers.1.mlp.fc1.weight", "text_encoder_2.text_projection.weight"]
    assert by_component(flat) == {component: {name: component} for component, name in names.items()}
    assert by_component({}) == {"unet": {}}
