import numpy as np
import pytest
import torch
from PIL import Image

from aquatint.errors import ModelFileError
from aquatint.models.inception import LAYERS, load_inception, shrink
from aquatint.tensor_file import write_tensors
from tests.encoders import inception_tensors, write_inception


def test_features_are_those_of_pytorch_fid(tmp_path):
    """The numbers are those of pytorch-fid 0.3.0 with torchvision 0.28.0, from the same weights and picture."""
    network = load_inception(write_inception(tmp_path / "inception.safetensors", slimmer=1))
    rng = np.random.Generator(np.random.Philox(key=8))
    picture = torch.from_numpy(rng.integers(0, 256, (1, 3, 299, 299)).astype(np.float32))
    (features,) = network(picture)
    assert features.shape == (2048,)
    assert features[[3, 320, 321]].tolist() == pytest.approx([0.30232808, 1.26500940, 0.33899042], abs=1e-5)
    assert features[-4:].tolist() == pytest.approx([0.75481123, 2.52792740, 0.97275805, 0.07511595], abs=1e-5)
    assert (features.mean().item(), features.std().item()) == pytest.approx((0.46640447, 0.68792647), abs=1e-5)


def test_a_picture_is_resized_as_pillow_resizes_floats():
    picture = np.random.default_rng(0).integers(0, 256, (40, 700, 3), dtype=np.uint8)
    found = shrink(torch.from_numpy(picture).permute(2, 0, 1)[None])[0]
    for channel in range(3):
        one = Image.fromarray(picture[..., channel].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(found[channel].numpy(), np.asarray(one).clip(0, 255), atol=0.01)


def test_a_picture_of_one_colour_stays_of_that_colour():
    assert shrink(torch.full((1, 3, 64, 96), 200, dtype=torch.uint8)).allclose(torch.tensor(200.0), atol=1e-3)


def test_there_are_94_layers():
    assert len(LAYERS) == len(set(LAYERS)) == 94


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("Mixed_7c.branch_pool.bn.bias"), "Mixed_7c.branch_pool.bn.bias"),
        (lambda tensors: tensors.update({"fc.weight": torch.zeros(1000, 128)}), "1008"),
    ],
)
def test_another_network_is_refused(tmp_path, change, said):
    tensors = inception_tensors()
    change(tensors)
    write_tensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(ModelFileError, match=said):
        load_inception(tmp_path / "other.safetensors")
