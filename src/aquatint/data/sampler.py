"""The order of the pictures, as a function of (seed, batch index).

Each bucket is an endless stream of laps: lap `i` of bucket `b` is a permutation of the bucket keyed by (seed, b, i).
Batch `k` of a bucket holds stream positions `[k * B, (k + 1) * B)`, whatever laps they fall in. Epoch `e` is made of
batches `floor(e * n / B) … floor((e + 1) * n / B) - 1` of every bucket with `n` pictures, in an order keyed by (seed, e).
So no picture is left out, no batch is short, and the only thing to save is one integer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from aquatint.utils.seeds import generator

Indices = np.ndarray[tuple[int], np.dtype[np.intp]]


def permutation(seed: int, stream: str, position: int, length: int) -> Indices:
    """The order of `length` random 64-bit words: unlike numpy's shuffle, the same in every version of numpy."""
    words = generator(seed, stream, position).bit_generator.random_raw(length)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Order:
    """Which samples each batch of the run holds. Raises ValueError for an empty bucket or a batch without samples.

    `counts` is the number of samples in a lap of each bucket (repeats included), `batch_size` the number in a batch.
    Any batch can be asked for at any time; asking in order is cheapest, for the last two laps of each bucket are remembered.
    """

    seed: int
    counts: tuple[int, ...]
    batch_size: int
    _memory: dict[tuple[str, int], tuple[int, Indices]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not self.counts or min(self.counts) < 1:
            raise ValueError(f"cannot order buckets of {self.counts} samples in batches of {self.batch_size}")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_memory": {}}

    def batch(self, index: int) -> tuple[int, tuple[int, ...]]:
        """The bucket of batch `index`, and the samples of that bucket (0-based) it holds."""
        epoch = self.epoch_of(index)
        first = self._batches_before(epoch)
        sizes = [end - start for start, end in zip(first, self._batches_before(epoch + 1), strict=True)]
        place = int(self._permutation("epoch", epoch, sum(sizes))[index - sum(first)])
        for bucket, size in enumerate(sizes):
            if place < size:
                return bucket, self._bucket_batch(bucket, first[bucket] + place)
            place -= size
        raise AssertionError("an epoch holds as many batches as its buckets together")

    def batches_before_epoch(self, epoch: int) -> int:
        """How many batches there are in epochs `0 … epoch - 1`; also the index of the first batch of the epoch."""
        return sum(self._batches_before(epoch))

    def epoch_of(self, batch_index: int) -> int:
        """The epoch that a batch belongs to, by bisection."""
        if batch_index < 0:
            raise ValueError(f"there is no batch {batch_index}")
        low, high = 0, (batch_index + len(self.counts)) * self.batch_size // sum(self.counts) + 1
        while high - low > 1:  # the epoch is at least `low` and below `high`
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before_epoch(middle) <= batch_index else (low, middle)
        return low

    def _batches_before(self, epoch: int) -> list[int]:
        return [epoch * count // self.batch_size for count in self.counts]

    def _bucket_batch(self, bucket: int, batch: int) -> tuple[int, ...]:
        start, count = batch * self.batch_size, self.counts[bucket]
        places = (divmod(position, count) for position in range(start, start + self.batch_size))
        return tuple(int(self._permutation(f"lap/{bucket}", lap, count)[place]) for lap, place in places)

    def _permutation(self, stream: str, number: int, length: int) -> Indices:
        slot = stream, number % 2
        if slot not in self._memory or self._memory[slot][0] != number:
            self._memory[slot] = number, permutation(self.seed, stream, number, length)
        return self._memory[slot][1]
