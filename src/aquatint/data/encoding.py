"""Jobs worked off: prepared in threads ahead of the encoder, encoded in fixed batches, published in the background.

The encoder's thread does nothing but encode. Threads decode pictures and turn them into numbers, across the borders of
batches and of jobs; another one writes shards. In memory are, besides the batch in the encoder: prepared rows, at most two
batches and one for each thread (and the rest of a batch or of a picture's views); what each thread is decoding; and the
entries of at most three jobs.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from aquatint.data.image import quiet_decoders
from aquatint.data.jobs import Failures, Job
from aquatint.data.shards import ShardStore
from aquatint.errors import StorageError

_MAX_THREADS = 8
_MAX_UNPUBLISHED = 2  # jobs that are encoded and not yet written

Entry = Mapping[str, torch.Tensor]


class Work(Protocol):
    """What is done with the requests of jobs. Picklable: each process that encodes has one."""

    @property
    def batch_size(self) -> int: ...

    @property
    def not_finite(self) -> str:
        """Why something is left out whose entry is not finite."""
        ...

    def build_encoder(self) -> Any:
        """What `encode` needs. If it has an encoder `precise`, that one gets what has no finite entry otherwise."""
        ...

    def together(self, requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """The same requests, cut into neighbours that are prepared together."""
        ...

    def room(self, requests: Sequence[Any]) -> Any:
        """Rows to be filled for a batch."""
        ...

    def prepare(self, requests: Sequence[Any], rows: Sequence[Any]) -> str | None:
        """Fills the row of each request; if that cannot be done, says why. Called in threads. Raises StorageError."""
        ...

    def encode(self, encoder: Any, rows: Any, which: Sequence[int]) -> list[Entry]:
        """The entries of some rows of a batch."""
        ...


class Jobs(Protocol):
    """Where jobs come from, and who is told how far they are: see `jobs.Todo`."""

    def take(self, *, wait: bool) -> Job | None: ...

    def advance(self, job: Job, rows: int, failures: Failures) -> None: ...

    def finish(self, job: Job) -> None: ...


def work_off(jobs: Jobs, work: Work, folder: Path, *, num_threads: int | None = None) -> None:
    """Does jobs until there are none, into the shards of `folder`. Raises AquatintError; finished jobs are kept then."""
    encoder: Any = None
    entries: dict[bytes, Entry] = {}
    with _Publisher(folder, jobs) as publisher:

        def take(*, wait: bool) -> Job | None:
            if wait:  # others may wait for what is not yet known to be finished, while we wait for them
                publisher.drain()
            return jobs.take(wait=wait)

        with preparing(work, take, num_threads) as batches:
            for batch in batches:
                encoder = work.build_encoder() if encoder is None else encoder
                made, failures = encode_batch(work, encoder, batch)
                entries |= made
                jobs.advance(batch.job, len(batch.requests), failures)
                if batch.is_last:
                    publisher.publish(batch.job, entries)
                    entries = {}


def encode_job(job: Job, work: Work, encoder: Any, *, num_threads: int | None = None) -> tuple[dict[bytes, Entry], list[tuple[bytes, str]]]:
    """The entries of a job by key, and why others are left out: (subject, reason). A function of the job alone."""
    entries: dict[bytes, Entry] = {}
    failures: list[tuple[bytes, str]] = []
    rest = [job]
    with preparing(work, lambda *, wait: rest.pop() if rest else None, num_threads) as batches:
        for batch in batches:
            made, failed = encode_batch(work, encoder, batch)
            entries |= made
            failures += failed
    return entries, failures


# Preparing


@dataclass
class Batch:
    """Neighbours in a job. `reasons` tells of each row, once it is prepared, why it cannot be used, or None."""

    job: Job
    requests: Sequence[Any]
    rows: Any
    is_last: bool
    reasons: list[Future[str | None]] = field(default_factory=list)


class _Take(Protocol):
    def __call__(self, *, wait: bool) -> Job | None: ...


@contextlib.contextmanager
def preparing(work: Work, take: _Take, num_threads: int | None = None) -> Iterator[Iterator[Batch]]:
    """Batches of the jobs that are taken, in order, with threads at work on those to come."""
    num_threads = num_threads or default_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")
    try:
        with quiet_decoders():
            yield _ahead(work, take, pool, 2 * work.batch_size + num_threads)
    finally:
        pool.shutdown(cancel_futures=True)


def default_threads() -> int:
    return min(_MAX_THREADS, os.cpu_count() or 1)


def _ahead(work: Work, take: _Take, pool: ThreadPoolExecutor, max_rows: int) -> Iterator[Batch]:
    waiting: deque[Batch] = deque()
    coming: Iterator[Batch] = iter(())
    while True:
        while sum(len(batch.requests) for batch in waiting) < max_rows:
            batch = next(coming, None)
            if batch is not None:
                waiting.append(batch)
                continue
            job = take(wait=not waiting)
            if job is None:
                break
            coming = _submit(job, work, pool)
        if not waiting:
            return
        yield waiting.popleft()


def _submit(job: Job, work: Work, pool: ThreadPoolExecutor) -> Iterator[Batch]:
    """The job's batches, each once all of it is submitted. What is prepared together may lie in several."""
    size = work.batch_size
    unfilled: deque[Batch] = deque()
    begun = 0
    for group in work.together(job.requests):
        rows = []
        for _ in group:
            if begun % size == 0:
                requests = job.requests[begun : begun + size]
                unfilled.append(Batch(job, requests, work.room(requests), is_last=begun + size >= len(job)))
            rows.append((unfilled[-1], begun % size))
            begun += 1
        future = pool.submit(work.prepare, group, [batch.rows[row] for batch, row in rows])
        for batch, _ in rows:
            batch.reasons.append(future)
        while unfilled and len(unfilled[0].reasons) == len(unfilled[0].requests):
            yield unfilled.popleft()


