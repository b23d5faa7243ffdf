"""Captions as they are trained: one is picked, choices in it are made, its tags are dropped and shuffled, trigger words go in front.

Everything random is drawn from the generator that is passed in, or is a function of the picture's content.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from aquatint.data.caption_text import all_choices, draw_choices, parse_choices, printable, split_tags, tag_key
from aquatint.utils.seeds import generator

Style = Literal["tags", "prose"]
Pick = Literal["first", "random"] | tuple[float, ...]
_GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, fill the unit interval evenly however many are taken
_MAX_SHOWN = 200  # characters of a caption in a report
_MANY = 6  # chunks that are not told apart any more, and names that are listed, in a report


@dataclass(frozen=True)
class Category:
    """Tags that are dropped with a probability of their own. `tags` are names, or patterns in which `*` stands for anything."""

    tags: tuple[str, ...]
    drop_prob: float


@dataclass(frozen=True)
class CaptionPolicy:
    """How captions are rendered. Prose stays as it is written; what is said about tags holds for the style `tags` only.

    The first `keep_first` tags are never moved and never dropped. With `keep_separator`, those before it are, and those
    after a second one, which stay at the end; `keep_first` then counts only where a caption has none. The mark itself is
    left out. The other tags are dropped with `tag_drop_prob`, or, if weighted, with the probabilities that `render` is
    given, or with that of their category: one that names the tag goes before one with a pattern, then the first listed.

    `pick` says which caption of several is used: the first, any, or by weights for the first, the second and so on.
    With `wildcards`, `{a|b}` stands for a or b, see `parse_choices`. `trigger` goes in front of every caption, also an
    empty one, and is not repeated if the caption has it already. `variants` is how many renderings are cached.
    """

    style: Style = "prose"
    separator: str = ","
    shuffle: bool = False
    keep_first: int = 1
    keep_separator: str = ""
    tag_drop_prob: float = 0.0
    tag_drop: Literal["uniform", "weighted"] = "uniform"
    categories: tuple[Category, ...] = ()
    wildcards: bool = False
    pick: Pick = "random"
    trigger: str = ""
    variants: int = 1

    @cached_property
    def drops(self) -> bool:
        return self.style == "tags" and (self.tag_drop_prob > 0 or any(category.drop_prob > 0 for category in self.categories))

    @cached_property
    def moves(self) -> bool:
        return self.style == "tags" and self.shuffle

    @cached_property
    def leaves_as_written(self) -> bool:
        return self.style == "prose" and not self.wildcards and not self.trigger

    @cached_property
    def joint(self) -> str:
        return f"{self.separator.strip()} "

    @cached_property
    def trigger_tags(self) -> list[str]:
        return split_tags(self.trigger, self.separator)

    @cached_property
    def _named(self) -> dict[str, float]:
        """Drop probabilities of the tags that a category names."""
        pairs = [(tag_key(tag), category.drop_prob) for category in self.categories for tag in category.tags if "*" not in tag]
        return dict(reversed(pairs))

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], float], ...]:
        return tuple(
            (any_of_patterns(patterns), category.drop_prob)
            for category in self.categories
            if (patterns := [tag for tag in category.tags if "*" in tag])
        )

    def drop_prob(self, tag: str, drop_probs: Mapping[str, float] | None) -> float:
        """The probability that a tag which may be dropped is dropped. `drop_probs` are by `tag_key`."""
        key = tag_key(tag)
        if key in self._named:
            return self._named[key]
        for pattern, prob in self._patterns:
            if pattern.fullmatch(key):
                return prob
        return self.tag_drop_prob if drop_probs is None else drop_probs.get(key, self.tag_drop_prob)


def any_of_patterns(patterns: Sequence[str]) -> re.Pattern[str]:
    """Matches the `tag_key` of what one of the patterns stands for; `*` stands for anything, also for nothing."""
    return re.compile("|".join(".*".join(map(re.escape, tag_key(pattern).split("*"))) for pattern in patterns), re.DOTALL)


def is_random(policy: CaptionPolicy) -> bool:
    """Whether a single caption may be rendered in more than one way."""
    return policy.wildcards or policy.moves or policy.drops


def render(
    captions: Sequence[str], policy: CaptionPolicy, rng: np.random.Generator, *, drop_probs: Mapping[str, float] | None = None
) -> str:
    """A picture's caption as it is trained; of none at all, the trigger words. `drop_probs` are those of `tags.drop_probs`."""
    shares = caption_shares(len(captions), policy.pick)
    index = _pick(shares, rng.random()) if len(shares) > 1 else 0
    return _render_one(captions[index] if captions else "", policy, rng, drop_probs)


