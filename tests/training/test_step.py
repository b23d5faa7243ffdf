from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from aquatint.data.batch import Batch
from aquatint.diffusion.schedule import edm_schedule, sdxl_schedule
from aquatint.optim.clipping import Clipping
from aquatint.optim.create import create_optimizer
from aquatint.optim.fused import FusedBackward
from aquatint.training import objective, step
from aquatint.training.objective import Objective
from aquatint.training.step import Parts, StepReport, gradient_norm


class Linear(torch.nn.Module):
    """Predicts `weight` times the noisy latents, whatever else it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))


class Descent(torch.optim.SGD):
    """The plainest step, and the host decides whether it is taken."""

    def step(self, closure=None, finite: torch.Tensor | None = None) -> None:
        if finite is None or finite:
            super().step(closure)


@pytest.fixture(autouse=True)
def simple_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "predict", lambda unet, noisy, *conditions: unet.weight * noisy)


def fused_parts(clipping: Clipping, **settings) -> Parts:
    """With steps inside the backward pass."""
    ordinary = parts(**settings)
    optimizer = create_optimizer("adafactor", ordinary.unet.named_parameters(), seed=0, learning_rate=0.0, weight_decay=0.0)
    return replace(ordinary, optimizer=optimizer, clipping=clipping, fused=FusedBackward(optimizer, clipping))


def parts(*, clip_norm: float = 0.0, weights: torch.Tensor | None = None, learning_rate: float = 0.1) -> Parts:
    unet = Linear()
    schedule = sdxl_schedule(zero_terminal_snr=True)
    weights = torch.ones(1000) if weights is None else weights
    return Parts(
        unet=unet,
        optimizer=Descent(unet.parameters(), lr=1.0),
        ema=None,
        objective=Objective(schedule, "v_prediction", weights),
        learning_rate=lambda step: learning_rate,
        autocast=False,
        clipping=Clipping("global", clip_norm),
        device=torch.device("cpu"),
    )


def train_step(parts: Parts, batches: Sequence[Batch], number: int) -> StepReport:
    """A step whose numbers are read at once."""
    return step.train_step(parts, batches, number).read()


def batch(size: int, seed: int = 0, timestep: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(0, 1000, (size,), generator=generator) if timestep is None else torch.full((size,), timestep)
    return Batch(
        latents=torch.randn(size, 4, 8, 8, generator=generator),
        noise=torch.randn(size, 4, 8, 8, generator=generator),
        timesteps=timesteps,
        prompt_embeds=torch.zeros(size, 77, 8),
        pooled_prompt_embeds=torch.zeros(size, 8),
        time_ids=torch.zeros(size, 6),
        loss_weights=torch.ones(size),
        names=tuple(f"{seed}-{i}" for i in range(size)),
        positions=tuple(range(size)),
        sources=(0,) * size,
    )


def joined(*batches: Batch) -> Batch:
    tensors = ("latents", "noise", "timesteps", "prompt_embeds", "pooled_prompt_embeds", "time_ids", "loss_weights")
    size = sum(len(one.names) for one in batches)
    return replace(
        batches[0],
        **{name: torch.cat([getattr(one, name) for one in batches]) for name in tensors},
        names=tuple(name for one in batches for name in one.names),
        positions=tuple(range(size)),
        sources=(0,) * size,
    )


def test_at_the_terminal_step_the_target_is_minus_the_picture():
    """v = -x0 at SNR 0, and the input is pure noise: the loss is that of weight * noise against -latents."""
    one = batch(3, timestep=999)
    report = train_step(parts(), [one], 0)
    assert report.loss == pytest.approx((0.5 * one.noise + one.latents).square().mean().item(), rel=1e-5)


def test_accumulated_batches_of_unequal_size_equal_one_large_batch():
    first, second = batch(1, seed=1), batch(5, seed=2)
    apart, together = parts(), parts()
    report_apart = train_step(apart, [first, second], 0)
    report_together = train_step(together, [joined(first, second)], 0)
    assert report_apart.samples == report_together.samples == 6
    assert report_apart.loss == pytest.approx(report_together.loss, rel=1e-6)
    assert apart.unet.weight.item() == pytest.approx(together.unet.weight.item(), rel=1e-6)


def test_the_weight_belongs_to_each_sample_by_its_timestep():
    """Weight 1 at t = 10 and 0 at t = 20: the second sample does not count, in the loss or in the gradient."""
    weights = torch.zeros(1000)
    weights[10] = 1.0
    mixed = joined(batch(1, seed=1, timestep=10), batch(1, seed=2, timestep=20))
    report = train_step(parts(weights=weights), [mixed], 0)
    alone = train_step(parts(), [batch(1, seed=1, timestep=10)], 0)
    assert report.loss == pytest.approx(alone.loss / 2, rel=1e-6)
    assert report.gradient_norm == pytest.approx(alone.gradient_norm / 2, rel=1e-6)


def test_a_sample_weighs_what_its_picture_does():
    """Weights of 1 and 0.25: the second sample counts for a quarter, in the loss and in the gradient."""
    first, second = batch(1, seed=1), batch(1, seed=2)
    mixed = replace(joined(first, second), loss_weights=torch.tensor([1.0, 0.25]))
    one, other, report = train_step(parts(), [first], 0), train_step(parts(), [second], 0), train_step(parts(), [mixed], 0)
    assert report.loss == pytest.approx((one.loss + 0.25 * other.loss) / 2, rel=1e-6)
    apart = train_step(parts(), [first, replace(second, loss_weights=torch.tensor([0.25]))], 0)
    assert apart.loss == pytest.approx(report.loss, rel=1e-6)
    assert apart.gradient_norm == pytest.approx(report.gradient_norm, rel=1e-6)


def test_only_what_is_inside_the_mask_counts():
    """A picture whose left half is masked out costs what a picture of its right half alone does."""
    one = batch(2, timestep=500)
    masks = torch.ones(2, 1, 8, 8)
    masks[0, :, :, :4] = 0.0
    masked = train_step(parts(), [replace(one, masks=masks)], 0)
    right = replace(one, latents=one.latents[..., 4:], noise=one.noise[..., 4:])
    halves = [
        replace(one, **{name: getattr(which, name)[row : row + 1] for name in ("latents", "noise")})
        for row, which in ((0, right), (1, one))
    ]
    halves = [replace(half, timesteps=one.timesteps[:1], loss_weights=torch.ones(1), names=("x",)) for half in halves]
    apart = train_step(parts(), halves, 0)
    assert masked.loss == pytest.approx(apart.loss, rel=1e-5)
    assert masked.gradient_norm == pytest.approx(apart.gradient_norm, rel=1e-5)
    everything = train_step(parts(), [replace(one, masks=torch.ones(2, 1, 8, 8))], 0)
    assert everything.loss == pytest.approx(train_step(parts(), [one], 0).loss, rel=1e-6)


def test_the_learning_rate_of_the_step_is_used():
    slow, fast = parts(learning_rate=0.01), parts(learning_rate=0.02)
    train_step(slow, [batch(2)], 0)
    train_step(fast, [batch(2)], 0)
    assert fast.unet.weight.item() - 0.5 == pytest.approx(2 * (slow.unet.weight.item() - 0.5), rel=1e-5)


def test_the_learning_rate_of_a_group_is_a_multiple_of_it():
    slow, usual = parts(learning_rate=0.02), parts(learning_rate=0.02)
    slow.optimizer.param_groups[0]["factor"] = 0.25
    report = train_step(slow, [batch(2)], 0)
    train_step(usual, [batch(2)], 0)
    assert slow.unet.weight.item() - 0.5 == pytest.approx((usual.unet.weight.item() - 0.5) / 4, rel=1e-5)
    assert report.learning_rate == 0.02


def test_the_gradient_is_clipped_after_its_norm_is_reported():
    clipped = parts(clip_norm=1e-3, learning_rate=1.0)
    report = train_step(clipped, [batch(2)], 0)
    assert report.gradient_norm > 1e-2
    assert abs(clipped.unet.weight.item() - 0.5) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(poison: float):
    one = batch(2)
    one.latents[0, 0, 0, 0] = poison
    broken = parts()
    report = train_step(broken, [one], 0)
    assert not report.finite
    assert broken.unet.weight.item() == 0.5
    assert broken.unet.weight.grad is None
    assert train_step(broken, [batch(2)], 1).finite


@pytest.mark.parametrize("mode", ["per_tensor", "delayed"])
def test_a_step_inside_the_backward_pass_is_the_step_after_it(mode: str):
    inside, after = fused_parts(Clipping(mode, 1e-3)), fused_parts(Clipping(mode, 1e-3))
    after.fused.remove()
    after.fused = None
    for number in range(4):
        batches = [batch(1, seed=2 * number), batch(2, seed=2 * number + 1)]
        assert train_step(inside, batches, number) == replace(train_step(after, batches, number), by_part=True)
        assert torch.equal(inside.unet.weight, after.unet.weight)
        assert inside.unet.weight.grad is None
    assert inside.unet.weight != 0.5


def test_a_loss_that_is_not_finite_changes_nothing_with_steps_inside_the_backward_pass_either():
    broken = fused_parts(Clipping("delayed", 1.0))
    good, bad = batch(2), batch(2)
    bad.latents[0, 0, 0, 0] = float("nan")
    report = train_step(broken, [good, bad], 0)
    assert not report.finite
    assert broken.unet.weight.item() == 0.5
    assert broken.unet.weight.grad is None
    assert broken.clipping.previous_norm == 0
    assert train_step(broken, [good], 1).finite


def test_the_gradient_norm_of_half_precision_gradients_is_exact():
    """In bf16 the sum of 1000 ones would stop at 256."""
    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert gradient_norm([parameter]).item() == pytest.approx(1000**0.5, rel=1e-6)


def test_the_report_names_the_pictures():
    assert train_step(parts(), [batch(1, seed=4), batch(1, seed=5)], 0).names == ("4-0", "5-0")


def test_what_the_host_knows_is_reported_sample_by_sample():
    batches = [replace(batch(2, timestep=10), sources=(3, 1)), batch(1, seed=5, timestep=999)]
    batches[1] = replace(batches[1], latents=batches[1].latents[..., :6], noise=batches[1].noise[..., :6])
    launched = step.train_step(parts(learning_rate=0.25), batches, 0)
    assert launched.samples == 3
    assert launched.is_ready()
    report = launched.read()
    assert (report.samples, report.learning_rate, report.finite, report.by_part) == (3, 0.25, True, False)
    assert (report.timesteps, report.sources, report.sizes_hw) == ((10, 10, 999), (3, 1, 0), ((8, 8), (8, 8), (8, 6)))
    assert report.loss == pytest.approx(sum(report.losses) / 3, rel=1e-6)
    assert launched.read() == report


def test_the_tables_of_the_objective_go_to_the_device_when_the_parts_are_put_together():
    meta = torch.device("meta")
    schedule = edm_schedule()
    bends = torch.ones(1000)
    placed = replace(parts(), objective=Objective(schedule, "edm", torch.ones(1000), huber_c=bends), device=meta).objective
    tables = (placed.weights, placed.huber_c, placed.schedule.alphas, placed.schedule.sigmas, placed.schedule.conditioning)
    assert all(table.device == meta for table in tables)
    assert all(level.device == meta for level in placed.schedule.at(torch.zeros(2, dtype=torch.int64, device=meta)))
