import pytest

from aquatint.config.check import REMARKS, RULES, find, has_bucket
from aquatint.config.describe import all_keys
from aquatint.config.schema import Config
from aquatint.config.sections.data import BucketsSection

TAGS = {"style": "tags", "shuffle": True, "variants": 8}


def config_of(sections):
    values = {"model": {"base": "/b"}, "data": {"sources": [{"path": "/p"}]}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


CONTRADICTIONS = {
    "epsilon with zero terminal SNR": {"model": {"prediction": "epsilon", "zero_terminal_snr": True}},
    "bf16 weights with an optimizer that rounds to nearest": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "adamw"}},
    **{
        f"{name} of an adapter that there is not": {"adapter": {name: value}}
        for name, value in {"rank": 8, "alpha": 8.0, "rslora": True, "targets": "all", "start_from": "/lora.safetensors"}.items()
    },
    "names of a LoRA that there is not": {"export": {"lora_names": ["diffusers"]}},
    "a merge of nothing": {"export": {"merged": True}},
    "a folder of a model that is not written": {"adapter": {"kind": "lora"}, "export": {"diffusers_folder": True}},
    "a merge that is not written": {"adapter": {"kind": "lora"}, "export": {"merged": True, "single_file": False}},
    "an autoencoder in a LoRA": {"adapter": {"kind": "lora"}, "model": {"standardise_latents": True}},
    "a batch as large as fits, of steps as large as that": {"training": {"batch_size": "auto"}},
    "a batch as large as fits, so many times": {"training": {"batch_size": "auto", "pictures_per_step": 8, "accumulation_steps": 2}},
    "two numbers of pictures per step": {"training": {"batch_size": 4, "pictures_per_step": 8}},
    "the bf16 optimizer without bf16 weights": {"training": {"precision": "bf16_mixed"}, "optimizer": {"name": "adamw_bf16"}},
    "steps inside the backward pass with a clip of the whole": {"training": {"fused_backward": True}},
    "few bits for weights that learn": {"memory": {"frozen_format": "int8"}},
    "blocks that wait in main memory while they learn": {"memory": {"swapped_blocks": 0.5}},
    "blocks that are compiled without having their weights": {
        "adapter": {"kind": "lora"}, "memory": {"swapped_blocks": 0.5}, "speed": {"compile": "blocks"},
    },
    "steps of a library inside the backward pass": {"training": {"fused_backward": True, "clip_norm": 0}, "optimizer": {"name": "lion"}},
    "state of a library in main memory": {"memory": {"optimizer_state": "cpu"}, "optimizer": {"name": "came"}},
    "bf16 weights with an optimizer of a library": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "muon"}},
    "a schedule for an optimizer that is free of them": {
        "lr": {"schedule": "cosine"}, "optimizer": {"name": "schedule_free"}, "ema": {"enabled": False},
    },
    "an average of what is averaged": {"optimizer": {"name": "schedule_free"}},
    "an average that nothing is known of": {"optimizer": {"name": "schedule_free", "betas": [0.0, 0.99]}, "ema": {"enabled": False}},
    "several rates where one is found": {
        "training": {"groups": [{"match": ["mid_block"], "learning_rate_factor": 0.5}]}, "optimizer": {"name": "prodigy"},
    },
    "decay of what is frozen": {"training": {"groups": [{"match": ["mid_block"], "learning_rate_factor": 0, "weight_decay": 0.1}]}},
    "a group that asks for nothing": {"training": {"groups": [{"match": ["mid_block"]}]}},
    "kernels without channels last": {"speed": {"kernels": True}},
    "projections joined beside adapters": {"adapter": {"kind": "lora"}, "speed": {"fused_qkv": True}},
    "blocks that are compiled and computed again in part": {
        "speed": {"compile": "blocks"}, "training": {"gradient_checkpointing": "pointwise"},
    },
    **{
        f"{name} of text encoders that are not trained": {"text_encoders": {name: value}}
        for name, value in {"learning_rate_factor": 0.5, "stop_after": "2 epochs"}.items()
    },
    "a text encoder twice": {"text_encoders": {"train": ["text_encoder", "text_encoder"]}},
    "text encoders that stop by the clock": {"text_encoders": {"train": ["text_encoder"], "stop_after": "30 min"}},
    "cached captions of a trained text encoder": {"text_encoders": {"train": ["text_encoder"]}, "captions": {"text": "cached"}},
    "renderings in a cache that has no captions": {
        "text_encoders": {"train": ["text_encoder"]}, "captions": {"style": "tags", "shuffle": True, "variants": 4},
    },
    "the format of captions that are not cached": {"text_encoders": {"train": ["text_encoder"]}, "cache": {"text_dtype": "float32"}},
    "the base's answer to captions that are read anew": {
        "text_encoders": {"train": ["text_encoder"]}, "diffusion": {"mask_prior_weight": 0.5},
        "data": {"sources": [{"path": "/none", "masks": "files"}]},
    },
    "a text encoder's rate where one is found": {"text_encoders": {"train": ["text_encoder"]}, "optimizer": {"name": "prodigy"}},
    "a way to clip without clipping": {"training": {"clip": "per_tensor", "clip_norm": 0}},
    "sides the wrong way round": {"buckets": {"min_side": 2048, "max_side": 1024}},
    "a shortest side above the resolution": {"buckets": {"min_side": 1056, "resolution": 1024}},
    "no multiple of the step fits": {"buckets": {"resolution": 1024, "step": 800, "min_side": 512}},
    "a longest side far below the resolution": {"buckets": {"resolution": 1024, "max_side": 768}},
    "a pixel limit below one bucket": {"data": {"max_pixels": 1_000_000}},
    "several center crops": {"crop": {"mode": "center", "variants": 4}},
    "shuffled prose": {"captions": {"style": "prose", "shuffle": True}},
    "tags dropped from prose": {"captions": {"style": "prose", "tag_drop_prob": 0.1}},
    "a separator for prose": {"captions": {"style": "prose", "separator": ";"}},
    "tags kept in prose": {"captions": {"style": "prose", "keep_first": 3}},
    "several renderings of prose": {"captions": {"style": "prose", "variants": 4}},
    "several renderings of tags that never change": {"captions": {"style": "tags", "variants": 4}},
    "shuffled only once": {"captions": {"style": "tags", "shuffle": True, "text": "cached"}},
    "dropped only once": {"captions": {"style": "tags", "tag_drop_prob": 0.2, "text": "cached"}},
    "a keep mark for prose": {"captions": {"style": "prose", "keep_separator": "|||"}},
    "categories for prose": {"captions": {"style": "prose", "categories": [{"tags": ["artist:*"], "drop_prob": 0.5}]}},
    "tag weights for prose": {"captions": {"style": "prose", "tag_weights": {"enabled": True}}},
    "weighted drops without drops": {"captions": {"style": "tags", "tag_drop": "weighted"}},
    "two ways to keep tags": {"captions": {"style": "tags", "keep_separator": "|||", "keep_first": 3}},
    "renderings kept of captions rendered anew": {"captions": {**TAGS, "text": "online"}},
    "bucket prices for a named set": {"buckets": {"set": "kohya", "area_weight": 0.3}},
    "enlargement prices for a named set": {"buckets": {"set": "novelai", "upscale_weight": 0.3}},
    "a widest shape for a named set": {"buckets": {"set": "kohya", "max_aspect": 2.0}},
    "the table of shapes at another resolution": {"buckets": {"set": "sdxl_table", "resolution": 768}},
    "a price of enlarging with nowhere else to go": {"buckets": {"upscale_weight": 2.0}},
    "a tier that is not smaller": {"buckets": {"tiers": [1024]}},
    "workers that nobody asks": {"cache": {"workers": 2}},
    "nothing to train": {"data": {"sources": [{"path": "/p", "role": "validation"}]}},
    "share and repeats": {"data": {"sources": [{"path": "/p", "share": 0.5, "repeats": 2}, {"path": "/q"}]}},
    "shares for all": {"data": {"sources": [{"path": "/p", "share": 0.5}, {"path": "/q", "share": 0.4}]}},
    "repeats for validation": {"data": {"sources": [{"path": "/p"}, {"path": "/q", "role": "validation", "repeats": 2}]}},
    "a floor without masks": {"data": {"mask_floor": 0.1}},
    "held out twice": {"data": {"sources": [{"path": "/p"}, {"path": "/q", "role": "validation"}]}, "validation": {"share": 0.1}},
    "every tag dropped": {"captions": {**TAGS, "tag_drop_prob": 1.0, "keep_first": 0}},
    "EDM noise the wrong way round": {"model": {"edm_sigmas": [80.0, 0.002]}},
    "EDM noise at SDXL's levels": {"model": {"noise_levels": "sdxl", "edm_sigmas": [0.002, 80.0]}},
    "gamma without a weighting": {"diffusion": {"weighting": "none", "gamma": 3.0}},
    "a floor without a weighting that needs it": {"diffusion": {"weighting": "clamped_v", "weight_floor": 0.1}},
    "k of p2 without p2": {"diffusion": {"p2_k": 2.0}},
    "gamma of p2 without p2": {"diffusion": {"weighting": "min_snr", "p2_gamma": 0.5}},
    "an uncertainty that is not learned": {"diffusion": {"uncertainty_learning_rate": 0.1}},
    "ranges that nothing adapts": {"diffusion": {"adaptive_ranges": 50}},
    "a decay that nothing adapts": {"diffusion": {"adaptive_decay": 0.9}},
    "ranges that do not divide the timesteps": {"diffusion": {"weighting": "adaptive", "adaptive_ranges": 30}},
    "weights of 1 made to have a mean of 1": {"diffusion": {"weighting": "none", "normalise_weights": True}},
    "a bend of the squared error": {"diffusion": {"huber_c": 0.2}},
    "a changing bend of the squared error": {"diffusion": {"huber_schedule": "constant"}},
    "a scaled bend of the squared error": {"diffusion": {"huber_scale": 2.0}},
    "a prior outside of masks that there are not": {"diffusion": {"mask_prior_weight": 0.5}},
    "two wishes for what is outside of masks": {
        "diffusion": {"mask_prior_weight": 0.5}, "data": {"sources": [{"path": "/p", "masks": "files"}], "mask_floor": 0.1},
    },
    "levels of no pyramid": {"noise": {"pyramid_levels": 3}},
    "noises exchanged by one picture": {"noise": {"immiscible": True}, "training": {"batch_size": 1}},
    "a centre of a density that has none": {"timesteps": {"mean": 0.5}},
    "a width of a density that has none": {"timesteps": {"density": "cosmap", "std": 0.5}},
    "a mode of another density": {"timesteps": {"mode_scale": 0.5}},
    "a shift of a density over the noise": {"timesteps": {"density": "log_normal", "shift": 3.0}},
    "a range without timesteps": {"timesteps": {"lowest": 600, "highest": 400}},
    "a uniform share of uniform draws": {"timesteps": {"uniform_share": 0.1}},
    "importance and learned weights": {"timesteps": {"importance": True}, "diffusion": {"weighting": "learned"}},
    "importance and a density by picture size": {"timesteps": {"importance": True, "resolution_noise": "tilt"}},
    "ranges of no importance": {"timesteps": {"importance_ranges": 100}},
    "important ranges that do not divide the timesteps": {"timesteps": {"importance": True, "importance_ranges": 30}},
    "a height without a width": {"samples": {"height": 512}},
    "raw weights where there are no others": {"samples": {"weights": "raw"}, "ema": {"enabled": False}},
    "no length": {"training": {"length": "0 steps"}},
    "a length in time": {"training": {"length": "2 h"}},
    "a warm-up in time": {"lr": {"warmup": "10 min"}},
    "a warm-up longer than the run": {"lr": {"warmup": "200 steps"}, "training": {"length": "100 steps"}},
    "a warm-up longer than the run in samples": {"lr": {"warmup": "60 steps"}, "training": {"length": "100 samples", "batch_size": 2}},
    "logging by the clock": {"tracking": {"log_every": "10 s"}},
    "validation by the clock": {"validation": {"every": "10 min"}},
    "logging every zero steps": {"tracking": {"log_every": "0 steps"}},
    "validation every zero steps": {"validation": {"every": "0 epochs"}},
    "samples every zero steps": {"samples": {"every": "0 steps"}},
    "checkpoints every zero steps": {"checkpoints": {"every": "0 steps"}},
    "a half-life in time": {"ema": {"half_life": "10 min"}},
    "a half-life of nothing": {"ema": {"half_life": "0 samples"}},
    "a decay and a half-life": {"ema": {"half_life": "20000 samples", "decay": 0.999}},
    "a half-life of no average": {"ema": {"half_life": "20000 samples", "enabled": False}},
    "further averages of no average": {"ema": {"power_stds": [0.05, 0.1], "enabled": False}},
    "the same average twice": {"ema": {"power_stds": [0.05, 0.1, 0.0502]}},
    "snapshots of nothing": {"ema": {"snapshot_every": "100 steps"}},
    "snapshots by the clock": {"ema": {"power_stds": [0.05], "snapshot_every": "10 min"}},
    "snapshots every zero steps": {"ema": {"power_stds": [0.05], "snapshot_every": "0 steps"}},
    "a reference for a constant learning rate": {"lr": {"reference": "10 steps"}},
    "a reference in time": {"lr": {"schedule": "inverse_sqrt", "reference": "1 h"}},
    "an end for a constant learning rate": {"lr": {"schedule": "constant", "end_factor": 0.1}},
    "rescaled guidance without guidance": {"samples": {"guidance_scale": 1.0, "guidance_rescale": 0.7}},
    "a negative prompt without guidance": {"samples": {"guidance_scale": 1.0, "negative_prompt": "blurry"}},
    "captions held out of nothing": {"evaluation": {"clip": "/clip"}, "validation": {"share": 0.0}},
    "captions held out by nobody": {"evaluation": {"dinov2": "/dinov2"}, "validation": {"every": "never"}},
    "a stop by a loss that is never measured": {"validation": {"stop_after": 5, "every": "never"}},
    "the best of nothing measured": {"checkpoints": {"keep_best": True}, "validation": {"every": "never"}},
    "a stop by a loss of trained pictures": {"validation": {"stop_after": 5, "share": 0.0}},
    "the best by a loss of trained pictures": {"checkpoints": {"keep_best": True}, "validation": {"share": 0.0}},
    "the same folder twice": {"data": {"sources": [{"path": "/p"}, {"path": "/q"}, {"path": "/p"}]}},
    "runs among the pictures": {"run": {"folder": "/p/runs"}},
    "no decoder training": {"vae_training": {"length": "0 steps"}},
    "a decoder's validation every zero steps": {"vae_training": {"validation_every": "0 steps"}},
    "a decoder's samples every zero steps": {"vae_training": {"samples_every": "0 epochs"}},
    "a decoder's checkpoints every zero steps": {"vae_training": {"checkpoints_every": "0 steps"}},
    "a decoder's length in time": {"vae_training": {"length": "2 h"}},
    "a decoder's warm-up in time": {"vae_training": {"warmup": "1 min"}},
    "a discriminator that starts by the clock": {"vae_training": {"adversarial_weight": 0.5, "adversarial_start": "10 min"}},
    "a decoder's validation by the clock": {"vae_training": {"validation_every": "10 min"}},
    "a decoder's warm-up as long as its run": {"vae_training": {"warmup": "50 steps", "length": "200 samples"}},
    "a decoder without a loss": {"vae_training": {"l1_weight": 0}},
    "a perceptual loss without its model": {"vae_training": {"perceptual_weight": 1}},
    "a perceptual model without a weight": {"vae_training": {"perceptual_model": "/vgg.safetensors"}},
    "a start of no discriminator": {"vae_training": {"adversarial_start": "5 steps"}},
    "a discriminator that never starts": {"vae_training": {"adversarial_weight": 0.5, "adversarial_start": "2000 steps"}},
}  # fmt: skip

