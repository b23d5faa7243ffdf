import subprocess
import sys
from collections import Counter

import pytest

from aquatint.demo.model import tiny_spec
from aquatint.models.sdxl.keys import FUSED, PREFIXES, from_original, official_shapes, original_layout, to_original
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.models.sdxl.shapes import COMPONENTS


def test_the_official_file_has_2515_tensors():
    counts = Counter(next(component for component in COMPONENTS if name.startswith(PREFIXES[component])) for name in official_shapes())
    assert counts == {"unet": 1680, "vae": 248, "text_encoder": 197, "text_encoder_2": 390}


@pytest.mark.parametrize("spec", [sdxl_spec(), tiny_spec()], ids=["sdxl", "tiny"])
def test_names_are_a_bijection(spec):
    layout = original_layout(spec)
    internal = [(component, name) for component in COMPONENTS for name in spec.shapes(component)]
    assert sorted((piece.component, piece.name) for pieces in layout.values() for piece in pieces) == sorted(internal)
    for original, pieces in layout.items():
        assert from_original(pieces[0].component, original) == tuple(piece.name for piece in pieces)


@pytest.mark.parametrize(
    ("component", "internal", "original"),
    [
        ("unet", "conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
        ("unet", "time_embedding.linear_2.bias", "model.diffusion_model.time_embed.2.bias"),
        ("unet", "add_embedding.linear_1.weight", "model.diffusion_model.label_emb.0.0.weight"),
        ("unet", "down_blocks.0.downsamplers.0.conv.bias", "model.diffusion_model.input_blocks.3.0.op.bias"),
        ("unet", "down_blocks.1.resnets.0.conv_shortcut.weight", "model.diffusion_model.input_blocks.4.0.skip_connection.weight"),
        (
            "unet",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight",
            "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
        ),
        ("unet", "mid_block.resnets.1.time_emb_proj.bias", "model.diffusion_model.middle_block.2.emb_layers.1.bias"),
        ("unet", "up_blocks.1.upsamplers.0.conv.weight", "model.diffusion_model.output_blocks.5.2.conv.weight"),
        ("unet", "up_blocks.2.resnets.2.norm2.weight", "model.diffusion_model.output_blocks.8.0.out_layers.0.weight"),
        ("vae", "decoder.up_blocks.0.resnets.2.conv1.weight", "first_stage_model.decoder.up.3.block.2.conv1.weight"),
        ("vae", "encoder.down_blocks.1.resnets.0.conv_shortcut.bias", "first_stage_model.encoder.down.1.block.0.nin_shortcut.bias"),
        ("vae", "encoder.mid_block.attentions.0.to_out.0.weight", "first_stage_model.encoder.mid.attn_1.proj_out.weight"),
        (
            "text_encoder",
            "embeddings.position_ids",
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        ),
        (
            "text_encoder_2",
            "text_model.encoder.layers.31.mlp.fc1.weight",
            "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight",
        ),
        ("text_encoder_2", "text_model.embeddings.position_embedding.weight", "conditioner.embedders.1.model.positional_embedding"),
    ],
)
def test_names_in_both_layouts(component, internal, original):
    assert to_original(component, internal).name == original
    assert from_original(component, original) == (internal,)


def test_the_official_shapes_differ_where_the_layouts_do():
    shapes = official_shapes()
    assert shapes["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"] == (3840, 1280)
    assert shapes["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"] == (3840,)
    assert shapes["first_stage_model.decoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes["conditioner.embedders.1.model.logit_scale"] == ()
    assert shapes["model.diffusion_model.label_emb.0.0.weight"] == (1280, 2816)


def test_query_key_and_value_are_stacked_in_this_order():
    pieces = original_layout(sdxl_spec())["conditioner.embedders.1.model.transformer.resblocks.5.attn.in_proj_bias"]
    assert [piece.name for piece in pieces] == [f"text_model.encoder.layers.5.self_attn.{part}.bias" for part in FUSED]


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder_2"])
def test_an_unknown_name_is_a_key_error(component):
    with pytest.raises(KeyError):
        to_original(component, "no.such.tensor")
    with pytest.raises(KeyError):
        from_original(component, PREFIXES[component] + "no.such.tensor")
    with pytest.raises(KeyError):
        from_original(component, "of.another.component")


def test_names_and_headers_need_no_torch():
    code = "import aquatint.models.sdxl.load, aquatint.models.sdxl.tokenizer, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
