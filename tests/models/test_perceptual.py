from pathlib import Path

import numpy as np
import pytest
import torch

from aquatint.errors import ModelFileError
from aquatint.models.perceptual import STAGES, WIDTHS, load_perceptual, perceptual_distance
from aquatint.tensor_file import write_tensors

CONVOLUTIONS = [number for stage in STAGES for number in stage]


def vgg_tensors(*, heads: str | None = "lin{}") -> dict[str, torch.Tensor]:
    """VGG16 with random weights that keep the scale, and heads that are not negative, as LPIPS trains them."""
    rng = torch.Generator().manual_seed(0)
    tensors, before = {}, 3
    for stage, width in zip(STAGES, WIDTHS, strict=True):
        for number in stage:
            tensors[f"features.{number}.weight"] = torch.randn(width, before, 3, 3, generator=rng) * (2 / (9 * before)) ** 0.5
            tensors[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=rng)
            before = width
    if heads is not None:
        for stage, width in enumerate(WIDTHS):
            tensors[f"{heads.format(stage)}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=rng)
    return tensors


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    write_tensors(path, vgg_tensors() | {"classifier.0.bias": torch.zeros(3)})
    return path


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 32, 48, generator=rng) * 2 - 1, torch.rand(2, 3, 32, 48, generator=rng) * 2 - 1


def convolved(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(C, H, W): 3x3, with zeros around, place by place of the kernel."""
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    total = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for row in range(3):
        for column in range(3):
            total += np.einsum("oc,chw->ohw", weight[:, :, row, column], padded[:, row : row + height, column : column + width])
    return np.maximum(total, 0)


def slow_distance(tensors: dict[str, torch.Tensor], first: torch.Tensor, second: torch.Tensor, heads: bool = True) -> float:
    """LPIPS of two pictures (3, H, W), written down from the paper, in float64."""
    images = []
    for picture in (first, second):
        values = picture.double().numpy()
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        images.append((values - shift[:, None, None]) / scale[:, None, None])
    distance = 0.0
    for number, stage in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        if number:
            images = [one.reshape(len(one), one.shape[1] // 2, 2, one.shape[2] // 2, 2).max(axis=(2, 4)) for one in images]
        for layer in stage:
            weight, bias = (tensors[f"features.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
            images = [convolved(one, weight, bias) for one in images]
        units = [one / (np.sqrt((one**2).sum(axis=0)) + 1e-10) for one in images]
        channels = tensors[f"lin{number}.model.1.weight"].double().numpy().reshape(-1, 1, 1) if heads else 1.0
        distance += (channels * (units[0] - units[1]) ** 2).sum(axis=0).mean()
    return distance


def test_the_distance_is_that_of_the_paper(vgg_file, pictures):
    first, second = pictures
    tensors = vgg_tensors()
    expected = [slow_distance(tensors, one, other) for one, other in zip(first, second, strict=True)]
    assert perceptual_distance(load_perceptual(vgg_file), first, second).tolist() == pytest.approx(expected, rel=1e-5)


def test_without_heads_all_channels_count_the_same(tmp_path, pictures):
    path = tmp_path / "bare.safetensors"
    write_tensors(path, {name: tensor.half() for name, tensor in vgg_tensors(heads=None).items()})
    tensors = {name: tensor.half().float() for name, tensor in vgg_tensors(heads=None).items()}
    expected = slow_distance(tensors, pictures[0][0], pictures[1][0], heads=False)
    assert perceptual_distance(load_perceptual(path), pictures[0][:1], pictures[1][:1]).item() == pytest.approx(expected, rel=1e-5)


def test_it_is_zero_for_equal_pictures_and_the_same_both_ways(vgg_file, pictures):
    weights = load_perceptual(vgg_file)
    first, second = pictures
    assert perceptual_distance(weights, first, first).tolist() == [0.0, 0.0]
    there, back = perceptual_distance(weights, first, second), perceptual_distance(weights, second, first)
    assert torch.allclose(there, back, rtol=1e-6)
    assert there.min() > 0


def test_a_picture_without_any_feature_has_a_gradient(vgg_file):
    weights = load_perceptual(vgg_file)
    dead = {number: (weight, torch.full_like(bias, -1e6)) for number, (weight, bias) in weights.convolutions.items()}
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    perceptual_distance(type(weights)(dead, weights.heads), image, torch.ones(1, 3, 16, 16)).sum().backward()
    assert image.grad is not None
    assert torch.equal(image.grad, torch.zeros_like(image))


def test_heads_may_have_either_spelling(tmp_path, vgg_file):
    path = tmp_path / "other.safetensors"
    write_tensors(path, vgg_tensors(heads="lins.{}"))
    for one, other in zip(load_perceptual(path).heads, load_perceptual(vgg_file).heads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("features.28.weight"), "no `features.28.weight`"),
        (lambda tensors: tensors.pop("lin3.model.1.weight"), "no `lin3.model.1.weight`"),
        (lambda tensors: tensors.update({"features.0.weight": torch.zeros(64, 3, 7, 7)}), "64, 3, 7, 7"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, change, reason):
    tensors = vgg_tensors()
    change(tensors)
    write_tensors(tmp_path / "vgg.safetensors", tensors)
    with pytest.raises(ModelFileError, match=r"vgg\.safetensors is not VGG16") as caught:
        load_perceptual(tmp_path / "vgg.safetensors")
    assert reason in caught.value.message
    assert "docs/vae.md" in caught.value.hint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match="no file"):
        load_perceptual(tmp_path / "none.safetensors")