FINE = {
    "the defaults": {},
    "v-prediction with zero terminal SNR": {"model": {"prediction": "v_prediction", "zero_terminal_snr": True}},
    "zero terminal SNR as the base has it": {"model": {"zero_terminal_snr": True}},
    "bf16 weights with stochastic rounding": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "adamw_bf16"}},
    "bf16 weights with adafactor": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "adafactor"}},
    "a LoRA in both spellings and in the model": {
        "adapter": {"kind": "lora", "rank": 32, "alpha": 16.0, "targets": "all", "start_from": "/lora.safetensors"},
        "export": {"lora_names": ["kohya", "diffusers"], "merged": True, "diffusers_folder": True},
    },
    "a LoRA in bf16": {"adapter": {"kind": "lora"}, "training": {"precision": "bf16_pure"}, "optimizer": {"name": "adamw_bf16"}},
    "schedule-free training with a warm-up": {
        "optimizer": {"name": "schedule_free"}, "ema": {"enabled": False}, "lr": {"warmup": "100 steps"},
    },
    "one rate for what is not frozen": {
        "optimizer": {"name": "prodigy"}, "training": {"groups": [{"match": ["mid_block"], "learning_rate_factor": 0}]},
    },
    "text encoders with a rate and an end of their own": {
        "text_encoders": {"train": ["text_encoder", "text_encoder_2"], "learning_rate_factor": 0.5, "stop_after": "2 epochs"},
        "captions": {"style": "tags", "shuffle": True},
    },
    "8-bit moments beside either weights": {"optimizer": {"name": "adamw8bit"}},
    "steps inside the backward pass, each tensor clipped": {"training": {"fused_backward": True, "clip": "per_tensor"}},
    "steps inside the backward pass without a clip": {"training": {"fused_backward": True, "clip_norm": 0}},
    "shuffled tags in several renderings": {"captions": TAGS},
    "tags as they are": {"captions": {"style": "tags", "separator": ";", "keep_first": 3}},
    "several random crops": {"crop": {"mode": "random", "variants": 4}},
    "small buckets": {"buckets": {"resolution": 64, "min_side": 32, "max_side": 128}},
    "nothing but squares": {"buckets": {"max_aspect": 1.0}},
    "a warm-up as long as the run": {"lr": {"warmup": "100 steps"}, "training": {"length": "100 steps"}},
    "a warm-up in another unit, when the pictures are not counted": {"lr": {"warmup": "100 steps"}, "training": {"length": "1 epoch"}},
    "checkpoints and samples by the clock": {"checkpoints": {"every": "30 min"}, "samples": {"every": "30 min"}},
    "nothing measured": {"validation": {"every": "never"}, "samples": {"every": "never"}},
    "one folder with two caption files": {"data": {"sources": [{"path": "/p"}, {"path": "/p", "caption_extensions": [".tags"]}]}},
    "renderings that are encoded as they come": {"captions": {"style": "tags", "shuffle": True}},
    "several captions of a table": {"captions": {"variants": 4}, "data": {"sources": [{"path": "/p/a.jsonl"}]}},
    "pictures that take turns": {"data": {"sources": [{"path": "/p", "share": 0.3}, {"path": "/q", "repeats": 0.5}]}},
    "an empty negative prompt without guidance": {"samples": {"guidance_scale": 1.0, "negative_prompt": ""}},
    "a half-life, in any of its units": {"ema": {"half_life": "0.5 epochs"}},
    "averages and their snapshots": {"ema": {"power_stds": [0.05, 0.1], "snapshot_every": "100 steps"}},
    "a decoder trained with everything": {
        "vae_training": {"perceptual_model": "/vgg.safetensors", "perceptual_weight": 1, "adversarial_weight": 0.5, "length": "3 epochs"},
    },
    "captions of trained pictures": {"evaluation": {"clip": "/clip", "source": "train"}, "validation": {"share": 0.0}},
    "an early stop by a source for validation": {
        "validation": {"stop_after": 5, "share": 0.0}, "data": {"sources": [{"path": "/p"}, {"path": "/q", "role": "validation"}]},
    },
    "an early stop and the best kept": {"validation": {"stop_after": 5}, "checkpoints": {"keep_best": True}},
    "pictures beside the runs": {"run": {"folder": "/runs"}, "data": {"sources": [{"path": "/runs-pictures"}]}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_found_once_with_its_reason_and_another_way(name):
    (finding,) = find(RULES, config_of(CONTRADICTIONS[name]))
    assert finding.message.startswith(("`", "there is no", "the same", "the optimizer", "every source", "a source", "the shares"))
    assert ": " in finding.hint, "reason, then what to write"
    assert "{" not in finding.message + finding.hint


@pytest.mark.parametrize("name", FINE)
def test_what_goes_together_is_left_alone(name):
    assert list(find(RULES, config_of(FINE[name]))) == []


def test_every_rule_has_an_example_above():
    found = {finding.message for sections in CONTRADICTIONS.values() for finding in find(RULES, config_of(sections))}
    assert len(found) >= len(RULES)


def test_rules_are_about_settings_that_there_are():
    assert {key for rule in (*RULES, *REMARKS) for key in rule.keys} <= set(all_keys())


@pytest.mark.parametrize("broken", ["captions.style", "captions.shuffle", "captions"])
def test_a_rule_about_a_setting_without_a_value_is_not_asked(broken):
    config = config_of(CONTRADICTIONS["shuffled prose"])
    assert list(find(RULES, config, {broken})) == []
    assert len(list(find(RULES, config, {"captions.dropout_prob", "crop"}))) == 1


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"learning_rate": 1e-2}}, "`optimizer.learning_rate = 0.01`"),
        ({"optimizer": {"learning_rate": 0}}, "nothing will be learned"),
        ({"adapter": {"kind": "lora"}, "optimizer": {"learning_rate": 1e-2}}, "far above what adapters stand"),
        ({"adapter": {"kind": "lora"}}, "an adapter hardly learns"),
        (
            {"adapter": {"kind": "lora"}, "optimizer": {"learning_rate": 1e-4}, "model": {"prediction": "x0", "retarget": True}},
            "another prediction than its base",
        ),
        ({"crop": {"mode": "random"}}, "one crop per picture"),
        ({"noise": {"immiscible": True}, "training": {"batch_size": 4}}, "does little with 4 pictures"),
        (
            {"timesteps": {"density": "logit_normal", "terminal_prob": 0.0}, "model": {"zero_terminal_snr": True}},
            "almost never draws the last timesteps",
        ),
        ({"buckets": {"resolution": 2048}}, "show more through the same noise"),
        ({"ema": {"warmup": False}}, "mostly the base model"),
        ({"optimizer": {"name": "prodigy", "learning_rate": 1e-4}}, "multiplies the rate that prodigy finds"),
        ({"training": {"clip": "delayed"}}, "an older norm than it has to"),
        ({"training": {"fused_backward": True, "clip": "delayed", "accumulation_steps": 4}}, "saves little memory"),
        ({"speed": {"channels_last": True, "kernels": True}, "training": {"device": "cpu"}}, "makes a step slower"),
        ({"ema": {"warmup": False, "half_life": "9000 samples"}, "training": {"batch_size": 4}}, "mostly the base model"),
        ({"ema": {"power_stds": [0.05, 0.1]}}, "too few snapshots"),
        ({"ema": {"power_stds": [0.1], "snapshot_every": "300 samples"}, "training": {"batch_size": 2}}, "too few snapshots"),
        ({"captions": {"dropout_prob": 0.9}}, "hides most captions"),
        ({"samples": {"prompts": ["a"], "height": 512, "width": 512}}, "512x512"),
        ({"cache": {"folder": "/p/cache"}}, "`cache.folder` lies inside"),
        ({"evaluation": {"clip": "/clip"}}, "no more than 64 pictures are held out"),
    ],
)
def test_what_is_allowed_but_odd_is_remarked(sections, words):
    config = config_of(sections)
    (remark,) = find(REMARKS, config)
    assert words in remark.message
    assert list(find(RULES, config)) == []


def test_the_defaults_are_not_remarked():
    assert list(find(REMARKS, config_of({}))) == []


@pytest.mark.parametrize("resolution", [64, 512, 1024])
@pytest.mark.parametrize("step", [32, 96, 160])
@pytest.mark.parametrize("sides", [(32, 2048), (256, 768), (512, 512)])
@pytest.mark.parametrize("max_aspect", [1.0, 2.0])
def test_a_bucket_is_possible_exactly_when_the_planner_finds_one(resolution, step, sides, max_aspect):
    from aquatint.data.buckets import candidates
    from aquatint.errors import UsageError

    settings = {"resolution": resolution, "step": step, "min_side": sides[0], "max_side": sides[1], "max_aspect": max_aspect}
    try:
        found = len(candidates(**settings)) > 0
    except (UsageError, ValueError):
        found = False
    assert has_bucket(BucketsSection(**settings)) == found