def variants(
    captions: Sequence[str], picture_digest: bytes, policy: CaptionPolicy, *, drop_probs: Mapping[str, float] | None = None
) -> tuple[str, ...]:
    """The different texts of `weighted_variants`."""
    if policy.leaves_as_written and len(captions) == 1:
        return (captions[0].strip(),)
    return tuple(weighted_variants(captions, picture_digest, policy, drop_probs=drop_probs))


def weighted_variants(
    captions: Sequence[str], picture_digest: bytes, policy: CaptionPolicy, *, drop_probs: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The texts that are cached of a picture, all different, with the probabilities they are to be used with.

    These are all that there can be, if nothing is dropped or shuffled and they are no more than `policy.variants`. Else
    they are so many renderings, as a function of the picture's content (the first ones stay the same when more are
    asked for); equal ones are one. Each caption keeps its probability, if at least one of them is of it.
    """
    if policy.leaves_as_written and len(captions) == 1:
        return {captions[0].strip(): 1.0}
    if (texts := _all_texts(captions, policy, policy.variants)) is not None:
        return texts
    rng = generator(0, f"caption/{picture_digest.hex()}", 0)
    shares = caption_shares(len(captions), policy.pick)
    start = rng.random() if len(shares) > 1 else 0.0
    picks = [_pick(shares, (start + index * _GOLDEN) % 1.0) for index in range(policy.variants)]
    counts = Counter(picks)
    total = sum(shares[pick] for pick in counts)
    texts = {}
    for pick in picks:
        text = _render_one(captions[pick] if captions else "", policy, rng, drop_probs)
        texts[text] = texts.get(text, 0.0) + shares[pick] / total / counts[pick]
    return texts


def num_possible(captions: Sequence[str], policy: CaptionPolicy, limit: int) -> int | None:
    """How many different texts there can be of a picture; None for more than `limit`, and where tags are dropped or shuffled."""
    texts = _all_texts(captions, policy, limit)
    return None if texts is None else len(texts)


def caption_shares(count: int, pick: Pick) -> tuple[float, ...]:
    """The probabilities of a picture's captions; of the first alone if no other is ever used.

    Weights beyond the picture's captions do not count; if those left are all 0, the first caption is used.
    """
    if pick == "first" or count <= 1:
        return (1.0,)
    if pick == "random":
        return (1.0 / count,) * count
    weights = [float(weight) for weight in pick[:count]]
    total = sum(weights)
    return tuple(weight / total for weight in weights) if total > 0 else (1.0,)


def _pick(shares: Sequence[float], number: float) -> int:
    """The index of the share in which a number in 0..1 lies. The shares may add up to a little less than 1."""
    for index, share in enumerate(shares):
        number -= share
        if number < 0:
            return index
    return max(range(len(shares)), key=shares.__getitem__)


def _all_texts(captions: Sequence[str], policy: CaptionPolicy, limit: int) -> dict[str, float] | None:
    """Every text that there can be with its probability; None for more than `limit`, and where tags are dropped or shuffled."""
    if policy.drops or policy.moves:
        return None
    texts: dict[str, float] = {}
    for caption, share in zip(captions or ("",), caption_shares(len(captions), policy.pick), strict=False):
        if share == 0:
            continue
        choices: dict[str, float] | None = {caption: 1.0}
        if _has_choices(caption, policy):
            choices = all_choices(parse_choices(caption), limit)
        if choices is None:
            return None
        for choice, prob in choices.items():
            text = _arranged(choice, policy)
            texts[text] = texts.get(text, 0.0) + share * prob
        if len(texts) > limit:
            return None
    return texts


def _render_one(caption: str, policy: CaptionPolicy, rng: np.random.Generator, drop_probs: Mapping[str, float] | None) -> str:
    if _has_choices(caption, policy):
        caption = draw_choices(parse_choices(caption), rng)
    return _arranged(caption, policy, lambda tags: _shuffled(_thinned(tags, policy, rng, drop_probs), policy, rng))


def _has_choices(caption: str, policy: CaptionPolicy) -> bool:
    return policy.wildcards and ("{" in caption or "\\" in caption)


def _arranged(caption: str, policy: CaptionPolicy, change: Callable[[list[str]], list[str]] = list) -> str:
    """The caption with its trigger words, and with a change to the tags that may be moved or dropped."""
    if policy.style == "prose":
        return _triggered(caption.strip(), policy)
    texts = caption.split(policy.keep_separator) if policy.keep_separator else [caption]
    parts = [split_tags(text, policy.separator) for text in texts]
    if policy.trigger:
        there = {tag_key(tag) for tag in policy.trigger_tags}
        parts = [[tag for tag in part if tag_key(tag) not in there] for part in parts]
    if len(parts) == 1:
        parts = [parts[0][: policy.keep_first], parts[0][policy.keep_first :]]
    kept, free, *end = parts
    return policy.joint.join([*policy.trigger_tags, *kept, *change(free), *(tag for part in end for tag in part)])


def _triggered(caption: str, policy: CaptionPolicy) -> str:
    """Prose behind the trigger words, unless it begins with them."""
    trigger = policy.trigger.strip()
    if not trigger:
        return caption
    there = caption[: len(trigger)].lower() == trigger.lower() and not caption[len(trigger) : len(trigger) + 1].isalnum()
    if there or not caption:
        return caption or trigger
    return f"{trigger}{policy.joint if trigger[-1].isalnum() else ' '}{caption}"


def _thinned(tags: list[str], policy: CaptionPolicy, rng: np.random.Generator, drop_probs: Mapping[str, float] | None) -> list[str]:
    if not policy.drops or not tags:
        return tags
    numbers = rng.random(len(tags)).tolist()
    by_tag = drop_probs if policy.tag_drop == "weighted" else None
    if policy.categories or by_tag is not None:
        return [tag for tag, number in zip(tags, numbers, strict=True) if number >= policy.drop_prob(tag, by_tag)]
    return [tag for tag, number in zip(tags, numbers, strict=True) if number >= policy.tag_drop_prob]


def _shuffled(tags: list[str], policy: CaptionPolicy, rng: np.random.Generator) -> list[str]:
    """By sorting numbers, and not with numpy's shuffle: it stays the same in every version of numpy."""
    if not policy.moves or len(tags) < 2:
        return tags
    numbers = rng.random(len(tags)).tolist()
    return [tags[index] for index in sorted(range(len(tags)), key=numbers.__getitem__)]


