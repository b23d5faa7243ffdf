"""The order of the pictures, as a function of (seed, batch index).

Each bucket is an endless stream of laps, one for every epoch. Lap `e` takes members `floor(n e r) … floor(n (e + 1) r) - 1`
of an endless walk round each group of `n` pictures with `r` repeats, in the group's fixed random order: so after any number of
laps every picture has come floor(e r) or ceil(e r) times, whatever fraction `r` is. Within a lap the pictures are shuffled, once
for every time that all of them come, and groups are spread evenly among each other.

Batch `k` of a bucket holds stream positions `[k * B, (k + 1) * B)`, whatever laps they fall in. Epoch `e` is made of batches
`floor(N(e) / B) … floor(N(e + 1) / B) - 1` of every bucket with `N(e) = Σ floor(n e r)` samples before that epoch, in an order
keyed by (seed, e). So no picture is left out, no batch is short, and the only thing to save is one integer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aquatint.utils.seeds import generator

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.uint32]

_MOST_SAMPLES = 2**31  # in an epoch: what places of 31 bits can count, next to as many random ones in a word
_BLOCK = 1 << 20  # words that are worked on at once: a lap of a hundred million would otherwise need twice the memory


@dataclass(frozen=True, slots=True)
class Group:
    """`count` pictures of a bucket that come equally often: `repeats` times in an epoch, exactly so over many."""

    count: int
    repeats: Fraction | int = Fraction(1)

    def samples_before(self, epoch: int) -> int:
        """How many samples the group gives in epochs `0 … epoch - 1`."""
        return self.count * epoch * self.repeats.numerator // self.repeats.denominator


class _Epoch(NamedTuple):
    """An epoch's batches: those of bucket `b` have places `starts[b] … starts[b + 1] - 1`, and come in the order of `places`."""

    number: int
    first_batch: int
    starts: npt.NDArray[np.int64]
    places: Rows


class _Stretch(NamedTuple):
    """The rows of a bucket's batches in an epoch, and those after them that belong to the next batch."""

    epoch: int
    rows: Rows
    rest: Rows


