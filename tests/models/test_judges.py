import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from aquatint.diffusion.metrics import cmmd, frechet_distance, moments
from aquatint.errors import ModelFileError
from aquatint.models.judges import Clip, Dinov2, Inception
from aquatint.models.sdxl.tokenizer import PAD, write_tokenizer_folder
from aquatint.storage import digest_file
from aquatint.tensor_file import TensorFile, write_tensors
from tests.encoders import SMALL, write_clip, write_dinov2, write_inception

CPU = torch.device("cpu")
TEXTS = ["a red circle on the left, white background", "", "É, çà et là… 25 words " * 40]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    inception = write_inception(root / "inception.safetensors")
    return {"clip": write_clip(root / "clip"), "dinov2": write_dinov2(root / "dinov2"), "inception": inception}


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8) for size_hw in ((64, 64), (96, 48), (40, 120), (28, 28), (3, 20))]


@pytest.fixture(scope="module")
def judges(folders):
    return [Clip(folders["clip"], CPU), Dinov2(folders["dinov2"], CPU), Inception(folders["inception"], CPU)]


def prepared(picture: np.ndarray, *, short: int, side: int, mean, std) -> torch.Tensor:
    """Shortest side, middle, mean and standard deviation, with Pillow and by hand; (1, 3, side, side)."""
    height, width = picture.shape[:2]
    new_hw = (short * height // min(height, width), short * width // min(height, width))
    pixels = np.asarray(Image.fromarray(picture).resize(new_hw[::-1], Image.Resampling.BICUBIC))
    top, left = (new_hw[0] - side) // 2, (new_hw[1] - side) // 2
    values = (pixels[top : top + side, left : left + side] / 255 - mean) / std
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None]


