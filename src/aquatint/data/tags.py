"""Tags of a data set: how frequent each is, how much a picture weighs in the loss for that, and how often a tag is dropped.

Captions become columns of numbers once, and the rest is arithmetic on these. Tags are compared by `tag_key`, and named by
it here. A tag that a caption repeats counts once.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aquatint.data.caption_text import printable, tag_key
from aquatint.data.captions import any_of_patterns

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

# Tags that tell how many are in the picture, how good it is or where it comes from, but not what is to be seen.
IGNORED = (
    "solo", "solo focus", "no humans", "multiple girls", "multiple boys", "multiple others",
    "1girl", "2girls", "3girls", "4girls", "5girls", "6+girls", "1boy", "2boys", "3boys", "4boys", "5boys", "6+boys",
    "1other", "2others", "3others", "4others", "5others", "6+others",
    "highres", "absurdres", "incredibly absurdres", "lowres", "masterpiece", "* quality", "aesthetic", "very aesthetic",
    "score *", "rating:*", "source:*", "newest", "recent", "mid", "early", "oldest", "year *",
    "commentary", "* commentary", "* request", "commission", "translated", "bad id", "bad * id", "md5 mismatch", "revision", "tagme",
)  # fmt: skip


@dataclass(frozen=True)
class TagTable:
    """Which tags each caption has: entries `starts[row] … starts[row + 1] - 1` of `ids` are places in `tags`, each once."""

    tags: tuple[str, ...]  # T
    ids: Int32s
    starts: Int64s  # (n + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def counts(self) -> Int64s:
        """How many captions have each tag, (T,)."""
        return np.bincount(self.ids, minlength=len(self.tags)).astype(np.int64)


class _Ids(dict[str, int]):
    """Parts of captions, blanks and all, to tags: each is looked at once. 0 is no tag."""

    def __init__(self) -> None:
        self.tags = {"": 0}

    def __missing__(self, part: str) -> int:
        self[part] = found = self.tags.setdefault(tag_key(part.strip()), len(self.tags))
        return found


def read_tags(captions: Iterable[str], separator: str, *, keep_separator: str = "") -> TagTable:
    """The tags of one caption per picture. The mark `keep_separator` separates tags too."""
    number_of = _Ids()
    ids, ends = array("i"), array("q", [0])
    for caption in captions:
        if keep_separator:
            caption = caption.replace(keep_separator, separator)
        if "\n" in caption:
            caption = caption.replace("\n", separator)
        found = set(map(number_of.__getitem__, caption.split(separator)))
        found.discard(0)
        ids.extend(found)
        ends.append(len(ids))
    return TagTable(tuple(number_of.tags)[1:], np.array(ids, dtype=np.int32) - np.int32(1), np.array(ends, dtype=np.int64))


def count_tags(captions: Iterable[str], separator: str, *, keep_separator: str = "") -> Counter[str]:
    """In how many captions each tag is."""
    table = read_tags(captions, separator, keep_separator=keep_separator)
    return Counter(dict(zip(table.tags, table.counts.tolist(), strict=True)))


def tag_weights(
    counts: npt.NDArray[np.integer], *, middle: float, power: float = 0.5, lowest: float = 0.5, highest: float = 2.0
) -> Float64s:
    """What tags in so many captions weigh: (middle / count)^power, at least `lowest` and at most `highest`. Shape (T,), like `counts`."""
    weights: Float64s = np.clip((middle / np.maximum(counts, 1)) ** power, lowest, highest)
    return weights


def middle_count(counts: npt.NDArray[np.integer]) -> float:
    """The count that a tag picked from a caption at random has or exceeds half of the time; 1 without tags.

    Half of all tags in captions are of rarer ones. The median over the different tags would be 1 or 2 in most large data
    sets, which have a long tail of tags used once, and would give nearly every other tag the lowest weight.
    """
    ordered = np.sort(counts)
    below = np.cumsum(ordered)
    return float(ordered[np.searchsorted(below, below[-1] / 2)]) if len(ordered) and below[-1] else 1.0


def picture_weights(
    table: TagTable,
    repeats: Sequence[float] | Float64s,
    *,
    power: float = 0.5,
    lowest: float = 0.5,
    highest: float = 2.0,
    ignore: Sequence[str] = IGNORED,
) -> Float64s:
    """Loss weights (n,) of pictures that are shown `repeats` (n,) times each; their mean over what is shown is 1.

    A picture weighs the geometric mean of its tags' weights, leaving out those that `ignore` (names, and patterns with
    `*`) says nothing is to be learnt from; one without others weighs 1, before the mean is set to 1. Frequencies are those in the
    data set, without the repeats: who repeats a picture wants it to count more.
    """
    counts_in = ~_matching(table.tags, ignore)
    logs = np.zeros(len(table.tags))
    counts = table.counts[counts_in]
    logs[counts_in] = np.log(tag_weights(counts, middle=middle_count(counts), power=power, lowest=lowest, highest=highest))
    sums, lengths = _row_sums(table, logs), _row_sums(table, counts_in.astype(np.float64))
    weights = np.exp(sums / np.maximum(lengths, 1.0))
    return np.asarray(weights / np.average(weights, weights=np.asarray(repeats, dtype=np.float64)))


def drop_probs(table: TagTable, prob: float, *, power: float = 0.5, lowest: float = 0.5, highest: float = 2.0) -> dict[str, float]:
    """The probability that a tag is dropped, such that `prob` of all tags in captions are, common ones more often than rare ones.

    It is min(1, c / w), with w the tag's weight as in `tag_weights`: by default, the most frequent tags are dropped four
    times as often as the rarest. c is found so that the mean over all tags of all captions is `prob`.
    """
    counts = table.counts
    if not len(counts):
        return {}
    rates = 1.0 / tag_weights(counts, middle=middle_count(counts), power=power, lowest=lowest, highest=highest)
    probs = np.minimum(_scale(rates, counts, prob) * rates, 1.0)
    return dict(zip(table.tags, probs.tolist(), strict=True))


def _scale(rates: Float64s, counts: Int64s, mean: float) -> float:
    """The c for which min(1, c * rates), averaged with the counts as weights, is `mean`.

    With the k highest rates at 1, c follows from the others; k is the first for which none of these exceeds 1.
    """
    order = np.argsort(-rates, kind="stable")
    rates, shares = rates[order], counts[order] / counts.sum()
    at_one = np.cumsum(shares) - shares
    rest = np.cumsum((shares * rates)[::-1])[::-1]
    scales = (mean - at_one) / rest
    return float(scales[np.argmax(scales * rates <= 1.0 + 1e-9)])


def _row_sums(table: TagTable, values: Float64s) -> Float64s:
    """The sum of `values` (T,) over each caption's tags, (n,)."""
    sums = np.zeros(len(table))
    filled = np.diff(table.starts) > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values[table.ids], table.starts[:-1][filled])
    return sums


def _matching(tags: Sequence[str], patterns: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which tags are among the patterns, (T,)."""
    if not patterns:
        return np.zeros(len(tags), dtype=np.bool_)
    matches = any_of_patterns(patterns).fullmatch
    return np.fromiter((matches(tag) is not None for tag in tags), dtype=np.bool_, count=len(tags))


def frequency_text(counter: Counter[str], top: int = 20) -> str:
    """For people: how many tags there are, and the most frequent ones with their counts."""
    once = sum(1 for count in counter.values() if count == 1)
    lines = [f"{counter.total():,} tags, {len(counter):,} different ones, {once:,} of them used once"]
    ordered = sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))[:top]
    return "\n".join(lines + [f"{count:>11,}  {printable(tag)}" for tag, count in ordered]) + "\n"
