"""Which process a run trains, and what is refused with which one."""

from pathlib import Path

import pytest

from aquatint.config.check import RULES, find
from aquatint.config.describe import all_keys
from aquatint.config.schema import Config
from aquatint.models.sdxl.load import BaseModel
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.models.sdxl.process import PLAYGROUND_SCALING, SDXL_SCALING, STANDARDISED, Process
from aquatint.training.process import PROCESS_RULES, conflicts, remarks, wanted_process

EPSILON = Process()
V = Process("v_prediction", declared=True)
V_ZTSNR = Process("v_prediction", zero_terminal_snr=True, declared=True)
COSXL = Process("v_prediction", edm_ve_sigmas=(0.002, 120.0), declared=True)
PLAYGROUND = Process("edm", edm_ve_sigmas=(0.002, 80.0), latents=PLAYGROUND_SCALING, declared=True)
FLOW = Process("flow", declared=True)


def base_of(process):
    return BaseModel(Path("/models/base.safetensors"), sdxl_spec(), "single_file", process, {})


def config_of(**sections):
    values = {"model": {"base": "/b"}, "data": {"sources": [{"path": "/p"}]}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    config = Config.model_validate(values)
    assert list(find(RULES, config)) == [], "what is tested here must not be refused before"
    return config


def wanted(process, **model):
    return wanted_process(config_of(model=model), base_of(process))


@pytest.mark.parametrize("own", [EPSILON, V, V_ZTSNR, COSXL, PLAYGROUND, FLOW], ids=str)
def test_auto_keeps_what_the_base_is(own):
    found = wanted(own)
    assert (found.prediction, found.zero_terminal_snr, found.edm_ve_sigmas, found.latents) == (
        own.prediction, own.zero_terminal_snr, own.edm_ve_sigmas, own.latents,
    )  # fmt: skip
    assert list(conflicts(config_of(), base_of(own))) == []


@pytest.mark.parametrize(
    ("own", "model", "expected"),
    [
        (EPSILON, {"prediction": "v_prediction", "zero_terminal_snr": True}, ("v_prediction", True, None, SDXL_SCALING)),
        (V_ZTSNR, {"prediction": "x0"}, ("x0", True, None, SDXL_SCALING)),
        (V_ZTSNR, {"prediction": "epsilon"}, ("epsilon", False, None, SDXL_SCALING)),
        (V_ZTSNR, {"prediction": "flow"}, ("flow", False, None, SDXL_SCALING)),
        (V_ZTSNR, {"noise_levels": "edm", "edm_sigmas": [0.01, 100.0]}, ("v_prediction", False, (0.01, 100.0), SDXL_SCALING)),
        (EPSILON, {"prediction": "edm"}, ("edm", False, (0.002, 80.0), SDXL_SCALING)),
        (COSXL, {"noise_levels": "sdxl"}, ("v_prediction", False, None, SDXL_SCALING)),
        (EPSILON, {"standardise_latents": True}, ("epsilon", False, None, STANDARDISED)),
    ],
)
def test_the_config_can_ask_for_another_process(own, model, expected):
    found = wanted(own, **model)
    assert (found.prediction, found.zero_terminal_snr, found.edm_ve_sigmas, found.latents) == expected


MISMATCHES = {
    "v to epsilon": (V, {"model": {"prediction": "epsilon"}}),
    "v to flow": (V_ZTSNR, {"model": {"prediction": "flow"}}),
    "flow to v": (FLOW, {"model": {"prediction": "v_prediction"}}),
    "EDM to v": (PLAYGROUND, {"model": {"prediction": "v_prediction"}}),
    "v at other noise levels": (V, {"model": {"noise_levels": "edm"}}),
    "v told the noise, at timesteps": (COSXL, {"model": {"noise_levels": "sdxl"}}),
}


@pytest.mark.parametrize(("own", "sections"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_file_that_says_what_it_is_is_not_trained_as_something_else_unasked(own, sections):
    (conflict,) = conflicts(config_of(**sections), base_of(own))
    assert "base.safetensors" in conflict.message
    assert "model.retarget = true" in conflict.hint
    asked = {**sections, "model": {**sections["model"], "retarget": True}}
    assert list(conflicts(config_of(**asked), base_of(own))) == []


def test_an_epsilon_file_may_be_anything_since_merges_forget_their_markers():
    config = config_of(model={"prediction": "v_prediction"})
    assert list(conflicts(config, base_of(EPSILON))) == []
    assert any("retrained for v_prediction" in remark for remark in remarks(config, base_of(EPSILON)))


CONTRADICTIONS = {
    "zero terminal SNR for an epsilon base": (EPSILON, {"model": {"zero_terminal_snr": True}}),
    "zero terminal SNR for a flow": (FLOW, {"model": {"zero_terminal_snr": True}}),
    "zero terminal SNR at EDM levels": (COSXL, {"model": {"zero_terminal_snr": True}}),
    "EDM levels for epsilon": (EPSILON, {"model": {"noise_levels": "edm"}}),
    "timesteps for an EDM model": (PLAYGROUND, {"model": {"noise_levels": "sdxl", "retarget": True}}),
    "EDM sigmas for a model with timesteps": (EPSILON, {"model": {"edm_sigmas": [0.002, 80.0]}}),
    "offset noise with zero terminal SNR": (V_ZTSNR, {"noise": {"offset": 0.05}}),
    "adaptive offset noise with zero terminal SNR": (V_ZTSNR, {"noise": {"offset_slope": 0.5}}),
    "offset noise for a flow": (FLOW, {"noise": {"offset": 0.05}}),
    "pyramid noise with zero terminal SNR": (V_ZTSNR, {"noise": {"pyramid": 0.3}}),
    "pyramid noise for a flow": (FLOW, {"noise": {"pyramid": 0.3}}),
    "sigma_sqrt for a flow": (FLOW, {"diffusion": {"weighting": "sigma_sqrt"}}),
    "sigma_sqrt at EDM levels": (COSXL, {"diffusion": {"weighting": "sigma_sqrt"}}),
    "other noise under the same EDM levels": (COSXL, {"timesteps": {"resolution_noise": "reindex"}}),
    "a karras grid from infinity": (V_ZTSNR, {"samples": {"grid": "karras"}}),
    "an exponential grid from infinity": (V_ZTSNR, {"samples": {"grid": "exponential"}}),
    "a karras grid for a flow": (FLOW, {"samples": {"grid": "karras"}}),
    "a leading grid for a flow": (FLOW, {"samples": {"grid": "leading"}}),
    "a leading grid with zero terminal SNR": (V_ZTSNR, {"samples": {"grid": "leading"}}),
    "a stand-in for an infinity that is not there": (V, {"samples": {"sigma_max": "comfyui"}}),
    "a shift without a flow": (EPSILON, {"samples": {"shift": 3.0}}),
    "standardised twice": (Process(folded=True), {"model": {"standardise_latents": True}}),
    "Playground's latents standardised": (PLAYGROUND, {"model": {"standardise_latents": True}}),
}


@pytest.mark.parametrize(("own", "sections"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_every_contradiction_with_the_process_is_refused_with_a_reason_and_an_alternative(own, sections):
    (conflict,) = conflicts(config_of(**sections), base_of(own))
    reason, _, alternative = conflict.hint.partition(": ")
    assert reason or alternative
    assert any(word in conflict.hint for word in ("set ", "leave "))
    assert conflict.key in all_keys()
    assert "{" not in conflict.message + conflict.hint


def test_every_rule_has_an_example_above():
    found = {conflict.message for own, sections in CONTRADICTIONS.values() for conflict in conflicts(config_of(**sections), base_of(own))}
    assert len(found) >= len(PROCESS_RULES)
    assert {key for rule in PROCESS_RULES for key in rule.keys} <= set(all_keys())


FINE = {
    "offset noise for epsilon": (EPSILON, {"noise": {"offset": 0.0357, "offset_slope": 0.01}}),
    "input perturbation with zero terminal SNR": (V_ZTSNR, {"noise": {"input_perturbation": 0.1}}),
    "immiscible noise with zero terminal SNR": (V_ZTSNR, {"noise": {"immiscible": True}, "training": {"batch_size": 8}}),
    "a karras grid from a stand-in": (V_ZTSNR, {"samples": {"grid": "karras", "sigma_max": "comfyui"}}),
    "a karras grid for epsilon": (EPSILON, {"samples": {"grid": "karras"}}),
    "a shifted flow": (FLOW, {"samples": {"shift": 3.0}, "timesteps": {"density": "logit_normal", "shift": 3.0}}),
    "sigma_sqrt at SDXL's levels": (V, {"diffusion": {"weighting": "sigma_sqrt"}}),
}


@pytest.mark.parametrize(("own", "sections"), FINE.values(), ids=FINE)
def test_what_goes_together_is_accepted(own, sections):
    assert list(conflicts(config_of(**sections), base_of(own))) == []


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased", "p2", "like_epsilon"])
@pytest.mark.parametrize(
    ("floor", "what"), [(0.05, "it gets `diffusion.weight_floor = 0.05` instead"), (0.0, "raise `diffusion.weight_floor`")]
)
def test_a_weighting_that_forgets_the_terminal_step_says_so_and_what_is_done(weighting, floor, what):
    config = config_of(diffusion={"weighting": weighting, "weight_floor": floor})
    (remark,) = remarks(config, base_of(V_ZTSNR))
    assert f"{weighting} gives the last timestep, pure noise, the weight 0" in remark
    assert what in remark
    assert "clamped_v" in remark
    assert list(remarks(config, base_of(V))) == []


@pytest.mark.parametrize(
    ("own", "sections", "words"),
    [
        (V_ZTSNR, {"model": {"zero_terminal_snr": False}}, "turns off"),
        (V_ZTSNR, {"timesteps": {"highest": 500}}, "leaves out the last timestep"),
        (V, {"timesteps": {"resolution_noise": "reindex"}}, "cannot be told"),
        (FLOW, {}, "usage_hint"),
    ],
)
def test_what_is_allowed_but_should_be_known_is_said(own, sections, words):
    assert any(words in remark for remark in remarks(config_of(**sections), base_of(own)))
