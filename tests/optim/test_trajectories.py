"""Every optimizer for bf16 weights goes where its float32 form goes, on a path where rounding to the nearest would stand still."""

import pytest
import torch
from torch.nn import Parameter

from aquatint.models.sdxl.model import sdxl_spec
from aquatint.optim.create import create_optimizer
from aquatint.optim.sizes import state_bytes

STEPS = 300
SETTINGS = {
    "adamw_bf16": {},
    "adamw_bf16 kahan": {"rounding": "kahan"},
    "adamw8bit": {},
    "adafactor": {},
    "soap": {"learning_rate": 1e-3, "max_precond_dim": 128},  # its steps are spread over fewer directions
}


def descend(name: str, dtype: torch.dtype, steps: int = STEPS) -> torch.Tensor:
    """How far weights (128, 128) got from 1 to 1 + their targets of +-0.1: a step of 1e-4 is a fortieth of what bf16 can tell from 1."""
    param = Parameter(torch.ones(128, 128, dtype=dtype))
    targets = 0.1 * (2 * torch.randint(2, (128, 128), generator=torch.Generator().manual_seed(1)) - 1)
    settings = {"learning_rate": 1e-4, "weight_decay": 0.0, **SETTINGS[name]}
    optimizer = create_optimizer(name.split()[0], [("weight", param)], seed=0, **settings)
    noise = torch.Generator().manual_seed(0)
    for _ in range(steps):
        param.grad = (2 * (param.detach().float() - 1 - targets) + 0.02 * torch.randn(param.shape, generator=noise)).to(dtype)
        optimizer.step()
    value = param.detach().float() + optimizer.state[param].get("compensation", torch.zeros(()))
    return ((value - 1) * targets.sign()).mean()


@pytest.mark.parametrize("name", SETTINGS)
def test_bf16_weights_go_as_far_as_float32_ones_within_2_percent(name):
    exact, rounded = descend(name, torch.float32), descend(name, torch.bfloat16)
    assert exact > 0.02
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


def test_rounded_to_the_nearest_they_would_not_move():
    param = Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([param], lr=1e-4, weight_decay=0.0)
    for _ in range(STEPS):
        param.grad = 2 * (param.detach() - 0.9)
        optimizer.step()
    assert (param == 1).all()


@pytest.mark.parametrize(
    ("name", "settings", "param_bytes", "expected"),
    [
        ("adamw", {}, 4, 8.0),
        ("adamw_bf16", {}, 2, 4.0),
        ("adamw_bf16", {"rounding": "kahan"}, 2, 6.0),
        ("adamw8bit", {}, 2, 2 * (1 + 4 / 256)),
        ("adafactor", {}, 2, 18.69e6 / 2_567_463_684),
        ("soap", {"max_precond_dim": 1280}, 2, 4.0 + 13.275 * 2**30 / 2_567_463_684),
        ("soap", {"max_precond_dim": 2048}, 2, 4.0 + 17.705 * 2**30 / 2_567_463_684),
    ],
)
def test_state_of_the_full_unet_weighs_what_theory_says(name, settings, param_bytes, expected):
    shapes = sdxl_spec().shapes("unet").values()
    assert state_bytes(name, shapes, param_bytes, **settings) / 2_567_463_684 == pytest.approx(expected, rel=0.02)
