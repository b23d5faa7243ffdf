"""Every process survives the way through a file, and through a diffusers folder."""

import json

import pytest
import torch
from safetensors import safe_open

from aquatint.demo.model import write_tiny_base
from aquatint.models.sdxl.export import export_diffusers, export_single_file
from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.markers import PROCESS_KEY
from aquatint.models.sdxl.process import PLAYGROUND_SCALING, RAW_MEAN, RAW_STD, SDXL_SCALING, STANDARDISED, Process
from tests.models.sdxl.small import small_spec

PROCESSES = {
    "epsilon": (Process(), set()),
    "v": (Process("v_prediction", declared=True), {"v_pred"}),
    "v with zero terminal SNR": (Process("v_prediction", zero_terminal_snr=True, declared=True), {"v_pred", "ztsnr"}),
    "v told the noise": (
        Process("v_prediction", edm_ve_sigmas=(0.0020000000949949026, 120.0), declared=True),
        {"edm_vpred.sigma_min", "edm_vpred.sigma_max"},
    ),
    "Playground's EDM": (
        Process("edm", edm_ve_sigmas=(0.002, 80.0), latents=PLAYGROUND_SCALING, declared=True),
        {"edm_mean", "edm_std"},
    ),
    "EDM of SDXL's latents": (Process("edm", edm_ve_sigmas=(0.002, 80.0), declared=True), set()),
    "x0": (Process("x0", zero_terminal_snr=True, declared=True), set()),
    "flow": (Process("flow", declared=True), set()),
}
NAMES = {"v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_min", "edm_vpred.sigma_max"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    write_tiny_base(path, seed=1, spec=small_spec())
    return open_base(path)


@pytest.mark.parametrize(("process", "expected"), PROCESSES.values(), ids=PROCESSES)
def test_a_single_file_says_what_it_is_to_us_and_by_markers_to_others(base, tmp_path, process, expected):
    path = tmp_path / "model.safetensors"
    export_single_file(path, base, base.component("unet"), dtype=torch.float32, process=process)
    assert open_base(path).process == process
    with safe_open(path, "pt") as file:
        assert NAMES & set(file.keys()) == expected
        told = expected or process.prediction == "epsilon"
        assert (PROCESS_KEY in file.metadata()) == (not told)
        assert ("modelspec.usage_hint" in file.metadata()) == (process.prediction != "epsilon")
        if "edm_vpred.sigma_max" in expected:
            assert file.get_tensor("edm_vpred.sigma_max").item() == 120.0


@pytest.mark.parametrize(("process", "expected"), PROCESSES.values(), ids=PROCESSES)
def test_a_diffusers_folder_says_what_it_is(base, tmp_path, process, expected):
    export_diffusers(tmp_path / "model", base, base.component("unet"), dtype=torch.float32, process=process)
    assert open_base(tmp_path / "model").process == process


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("process", "expected"), PROCESSES.values(), ids=PROCESSES)
def test_diffusers_can_drive_the_scheduler_of_the_folder(base, tmp_path, process, expected):
    import diffusers

    export_diffusers(tmp_path / "model", base, base.component("unet"), dtype=torch.float32, process=process)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(tmp_path / "model" / "scheduler")
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:  # as the SDXL pipeline does it
        scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample, return_dict=False)[0]
    assert sample.isfinite().all()


def test_standardised_latents_are_sdxls_own_under_the_autoencoder_of_the_export(base, tmp_path):
    """What the file's autoencoder encodes, times SDXL's factor, is what was trained; and it decodes to the same picture."""
    process = Process("v_prediction", zero_terminal_snr=True, latents=STANDARDISED)
    export_single_file(tmp_path / "model.safetensors", base, base.component("unet"), dtype=torch.float32, process=process)
    export_diffusers(tmp_path / "folder", base, base.component("unet"), dtype=torch.float32, process=process)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    old = base.load_vae().double()
    moments = old.encode(images.double()).latent_dist
    trained = STANDARDISED(moments.mean)
    for name in ("model.safetensors", "folder"):
        exported = open_base(tmp_path / name)
        assert (exported.process.latents, exported.process.folded) == (SDXL_SCALING, True)
        new = exported.load_vae().double()
        again = new.encode(images.double()).latent_dist
        torch.testing.assert_close(SDXL_SCALING(again.mean), trained, rtol=0, atol=1e-5)
        torch.testing.assert_close(0.13025 * again.std, moments.std / torch.tensor(RAW_STD).view(1, 4, 1, 1), rtol=1e-4, atol=0)
        torch.testing.assert_close(new.decode(again.mean).sample, old.decode(moments.mean).sample, rtol=0, atol=1e-4)


def test_scaling_goes_there_and_back():
    raw = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 5
    for scaling in (SDXL_SCALING, STANDARDISED, PLAYGROUND_SCALING):
        torch.testing.assert_close(scaling.undo(scaling(raw)), raw, rtol=1e-5, atol=1e-5)
    mean = torch.tensor(RAW_MEAN).view(1, 4, 1, 1)
    torch.testing.assert_close(PLAYGROUND_SCALING(mean + torch.tensor(RAW_STD).view(1, 4, 1, 1)), torch.full((1, 4, 1, 1), 0.5))