def draw_dropout(seed: int, position: int, *, prob: float, zeros_share: float) -> Literal["keep", "zeros", "empty"]:
    """What the sample at a global position is trained with: its caption, zeros, or the encoded empty text."""
    dropped, kind = generator(seed, "dropout", position).random(2)
    if dropped >= prob:
        return "keep"
    return "zeros" if kind < zeros_share else "empty"


# Text


def caption_report(names: Sequence[str], captions: Sequence[str], counts: Sequence[tuple[int, int, bool]], *, num_shown: int = 5) -> str:
    """For people: how many captions fill one, two, three chunks, which are the longest, and some of them as they are.

    `counts` has each caption's tokens, its chunks, and whether one of these ends inside a tag or sentence.
    """
    if not names:
        return "there are no captions\n"
    tokens = sorted(count for count, _, _ in counts)
    chunks = Counter(min(count, _MANY) for _, count, _ in counts)
    longest = sorted(range(len(names)), key=lambda row: (-counts[row][0], row))[:3]
    broken = [name for name, (_, _, inside) in zip(names, counts, strict=True) if inside]
    shown = sorted({index * (len(names) - 1) // max(num_shown - 1, 1) for index in range(num_shown)})
    lengths = f"{tokens[0]} tokens"
    if tokens[0] < tokens[-1]:
        lengths = f"{tokens[0]} to {tokens[-1]} tokens, {tokens[len(tokens) // 2]} in the middle"
    lines = [f"{_number(len(names), 'caption')} of {lengths}; none is cut off"]
    lines += [f"  {count:,} in {_number(chunk, 'chunk')}{' or more' if chunk == _MANY else ''}" for chunk, count in sorted(chunks.items())]
    lines += [f"  the longest: {', '.join(f'{names[row]} ({counts[row][0]} tokens)' for row in longest)}"]
    if broken:
        more = f" and {len(broken) - _MANY:,} more" if len(broken) > _MANY else ""
        lines += [f"  {len(broken):,} broken inside a tag or sentence, as no comma is near: {', '.join(broken[:_MANY])}{more}"]
    lines += ["for example:", *(f"  {names[row]} ({counts[row][0]} tokens): {_quoted(captions[row])}" for row in shown)]
    return "\n".join(lines) + "\n"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _quoted(caption: str) -> str:
    return f'"{printable(caption if len(caption) <= _MAX_SHOWN else f"{caption[: _MAX_SHOWN - 1]}…")}"'
