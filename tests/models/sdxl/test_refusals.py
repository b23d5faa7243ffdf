"""Files that are not a base model: each is named for what it is, with something to do about it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from aquatint.errors import ModelFileError
from aquatint.models.sdxl.keys import PREFIXES, official_shapes
from aquatint.models.sdxl.load import SPEC_KEY, open_base
from aquatint.models.sdxl.model import sdxl_spec
from tests.models.sdxl.small import small_spec, spec_metadata, write_header, write_small

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
SD1 = {CONV_IN: (320, 4, 3, 3), "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768)}
SD2 = {CONV_IN: (320, 4, 3, 3), "cond_stage_model.model.token_embedding.weight": (49408, 1024)}
REFINER = {CONV_IN: (384, 4, 3, 3), "conditioner.embedders.0.model.token_embedding.weight": (49408, 1280)}
INPAINTING = {**official_shapes(), CONV_IN: (320, 9, 3, 3)}
LORA = {"lora_unet_input_blocks_1_0_emb_layers_1.lora_down.weight": (8, 1280), "lora_unet_input_blocks_1_0_emb_layers_1.alpha": ()}
PEFT_LORA = {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (8, 640)}
VAE_ALONE = {"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)}
UNET_ALONE = {name: shape for name, shape in official_shapes().items() if name.startswith(PREFIXES["unet"])}
NO_VAE = {name: shape for name, shape in official_shapes().items() if not name.startswith(PREFIXES["vae"])}


def refusal(path: Path, vae: Path | None = None) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        open_base(path, vae)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (SD1, "a Stable Diffusion 1 model"),
        (SD2, "a Stable Diffusion 2 model"),
        (REFINER, "the SDXL refiner"),
        (INPAINTING, "an inpainting or editing model"),
        (LORA, "a LoRA"),
        (PEFT_LORA, "a LoRA"),
        (VAE_ALONE, "a VAE alone"),
        ({f"first_stage_model.{name}": shape for name, shape in VAE_ALONE.items()}, "a VAE alone"),
        (UNET_ALONE, "a UNet alone"),
        ({"conv_in.weight": (320, 4, 3, 3)}, "a UNet alone"),
        (NO_VAE, "has no VAE"),
        ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "a ControlNet"),
        ({"clip_l": (8, 768), "clip_g": (8, 1280)}, "a textual inversion embedding"),
        ({**official_shapes(), "edm_vpred.sigma_max": ()}, "claims noise levels"),
        ({**official_shapes(), "edm_mean": (4,), "edm_std": (4,)}, "with other statistics"),
        ({**official_shapes(), "edm_vpred.sigma_max": (9, 9)}, "should hold a few numbers"),
        ({**official_shapes(), f"{CONV_IN}.absmax": (9,)}, "a compressed model"),
        ({"double_blocks.0.img_attn.qkv.weight": (9, 9)}, "another family"),
        ({"something.else": (3,)}, "no SDXL UNet"),
        ({}, "no SDXL UNet"),
    ],
)
def test_other_models_are_named(tmp_path, shapes, words):
    assert words in refusal(write_header(tmp_path / "model.safetensors", shapes)).message


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("model.ckpt", b"PK\x03\x04 archive", "a pickle file"),
        ("model.pt", b"\x80\x02 old pickle", "a pickle file"),
        ("model.safetensors", b"PK\x03\x04 a renamed pickle", "a pickle file"),
        ("model.gguf", b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a pointer of Git LFS"),
        ("model.safetensors", b"<!DOCTYPE html><html>401</html>", "a web page"),
        ("model.safetensors", b"", "not a readable safetensors file"),
        ("model.safetensors", b"\x00" * 64, "not a readable safetensors file"),
    ],
)
def test_other_files_are_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    assert words in refusal(tmp_path / name).message


@pytest.mark.parametrize("length", [int.from_bytes(b"PK", "little"), 0x5080, int.from_bytes(b"GGUF", "little") % 2**16, 0x203C])
def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path, length):
    path = write_small(tmp_path / "model.safetensors")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
    length += 2**16 * (1 + size // 2**16)
    rest = path.stat().st_size - 8 - size
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + header.ljust(length))
        file.truncate(8 + length + rest)
    assert open_base(path).spec == small_spec()


def test_a_file_cut_short_is_refused(tmp_path):
    path = write_small(tmp_path / "model.safetensors")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert "its header promises" in refusal(path).message


def test_missing_tensors_are_named(tmp_path):
    gone = "model.diffusion_model.middle_block.1.proj_in.weight"
    message = refusal(write_small(tmp_path / "model.safetensors", without=(gone,))).message
    assert f"lacks 1 tensor: `{gone}`" in message


def test_many_missing_tensors_are_counted(tmp_path):
    message = refusal(write_small(tmp_path / "model.safetensors", without=("model.diffusion_model.output_blocks.",))).message
    assert "and " in message
    assert message.count("`") == 10


def test_a_tensor_of_another_shape_is_named(tmp_path):
    message = refusal(write_small(tmp_path / "model.safetensors", **{"model.diffusion_model.out.2.bias": (7,)})).message
    assert "`model.diffusion_model.out.2.bias` is [7] instead of [4]" in message


def test_a_model_of_other_sizes_is_refused_without_its_description(tmp_path):
    path = write_header(tmp_path / "model.safetensors", {**official_shapes(), "model.diffusion_model.out.2.weight": (4, 64, 3, 3)})
    assert "does not have SDXL's sizes" in refusal(path).message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"unet": 1, "vae": 1, "text_encoder": 1, "text_encoder_2": 1}', "[" * 100_000])
def test_a_bad_description_of_sizes_is_refused(tmp_path, text):
    path = write_header(tmp_path / "model.safetensors", official_shapes(), {SPEC_KEY: text})
    assert "describes" in refusal(path).message


def test_a_description_cannot_ask_for_endless_work(tmp_path):
    spec = small_spec()
    greedy = replace(spec, text_encoder={**spec.text_encoder, "num_hidden_layers": 10**12})
    path = write_header(tmp_path / "model.safetensors", official_shapes(), spec_metadata(greedy))
    assert "more than 100 layers" in refusal(path).message


def test_a_missing_path_and_an_empty_folder(tmp_path):
    assert "there is no file or folder" in refusal(tmp_path / "none.safetensors").message
    assert "is an empty folder" in refusal(tmp_path).message


def test_a_folder_of_checkpoints_names_one(tmp_path):
    write_small(tmp_path / "one.safetensors")
    assert "one.safetensors" in refusal(tmp_path).hint


def test_a_part_of_a_diffusers_folder_names_the_whole(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    assert str(tmp_path) in refusal(tmp_path / "unet").hint


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "another kind of model (StableDiffusionPipeline)"),
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, "an inpainting model"),
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}, "the SDXL refiner"),
        ({"_class_name": "StableDiffusionXLPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}, "config.json is missing"),
    ],
)
def test_other_diffusers_folders_are_named(tmp_path, index, words):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert words in refusal(tmp_path).message


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model_index.json").write_bytes(text)
    assert "JSON" in refusal(tmp_path).message


def diffusers_folder(folder: Path, *, unet=None, vae=None, scheduler=None) -> Path:
    """A folder of the official size without weights."""
    spec = sdxl_spec()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", "text_encoder": ["a", "b"]}))
    for component, changes in {"unet": unet, "vae": vae, "text_encoder": {}, "text_encoder_2": {}}.items():
        (folder / component).mkdir()
        (folder / component / "config.json").write_text(json.dumps({**getattr(spec, component), **(changes or {})}))
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        write_header(folder / component / f"{stem}.safetensors", spec.shapes(component))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler or {}))
    return folder


def test_a_whole_diffusers_folder_of_the_official_size_opens(tmp_path):
    base = open_base(diffusers_folder(tmp_path))
    assert (base.spec, base.process.prediction, base.process.zero_terminal_snr) == (sdxl_spec(), "epsilon", False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet": {"in_channels": 9}}, "its UNet reads 9 channels"),
        ({"unet": {"transformer_layers_per_block": [[0, 0], [2, 2], [4, 4]]}}, "built differently"),
        ({"unet": {"addition_embed_type": None}}, "built differently"),
        ({"vae": {"scaling_factor": 0.18215}}, "is not SDXL's"),
        ({"vae": {"latents_mean": [0, 0, 0, 0]}}, "is not SDXL's"),
        ({"scheduler": {"prediction_type": "score"}}, "another kind of noise"),
        ({"scheduler": {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}}, "another kind of noise"),
        ({"unet": {"block_out_channels": [320, 640]}}, "cannot be built"),
        ({"unet": {"cross_attention_dim": "2048"}}, "SDXL's sizes"),
        ({"unet": {"cross_attention_dim": 768}}, "SDXL's sizes"),
    ],
)
def test_diffusers_folders_that_differ_are_refused(tmp_path, changes, words):
    assert words in refusal(diffusers_folder(tmp_path, **changes)).message


def test_a_diffusers_folder_without_safetensors_is_refused(tmp_path):
    diffusers_folder(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds no .safetensors weights" in refusal(tmp_path).message
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    assert "holds only pickle files" in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("shapes", "words"),
    [(SD1, "not SDXL's"), (LORA, "holds no VAE"), ({"encoder.conv_in.weight": (8, 3, 3, 3)}, "lacks")],
)
def test_another_vae_must_be_a_whole_one(tmp_path, shapes, words):
    base = write_small(tmp_path / "base.safetensors")
    assert words in refusal(base, write_header(tmp_path / "vae.safetensors", shapes)).message


def test_another_vae_must_be_there_and_be_safe(tmp_path):
    base = write_small(tmp_path / "base.safetensors")
    assert "model.vae" in refusal(base, tmp_path / "none.safetensors").hint
    (tmp_path / "vae.pt").write_bytes(b"\x80")
    assert "a pickle file" in refusal(base, tmp_path / "vae.pt").message


def test_a_vae_folder_of_sd15_is_refused(tmp_path):
    base = write_small(tmp_path / "base.safetensors")
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**small_spec().vae, "scaling_factor": 0.18215}))
    assert "is not SDXL's" in refusal(base, folder).message


def test_tensors_that_nobody_needs_are_allowed(tmp_path):
    path = write_small(tmp_path / "model.safetensors", **{"alphas_cumprod": (1000,), "model_ema.decay": ()})
    assert open_base(path).spec == small_spec()


def test_a_whole_file_of_the_official_size_opens(tmp_path):
    base = open_base(write_header(tmp_path / "model.safetensors", official_shapes()))
    assert (base.spec, base.layout, base.process.prediction) == (sdxl_spec(), "single_file", "epsilon")


def test_the_small_file_says_its_sizes():
    assert SPEC_KEY in spec_metadata(small_spec())