@dataclass
class _Memory:
    epoch: _Epoch | None = None
    stretches: dict[int, _Stretch] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """Which samples each batch of the run holds.

    `buckets` are the groups of each bucket, whose rows are numbered group after group; `batch_size` is the number of samples
    in a batch. Raises ValueError for a bucket without pictures, repeats that are not above 0 or not exact, a batch without
    samples, or 2**31 samples in an epoch.

    Any batch can be asked for at any time. Asking in order is cheapest, for what the present epoch needs is remembered:
    four bytes for each of its samples, and for each of its batches. A pickled copy begins with nothing.
    """

    seed: int
    buckets: tuple[tuple[Group, ...], ...]
    batch_size: int
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if reason := self._why_impossible():
            raise ValueError(f"cannot order samples: {reason}")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_memory": _Memory()}

    @property
    def samples_per_epoch(self) -> Fraction:
        """The mean over many epochs; single ones have up to a batch more or less of each bucket."""
        return sum((Fraction(group.count * group.repeats) for groups in self.buckets for group in groups), Fraction(0))

    def batch(self, index: int) -> tuple[int, tuple[int, ...]]:
        """The bucket of batch `index`, and the rows of that bucket (0-based) it holds."""
        epoch = self._epoch_around(index)
        place = int(epoch.places[index - epoch.first_batch])
        bucket = int(np.searchsorted(epoch.starts, place, side="right")) - 1
        start = (place - int(epoch.starts[bucket])) * self.batch_size
        return bucket, tuple(self._rows_of(bucket, epoch.number)[start : start + self.batch_size].tolist())

    def batches_before_epoch(self, epoch: int) -> int:
        """How many batches there are in epochs `0 … epoch - 1`; also the index of the first batch of the epoch."""
        return sum(self._batches_before(epoch))

    def epoch_of(self, batch_index: int) -> int:
        """The epoch that a batch belongs to, by bisection between what the mean length allows."""
        if batch_index < 0:
            raise ValueError(f"there is no batch {batch_index}")
        slack = len(self.buckets) * self.batch_size + sum(map(len, self.buckets))  # samples that rounding down can take away
        low = batch_index * self.batch_size // self.samples_per_epoch
        high = (batch_index * self.batch_size + slack) // self.samples_per_epoch + 1
        return bisect_right(range(high), batch_index, low, high, key=self.batches_before_epoch) - 1

    def _why_impossible(self) -> str:
        groups = [group for bucket in self.buckets for group in bucket]
        if self.batch_size < 1:
            return f"a batch has {self.batch_size}"
        if not groups or not all(any(group.count for group in bucket) for bucket in self.buckets):
            return "there is no bucket, or one without pictures"
        if bad := [group for group in groups if group.count < 0 or not _is_exact(group.repeats)]:
            return f"{bad[0].count} pictures with {bad[0].repeats!r} repeats"
        return "" if self.samples_per_epoch < _MOST_SAMPLES else f"an epoch would have {int(self.samples_per_epoch):,}"

    def _samples_before(self, bucket: int, epoch: int) -> int:
        return sum(group.samples_before(epoch) for group in self.buckets[bucket])

    def _batches_before(self, epoch: int) -> list[int]:
        return [self._samples_before(bucket, epoch) // self.batch_size for bucket in range(len(self.buckets))]

    def _epoch_around(self, index: int) -> _Epoch:
        remembered = self._memory.epoch
        if remembered is None or not 0 <= index - remembered.first_batch < len(remembered.places):
            number = self.epoch_of(index)
            before, after = self._batches_before(number), self._batches_before(number + 1)
            starts = np.cumsum([0, *(end - start for start, end in zip(before, after, strict=True))])
            self._memory.epoch = remembered = None  # its memory goes before that of the next one comes
            places = permutation(self.seed, "epoch", number, int(starts[-1]))
            self._memory.epoch = remembered = _Epoch(number, sum(before), starts, places)
        return remembered

    def _rows_of(self, bucket: int, epoch: int) -> Rows:
        """The rows of all the bucket's batches in an epoch, one batch after the other."""
        remembered = self._memory.stretches.get(bucket)
        if remembered is None or remembered.epoch != epoch:
            rest = self._left_over(bucket, epoch)
            self._memory.stretches.pop(bucket, None)
            del remembered
            rows = np.concatenate([rest, lap(self.seed, bucket, self.buckets[bucket], epoch)])
            whole = len(rows) // self.batch_size * self.batch_size
            self._memory.stretches[bucket] = remembered = _Stretch(epoch, rows[:whole], rows[whole:].copy())
        return remembered.rows

    def _left_over(self, bucket: int, epoch: int) -> Rows:
        """The last rows before an epoch that filled no batch: fewer than a batch, of as many laps as it takes."""
        remembered = self._memory.stretches.get(bucket)
        if remembered is not None and remembered.epoch == epoch - 1:
            return remembered.rest
        parts = [np.zeros(0, dtype=np.uint32)]
        missing = self._samples_before(bucket, epoch) % self.batch_size
        while missing:
            samples = self._samples_before(bucket, epoch)
            epoch = bisect_left(range(epoch), samples, 0, epoch, key=lambda number: self._samples_before(bucket, number)) - 1
            parts.append(lap(self.seed, bucket, self.buckets[bucket], epoch)[-missing:])
            missing -= len(parts[-1])
        return np.concatenate(parts[::-1])


def lap(seed: int, bucket: int, groups: Sequence[Group], number: int) -> Rows:
    """The rows of a bucket's lap, in the order in which they come."""
    first_rows = accumulate((group.count for group in groups), initial=0)
    parts = [_members(seed, f"{bucket}/{index}", group, number) for index, group in enumerate(groups)]
    for part, first_row in zip(parts, first_rows, strict=False):
        part += first_row
    parts = [part for part in parts if len(part)]
    if len(parts) < 2:
        return parts[0] if parts else np.zeros(0, dtype=np.uint32)
    order = _spread(seed, f"merge/{bucket}", number, [len(part) for part in parts])
    return np.concatenate(parts)[order]


def permutation(seed: int, stream: str, position: int, length: int, *, round_length: int | None = None) -> Rows:
    """The numbers below `length` in random order; with `round_length`, the first so many of them come before the next, and so on.

    It is the order of random 64-bit words whose low bits are their places. No two are alike, so that any way of sorting
    them, in any version of numpy, gives the same; and sorting words is ten times as fast as sorting places by words.
    """
    words = _random_words(seed, stream, position, length)
    if round_length is not None and round_length < length:
        bits = ((length - 1) // round_length).bit_length()
        for block, places in _blocks(words):
            block >>= bits
            block |= places // round_length << (64 - bits)
    return _places_in_order(words)


def _members(seed: int, name: str, group: Group, number: int) -> Rows:
    """What a group gives to a lap, by member."""
    start, end = group.samples_before(number), group.samples_before(number + 1)
    if start == end:
        return np.zeros(0, dtype=np.uint32)
    steps = permutation(seed, f"lap/{name}", number, end - start, round_length=group.count)
    steps += start % group.count
    steps %= group.count
    if group.repeats.denominator == 1:
        return steps  # of the whole group: where its walk begins makes no difference
    return permutation(seed, f"walk/{name}", 0, group.count)[steps]


def _spread(seed: int, stream: str, position: int, lengths: Sequence[int]) -> Rows:
    """An order in which several sequences, one after the other, become one with each spread evenly, and still in its own order.

    Element `j` of a sequence lies at a random point of the `j`-th of `length` equal parts of the whole.
    """
    words = _random_words(seed, stream, position, sum(lengths))
    bits = _bits(len(words))
    start = 0
    for length in lengths:
        for block, places in _blocks(words[start : start + length]):
            block >>= bits
            block |= places << (64 - bits)
            block //= length
            block <<= bits
        start += length
    return _places_in_order(words)


def _places_in_order(words: Words) -> Rows:
    """Where each word stood before the words were sorted, by all but their low bits. Sorts them in place."""
    bits = _bits(len(words))
    for block, places in _blocks(words):
        block >>= bits
        block <<= bits
        block |= places
    words.sort()
    words &= (1 << bits) - 1
    return words.astype(np.uint32)


def _random_words(seed: int, stream: str, position: int, length: int) -> Words:
    words: Words = generator(seed, stream, position).bit_generator.random_raw(length)
    return words


def _blocks(words: Words) -> Iterator[tuple[Words, Words]]:
    """Views of some words at a time, with their places."""
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        yield block, np.arange(start, start + len(block), dtype=np.uint64)


def _bits(length: int) -> int:
    """How many bits a place below `length` takes."""
    return max(length - 1, 0).bit_length()


def _is_exact(repeats: object) -> bool:
    return isinstance(repeats, int | Fraction) and repeats > 0
