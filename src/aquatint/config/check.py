"""Settings that are fine each on their own, but not together. Every rule says what, why, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from aquatint.config.adapter_rules import ADAPTER_REMARKS, ADAPTER_RULES, has_adapter
from aquatint.config.diffusion_rules import DIFFUSION_REMARKS, DIFFUSION_RULES
from aquatint.config.duration import Duration
from aquatint.config.ema_rules import EMA_REMARKS, EMA_RULES
from aquatint.config.evaluation_rules import EVALUATION_REMARKS, EVALUATION_RULES
from aquatint.config.group_rules import GROUP_RULES
from aquatint.config.memory_rules import MEMORY_RULES
from aquatint.config.optimizer_rules import OPTIMIZER_REMARKS, OPTIMIZER_RULES
from aquatint.config.rule import Rule
from aquatint.config.schema import Config
from aquatint.config.sections.data import BucketsSection, CaptionsSection, SourceSection
from aquatint.config.sections.library_optimizers import OWN_RATE
from aquatint.config.sections.steps import LearningRateSection
from aquatint.config.speed_rules import SPEED_REMARKS, SPEED_RULES
from aquatint.config.text_rules import TEXT_RULES, trains_text
from aquatint.config.vae_rules import VAE_RULES
from aquatint.config.validation_rules import VALIDATION_RULES

MIN_BUCKET_AREA = 0.85  # of `resolution` squared; buckets below are not made
TABLE_ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".json")
NOTABLE_LEARNING_RATE = 1e-4  # full fine-tuning of SDXL is done at 4e-7 … 1e-5, with thousands of pictures per step up to 1e-4


@dataclass(frozen=True)
class Finding:
    """A rule that applies, in words. `keys` are the settings that it is about, the one to change first."""

    keys: tuple[str, ...]
    message: str
    hint: str


def _duration(config: Config, key: str) -> Duration:
    """The value of `section.name`; for "never", any that no rule minds."""
    section, name = key.split(".")
    value: Duration | None = getattr(getattr(config, section), name)
    return value or Duration(1, "steps")


def _is_time(key: str) -> Callable[[Config], bool]:
    return lambda config: _duration(config, key).unit == "seconds"


def _is_set_beside_named_buckets(name: str) -> Callable[[Config], bool]:
    return lambda config: config.buckets.set != "aquatint" and getattr(config.buckets, name) != getattr(BucketsSection(), name)


def _is_set_beside_prose(name: str) -> Callable[[Config], bool]:
    return lambda config: config.captions.style == "prose" and getattr(config.captions, name) != getattr(CaptionsSection(), name)


def _is_zero(key: str) -> Callable[[Config], bool]:
    return lambda config: _duration(config, key).value == 0


RULES = (
    # precision
    Rule(
        ("training.precision", "optimizer.name"),
        lambda c: c.training.precision == "bf16_pure" and c.optimizer.name == "adamw",
        '`training.precision = "bf16_pure"` cannot go with the optimizer "adamw"',
        "bf16 weights swallow most of its small updates, so the model would hardly learn: "
        'set `optimizer.name = "adamw_bf16"`, `"adamw8bit"` or `"adafactor"` (they round so that nothing is lost), '
        'or `training.precision = "bf16_mixed"`',
    ),
    Rule(
        ("optimizer.name", "training.precision"),
        lambda c: c.training.precision != "bf16_pure" and c.optimizer.name == "adamw_bf16",
        'the optimizer "adamw_bf16" does nothing special with `training.precision = "{c.training.precision}"`',
        "it saves memory only beside bf16 weights, and is slower than the ordinary one: "
        'set `optimizer.name = "adamw"`, or `training.precision = "bf16_pure"`',
    ),
    # shapes
    Rule(
        ("buckets.min_side", "buckets.max_side"),
        lambda c: c.buckets.min_side > c.buckets.max_side,
        "`buckets.min_side` ({c.buckets.min_side}) is larger than `buckets.max_side` ({c.buckets.max_side})",
        "no picture shape fits between them: swap them, or leave both out for 512 and 2048",
    ),
    Rule(
        ("buckets.min_side", "buckets.resolution"),
        lambda c: c.buckets.resolution < c.buckets.min_side <= c.buckets.max_side,
        "`buckets.min_side` ({c.buckets.min_side}) is larger than `buckets.resolution` ({c.buckets.resolution})",
        "even a square of that side would be too large: set `buckets.min_side` to half of the resolution, or raise the resolution",
    ),
    Rule(
        ("buckets.resolution", "buckets.step", "buckets.min_side", "buckets.max_side", "buckets.max_aspect"),
        lambda c: c.buckets.min_side <= min(c.buckets.max_side, c.buckets.resolution) and not has_bucket(c.buckets),
        "there is no picture shape that fits all settings of `buckets`",
        "sides must be multiples of `step` from `min_side` to `max_side`, with an area of 85 to 100 % of `resolution` squared: "
        "leave out all but `resolution`, and make that a multiple of `step`",
    ),
    Rule(
        ("data.max_pixels", "buckets.resolution"),
        lambda c: c.data.max_pixels < c.buckets.resolution**2,
        "`data.max_pixels = {c.data.max_pixels}` refuses every picture large enough for `buckets.resolution = {c.buckets.resolution}`",
        "leave it out: it is there to keep giant pictures from filling the memory",
    ),
    *(
        Rule(
            (f"buckets.{name}", "buckets.set"),
            _is_set_beside_named_buckets(name),
            f'`buckets.{name}` does nothing with `buckets.set = "{{c.buckets.set}}"`',
            f"that set has shapes and a rule of its own: leave out `buckets.set`, or `buckets.{name}`",
        )
        for name in ("area_weight", "upscale_weight", "max_aspect")
    ),
    Rule(
        ("buckets.upscale_weight", "buckets.tiers"),
        lambda c: not c.buckets.tiers and c.buckets.set == "aquatint" and c.buckets.upscale_weight != BucketsSection().upscale_weight,
        "`buckets.upscale_weight` does nothing without `buckets.tiers`",
        "it decides which tier a small picture goes to: set `buckets.tiers = [768, 512]`, or leave it out",
    ),
    Rule(
        ("buckets.resolution", "buckets.set"),
        lambda c: c.buckets.set == "sdxl_table" and (c.buckets.resolution != 1024 or bool(c.buckets.tiers)),
        '`buckets.set = "sdxl_table"` is a list of shapes of about 1024 × 1024 pixels, and no others',
        "the list is part of the model's paper: leave out `buckets.resolution` and `buckets.tiers`, or `buckets.set`",
    ),
    Rule(
        ("buckets.tiers", "buckets.resolution"),
        lambda c: any(tier >= c.buckets.resolution for tier in c.buckets.tiers),
        "`buckets.tiers` ({c.buckets.tiers}) must be smaller than `buckets.resolution` ({c.buckets.resolution})",
        "they are for pictures that are too small for the resolution: write for example 768 and 512",
    ),
    Rule(
        ("crop.variants", "crop.mode"),
        lambda c: c.crop.mode != "random" and c.crop.variants > 1,
        '`crop.variants = {c.crop.variants}` does nothing with `crop.mode = "{c.crop.mode}"`',
        'a picture has only one such crop: set `crop.mode = "random"`, or leave out `crop.variants`',
    ),
    # captions
    Rule(
        ("captions.shuffle", "captions.style"),
        lambda c: c.captions.style == "prose" and c.captions.shuffle,
        '`captions.shuffle` does nothing with `captions.style = "prose"`',
        'prose has no tags to shuffle: set `captions.style = "tags"`, or leave out `captions.shuffle`',
    ),
    Rule(
        ("captions.tag_drop_prob", "captions.style"),
        lambda c: c.captions.style == "prose" and c.captions.tag_drop_prob > 0,
        '`captions.tag_drop_prob` does nothing with `captions.style = "prose"`',
        'prose has no tags to drop: set `captions.style = "tags"`, or use `captions.dropout_prob`, which leaves out whole captions',
    ),
    Rule(
        ("captions.separator", "captions.style"),
        lambda c: c.captions.style == "prose" and c.captions.separator != ",",
        '`captions.separator` does nothing with `captions.style = "prose"`',
        'prose is used as it is written: set `captions.style = "tags"`, or leave out `captions.separator`',
    ),
    Rule(
        ("captions.keep_first", "captions.style"),
        lambda c: c.captions.style == "prose" and c.captions.keep_first != 1,
        '`captions.keep_first` does nothing with `captions.style = "prose"`',
        'prose has no tags to keep: set `captions.style = "tags"`, or leave out `captions.keep_first`',
    ),
    *(
        Rule(
            (f"captions.{name}", "captions.style"),
            _is_set_beside_prose(name),
            f'`captions.{name}` does nothing with `captions.style = "prose"`',
            f'prose has no tags: set `captions.style = "tags"`, or leave out `captions.{name}`',
        )
        for name in ("keep_separator", "categories", "tag_weights")
    ),
    Rule(
        ("captions.tag_drop", "captions.tag_drop_prob"),
        lambda c: c.captions.tag_drop == "weighted" and c.captions.tag_drop_prob == 0,
        '`captions.tag_drop = "weighted"` does nothing with `captions.tag_drop_prob = 0`',
        "no tag is dropped: set `captions.tag_drop_prob = 0.1`, or leave out `captions.tag_drop`",
    ),
    Rule(
        ("captions.keep_separator", "captions.keep_first"),
        lambda c: bool(c.captions.keep_separator) and c.captions.keep_first not in (0, 1),
        "`captions.keep_separator` and `captions.keep_first` say two things about the same",
        "with the separator, the tags before it are kept: leave out `captions.keep_first`",
    ),
    Rule(
        ("captions.variants", "captions.text", "captions.shuffle", "captions.tag_drop_prob", "captions.wildcards"),
        lambda c: c.captions.variants > 1 and not varies(c.captions) and not may_have_several(c),
        "`captions.variants = {c.captions.variants}` would keep that many copies of the same caption",
        'variants differ by shuffled or dropped tags: set `captions.style = "tags"` with `captions.shuffle = true`, '
        "or leave out `captions.variants`",
    ),
    Rule(
        ("captions.variants", "captions.text"),
        lambda c: c.captions.variants > 1 and c.captions.text == "online",
        '`captions.variants = {c.captions.variants}` does nothing with `captions.text = "online"`',
        "captions are then rendered anew for every sample: leave out one of the two",
    ),
    Rule(
        ("captions.variants", "captions.text", "captions.shuffle", "captions.tag_drop_prob", "captions.style"),
        lambda c: c.captions.variants == 1 and c.captions.text == "cached" and varies(c.captions),
        "`captions.variants = 1` shuffles or drops the tags of each caption once, and then always shows it that way",
        'captions are encoded before the training: set `captions.variants = 8`, or `captions.text = "online"`',
    ),
    Rule(
        ("captions.tag_drop_prob", "captions.keep_first", "captions.style"),
        lambda c: c.captions.style == "tags" and c.captions.tag_drop_prob == 1 and c.captions.keep_first == 0,
        "`captions.tag_drop_prob = 1` drops every tag of every caption",
        "every caption would be empty: set it to 0.1 for some variety, or set `captions.keep_first`",
    ),
    # time
    Rule(
        ("training.length",),
        lambda c: c.training.length.value == 0,
        "`training.length` is zero",
        'nothing would be trained: write "2000 steps" or "10 epochs"',
    ),
    Rule(
        ("training.length",),
        lambda c: c.training.length.unit == "seconds",
        "`training.length` cannot be a time",
        'the learning rate needs to know the last step, and a run should end the same on any machine: write "2000 steps" or "10 epochs"',
    ),
    Rule(
        ("lr.warmup",),
        lambda c: c.lr.warmup.unit == "seconds",
        "`lr.warmup` cannot be a time",
        'a run should be the same on any machine: write it as "100 steps" or "0.1 epochs"',
    ),
    Rule(
        ("lr.warmup", "training.length", "training.batch_size", "training.accumulation_steps", "training.pictures_per_step"),
        lambda c: _longer(c, c.lr.warmup, c.training.length),
        '`lr.warmup` ("{c.lr.warmup}") is longer than `training.length` ("{c.training.length}")',
        "the learning rate would never reach its peak: a twentieth of the length is plenty",
    ),
    *(
        Rule(
            (key,),
            _is_time(key),
            f"`{key}` cannot be a time",
            "what is measured should not depend on how fast the machine is, so that a resumed run repeats it: "
            'count in steps or epochs, such as "100 steps"',
        )
        for key in ("tracking.log_every", "validation.every")
    ),
    *(
        Rule(
            (key,),
            _is_zero(key),
            f"`{key}` is zero",
            'zero steps never pass: write how often, such as "100 steps"'
            + (', or "never"' if key in ("validation.every", "samples.every") else ""),
        )
        for key in ("tracking.log_every", "validation.every", "samples.every", "checkpoints.every")
    ),
    Rule(
        ("lr.end_factor", "lr.schedule"),
        lambda c: c.lr.schedule in ("constant", "inverse_sqrt") and c.lr.end_factor != 0,
        '`lr.end_factor` does nothing with `lr.schedule = "{c.lr.schedule}"`',
        'that one aims at no end: set `lr.schedule = "cosine"` or `"linear"`, or leave out `lr.end_factor`',
    ),
    Rule(
        ("lr.reference", "lr.schedule"),
        lambda c: c.lr.schedule != "inverse_sqrt" and c.lr.reference != LearningRateSection().reference,
        '`lr.reference` does nothing with `lr.schedule = "{c.lr.schedule}"`',
        'it belongs to "inverse_sqrt": set that, or leave out `lr.reference`',
    ),
    Rule(
        ("lr.reference",),
        lambda c: c.lr.reference.unit == "seconds" or c.lr.reference.value == 0,
        '`lr.reference` ("{c.lr.reference}") must be a number of steps, samples or epochs',
        'a run should be the same on any machine: write for example "1000 steps"',
    ),
    # cache
    Rule(
        ("cache.workers", "cache.engine"),
        lambda c: c.cache.workers > 1 and c.cache.engine == "local",
        '`cache.workers = {c.cache.workers}` does nothing with `cache.engine = "local"`',
        'this process does the work: set `cache.engine = "processes"` for several GPUs of this machine, or leave out `cache.workers`',
    ),
    # sources
    Rule(
        ("data.sources",),
        lambda c: all(source.role == "validation" for source in c.data.sources),
        "every source in `data.sources` is for validation",
        'there would be nothing to train on: leave out `role = "validation"` where the pictures to learn from are',
    ),
    Rule(
        ("data.sources",),
        lambda c: any(source.share is not None and source.repeats != 1 for source in c.data.sources),
        "a source in `data.sources` has both `share` and `repeats`",
        "each says how often its pictures are shown: keep one of them",
    ),
    Rule(
        ("data.sources",),
        lambda c: _shares(c) >= 1 or (_shares(c) > 0 and all(s.share is not None for s in c.data.sources if s.role != "validation")),
        "the shares in `data.sources` leave nothing for the other sources",
        "a share is a part of all samples: at least one source must be without, and gets what the others leave",
    ),
    Rule(
        ("data.sources",),
        lambda c: any(s.role == "validation" and (s.repeats != 1 or s.share is not None or s.loss_weight != 1) for s in c.data.sources),
        "`repeats`, `share` and `loss_weight` do nothing for a source that is only for validation",
        'its pictures are each measured once: leave them out, or leave out `role = "validation"`',
    ),
    Rule(
        ("data.sources", "data.mask_floor"),
        lambda c: c.data.mask_floor > 0 and all(source.masks == "none" and source.mask_column is None for source in c.data.sources),
        "`data.mask_floor` does nothing without masks",
        'no source has any: set `masks = "files"` or `masks = "alpha"` in `[[data.sources]]`, or leave out `data.mask_floor`',
    ),
    Rule(
        ("validation.share", "data.sources"),
        lambda c: c.validation.share not in (0.0, 0.02) and any(source.role == "validation" for source in c.data.sources),
        "`validation.share` does nothing beside a source for validation",
        "the pictures of that source are the ones measured: leave out `validation.share`",
    ),
    # folders
    Rule(
        ("data.sources",),
        lambda c: _repeats_source(c),
        "the same pictures stand twice in `data.sources`",
        "its pictures would be counted twice: list it once, with `repeats = 2` if you want them more often",
    ),
    Rule(
        ("run.folder", "data.sources"),
        lambda c: any(_inside(c.run.folder, Path(source.path)) for source in c.data.sources),
        "`run.folder` lies inside a folder of `data.sources`",
        "the sample pictures of this run would become training pictures of the next: choose a folder outside",
    ),
    *ADAPTER_RULES,
    *DIFFUSION_RULES,
    *EMA_RULES,
    *GROUP_RULES,
    *MEMORY_RULES,
    *OPTIMIZER_RULES,
    *SPEED_RULES,
    *TEXT_RULES,
    *EVALUATION_RULES,
    *VAE_RULES,
    *VALIDATION_RULES,
)
"""Contradictions: a config with one of them is refused."""

REMARKS = (
    Rule(
        ("optimizer.learning_rate", "adapter.kind"),
        lambda c: not has_adapter(c) and c.optimizer.learning_rate > NOTABLE_LEARNING_RATE and c.optimizer.name not in OWN_RATE,
        "`optimizer.learning_rate = {c.optimizer.learning_rate:g}` is far above what full fine-tuning of SDXL stands",
        "1e-6 to 1e-5 is usual",
    ),
    Rule(
        ("optimizer.learning_rate",),
        lambda c: c.optimizer.learning_rate == 0,
        "`optimizer.learning_rate` is 0: nothing will be learned",
        "1e-6 to 1e-5 is usual",
    ),
    Rule(
        ("crop.mode", "crop.variants"),
        lambda c: c.crop.mode == "random" and c.crop.variants == 1,
        '`crop.mode = "random"` with `crop.variants = 1` picks one crop per picture and keeps it',
        "`crop.variants = 4` gives real variety for four times the cache",
    ),
    Rule(
        ("captions.dropout_prob",),
        lambda c: c.captions.dropout_prob > 0.5,
        "`captions.dropout_prob = {c.captions.dropout_prob:g}` hides most captions",
        "0.1 is usual",
    ),
    Rule(
        ("cache.folder", "data.sources"),
        lambda c: any(_inside(c.cache.folder, Path(source.path)) for source in c.data.sources),
        "`cache.folder` lies inside a folder of `data.sources`",
        "it works, but keeps your pictures and our files apart no longer",
    ),
    *ADAPTER_REMARKS,
    *DIFFUSION_REMARKS,
    *EMA_REMARKS,
    *OPTIMIZER_REMARKS,
    *SPEED_REMARKS,
    *EVALUATION_REMARKS,
)
"""Worth a look, but allowed."""


def find(rules: tuple[Rule, ...], config: Config, broken: AbstractSet[str] = frozenset()) -> Iterator[Finding]:
    """The rules that apply. Rules about a setting in `broken` (dotted keys) are left out: its value is not the user's."""
    for rule in rules:
        if not any(_touches(key, broken) for key in rule.keys) and rule.applies(config):
            yield Finding(rule.keys, rule.message.format(c=config), rule.hint)