def test_clip_sees_what_transformers_shows_it(folders, pictures):
    model = CLIPModel.from_pretrained(folders["clip"], local_files_only=True).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folders["clip"])
    with torch.no_grad():
        seen = model.vision_model(processor(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"])
        expected = model.visual_projection(seen.pooler_output)
    np.testing.assert_allclose(Clip(folders["clip"], CPU).embed(pictures), expected.numpy(), atol=1e-5)


def test_clip_reads_what_transformers_reads(folders, tmp_path):
    model = CLIPModel.from_pretrained(folders["clip"], local_files_only=True).eval()
    write_tokenizer_folder(tmp_path, PAD)
    inputs = CLIPTokenizer.from_pretrained(tmp_path)(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = model.text_projection(model.text_model(**inputs).pooler_output)
    np.testing.assert_allclose(Clip(folders["clip"], CPU).embed_texts(TEXTS), expected.numpy(), atol=1e-5)


def test_dinov2_sees_what_transformers_shows_it(folders, pictures):
    model = Dinov2Model.from_pretrained(folders["dinov2"], local_files_only=True).eval()
    processor = BitImageProcessorPil.from_pretrained(folders["dinov2"])
    with torch.no_grad():
        expected = model(processor(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]).pooler_output
    np.testing.assert_allclose(Dinov2(folders["dinov2"], CPU).embed(pictures), expected.numpy(), atol=1e-5)


def test_pictures_are_prepared_as_the_files_say(folders, pictures):
    """Against Pillow alone: the shortest side is brought to `size`, and the middle is cut out."""
    clip_values = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    dino_values = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    clip = CLIPModel.from_pretrained(folders["clip"], local_files_only=True).eval()
    dino = Dinov2Model.from_pretrained(folders["dinov2"], local_files_only=True).eval()
    for picture in pictures[:4]:
        with torch.no_grad():
            seen = clip.vision_model(prepared(picture, short=28, side=28, **clip_values)).pooler_output
            by_clip, by_dino = clip.visual_projection(seen), dino(prepared(picture, short=32, side=28, **dino_values)).pooler_output
        np.testing.assert_allclose(Clip(folders["clip"], CPU).embed([picture]), by_clip.numpy(), atol=1e-5)
        np.testing.assert_allclose(Dinov2(folders["dinov2"], CPU).embed([picture]), by_dino.numpy(), atol=1e-5)


def test_a_preprocessor_config_of_old_is_read_alike(folders, pictures, tmp_path):
    old = shutil.copytree(folders["clip"], tmp_path / "old")
    config = json.loads((old / "preprocessor_config.json").read_text())
    config |= {"size": 28, "crop_size": 28, "feature_extractor_type": "CLIPFeatureExtractor"}
    (old / "preprocessor_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "image_processor_type"}))
    np.testing.assert_array_equal(Clip(old, CPU).embed(pictures), Clip(folders["clip"], CPU).embed(pictures))


def test_dinov2_with_registers_is_known(folders, pictures, tmp_path):
    with torch.random.fork_rng():
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=28, patch_size=14, **SMALL)).eval()
    model.save_pretrained(tmp_path)
    shutil.copy(folders["dinov2"] / "preprocessor_config.json", tmp_path)
    processor = BitImageProcessorPil.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(processor(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]).pooler_output
    np.testing.assert_allclose(Dinov2(tmp_path, CPU).embed(pictures), expected.numpy(), atol=1e-5)


def test_an_embedding_is_a_function_of_its_picture_alone(judges, pictures):
    for judge in judges:
        together = judge.embed(pictures)
        assert together.dtype == np.float32
        for picture, expected in zip(pictures, together, strict=True):
            np.testing.assert_allclose(judge.embed([picture])[0], expected, atol=1e-5)


def test_the_same_pictures_are_no_distance_apart(judges, pictures):
    for judge in judges:
        one, other = judge.embed(pictures), judge.embed(pictures)
        np.testing.assert_array_equal(one, other)
        assert frechet_distance(moments(one), moments(other)) == pytest.approx(0, abs=1e-5)
        assert cmmd(one, other) == 0


def test_sets_of_one_colour_each_have_closed_forms(judges):
    """No covariance is left: the Fréchet distance is |a - b|^2, and CMMD 2000 (1 - k(a, b))."""
    grey, blue = (np.full((48, 64, 3), colour, dtype=np.uint8) for colour in ((128, 128, 128), (0, 0, 255)))
    for judge in judges:
        one, other = judge.embed([grey] * 3), judge.embed([blue] * 3)
        a, b = one[0].astype(np.float64), other[0].astype(np.float64)
        assert frechet_distance(moments(one), moments(other)) == pytest.approx(((a - b) ** 2).sum(), rel=1e-3)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert cmmd(one, other) == pytest.approx(2000 * (1 - np.exp((cosine - 1) / 100)), rel=1e-3)


def test_digests_are_those_of_the_weights_files(folders, judges):
    clip, dinov2, inception = (judge.digest for judge in judges)
    assert clip == digest_file(folders["clip"] / "model.safetensors")
    assert dinov2 == digest_file(folders["dinov2"] / "model.safetensors")
    assert inception == digest_file(folders["inception"])


def test_weights_in_several_files_are_read(folders, pictures, tmp_path):
    model = Dinov2Model.from_pretrained(folders["dinov2"], local_files_only=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(folders["dinov2"] / "preprocessor_config.json", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, parts = Dinov2(folders["dinov2"], CPU), Dinov2(tmp_path, CPU)
    np.testing.assert_array_equal(parts.embed(pictures), whole.embed(pictures))
    assert parts.digest != whole.digest


def test_a_pickle_is_not_read(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin may hold any program"):
        Clip(folder, CPU)


def test_a_folder_of_another_model_is_refused(folders):
    with pytest.raises(ModelFileError, match=r"'dinov2', and `evaluation\.clip` needs 'clip'"):
        Clip(folders["dinov2"], CPU)


def test_weights_of_another_size_are_refused(folders, tmp_path):
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **{**SMALL, "hidden_size": 64})).save_pretrained(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folders["dinov2"] / name, tmp_path)
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        Dinov2(tmp_path, CPU)


def test_missing_weights_are_never_made_up(folders, tmp_path):
    folder = shutil.copytree(folders["dinov2"], tmp_path / "dinov2")
    with TensorFile(folder / "model.safetensors") as file:
        tensors = {name: file.read(name) for name in file.tensors if name != "layernorm.bias"}
        metadata = file.metadata
    write_tensors(folder / "model.safetensors", tensors, metadata)
    with pytest.raises(ModelFileError, match=r"lack `layernorm\.bias`"):
        Dinov2(folder, CPU)


def test_a_file_that_was_cut_short_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        Clip(folder, CPU)


@pytest.mark.parametrize(("kind", "setting"), [(Clip, "clip"), (Dinov2, "dinov2"), (Inception, "inception")])
def test_a_path_that_is_not_there_names_its_setting(tmp_path, kind, setting):
    with pytest.raises(ModelFileError) as caught:
        kind(tmp_path / "none", CPU)
    assert f"evaluation.{setting}" in caught.value.hint


def test_loading_leaves_the_random_state_alone(folders):
    before = torch.random.get_rng_state()
    Clip(folders["clip"], CPU)
    Dinov2(folders["dinov2"], CPU)
    assert torch.equal(before, torch.random.get_rng_state())