# Encoding


def encode_batch(work: Work, encoder: Any, batch: Batch) -> tuple[dict[bytes, Entry], list[tuple[bytes, str]]]:
    """The entries of a batch by key, and why others are left out: (subject, reason)."""
    reasons = [future.result() for future in batch.reasons]
    which = [row for row, reason in enumerate(reasons) if reason is None]
    made = {}
    for row, entry in zip(which, work.encode(encoder, batch.rows, which) if which else [], strict=True):
        if not is_finite(entry):
            (entry,) = work.encode(getattr(encoder, "precise", None) or encoder, batch.rows, [row])
        if is_finite(entry):
            made[batch.requests[row].key] = entry
        else:
            reasons[row] = work.not_finite
    return made, [(request.subject, reason) for request, reason in zip(batch.requests, reasons, strict=True) if reason is not None]


def is_finite(entry: Entry) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in entry.values())


# Publishing


class _Publisher:
    """Writes shards behind the encoder's back. A context manager; on the way out it waits for those that are being written."""

    def __init__(self, folder: Path, jobs: Jobs) -> None:
        self._store, self._jobs = ShardStore(folder), jobs
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._writing: deque[tuple[Job, Future[str | None]]] = deque()

    def __enter__(self) -> _Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with contextlib.suppress(StorageError) if kind else contextlib.nullcontext():  # what went wrong first is the news
                self.drain()
        finally:
            self._writer.shutdown()

    def publish(self, job: Job, entries: Mapping[bytes, Entry]) -> None:
        """Has a job's shard written. Raises StorageError for one before it."""
        while self._writing and (len(self._writing) >= _MAX_UNPUBLISHED or self._writing[0][1].done()):
            self._settle()
        self._writing.append((job, self._writer.submit(self._store.write, entries)))

    def drain(self) -> None:
        """Waits until all is written. Raises StorageError."""
        while self._writing:
            self._settle()

    def _settle(self) -> None:
        job, writing = self._writing.popleft()
        writing.result()
        self._jobs.finish(job)
