"""Which shapes of a set to use, when every bucket must be filled: exact, by dynamic programming.

The problem. Choose a subset of the shapes. Every picture goes to the cheapest shape of the subset. Every shape in use must
get samples worth `min_count` or more; a subset of one shape is always allowed. The total cost over all samples is to be least.

Why it can be solved. What a picture pays in shape q is a cone over the aspects, |x - x_q| + price_q, and all cones are
equally steep. If a cone touches the lower envelope of some cones at all, it does so in one interval around its own tip, and
that interval is bounded by its two neighbours in the envelope alone. A shape that does not touch it gets no picture, so it
cannot be filled. Every allowed subset is therefore a chain, sorted by aspect, in which the pictures of a shape q between its
neighbours p and r are those of aspects in (border(p, q), border(q, r)], and the cost is a sum over such triples. With

    best(q, r) = the least cost of all pictures up to border(q, r), if q and r are neighbours
               = cost_q(.., border(q, r)] - or, over p, min best(p, q) + cost_q(border(p, q), border(q, r)]

over those p with enough samples in between, the best chain is found in m^2 log m steps for m shapes. For each q the p are
sorted by the samples before their border, and a running minimum answers all r at once.

The pictures enter as sums between borders only: one pass over any number of them, and nothing is rounded to a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from aquatint.data.bucket_sets import BucketSet, Floats, Ints


@dataclass(frozen=True)
class Tally:
    """How many samples have aspects up to each of `edges` (k,), and the sum of their positions: (k + 1,), the last are all of them."""

    edges: Floats
    samples: Floats
    sums: Floats

    @classmethod
    def of(cls, bucket_set: BucketSet, edges: Floats, portions: Iterable[tuple[Floats, Floats]]) -> Tally:
        """Counts portions of (aspects, samples), both (n,)."""
        samples, sums = np.zeros(len(edges) + 1), np.zeros(len(edges) + 1)
        for aspects, counts in portions:
            order = np.argsort(aspects)  # neighbours are found near one another: four times as fast as in any order
            aspects, counts = aspects[order], counts[order]
            places = np.searchsorted(edges, aspects)
            samples += np.bincount(places, counts, len(samples))
            sums += np.bincount(places, counts * bucket_set.position_of(aspects), len(sums))
        return cls(edges, np.cumsum(samples), np.cumsum(sums))


def choose(bucket_set: BucketSet, min_count: float, portions: Callable[[], Iterable[tuple[Floats, Floats]]]) -> Ints:
    """The shapes to use, as ascending indices. `portions` gives all pictures as (aspects, samples); it is called once or twice."""
    members, borders = bucket_set.cells
    inside = np.diff(Tally.of(bucket_set, borders, portions()).samples, prepend=0.0)
    if (inside[inside > 0] >= min_count).all():
        return members[inside > 0]  # every picture in its cheapest shape: nothing costs less
    own = bucket_set.aspect_at(bucket_set.positions)
    edges = np.unique(np.concatenate([own, bucket_set.borders[np.isfinite(bucket_set.borders)]]))
    return best_chain(bucket_set, Tally.of(bucket_set, edges, portions()), min_count)


def best_chain(bucket_set: BucketSet, tally: Tally, min_count: float) -> Ints:
    """The best subset, as ascending indices. The tally's edges are the borders between the shapes and their own aspects."""
    count, end = len(bucket_set), len(tally.edges)
    places = np.where(np.isfinite(bucket_set.borders), np.searchsorted(tally.edges, bucket_set.borders), -1)
    costs = _Costs(bucket_set, tally)
    best = np.full((count, count), np.inf)
    before = np.full((count, count), -1)  # the neighbour p of q, for each q and r; -1 where q is the first
    last, least, left = -1, np.inf, -1  # the best end of a chain: its last shape, the total cost, and the shape before it
    for q in range(count):
        p = np.flatnonzero(best[:q, q] < np.inf)
        ways = _Ways(p, best[p, q] - costs.up_to(q, places[p, q]), tally.samples[places[p, q]])
        r = q + 1 + np.flatnonzero(places[q, q + 1 :] >= 0)
        cost, neighbour = ways.cheapest(tally.samples[places[q, r]] - min_count)
        best[q, r], before[q, r] = cost + costs.up_to(q, places[q, r]), neighbour
        total, previous = ways.cheapest(tally.samples[[end]] - min_count)
        alone = costs.up_to(q, np.array([end]))[0]
        for value, shape in ((alone, -1), (total[0] + alone, int(previous[0]))):
            if value < least:
                last, least, left = q, value, shape
    return _walk_back(before, last, left)


class _Ways:
    """How a chain can reach shape q: for each neighbour before it, the cost less what q would have cost until the border.

    Or with nothing before it, which costs nothing.
    """

    def __init__(self, neighbours: Ints, costs: Floats, samples_before: Floats) -> None:
        order = np.argsort(samples_before, kind="stable")
        self._neighbours = np.concatenate([[-1], neighbours[order]])
        self._samples = np.concatenate([[0.0], samples_before[order]])
        costs = np.concatenate([[0.0], costs[order]])
        self._costs = np.minimum.accumulate(costs)
        self._best = np.maximum.accumulate(np.where(costs <= self._costs, np.arange(len(costs)), 0))

    def cheapest(self, most_before: Floats) -> tuple[Floats, Ints]:
        """The least costs and their neighbours, with at most so many samples (k,) before the border; infinite where there is none."""
        places = np.searchsorted(self._samples, most_before, side="right") - 1
        return np.where(places >= 0, self._costs[places], np.inf), np.where(places >= 0, self._neighbours[self._best[places]], -1)


class _Costs:
    """What all pictures up to an edge would pay in one shape."""

    def __init__(self, bucket_set: BucketSet, tally: Tally) -> None:
        self._set, self._tally = bucket_set, tally
        self._own = np.searchsorted(tally.edges, bucket_set.aspect_at(bucket_set.positions))

    def up_to(self, shape: int, places: Ints) -> Floats:
        position, price = self._set.positions[shape], self._set.prices[shape]
        samples, sums = self._tally.samples, self._tally.sums
        inner = np.minimum(places, self._own[shape])  # up to there the distance is position - x, and from there on x - position
        below = position * samples[inner] - sums[inner]
        beyond = sums[places] - sums[inner] - position * (samples[places] - samples[inner])
        total: Floats = below + beyond + price * samples[places]
        return total


def _walk_back(before: Ints, last: int, left: int) -> Ints:
    """The chain that ends in shapes `left` and `last`."""
    chain = [last]
    while left >= 0:
        chain.append(left)
        left = int(before[left, chain[-2]])
    return np.array(chain[::-1], dtype=np.int64)
