import numpy as np
import pytest
import torch

from aquatint.demo.model import write_tiny_base
from aquatint.errors import UsageError
from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.process import Process
from aquatint.tracking.tensorboard import png_size_hw
from aquatint.training import plotting
from aquatint.training.build import build_reader
from aquatint.training.build_parts import build_ema, build_parts
from aquatint.training.objectives import choose_objective
from aquatint.training.plotting import plot_run
from aquatint.training.prepare import prepare
from tests.runs import small_config

RUN = {
    "training": {"length": "3 epochs", "batch_size": 3, "accumulation_steps": 2},
    "lr": {"schedule": "cosine", "warmup": "0.5 epochs", "end_factor": 0.1},
    "timesteps": {"density": "logit_normal", "shift": 2.0, "resolution_noise": "tilt", "spread": "lattice"},
    "validation": {"every": None},
    "ema": {"half_life": "20 samples", "power_stds": [0.1]},
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory, tiny_base):
    """A config with its base and everything of the run that it would start."""
    config = small_config(tmp_path_factory.mktemp("run"), tiny_base, **RUN)
    base = open_base(config.model.base)
    data = prepare(config, base, say=lambda line: None)
    return config, base, data


@pytest.fixture(scope="module")
def flow_base(tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    write_tiny_base(path, seed=0, process=Process("flow", declared=True))
    return path


def config_for(tmp_path, base, **sections):
    return small_config(tmp_path, base, **{"data": {"sources": [{"path": str(tmp_path / "none")}]}, **sections})


def test_drawn_timesteps_are_those_of_the_run(planned):
    config, base, data = planned
    reader = build_reader(config, base, data)
    batches = [reader.order.batch(k) for k in range(4)]
    drawn = [plotting.first_draws(config, reader.draws.densities[bucket]).reshape(-1, 3)[k] for k, (bucket, _) in enumerate(batches)]
    assert np.array(drawn).tolist() == [reader.read(k).timesteps.tolist() for k in range(4)]


def test_drawn_learning_rates_are_those_of_the_run(planned):
    config, base, data = planned
    parts, _, total = build_parts(config, base, choose_objective(config, base), data)
    rates = plotting.learning_rates(config, plotting.count_samples(config))
    assert rates.tolist() == pytest.approx([parts.learning_rate(step) for step in range(total)], rel=1e-12)
    assert rates.argmax() > 0


def test_drawn_memories_are_those_of_the_averages_of_the_run(planned):
    """The weights of step s are 1 in place s alone, so an average holds its shares of them."""
    config, _, _ = planned
    config = config.model_copy(update={"training": config.training.model_copy(update={"length": config.training.length.parse("40 steps")})})
    model = torch.nn.Linear(41, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(41)[:1])
    ema = build_ema(config, model, samples_per_epoch=10)
    memories, base_share = plotting.memories_of(config, samples_per_epoch=10)
    for step in range(40):
        with torch.no_grad():
            model.weight.copy_(torch.eye(41)[step + 1 : step + 2])
        ema.update(step)
        for memory, table in zip(memories, (ema.average, *ema.tracks.values()), strict=True):
            newer = table["weight"][0].double().numpy()[: step + 2][::-1].cumsum()
            assert memory.steps_back[step] == np.searchsorted(newer, 0.5 - 1e-6) + 1
    assert base_share == pytest.approx(ema.average["weight"][0, 0].item(), rel=1e-4)


def test_half_of_an_average_with_constant_decay_is_from_its_half_life():
    ages = plotting.half_ages(np.full(3000, 0.999))
    assert ages[:692].tolist() == list(range(2, 694)), "the base model is more than half of it, and counts as one step"
    assert set(ages[693:]) == {693}  # ln 0.5 / ln 0.999 = 692.8
    assert plotting.half_ages(np.zeros(3)).tolist() == [1, 1, 1]


def test_drawn_weights_are_closed_forms_of_the_snr(tmp_path, tiny_base):
    config = config_for(tmp_path, tiny_base)
    base = open_base(tiny_base)
    snr = choose_objective(config, base).schedule.snr.numpy()
    table = plotting.weights_of(config, base)
    np.testing.assert_allclose(table.picture, np.minimum(snr + 1, 5), rtol=1e-6)
    np.testing.assert_allclose(table.output, np.minimum(snr + 1, 5) / (snr + 1), rtol=1e-6)
    assert table.density[999] == pytest.approx(0.01 + 0.99 / 1000)
    assert table.drawn_share[-1] == pytest.approx(10.9)


def test_drawn_levels_end_in_exactly_nothing_with_zero_terminal_snr(tmp_path, tiny_base):
    config = config_for(tmp_path, tiny_base)
    (levels,) = plotting.levels_of(config, open_base(tiny_base))
    assert levels.decibels[0] == pytest.approx(10 * np.log10(1175.470588))
    assert levels.decibels[999] == -np.inf
    assert levels.name == "v_prediction, zero terminal SNR"


def test_levels_and_draws_are_shown_for_each_shape_where_they_differ(tmp_path, tiny_base):
    base, tiers = open_base(tiny_base), {"buckets": {"tiers": [32], "min_side": 32}}
    assert plotting.shapes_on_offer(config_for(tmp_path, tiny_base, **tiers)) == ((64, 64), (32, 32))
    for how, levels, draws in (("none", 1, 1), ("tilt", 1, 2), ("reindex", 2, 1)):
        config = config_for(tmp_path, tiny_base, timesteps={"resolution_noise": how}, **tiers)
        assert (len(plotting.levels_of(config, base)), len(plotting.draws_of(config, base))) == (levels, draws)
    large, small = plotting.levels_of(config, base)
    np.testing.assert_allclose(small.decibels[:999] - large.decibels[:999], 20 * np.log10(2))


def test_sampling_steps_are_those_of_the_samples(tmp_path, tiny_base):
    config = config_for(tmp_path, tiny_base, samples={"every": None, "steps": 28})
    grid = plotting.grid_of(config, open_base(tiny_base))
    assert grid.timesteps[:3].tolist() == [999, 963, 928]
    assert grid.ve_sigmas[0] == np.inf
    assert grid.ve_sigmas[1:4] == pytest.approx([57.867, 27.170, 16.696], rel=5e-5)


def test_a_shift_of_a_flow_is_seen_in_its_sampling_steps(tmp_path, flow_base):
    config = config_for(
        tmp_path, flow_base, model={"prediction": "auto", "zero_terminal_snr": "auto"}, samples={"every": None, "shift": 3.0}
    )
    grid = plotting.grid_of(config, open_base(flow_base))
    t = np.array(grid.timesteps[1:] + 1) / 1000
    np.testing.assert_allclose(grid.ve_sigmas[1:], 3 * t / (1 - t))


@pytest.mark.parametrize(("offset", "largest"), [(0.05, 0.05060667), (0.1, 0.10030471)])
def test_noise_of_whole_channels_is_as_strong_as_its_offset(tmp_path, tiny_base, offset, largest):
    table = plotting.noise_of(config_for(tmp_path, tiny_base, noise={"offset": offset}))
    assert table.sides[-1] == 128
    assert table.deviations[0] == pytest.approx((1 + offset**2) ** 0.5, rel=2e-3)
    assert table.deviations[-1] == pytest.approx(largest, rel=0.15)  # of 128 draws


def test_a_run_is_drawn_into_files_with_a_line_each_and_what_needs_pictures_is_left_out_without(tmp_path, tiny_base):
    *drawn, left_out = plot_run(config_for(tmp_path, tiny_base, training={"length": "2 epochs"}), tmp_path / "plots")
    assert [one.path.name for one in drawn] == ["schedule.png", "weights.png", "timesteps.png", "sampling.png"]
    assert {png_size_hw(one.path.read_bytes())[1] for one in drawn} == {860}
    assert "pure noise" in drawn[0].words
    assert "10.9 % of the draws and 11.9 % of the weight" in drawn[1].words
    assert left_out.path is None
    assert "counts in epochs" in left_out.words
    assert "does not exist" in left_out.words
    assert not (tmp_path / "plots" / "learning_rate.png").exists()


def test_a_config_that_contradicts_its_base_is_refused(tmp_path, flow_base):
    with pytest.raises(UsageError, match="trained for flow"):
        plot_run(config_for(tmp_path, flow_base), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
