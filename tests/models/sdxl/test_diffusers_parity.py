"""What we write is what diffusers' own pipeline reads, and its pictures are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aquatint.demo.model import write_tiny_base
from aquatint.diffusion.noise import draw_noise
from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.models.sdxl.export import export_diffusers
from aquatint.models.sdxl.generate import Steps, generate
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.models.sdxl.model import predict
from aquatint.models.sdxl.process import Process

PROMPT, NEGATIVE = "a red circle on the left, white background", "a blue square"
HEIGHT, WIDTH, STEPS, SCALE = 64, 96, 4, 3.0

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers under numpy 2


class Exported:
    """A tiny base in both layouts, and our own parts of it."""

    def __init__(self, folder: Path, prediction: Any, zero_terminal_snr: bool) -> None:
        self.file, self.folder = folder / "tiny.safetensors", folder / "diffusers"
        self.prediction, self.zero_terminal_snr = prediction, zero_terminal_snr
        process = Process(prediction, zero_terminal_snr)
        write_tiny_base(self.file, seed=3, process=process)
        self.base: BaseModel = open_base(self.file)
        export_diffusers(
            self.folder,
            self.base,
            self.base.component("unet"),
            dtype=torch.float32,
            process=process,
        )
        self.unet, self.vae = self.base.load_unet(), self.base.load_vae()
        self.encoder = self.base.caption_encoder("cpu")

    def prompt(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        ((hidden, pooled),) = self.encoder.encode([text])
        return hidden[None], pooled[None]

    def picture(self, negative: str | None) -> np.ndarray:
        schedule = sdxl_schedule(zero_terminal_snr=self.zero_terminal_snr)
        unconditional = None if negative is None else self.prompt(negative)
        return generate(
            self.unet, self.vae, schedule, self.prediction, self.prompt(PROMPT), unconditional,
            steps=Steps(STEPS, SCALE), seed=0, positions=[0], height=HEIGHT, width=WIDTH,
        )  # fmt: skip


@pytest.fixture(scope="module")
def epsilon(tmp_path_factory) -> Exported:
    return Exported(tmp_path_factory.mktemp("epsilon"), "epsilon", False)


@pytest.fixture(scope="module")
def ztsnr(tmp_path_factory) -> Exported:
    return Exported(tmp_path_factory.mktemp("ztsnr"), "v_prediction", True)


def from_single_file(exported: Exported) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_single_file(
        str(exported.file), config=str(exported.folder), local_files_only=True, add_watermarker=False
    )


def from_pretrained(exported: Exported) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(exported.folder, local_files_only=True, add_watermarker=False)


def picture(pipeline: Any, negative: str | None) -> np.ndarray:
    """The pipeline's picture from our noise, as numbers like ours."""
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_noise(0, "sample-image", [0], (4, HEIGHT // 8, WIDTH // 8))
    result = pipeline(
        PROMPT,
        negative_prompt=negative,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=noise,
        output_type="np",
    )
    return np.round(result.images * 255)


def with_trailing_euler(pipeline: Any) -> Any:
    from diffusers import EulerDiscreteScheduler

    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline


def assert_same_model(exported: Exported, pipeline: Any) -> None:
    embeds, pooled = exported.prompt(PROMPT)
    theirs = pipeline.encode_prompt(PROMPT)
    torch.testing.assert_close(theirs[0], embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs[2], pooled, atol=1e-5, rtol=1e-5)
    inputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    time_ids = torch.tensor([[64.0, 64, 0, 8, 64, 64]])
    with torch.no_grad():
        ours = predict(exported.unet, *inputs, embeds, pooled, time_ids)
        other = pipeline.unet(*inputs, encoder_hidden_states=embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample
    assert ours.std() > 0.01
    torch.testing.assert_close(other, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("load", [from_single_file, from_pretrained])
def test_diffusers_reads_the_same_networks(epsilon, load):
    assert_same_model(epsilon, load(epsilon))


@pytest.mark.parametrize("load", [from_single_file, from_pretrained])
@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_diffusers_makes_the_same_picture(epsilon, load, negative):
    pipeline = with_trailing_euler(load(epsilon))
    assert np.abs(picture(pipeline, negative) - epsilon.picture(negative)).mean() < 0.5


@pytest.mark.parametrize("load", [from_single_file, from_pretrained])
def test_a_v_prediction_model_needs_no_setting_in_diffusers(ztsnr, load):
    pipeline = load(ztsnr)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert np.abs(picture(pipeline, NEGATIVE) - ztsnr.picture(NEGATIVE)).mean() < 0.5


def test_an_epsilon_folder_keeps_sdxl_s_own_scheduler(epsilon):
    config = from_pretrained(epsilon).scheduler.config
    assert (config.timestep_spacing, config.steps_offset, config.rescale_betas_zero_snr) == ("leading", 1, False)
