import copy

import pytest
import torch
from torch import nn

from aquatint.optim.adafactor import Adafactor
from aquatint.optim.adamw8bit import AdamW8bit
from aquatint.optim.adamw_bf16 import AdamWBF16
from aquatint.optim.create import create_optimizer, idle_steps, parameter_groups
from aquatint.optim.groups import GroupSettings
from aquatint.optim.sizes import state_bytes
from aquatint.optim.soap import Soap

ADAM = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
SETTINGS = {
    "adamw": ADAM,
    "adamw_bf16": ADAM,
    "adamw_bf16 kahan": {**ADAM, "rounding": "kahan"},
    "adamw8bit": ADAM,
    "soap": {**ADAM, "max_precond_dim": 40, "precond_every": 3},
    "adafactor": {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_threshold": 0.9, "decay_power": 0.7},
}
KINDS = [("adamw", torch.float32), *((name, dtype) for name in list(SETTINGS)[1:] for dtype in (torch.float32, torch.bfloat16))]
EACH_KIND = pytest.mark.parametrize(("name", "dtype"), KINDS, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in KINDS])


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(54, 96), nn.Linear(96, 96)).to(dtype)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(module.parameters()):
            bits = torch.Generator().manual_seed(1000 * step + index)
            param.grad = torch.randn(param.shape, generator=bits).to(param.dtype)
        optimizer.step()


def make(name: str, module: nn.Module, seed: int = 3) -> torch.optim.Optimizer:
    return create_optimizer(name.split()[0], module.named_parameters(), seed=seed, **SETTINGS[name])


def test_norms_and_biases_get_no_weight_decay():
    groups = parameter_groups(model().named_parameters(), 0.1)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight", "3.weight", "4.weight"],
        ["0.bias", "1.weight", "1.bias", "3.bias", "4.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_tensors_with_settings_of_their_own_have_groups_of_their_own():
    slow, bare = GroupSettings(0.1, 0.1), GroupSettings(2.0, 0.0)
    own = {"0.weight": slow, "0.bias": slow, "1.weight": slow, "4.weight": bare}
    groups = parameter_groups(model().named_parameters(), 0.1, own)
    assert [([name for name, _ in group["params"]], group["factor"], group["weight_decay"]) for group in groups] == [
        (["0.weight"], 0.1, 0.1),
        (["0.bias", "1.weight"], 0.1, 0.0),
        (["3.weight"], 1.0, 0.1),
        (["1.bias", "3.bias", "4.bias"], 1.0, 0.0),
        (["4.weight"], 2.0, 0.0),
    ]


@EACH_KIND
def test_groups_that_ask_for_nothing_else_change_no_bit(name, dtype):
    plain, grouped = model(dtype), model(dtype)
    same = dict.fromkeys(["0.weight", "3.bias"], GroupSettings(1.0, 0.1))
    first = make(name, plain)
    second = create_optimizer(name.split()[0], grouped.named_parameters(), seed=3, own=same, **SETTINGS[name])
    train(plain, first, range(3))
    train(grouped, second, range(3))
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), grouped.parameters(), strict=True))


def test_only_soap_gets_ready_before_it_moves_a_matrix():
    for name in SETTINGS:
        module = model()
        before = module[3].weight.clone()
        train(module, make(name, module), range(1))
        assert torch.equal(module[3].weight, before) == (idle_steps(name.split()[0]) == 1), name


def test_empty_groups_are_left_out():
    assert [group["weight_decay"] for group in parameter_groups(nn.GroupNorm(2, 4).named_parameters(), 0.1)] == [0.0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("adamw_bf16 kahan", AdamWBF16),
        ("adamw8bit", AdamW8bit),
        ("adafactor", Adafactor),
        ("soap", Soap),
    ],
)
def test_settings_reach_the_optimizer(name, kind):
    optimizer = make(name, model())
    assert isinstance(optimizer, kind)
    renamed = {"lr" if key == "learning_rate" else key: value for key, value in SETTINGS[name].items()}
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in renamed} == renamed
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert group["param_names"] == ["0.weight", "3.weight", "4.weight"]


def test_adamw_is_the_fused_one():
    assert make("adamw", model()).defaults["fused"] is True


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown optimizer 'adam'"):
        create_optimizer("adam", model().named_parameters(), seed=0, learning_rate=1e-3, weight_decay=0.0)


@EACH_KIND
def test_a_resumed_optimizer_goes_on_bit_for_bit(name, dtype):
    straight = model(dtype)
    optimizer = make(name, straight)
    train(straight, optimizer, range(4))
    resumed, saved = copy.deepcopy(straight), copy.deepcopy(optimizer.state_dict())
    train(straight, optimizer, range(4, 9))

    second = make(name, resumed)
    second.load_state_dict(saved)
    train(resumed, second, range(4, 9))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, second.state[other][key])


@EACH_KIND
def test_loading_keeps_the_dtype_of_every_state_tensor(name, dtype):
    module = model(dtype)
    optimizer = make(name, module)
    train(module, optimizer, range(2))
    loaded = make(name, module)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param in module.parameters():
        kept = {key: value.dtype for key, value in loaded.state[param].items()}
        assert kept == {key: value.dtype for key, value in optimizer.state[param].items()}
        assert all(torch.equal(value, loaded.state[param][key]) for key, value in optimizer.state[param].items())


@EACH_KIND
def test_state_dict_of_a_fresh_optimizer_can_be_loaded(name, dtype):
    module, reference = model(dtype), model(dtype)
    optimizer, expected = make(name, module), make(name, reference)
    optimizer.load_state_dict(make(name, module).state_dict())
    train(module, optimizer, range(2))
    train(reference, expected, range(2))
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), reference.parameters(), strict=True))


@EACH_KIND
def test_state_weighs_what_the_plan_says(name, dtype):
    module = model(dtype)
    optimizer = make(name, module)
    train(module, optimizer, range(2))
    measured = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    settings = {key: value for key, value in SETTINGS[name].items() if key in ("rounding", "max_precond_dim")}
    assert measured == state_bytes(name.split()[0], [param.shape for param in module.parameters()], dtype.itemsize, **settings)


def test_planned_bytes_of_a_large_convolution():
    shapes = [(1280, 1280, 3, 3)]
    elements = 1280 * 1280 * 9
    assert state_bytes("adamw", shapes, 4) == 8 * elements + 4
    assert state_bytes("adamw_bf16", shapes, 2) == 4 * elements + 4
    assert state_bytes("adamw_bf16", shapes, 2, rounding="kahan") == 6 * elements + 4
    assert state_bytes("adamw8bit", shapes, 2) == 2 * elements + 2 * 4 * elements // 256 + 4
    assert state_bytes("adafactor", shapes, 2) == 4 * 12_800 + 4
    assert state_bytes("soap", shapes, 2, max_precond_dim=2048) == 4 * elements + 2 * 4 * 1280**2 + 4


@EACH_KIND
def test_training_moves_towards_the_minimum(name, dtype):
    module = model(dtype)
    optimizer = make(name, module)
    x = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    losses = []
    for _ in range(60):
        loss = module(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