def _touches(key: str, broken: AbstractSet[str]) -> bool:
    return any(other == key or other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in broken)


def has_bucket(buckets: BucketsSection) -> bool:
    """Whether at least one picture shape satisfies all settings."""
    area = buckets.resolution**2
    first = -(-buckets.min_side // buckets.step) * buckets.step
    for short in range(first, min(buckets.max_side, buckets.resolution) + 1, buckets.step):
        longest = min(buckets.max_side, area // short, int(short * buckets.max_aspect))
        long = longest // buckets.step * buckets.step
        if long >= short and short * long >= MIN_BUCKET_AREA * area:
            return True
    return False


def varies(captions: CaptionsSection) -> bool:
    """Whether a single caption is rendered in more than one way."""
    drops = captions.tag_drop_prob > 0 or any(category.drop_prob > 0 for category in captions.categories)
    return captions.wildcards or (captions.style == "tags" and (captions.shuffle or drops))


def encodes_online(captions: CaptionsSection) -> bool:
    """Whether captions are encoded as they are needed, each time rendered anew."""
    return captions.text == "online" or (captions.text == "auto" and captions.variants == 1 and varies(captions))


def renders_online(config: Config) -> bool:
    """Whether captions of samples are rendered anew each time, and so are none in the cache."""
    return trains_text(config) or encodes_online(config.captions)


def may_have_several(config: Config) -> bool:
    """Whether pictures may have several captions to pick from at random, as far as the names in the config tell."""
    return config.captions.pick == "random" and any(
        source.caption_lines == "alternatives" or ".json" in source.caption_extensions or _kind(source) != "folder"
        for source in config.data.sources
    )


def _kind(source: SourceSection) -> str:
    if source.kind != "auto":
        return source.kind
    ending = Path(source.path).suffix.lower()
    return "tar" if ending == ".tar" else "table" if ending in TABLE_ENDINGS else "folder"


def _shares(config: Config) -> float:
    return sum(source.share or 0.0 for source in config.data.sources)


def _samples(config: Config, duration: Duration) -> float | None:
    """Pictures that pass in this time, or None if that depends on how many there are."""
    per_step = config.training.per_step
    return {"steps": duration.value * per_step, "samples": duration.value}.get(duration.unit)


def _longer(config: Config, first: Duration, second: Duration) -> bool:
    if first.unit == second.unit:
        return first.value > second.value
    samples = _samples(config, first), _samples(config, second)
    return samples[0] is not None and samples[1] is not None and samples[0] > samples[1]


def _repeats_source(config: Config) -> bool:
    sources = [(source.path, source.caption_extensions) for source in config.data.sources]
    return len(set(sources)) < len(sources)


def _inside(folder: Path, parent: Path) -> bool:
    return folder == parent or parent in folder.parents
