from pathlib import Path

import pytest
import torch

from aquatint.models.patchgan import build_discriminator
from aquatint.models.recompute import Recompute, recompute
from aquatint.models.sdxl.load import open_base
from aquatint.training import vae_looks
from aquatint.training.ema import Ema
from aquatint.training.vae_looks import measure, pixels
from aquatint.training.vae_pictures import PictureBatch
from aquatint.training.vae_step import Adversary, DecoderLoss, VaeParts, reconstruct, trained_parts, vae_step
from tests.training.vae_runs import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_base(path)
    return path


def parts_of(base: Path, *, adversary_from: int | None = None, learning_rate: float = 1e-3, checkpointing: Recompute = False) -> VaeParts:
    vae = open_base(base).load_vae(torch.float32)
    recompute(vae, checkpointing)
    decoder = trained_parts(vae)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=learning_rate, weight_decay=0.0)
    adversary = None
    if adversary_from is not None:
        discriminator = build_discriminator(0, channels=8)
        adversary = Adversary(discriminator, torch.optim.AdamW(discriminator.parameters(), weight_decay=0.0), 0.5, adversary_from)
    ema = Ema(dict(decoder.named_parameters()), decay=0.5, warmup=False, device=None)
    return VaeParts(
        vae, decoder, optimizer, ema, DecoderLoss(1.0, 0.5), adversary, lambda step: learning_rate, False, 1.0, torch.device("cpu")
    )


@pytest.fixture(scope="module")
def batch() -> PictureBatch:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    return PictureBatch(images, torch.randn(2, 4, 4, 4, generator=rng), ("a.png", "b.png"))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_only_the_decoder_and_its_1x1_convolution_are_trained(base: Path, batch: PictureBatch):
    parts = parts_of(base, adversary_from=0)
    before = weights(parts.vae)
    vae_step(parts, [batch], 0)
    moved = changed(before, weights(parts.vae))
    assert {name.split(".")[0] for name in moved} == {"decoder", "post_quant_conv"}
    assert moved == {name for name in before if name.split(".")[0] in ("decoder", "post_quant_conv")}
    assert set(dict(parts.decoder.named_parameters())) == moved


def test_latents_are_a_sample_of_the_encoder_s_own_distribution(base: Path, batch: PictureBatch):
    parts = parts_of(base)
    with torch.no_grad():
        distribution = parts.vae.encode(batch.images).latent_dist
        expected = parts.vae.decode(distribution.mean + distribution.std * batch.noise).sample
        assert torch.equal(reconstruct(parts, batch), expected)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    loss = DecoderLoss(l1_weight=2.0, mse_weight=10.0)
    parts = loss.parts(torch.full((1, 3, 4, 4), 0.3), torch.full((1, 3, 4, 4), 0.1))
    assert (parts["l1"].item(), parts["mse"].item()) == (pytest.approx(0.2), pytest.approx(0.04))
    assert loss.total(parts).item() == pytest.approx(0.8)


def test_the_discriminator_waits_for_its_step(base: Path, batch: PictureBatch):
    parts = parts_of(base, adversary_from=1)
    assert parts.adversary is not None
    before = weights(parts.adversary.discriminator)
    assert set(vae_step(parts, [batch], 0).figures) == {"l1", "mse"}
    assert changed(before, weights(parts.adversary.discriminator)) == set()
    report = vae_step(parts, [batch], 1)
    assert set(report.figures) == {"l1", "mse", "adversarial", "adaptive_weight", "discriminator_loss"}
    moved = changed(before, weights(parts.adversary.discriminator))
    assert set(before) - moved <= {"11.bias"}  # where no verdict is beyond a hinge yet, real and decoded pull it equally
    assert report.loss == pytest.approx(report.figures["l1"] + 0.5 * report.figures["mse"], rel=1e-6)


def test_the_adversarial_pull_is_as_strong_as_the_reconstruction_s_times_its_weight(base: Path, batch: PictureBatch):
    """On the last layer: ||weight balance grad adversarial|| = weight ||grad reconstruction||, by the balance's own formula."""
    parts = parts_of(base, adversary_from=0)
    assert parts.adversary is not None
    last = parts.vae.decoder.conv_out.weight
    output = reconstruct(parts, batch)
    loss = parts.loss.total(parts.loss.parts(output, batch.images))
    verdict = -parts.adversary.discriminator(output).mean()
    norms = [torch.autograd.grad(one, last, retain_graph=True)[0].norm().item() for one in (loss, verdict)]
    balance = vae_step(parts, [batch], 0).figures["adaptive_weight"]
    assert balance == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [True, "pointwise"])
def test_recomputing_activations_changes_no_gradient(base: Path, batch: PictureBatch, checkpointing: Recompute):
    plain, saving = (parts_of(base, adversary_from=0, checkpointing=what) for what in (False, checkpointing))
    reports = [vae_step(parts, [batch], 0) for parts in (plain, saving)]
    assert reports[0].loss == reports[1].loss
    assert changed(weights(plain.vae), weights(saving.vae)) == set()


def test_half_precision_is_for_the_math_and_not_for_the_weights(base: Path, batch: PictureBatch):
    full, half = parts_of(base), parts_of(base, checkpointing=True)
    half.autocast = True
    before = weights(half.decoder)
    losses = [vae_step(parts, [batch], 0).loss for parts in (full, half)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert changed(before, weights(half.decoder)) == set(before)


def test_a_step_that_is_not_finite_changes_nothing(base: Path, batch: PictureBatch):
    parts = parts_of(base, adversary_from=0)
    assert parts.adversary is not None
    vae_step(parts, [batch], 0)
    before = [weights(parts.vae), weights(parts.adversary.discriminator), {k: v.clone() for k, v in parts.ema.average.items()}]
    optimizer = {name: table.copy() for name, table in parts.tables().items() if "optimizer" in name}
    steps = {name: {key: value.clone() for key, value in table.items()} for name, table in optimizer.items()}
    bad = PictureBatch(batch.images.clone().fill_(float("nan")), batch.noise, batch.names)
    report = vae_step(parts, [bad], 1)
    assert not report.finite
    assert report.names == ("a.png", "b.png")
    after = [weights(parts.vae), weights(parts.adversary.discriminator), parts.ema.average]
    assert [changed(one, other) for one, other in zip(before, after, strict=True)] == [set(), set(), set()]
    assert all(changed(steps[name], dict(table)) == set() for name, table in parts.tables().items() if name in steps)


def test_the_numbers_are_their_closed_forms(base: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch):
    """Off by 0.2 of 2 everywhere is 20 dB, off by 0.02 is 40 dB; the mean is over pictures."""
    off = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    small = PictureBatch(batch.images.clamp(-0.7, 0.7), batch.noise, batch.names)
    monkeypatch.setattr(vae_looks, "reconstruct", lambda parts, batch: batch.images + off)
    assert measure(parts_of(base), [small]) == {"val_l1": pytest.approx(0.11, rel=1e-5), "val_psnr": pytest.approx(30, rel=1e-5)}


def test_what_is_beyond_white_counts_as_white(base: Path, batch: PictureBatch, monkeypatch: pytest.MonkeyPatch):
    white = PictureBatch(torch.ones_like(batch.images), batch.noise, batch.names)
    monkeypatch.setattr(vae_looks, "reconstruct", lambda parts, batch: batch.images + 0.5)
    assert measure(parts_of(base), [white])["val_l1"] == 0.0
    assert pixels(torch.tensor([-1.5, 0.0, 1.5]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]
