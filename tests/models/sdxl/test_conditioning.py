import math

import pytest
import torch
from torch.nn import functional

from aquatint.models.sdxl.conditioning import TextEncoders, take_off_unheard, time_ids_tensor
from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.model import build_unet, sdxl_spec
from aquatint.models.sdxl.tokenizer import PAD, PAD_2, chunk, padded
from aquatint.tensor_file import TensorFile

CAPTIONS = ["a red circle, white background", "", "tag, " * 80]


@pytest.fixture(scope="module")
def encoders(tiny_base) -> TextEncoders:
    return open_base(tiny_base).caption_encoder("cpu")


@pytest.fixture(scope="module")
def official(tiny_base) -> dict[str, torch.Tensor]:
    """The text encoders' tensors as the file has them."""
    with TensorFile(tiny_base) as file:
        return {name: file.read(name) for name in file.tensors if name.startswith("conditioner.")}


def attend(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Causal self-attention with query, key and value stacked, (T, D) -> (T, D)."""
    length, width = x.shape
    query, key, value = functional.linear(x, weight, bias).view(length, 3, num_heads, width // num_heads).permute(1, 2, 0, 3)
    scores = query @ key.transpose(1, 2) / math.sqrt(width // num_heads)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, width)


def open_clip(tensors: dict[str, torch.Tensor], ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """OpenCLIP's text tower, from its own layout: penultimate states (77, D) and the pooled embedding."""
    t = {name.removeprefix("conditioner.embedders.1.model."): value for name, value in tensors.items()}
    width = t["ln_final.weight"].numel()

    def norm(x, name):
        return functional.layer_norm(x, (width,), t[f"{name}.weight"], t[f"{name}.bias"])

    x = t["token_embedding.weight"][ids] + t["positional_embedding"]
    states = [x]
    for layer in range(2):
        block = f"transformer.resblocks.{layer}"
        mixed = attend(norm(x, f"{block}.ln_1"), t[f"{block}.attn.in_proj_weight"], t[f"{block}.attn.in_proj_bias"], 2)
        x = x + functional.linear(mixed, t[f"{block}.attn.out_proj.weight"], t[f"{block}.attn.out_proj.bias"])
        wide = functional.gelu(functional.linear(norm(x, f"{block}.ln_2"), t[f"{block}.mlp.c_fc.weight"], t[f"{block}.mlp.c_fc.bias"]))
        x = x + functional.linear(wide, t[f"{block}.mlp.c_proj.weight"], t[f"{block}.mlp.c_proj.bias"])
        states.append(x)
    return states[-2], norm(x, "ln_final")[ids.index(49407)] @ t["text_projection"]


def clip_l(tensors: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """CLIP-L's text tower, from the file's names: penultimate states (77, D)."""
    t = {name.removeprefix("conditioner.embedders.0.transformer.text_model."): value for name, value in tensors.items()}
    x = t["embeddings.token_embedding.weight"][ids] + t["embeddings.position_embedding.weight"]

    def linear(x, name):
        return functional.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    layer = "encoder.layers.0"
    parts = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
    normed = functional.layer_norm(x, x.shape[1:], t[f"{layer}.layer_norm1.weight"], t[f"{layer}.layer_norm1.bias"])
    weight, bias = (torch.cat([t[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias"))
    x = x + linear(attend(normed, weight, bias, 2), f"{layer}.self_attn.out_proj")
    normed = functional.layer_norm(x, x.shape[1:], t[f"{layer}.layer_norm2.weight"], t[f"{layer}.layer_norm2.bias"])
    wide = linear(normed, f"{layer}.mlp.fc1")
    return x + linear(wide * torch.sigmoid(1.702 * wide), f"{layer}.mlp.fc2")


@pytest.mark.parametrize("caption", CAPTIONS, ids=["short", "empty", "long"])
def test_embeddings_equal_the_official_math(encoders, official, caption):
    ((hidden, pooled),) = encoders.encode([caption])
    chunks = chunk(caption)
    expected = [open_clip(official, padded(ids, PAD_2)) for ids in chunks]
    torch.testing.assert_close(pooled, expected[0][1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden[:, 32:], torch.cat([states for states, _ in expected]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden[:, :32], torch.cat([clip_l(official, padded(ids, PAD)) for ids in chunks]), atol=1e-4, rtol=1e-4)


def test_captions_of_any_length_are_encoded_together(encoders):
    together = encoders.encode(CAPTIONS)
    assert [(tuple(hidden.shape), tuple(pooled.shape)) for hidden, pooled in together] == [
        ((77, 80), (48,)), ((77, 80), (48,)), ((231, 80), (48,)),
    ]  # fmt: skip
    for caption, (hidden, pooled) in zip(CAPTIONS, together, strict=True):
        ((alone, alone_pooled),) = encoders.encode([caption])
        torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled, alone_pooled, atol=1e-5, rtol=1e-5)


def test_more_chunks_than_fit_at_once_are_encoded(encoders):
    results = encoders.encode(["a red circle"] * 70)
    assert len(results) == 70
    torch.testing.assert_close(results[0][0], results[69][0], atol=1e-5, rtol=1e-5)


def test_nothing_to_encode_is_nothing(encoders):
    assert encoders.encode([]) == []


def test_embeddings_are_ordinary_tensors(encoders):
    ((hidden, pooled),) = encoders.encode(["a cat"])
    for tensor in (hidden, pooled):
        assert (tensor.dtype, tensor.device.type, tensor.requires_grad, tensor.is_inference()) == (torch.float32, "cpu", False, False)


def test_the_digest_is_the_base_s(encoders, tiny_base):
    assert encoders.digest == open_base(tiny_base).digest("text_encoders")


def test_time_ids_keep_whole_numbers():
    ids = time_ids_tensor([(3008, 2001, 0, 16, 1025, 1024), (1, 2, 3, 4, 5, 6)])
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[3008, 2001, 0, 16, 1025, 1024], [1, 2, 3, 4, 5, 6]]


def sinusoids(*values: float) -> torch.Tensor:
    """What SDXL's own UNet makes of sizes."""
    return build_unet(sdxl_spec()).add_time_proj(torch.tensor(values))


def test_methods_7_sizes_become_the_sinusoids_that_sdxl_was_trained_with():
    zero, size, one, other = sinusoids(0, 1024, 1000, 1001)
    assert zero.tolist() == [1.0] * 128 + [0.0] * 128
    assert size.square().sum().item() == pytest.approx(128, rel=1e-5)
    assert size[[0, 1, 127, 128, 129, 255]].tolist() == pytest.approx(
        [0.987354, -0.53761, 0.993952, -0.158533, -0.843193, 0.109818], abs=2e-4
    )
    assert (one - other).norm().item() == pytest.approx(2.6712, abs=1e-3)


def test_methods_7_the_six_sizes_become_1536_numbers():
    vector = sinusoids(1024, 1024, 0, 0, 1024, 1024).flatten()
    assert vector.numel() == 1536
    assert vector.sum().item() == pytest.approx(435.7508769, abs=5e-3)


def test_without_the_layers_that_are_not_heard_embeddings_keep_every_bit(tiny_base, encoders):
    base = open_base(tiny_base)
    fewer = base.caption_encoder("cpu")
    take_off_unheard(fewer.clip)
    assert {name: tuple(tensor.shape) for name, tensor in fewer.clip.state_dict().items()} == base.spec.heard_shapes("text_encoder")
    for one, other in zip(fewer.encode(CAPTIONS), encoders.encode(CAPTIONS), strict=True):
        assert all(map(torch.equal, one, other))
