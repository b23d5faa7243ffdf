"""What is left to make in a shard folder, cut into jobs: a job is one shard to be.

A job is made of the requests of one shape, in the order they were given in, and what comes out of it depends on nothing
else. So shards are the same byte for byte whoever makes them, in whatever order, and however often that was broken off:
what was finished are whole jobs, and without them the rest is cut at the same places. (Pictures that turn out to be
unusable are the exception: leaving them out from the start moves the cuts behind them.)
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from aquatint.data.claims import Claim, remove_abandoned, try_claim
from aquatint.data.shards import ShardStore

CLAIMS = "claims"  # the folder, inside that of the shards
_POLL_SECONDS = 0.2

OnProgress = Callable[[int, int], None]
OnFailure = Callable[[bytes, str], None]
Item = TypeVar("Item")
Failures = Sequence[tuple[bytes, str]]


class Request(Protocol):
    """Something that shall be in the cache under `key`. Requests of one `shape` may share a shard.

    `subject` is what is to blame if it cannot be made: the digest of a picture, say.
    """

    @property
    def key(self) -> bytes: ...

    @property
    def subject(self) -> bytes: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Job:
    """The requests of one shard to be."""

    requests: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.requests)

    @cached_property
    def digest(self) -> str:
        """Of its keys: the same work has the same name in every process. 32 hex digits."""
        return hashlib.blake2b(b"".join(request.key for request in self.requests), digest_size=16).hexdigest()


def plan_jobs(requests: Iterable[Request], shard_entries: int) -> tuple[Job, ...]:
    """Jobs of `shard_entries` requests of one shape, the last of a shape shorter; each key once, the largest shapes first."""
    by_shape: dict[tuple[int, ...], list[Request]] = {}
    for request in {request.key: request for request in requests}.values():
        by_shape.setdefault(request.shape, []).append(request)
    shapes = sorted(by_shape, key=lambda shape: (-prod(shape), shape))  # what does not fit into memory shall fail at once, not after hours
    return tuple(Job(tuple(part)) for shape in shapes for part in batched(by_shape[shape], shard_entries))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def missing(store: ShardStore, requests: Iterable[Request]) -> list[Any]:
    """The requests that have no entry, each key once."""
    wanted = list({request.key: request for request in requests}.values())
    there = store.has(np.frombuffer(b"".join(request.key for request in wanted), dtype=np.uint8).reshape(-1, 16))
    return [wanted[index] for index in np.flatnonzero(~there)]


class Todo:
    """The jobs that are left, handed out one by one, and how far they are. A context manager.

    A job is claimed when it is handed out, so that processes that fill one folder share the jobs out. `failures` tells
    why something was left out, by subject; `on_failure` gets each as soon as it is known, `on_progress` how many of the
    entries that were missing are done (made here or elsewhere, or found to be impossible), and how many there were.
    """

    def __init__(
        self,
        store: ShardStore,
        requests: Iterable[Request],
        shard_entries: int,
        *,
        on_progress: OnProgress = lambda done, total: None,
        on_failure: OnFailure = lambda subject, reason: None,
    ) -> None:
        left = missing(store, requests)
        self.total = len(left)
        self.failures: dict[bytes, str] = {}
        self._store, self._shard_entries = store, shard_entries
        self._on_progress, self._on_failure = on_progress, on_failure
        self._jobs = deque(plan_jobs(left, shard_entries))
        self._elsewhere: list[Job] = []  # claimed by other processes, when last looked at
        self._claims: dict[str, tuple[Claim, Job]] = {}  # the jobs that are handed out
        self._rows: dict[str, int] = {}  # how many requests of each of them are done
        self._finished = 0

    def __enter__(self) -> Todo:
        remove_abandoned(self._folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._claims:
            self._claims.popitem()[1][0].release()

    @property
    def num_jobs(self) -> int:
        """How many jobs are not handed out, some of which other processes may be at."""
        return len(self._jobs) + len(self._elsewhere)

    def take(self, *, wait: bool) -> Job | None:
        """A job that nobody else is at, or None if there is none; with `wait`, only once all that others are at is done."""
        told = False
        while (job := self._next()) is None and self._elsewhere and wait:
            if not told:
                logging.getLogger("aquatint").info("waiting for another process, which makes the rest of %s", self._store.folder)
            told = True
            time.sleep(_POLL_SECONDS)
        return job

    def advance(self, job: Job, rows: int, failures: Failures) -> None:
        """Counts further requests of a job, of which some may have failed: (subject, reason)."""
        self._rows[job.digest] = self._rows.get(job.digest, 0) + rows
        for subject, reason in failures:
            if subject not in self.failures:
                self.failures[subject] = reason
                self._on_failure(subject, reason)
        self._report()

    def finish(self, job: Job) -> None:
        """The job's shard is published."""
        self._finished += len(job)
        self._release(job)

    def give_back(self, job: Job) -> None:
        """The job could not be done: somebody else shall do it."""
        self._release(job)
        self._jobs.appendleft(job)

    @property
    def _folder(self) -> Path:
        return self._store.folder / CLAIMS

    def _next(self) -> Job | None:
        self._jobs.extend(self._elsewhere)
        self._elsewhere.clear()
        while self._jobs:
            job = self._jobs.popleft()
            claim = try_claim(self._folder / f"{job.digest}.lock")
            if claim is None:
                self._elsewhere.append(job)
                continue
            self._claims[job.digest] = claim, job
            self._store.refresh()
            left = [request for request in job.requests if request.key not in self._store]
            if len(left) == len(job):
                return job
            self._release(job)
            self._finished += len(job) - len(left)
            self._report()
            if left:
                self._follow(job, left)
        return None

    def _follow(self, job: Job, left: Sequence[Request]) -> None:
        """Goes on as another process does that has made a part of a job, or both would do everything."""
        made = next(request.key for request in job.requests if request.key in self._store)
        location = self._store.index.find(made)
        if location is not None and location.layout.num_entries == len(job) - len(left):  # the job, and what is left was impossible there
            self._jobs.append(Job(tuple(left)))
        else:  # its jobs are cut at other places: it may have left out some picture from the start
            self._plan_anew(left)

    def _plan_anew(self, left: Sequence[Request]) -> None:
        """Cuts all that is left anew, without what has turned out to be impossible."""
        others = chain.from_iterable(job.requests for job in (*self._jobs, *self._elsewhere))
        requests = missing(self._store, [request for request in (*left, *others) if request.subject not in self.failures])
        self._jobs, self._elsewhere = deque(plan_jobs(requests, self._shard_entries)), []
        self._finished = self.total - len(requests) - sum(len(job) for _, job in self._claims.values())

    def _release(self, job: Job) -> None:
        self._claims.pop(job.digest)[0].release()
        self._rows.pop(job.digest, None)

    def _report(self) -> None:
        self._on_progress(self._finished + sum(self._rows.values()), self.total)
