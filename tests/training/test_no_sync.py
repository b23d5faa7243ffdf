"""The host launches a step and reads nothing of it: a GPU that it waits for would stand still as long as the host needs afterwards."""

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from aquatint.config.duration import Duration
from aquatint.data.batch import Batch
from aquatint.diffusion.schedule import edm_schedule, flow_schedule, sdxl_schedule
from aquatint.models.sdxl.process import Process
from aquatint.optim.clipping import Clipping
from aquatint.optim.create import create_optimizer
from aquatint.optim.fused import FusedBackward
from aquatint.training import objective as objectives
from aquatint.training.ema import Ema
from aquatint.training.objective import Objective
from aquatint.training.state import Every, TrainState
from aquatint.training.step import Parts, Pending, train_step
from aquatint.training.tasks import log_action
from aquatint.training.trainer import Run, StopRequest, Task, train
from tests.optim.test_create import EACH_KIND, SETTINGS
from tests.optim.test_tensorwise import held
from tests.training.test_step import batch
from tests.training.test_trainer import Recorder

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2, aten.linalg_eigh)
READS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__repr__", "__format__")  # NumPy takes no tensor of a GPU
WEIGHTS = torch.linspace(0.5, 1.5, 1000)


class Waits(TorchDispatchMode):
    """Counts operations whose result the host waits for on a GPU, and all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if func.overloadpacket in WAITS:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts what reads a tensor without an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def waits_of(action: Callable[[], Any]) -> dict[str, int]:
    waits, reads = Waits(), Reads()
    with reads, waits:
        action()
    assert waits.calls > 0
    return dict(waits.found + reads.found)


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "predict", lambda unet, noisy, *conditions: unet(noisy.to(unet[0].weight.dtype)).float())


def parts_of(name: str, dtype: torch.dtype, *, fused: bool = False, objective: Objective | None = None, ema: bool = True) -> Parts:
    """Two convolutions of 4,608 weights, which are enough for moments of 8 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = nn.Sequential(nn.Conv2d(4, 128, 3, padding=1), nn.Conv2d(128, 4, 3, padding=1)).to(dtype)
    settings = {key: value for key, value in SETTINGS[name].items() if key != "learning_rate"}
    optimizer = create_optimizer(name.split()[0], unet.named_parameters(), seed=0, learning_rate=1e-3, **settings)
    clipping = Clipping("delayed" if fused else "global", 0.1)
    return Parts(
        unet=unet,
        optimizer=optimizer,
        ema=Ema(dict(unet.named_parameters()), decay=0.9, warmup=True, device=None, power_stds=(0.1,)) if ema else None,
        objective=objective or Objective(sdxl_schedule(zero_terminal_snr=True), "v_prediction", WEIGHTS),
        learning_rate=lambda step: 1e-3,
        autocast=False,
        clipping=clipping,
        device=torch.device("cpu"),
        fused=FusedBackward(optimizer, clipping) if fused else None,
    )


def everything(parts: Parts) -> list[Tensor]:
    """Weights, moments, averages and what is clipped by."""
    averages = [tensor for table in parts.ema.tables().values() for tensor in table.values()] if parts.ema else []
    return [*held(parts.unet, parts.optimizer), *averages, parts.clipping.previous_norm]


EACH_WAY = pytest.mark.parametrize("fused", [False, True], ids=["after", "inside"])


@EACH_KIND
@EACH_WAY
def test_a_step_reads_nothing(name: str, dtype: torch.dtype, fused: bool):
    """Also where SOAP refreshes its bases; its first step, which waits for their eigenvectors, is not among those counted."""
    parts = parts_of(name, dtype, fused=fused)
    train_step(parts, [batch(2)], 0)
    for step in range(1, 5):
        assert waits_of(lambda step=step: train_step(parts, [batch(1, seed=step), batch(2, seed=9)], step)) == {}


OBJECTIVES = {
    "edm, smooth L1": Objective(edm_schedule(), "edm", WEIGHTS, 0.5, "smooth_l1", WEIGHTS),
    "flow, reindexed": Objective(flow_schedule(), "flow", WEIGHTS, reindexes=True),
    "epsilon, reindexed, perturbed": Objective(Process().schedule(), "epsilon", WEIGHTS, input_perturbation=0.1, reindexes=True),
    "masks and prior, huber": Objective(Process().schedule(), "x0", WEIGHTS, 1.0, "huber", WEIGHTS, mask_prior_weight=0.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_reads_anything(name: str):
    parts = parts_of("adamw", torch.float32, objective=OBJECTIVES[name])
    parts.frozen = parts_of("adamw", torch.float32).unet if "prior" in name else None
    one = replace(batch(2), masks=torch.ones(2, 1, 8, 8), perturbation=torch.ones(2, 4, 8, 8))
    assert waits_of(lambda: train_step(parts, [one], 0)) == {}


@EACH_KIND
@EACH_WAY
def test_a_step_whose_loss_is_not_finite_changes_no_bit(name: str, dtype: torch.dtype, fused: bool):
    parts = parts_of(name, dtype, fused=fused)
    for step in range(3):
        train_step(parts, [batch(2, seed=step)], step)
    before = [tensor.clone() for tensor in everything(parts)]
    bad = batch(2)
    bad.latents[1, 0, 0, 0] = float("nan")
    report = train_step(parts, [batch(2, seed=5), bad], 3).read()
    assert not report.finite
    assert sum(loss == loss for loss in report.losses) == 3
    for tensor, old in zip(everything(parts), before, strict=True):
        assert torch.equal(tensor.flatten().view(torch.uint8), old.flatten().view(torch.uint8))
    assert train_step(parts, [batch(2, seed=6)], 4).read().finite
    assert all(tensor.isfinite().all() for tensor in everything(parts))


def course(parts: Parts, recorder: Recorder, steps: int) -> Run:
    def stream(state: TrainState) -> Generator[Batch]:
        yield from (batch(2, seed=step) for step in range(state.step, 10**6))

    task = Task(Every(Duration(3, "steps"), 1), log_action(recorder))
    return Run(Path("run"), parts, TrainState(), stream, 1, steps, 3, (task,), recorder)  # type: ignore[arg-type]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is ever there before somebody waits for it."""
    monkeypatch.setattr(Pending, "is_ready", lambda self: False)


@pytest.mark.usefixtures("slow")
def test_the_loop_between_tasks_reads_only_numbers_that_have_arrived():
    """Two readings for each report: its numbers, and the timesteps, which never left main memory."""
    run = course(parts_of("adamw", torch.float32), Recorder(), 2)
    found = waits_of(lambda: train(run, StopRequest()))
    assert found == {"tolist": 4}


def test_reading_one_step_late_changes_no_bit(request: pytest.FixtureRequest):
    prompt, late = Recorder(), Recorder()
    straight, lagging = (parts_of("adamw_bf16", torch.bfloat16, fused=True) for _ in range(2))
    expected = train(course(straight, prompt, 8), StopRequest())
    request.getfixturevalue("slow")
    assert train(course(lagging, late, 8), StopRequest()) == expected
    assert late.rows == prompt.rows
    assert len(late.rows) == 2
    assert all(torch.equal(one, other) for one, other in zip(everything(lagging), everything(straight), strict=True))
