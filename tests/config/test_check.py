import pytest

from aquatint.config.check import REMARKS, RULES, find, has_bucket
from aquatint.config.describe import all_keys
from aquatint.config.schema import BucketsSection, Config

TAGS = {"style": "tags", "shuffle": True, "variants": 8}


def config_of(sections):
    values = {"model": {"base": "/b"}, "data": {"sources": [{"path": "/p"}]}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


CONTRADICTIONS = {
    "epsilon with zero terminal SNR": {"model": {"prediction": "epsilon", "zero_terminal_snr": True}},
    "bf16 weights with an optimizer that rounds to nearest": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "adamw"}},
    "the bf16 optimizer without bf16 weights": {"training": {"precision": "bf16_mixed"}, "optimizer": {"name": "adamw_bf16"}},
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
    "gamma without a weighting": {"diffusion": {"weighting": "none", "gamma": 3.0}},
    "a floor without min_snr": {"diffusion": {"weighting": "clamped_v", "weight_floor": 0.1}},
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
    "an end for a constant learning rate": {"lr": {"schedule": "constant", "end_factor": 0.1}},
    "rescaled guidance without guidance": {"samples": {"guidance_scale": 1.0, "guidance_rescale": 0.7}},
    "a negative prompt without guidance": {"samples": {"guidance_scale": 1.0, "negative_prompt": "blurry"}},
    "the same folder twice": {"data": {"sources": [{"path": "/p"}, {"path": "/q"}, {"path": "/p"}]}},
    "runs among the pictures": {"run": {"folder": "/p/runs"}},
}  # fmt: skip

FINE = {
    "the defaults": {},
    "v-prediction with zero terminal SNR": {"model": {"prediction": "v_prediction", "zero_terminal_snr": True}},
    "zero terminal SNR as the base has it": {"model": {"zero_terminal_snr": True}},
    "bf16 weights with stochastic rounding": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "adamw_bf16"}},
    "bf16 weights with adafactor": {"training": {"precision": "bf16_pure"}, "optimizer": {"name": "adafactor"}},
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
        ({"crop": {"mode": "random"}}, "one crop per picture"),
        ({"diffusion": {"weighting": "min_snr", "weight_floor": 0.0}}, "never trains the last timestep"),
        ({"ema": {"warmup": False}}, "mostly the base model"),
        ({"captions": {"dropout_prob": 0.9}}, "hides most captions"),
        ({"samples": {"prompts": ["a"], "height": 512, "width": 512}}, "512x512"),
        ({"cache": {"folder": "/p/cache"}}, "`cache.folder` lies inside"),
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
