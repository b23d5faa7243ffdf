"""What zero terminal SNR is for: pictures that are all black or all white, by caption, sampled from pure noise.

Without it a picture's brightness still shows through the noise of the last timestep: the mean of 64 x 64 pixels of noise is
0.016, and that of a white picture under them 0.068. A net learns to read it there; sampling starts from noise that holds none, and
what is read then is neither colour. It is no matter of more training: four times as many steps end the same. With it, the last
timestep holds nothing but the caption.
"""

import math

import pytest
import torch

from aquatint.diffusion.loss import per_sample_mse
from aquatint.diffusion.noise import draw_noise
from aquatint.diffusion.parameterization import Prediction, target, to_epsilon, to_x0
from aquatint.diffusion.samplers import euler
from aquatint.diffusion.schedule import Schedule, add_noise, sdxl_schedule
from aquatint.diffusion.timesteps import draw_timesteps, trailing_timesteps
from aquatint.diffusion.weighting import loss_weights

SHAPE_CHW = (1, 64, 64)
BLACK, WHITE = -1.0, 1.0
STEPS, BATCH, WIDTH = 900, 16, 64


class Net(torch.nn.Module):
    """The least that can do it: p x + q mean(x) + r, with p, q and r from the timestep and the caption."""

    def __init__(self) -> None:
        super().__init__()
        self.told = torch.nn.Sequential(
            torch.nn.Linear(34, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, 3)
        )

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        angles = timesteps.float()[:, None] * torch.exp(-math.log(1000) * torch.arange(16) / 16)
        captions_and_time = torch.cat([angles.sin(), angles.cos(), torch.nn.functional.one_hot(captions, 2).float()], dim=1)
        p, q, r = self.told(captions_and_time)[:, :, None, None, None].unbind(dim=1)
        return p * x + q * x.mean(dim=(1, 2, 3), keepdim=True) + r


def train(prediction: Prediction, schedule: Schedule) -> Net:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    weighting = "clamped_v" if schedule.zero_terminal_snr else "none"
    weights = loss_weights(weighting, prediction, schedule.snr, gamma=5.0, floor=0.05)
    captions = torch.arange(BATCH) % 2
    latents = torch.where(captions == 1, WHITE, BLACK).view(-1, 1, 1, 1).expand(BATCH, *SHAPE_CHW)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        positions = range(step * BATCH, (step + 1) * BATCH)
        timesteps, noise = draw_timesteps(0, positions, BATCH), draw_noise(0, "noise", positions, SHAPE_CHW)
        alpha, sigma = schedule.at(timesteps)
        output = net(add_noise(latents, noise, alpha, sigma), timesteps, captions)
        losses = per_sample_mse(output, target(prediction, latents, noise, alpha, sigma))
        optimizer.zero_grad()
        (weights[timesteps] * losses).mean().backward()
        optimizer.step()
    return net


@torch.no_grad()
def brightness(prediction: Prediction, schedule: Schedule, net: Net, caption: int) -> torch.Tensor:
    """The mean of each of eight pictures."""

    def denoise(x: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        timesteps = torch.full((8,), timestep)
        alpha, sigma = schedule.at(timesteps)
        output = net(x, timesteps, torch.full((8,), caption))
        return to_x0(prediction, output, x, alpha, sigma), to_epsilon(prediction, output, x, alpha, sigma)

    noise = draw_noise(1, "sample", range(8), SHAPE_CHW)
    return euler(denoise, noise, schedule, trailing_timesteps(20)).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("reaches", [True, False], ids=["v with zero terminal SNR", "epsilon without"])
def test_both_colours_are_reached_with_zero_terminal_snr_and_only_with_it(reaches):
    prediction: Prediction = "v_prediction" if reaches else "epsilon"
    schedule = sdxl_schedule(zero_terminal_snr=reaches)
    net = train(prediction, schedule)
    black, white = (brightness(prediction, schedule, net, caption) for caption in (0, 1))
    if reaches:
        assert [black.mean().item(), white.mean().item()] == pytest.approx([BLACK, WHITE], abs=0.05)
        assert torch.cat([black - BLACK, white - WHITE]).abs().max().item() < 0.1
    else:
        assert torch.cat([black - BLACK, white - WHITE]).abs().mean().item() > 0.3
