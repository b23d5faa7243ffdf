import pytest
import torch

from aquatint.errors import UsageError
from aquatint.training import vae_dry_step
from aquatint.training.vae_dry_step import random_pictures, try_vae_step
from aquatint.training.vae_step import VaeParts
from tests.training.vae_runs import write_base

from .test_vae_step import changed, parts_of, weights


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> VaeParts:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_base(path)
    return parts_of(path, adversary_from=500)


def test_the_pictures_have_the_shapes_of_the_run():
    batch = random_pictures(3, 64)
    assert (batch.images.shape, batch.noise.shape, len(batch.names)) == ((3, 3, 64, 64), (3, 4, 8, 8), 3)
    assert -1 <= batch.images.min() < batch.images.max() <= 1


def test_it_goes_through_a_judged_step_and_leaves_everything_as_it_was(parts, monkeypatch, capsys):
    assert parts.adversary is not None
    before, judge, state = weights(parts.vae), weights(parts.adversary.discriminator), torch.get_rng_state()
    held, went = [], []
    through = vae_dry_step.passes
    monkeypatch.setattr(vae_dry_step, "room", lambda device, num_bytes: held.append(num_bytes))
    monkeypatch.setattr(vae_dry_step, "passes", lambda *args: went.append(through(*args)))
    try_vae_step(parts, 2, 32)
    assert "discriminator_loss" in went[0][3], "long before it joins in"
    assert not changed(before, weights(parts.vae)) | changed(judge, weights(parts.adversary.discriminator))
    assert torch.equal(torch.get_rng_state(), state)
    trained = [*parts.decoder.parameters(), *parts.adversary.discriminator.parameters()]
    assert all(weight.grad is None for weight in trained)
    assert held == [8 * sum(weight.numel() for weight in trained)]
    assert capsys.readouterr().err == "dry step    2 × 32 × 32 pixels, judged: it fits\n"


def test_running_out_of_memory_says_what_to_lower(parts, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(vae_dry_step, "passes", fail)
    with pytest.raises(UsageError, match=r"a step of 2 × 32 × 32 pixels does not fit into the memory \(CUDA") as caught:
        try_vae_step(parts, 2, 32)
    assert "vae_training.batch_size" in caught.value.hint


def test_other_errors_pass_through(parts, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(vae_dry_step, "passes", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        try_vae_step(parts, 2, 32)
