"""What every optimizer of a library must keep to. Those that need torchao or bitsandbytes run with `make test-libraries`."""

from importlib import util

import pytest
import torch

from aquatint.config.describe import optimizer_names
from aquatint.config.sections.library_optimizers import LIBRARY_NAMES
from aquatint.errors import UsageError
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.optim.create import OURS
from aquatint.optim.groups import GroupSettings
from aquatint.optim.library import LIBRARY
from aquatint.optim.library_optimizer import split_groups
from aquatint.optim.library_sizes import LIBRARY_BYTES
from aquatint.optim.sizes import state_bytes
from aquatint.planning.memory import UPDATE_BYTES
from aquatint.planning.trace import Tally

from .library_models import DEFAULTS, HEAVY, QUICK, Model, everything, is_same, make, train

NOISE = pytest.mark.filterwarnings("ignore")  # what they say of themselves on a CPU is not ours to mend
EACH = pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=[pytest.mark.libraries, NOISE]) for name in HEAVY)])


def test_config_library_and_plan_know_the_same_names():
    assert set(LIBRARY_NAMES) == LIBRARY.keys() == LIBRARY_BYTES.keys()
    assert set(optimizer_names()) == UPDATE_BYTES.keys() == {"adamw", *OURS, *LIBRARY_NAMES}


@pytest.mark.parametrize("name", [name for name in LIBRARY if LIBRARY[name].extra])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, name):
    monkeypatch.setattr("aquatint.optim.library.find_spec", lambda package: None)
    with pytest.raises(
        UsageError, match=f'the package {LIBRARY[name].package} is not installed, and it is needed for `optimizer.name = "{name}"`'
    ) as caught:
        make(name, Model())
    assert f"`pip install 'aquatint[{LIBRARY[name].extra}]'`" in caught.value.hint


def test_the_quick_ones_are_installed_where_the_tests_run():
    assert all(util.find_spec(LIBRARY[name].package) for name in QUICK)


@EACH
def test_weight_decay_and_rate_are_those_of_the_group(name):
    """Without a gradient, what is left of a step is p (1 - lr wd); prodigy does not step at all then."""
    model, rate = Model(), 0.01
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    slow = GroupSettings(0.5, 0.2)
    own = {} if name == "prodigy" else {"small.weight": slow, "small.bias": slow}  # all of its weights share a rate
    optimizer = make(name, model, weight_decay=0.1, own=own)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step(finite=torch.tensor(True))
    for key, param in model.named_parameters():
        lr, decay = (0.5 * rate, 0.2) if key == "small.weight" else (rate, 0.1)
        left = 1.0 if param.dim() < 2 or name == "prodigy" else 1 - lr * decay
        torch.testing.assert_close(param.detach(), before[key] * left, rtol=1e-6, atol=0)


@EACH
def test_a_step_that_is_not_finite_changes_nothing_and_is_not_counted(name):
    model = Model()
    optimizer = make(name, model)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    train(model, optimizer, range(2, 3), finite=False)
    assert is_same(before, everything(model, optimizer))


@EACH
def test_state_weighs_what_the_plan_says(name):
    model = Model()
    for param in model.norm.parameters():
        param.data += 0.5  # of weights that are all zero, prodigy keeps less
    optimizer = make(name, model)
    train(model, optimizer, range(2))
    tensors = optimizer.tensors()  # bitsandbytes shares its maps
    kept = [key for key in tensors if not key.startswith("group") and not key.endswith(".int") and "/qmap" not in key]
    planned = state_bytes(name, {key: param.shape for key, param in model.named_parameters()}, 4, **DEFAULTS[name])
    assert sum(tensors[key].nbytes for key in kept) == planned


@pytest.mark.parametrize("name", QUICK)
def test_what_an_update_takes_for_a_moment_is_what_the_plan_has_for_it(name):
    model = torch.nn.Linear(512, 512, bias=False)
    optimizer = make(name, model)
    train(model, optimizer, range(1))
    model.weight.grad = torch.ones_like(model.weight)
    tally = Tally([model.weight, model.weight.grad, *optimizer.tensors().values()])
    with tally.counting():
        optimizer.step()
    assert tally.peak / model.weight.numel() <= UPDATE_BYTES[name][1] + 0.1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("muon", 4.53), ("schedule_free", 8.0), ("prodigy", 16.0), ("lion", 4.0), ("came", 4.76), ("torch_adafactor", 0.38),
        ("bnb_adamw8bit", 2.03), ("bnb_paged_adamw8bit", 2.03), ("bnb_lion8bit", 1.02), ("torchao_adamw8bit", 2.03),
        ("torchao_adamw4bit", 1.07), ("torchao_adamw_fp8", 2.03),
    ],
)  # fmt: skip
def test_state_of_the_full_unet_weighs_what_the_docs_say(name, expected):
    found = state_bytes(name, sdxl_spec().shapes("unet"), 4, **DEFAULTS[name]) / 2_567_463_684
    assert found == pytest.approx(expected, abs=0.005)


def test_prodigy_needs_less_if_it_looks_at_every_eleventh_weight():
    shapes = sdxl_spec().shapes("unet")
    assert state_bytes("prodigy", shapes, 4, slice_p=11) / 2_567_463_684 == pytest.approx(8 + 8 / 11, rel=1e-3)


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw():
    hidden, others = split_groups([{"params": list(Model().named_parameters()), "factor": 2.0}])
    assert [name for name, _ in hidden[0]["params"]] == ["small.weight", "large.weight"]
    assert {name for name, _ in others[0]["params"]} == {
        "conv.weight", "conv.bias", "norm.weight", "norm.bias", "time_embedding.weight", "time_embedding.bias", "small.bias", "large.bias",
    }  # fmt: skip
    assert hidden[0]["factor"] == others[0]["factor"] == 2.0


def test_muon_takes_nearly_all_matrices_of_the_unet():
    shapes = sdxl_spec().shapes("unet")
    _, others = split_groups([{"params": [(name, torch.empty(shape, device="meta")) for name, shape in shapes.items() if len(shape) == 2]}])
    assert {name.partition(".")[0] for name, _ in others[0]["params"]} == {"time_embedding", "add_embedding"}


def test_every_group_has_its_names_its_factor_and_one_state():
    model = Model()
    optimizer = make("muon", model)
    train(model, optimizer, range(1))
    assert sorted(name for group in optimizer.param_groups for name in group["param_names"]) == sorted(dict(model.named_parameters()))
    assert all(group["factor"] == 1.0 for group in optimizer.param_groups)
    assert set(optimizer.state) == set(model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
