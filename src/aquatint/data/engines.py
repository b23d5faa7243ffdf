"""Who encodes what is missing: this process, several on this machine, or Ray tasks on a cluster.

All make the same shards. Jobs are handed out and claimed by the process that runs the engine; a job whose worker dies is
handed out again. A worker writes its shards itself, so a cluster needs one folder that all its machines see.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from aquatint.data.encoding import Work, default_threads, encode_job, work_off
from aquatint.data.jobs import Failures, Job, Todo
from aquatint.data.shards import ShardStore
from aquatint.errors import AquatintError, UsageError, full_memory

MAX_ATTEMPTS = 3  # at a job, if its worker dies
_JOBS_PER_WORKER = 2  # one at work, and one to be prepared meanwhile
_RAY_STORE_BYTES = 128 << 20  # by default Ray takes a third of the memory; what passes through it here are jobs and reasons
_FAREWELL_SECONDS = 5.0  # a worker that was told to stop does so at its next batch
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # they reach the whole group; it decides what they mean
_SHORT_OF_MEMORY = "lower cache.workers or cache.batch_size, then run the same command again; what was encoded is kept"

Name = Literal["local", "processes", "ray"]


class Engine(Protocol):
    """Does all jobs of `todo`, into the shards of `folder`. Raises AquatintError; finished jobs are kept then."""

    def run(self, todo: Todo, work: Work, folder: Path) -> None: ...


def choose_engine(name: Name, workers: int, *, gpus: bool = False) -> Engine:
    """The engine that a config names. With `gpus`, each Ray task has one; processes share them out in any case."""
    engines: dict[Name, Engine] = {"local": Local(), "processes": Processes(workers), "ray": Ray(workers, 1.0 if gpus else 0.0)}
    return engines[name]


@dataclass(frozen=True)
class Local:
    """This process."""

    num_threads: int | None = None

    def run(self, todo: Todo, work: Work, folder: Path) -> None:
        work_off(todo, work, folder, num_threads=self.num_threads)


@dataclass(frozen=True)
class Processes:
    """Processes of their own on this machine; each has one of the GPUs, in turns, and makes its own encoder."""

    workers: int

    def run(self, todo: Todo, work: Work, folder: Path) -> None:
        crew = _Crew(self.workers, work, folder)
        try:
            while crew.feed(todo):
                crew.listen(todo)
        finally:
            crew.stop()


@dataclass(frozen=True)
class Ray:
    """Ray tasks, `workers` at once: on the cluster at RAY_ADDRESS if that is set, or on this machine."""

    workers: int
    gpus_per_task: float = 0.0

    def run(self, todo: Todo, work: Work, folder: Path) -> None:
        ray = _import_ray()
        with _ray_session(ray, self.workers):
            encode = ray.remote(num_cpus=1, num_gpus=self.gpus_per_task, max_retries=MAX_ATTEMPTS)(_encode_and_publish)
            tools = ray.put(_Tools(uuid.uuid4().hex, work, folder))
            flying: dict[Any, Job] = {}
            try:
                while True:
                    while len(flying) < self.workers and (job := todo.take(wait=not flying)) is not None:
                        flying[encode.remote(tools, job)] = job
                    if not flying:
                        return
                    for done in ray.wait(list(flying), timeout=1.0)[0]:
                        _collect(ray, done, flying.pop(done), todo)
            finally:
                for task in flying:
                    with contextlib.suppress(Exception):  # it may have ended in any way by now
                        ray.cancel(task, force=True)


# How errors cross processes


@dataclass(frozen=True)
class Failure:
    """An error on its way out of a worker: an AquatintError itself cannot be pickled."""

    kind: type[AquatintError]
    message: str
    hint: str
    trace: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        if isinstance(error, AquatintError):
            return cls(type(error), error.message, error.hint)
        trace = "".join(traceback.format_exception(error))
        if full_memory(error) is not None:
            return cls(AquatintError, "a process that encodes has run out of memory", _SHORT_OF_MEMORY, trace)
        message = f"a process that encodes has failed: {type(error).__name__}: {error}"
        return cls(AquatintError, message, "this is a mistake in aquatint: please report it, with the log", trace)

    def error(self) -> AquatintError:
        error = self.kind(self.message, hint=self.hint)
        error.__cause__ = RuntimeError(f"in the worker:\n{self.trace}") if self.trace else None
        return error


def how_it_ended(exit_code: int | None) -> str:
    """A process's end in words."""
    if exit_code is not None and exit_code < 0:
        return f"signal {-exit_code}, {signal.strsignal(-exit_code)}"
    return f"exit code {exit_code}"


# Processes: the parent's side


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    jobs: dict[str, Job] = field(default_factory=dict)
    ready: bool = False

    def give(self, job: Job) -> None:
        self.jobs[job.digest] = job
        with contextlib.suppress(OSError):  # it has died, which is noticed where its messages are read
            self.pipe.send(job)


@dataclass
class _Crew:
    """The workers, by their number. One that has died is replaced when there is a job for it."""

    size: int
    work: Work
    folder: Path
    members: dict[int, _Worker] = field(default_factory=dict)
    attempts: Counter[str] = field(default_factory=Counter)

    def feed(self, todo: Todo) -> bool:
        """Hands out jobs. Returns whether there is something to wait for."""
        for number in range(min(self.size, todo.num_jobs + self.num_busy)):
            if number not in self.members:
                self.members[number] = self._start(number)
        for depth in range(1, _JOBS_PER_WORKER + 1):
            for worker in self.members.values():
                if not worker.ready or len(worker.jobs) >= depth:
                    continue
                job = todo.take(wait=self.num_busy == 0)
                if job is None:
                    return self.num_busy > 0
                worker.give(job)
        return bool(self.members)

    @property
    def num_busy(self) -> int:
        return sum(bool(worker.jobs) for worker in self.members.values())

    def listen(self, todo: Todo) -> None:
        """Waits for messages and acts on them. Raises AquatintError."""
        for pipe in wait([worker.pipe for worker in self.members.values()]):
            number = next(number for number, worker in self.members.items() if worker.pipe is pipe)
            worker = self.members[number]
            try:
                while worker.pipe.poll():
                    self._act_on(worker.pipe.recv(), worker, todo)
            except (EOFError, ConnectionError):
                self._bury(number, todo)

    def stop(self) -> None:
        """Ends all workers: those that have nothing to do at once, others at their next batch, or by force. Shards stay whole."""
        for worker in self.members.values():
            worker.pipe.close()
        for worker in self.members.values():
            worker.process.join(_FAREWELL_SECONDS if worker.ready else 0.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.members.clear()

    def _start(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        num_threads = max(1, (os.cpu_count() or 1) // self.size)
        process = context.Process(
            target=_serve, args=(theirs, self.work, self.folder, _gpu_of(number), num_threads), name=f"encoder-{number}", daemon=True
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)  # or Ctrl-C would reach the process before it knows that
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # or the end of the process would not be the end of the pipe
        return _Worker(process, ours)

    def _act_on(self, message: Any, worker: _Worker, todo: Todo) -> None:
        match message:
            case Failure():
                raise message.error()
            case "ready":
                worker.ready = True
            case ("advance", digest, rows, failures):
                todo.advance(worker.jobs[digest], rows, failures)
            case ("finish", digest):
                todo.finish(worker.jobs.pop(digest))

    def _bury(self, number: int, todo: Todo) -> None:
        """Takes back the jobs of a worker that has died. Raises AquatintError if that happens again and again."""
        worker = self.members.pop(number)
        worker.pipe.close()
        worker.process.join()
        key = next(iter(worker.jobs), "")  # what it was at
        self.attempts[key] += 1
        for job in reversed(worker.jobs.values()):
            todo.give_back(job)
        if self.attempts[key] >= MAX_ATTEMPTS:
            raise AquatintError(
                f"the processes that encode die again and again ({how_it_ended(worker.process.exitcode)})",
                hint=f"the machine or container may be short of memory: {_SHORT_OF_MEMORY}",
            )


def _gpu_of(number: int) -> str | None:
    """The CUDA_VISIBLE_DEVICES of a worker: one of the GPUs that this process may use, or None if there is none."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(device) for device in range(torch.cuda.device_count())] if allowed is None else allowed.replace(" ", "").split(",")
    return devices[number % len(devices)] if devices else None


# Processes: the worker's side


class _ParentGone(Exception):
    """The pipe to the parent is closed: it has died, or wants this process to end."""


def _serve(pipe: Connection, work: Work, folder: Path, gpu: str | None, num_threads: int) -> None:
    """Does the jobs that come through the pipe."""
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # in time: CUDA looks when it is first used
    torch.set_num_threads(num_threads)
    try:
        work_off(_JobsFromParent(pipe), work, folder, num_threads=max(2, min(num_threads, default_threads())))
    except _ParentGone:
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(Failure.of(error))


class _JobsFromParent:
    """The other end of a `Todo`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._over = self._gone = False
        threading.Thread(target=self._receive, name="jobs", daemon=True).start()
        self._send("ready")

    def take(self, *, wait: bool) -> Job | None:
        if self._over:
            return None
        try:
            job = self._jobs.get(block=wait)
        except queue.Empty:
            return None
        self._over = job is None
        return job

    def advance(self, job: Job, rows: int, failures: Failures) -> None:
        if self._gone:
            raise _ParentGone
        self._send(("advance", job.digest, rows, failures))

    def finish(self, job: Job) -> None:
        self._send(("finish", job.digest))

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise _ParentGone from error

    def _receive(self) -> None:
        """Reads as soon as there is something: the parent shall not wait for a pipe that is full."""
        try:
            while True:
                self._jobs.put(self._pipe.recv())
        except (EOFError, OSError):
            self._gone = True
            self._jobs.put(None)


# Ray


@dataclass(frozen=True)
class _Tools:
    """What a Ray worker needs. Equal if it is of the same build, so that a worker makes its encoder once."""

    build: str
    work: Work = field(compare=False)
    folder: Path = field(compare=False)


@functools.lru_cache(maxsize=1)
def _set_up(tools: _Tools) -> tuple[Any, ShardStore]:
    return tools.work.build_encoder(), ShardStore(tools.folder)


def _encode_and_publish(tools: _Tools, job: Job) -> list[tuple[bytes, str]] | Failure:
    """A Ray task. Returns why requests were left out."""
    try:
        encoder, store = _set_up(tools)
        entries, failures = encode_job(job, tools.work, encoder)
        store.write(entries)
    except Exception as error:
        return Failure.of(error)
    return failures


def _collect(ray: Any, task: Any, job: Job, todo: Todo) -> None:
    try:
        result = ray.get(task)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise AquatintError(
            f"Ray could not have pictures or captions encoded: {reason}",
            hint="look at the state of the cluster with `ray status`, then run the same command again; what was encoded is kept",
        ) from error
    if isinstance(result, Failure):
        raise result.error()
    todo.advance(job, len(job), result)
    todo.finish(job)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("the engine `ray` needs the package ray, which is not installed", hint="pip install 'aquatint[ray]'") from error
    return ray


@contextlib.contextmanager
def _ray_session(ray: Any, workers: int) -> Iterator[None]:
    """A connection to Ray: the one that is open, the cluster at RAY_ADDRESS, or an instance on this machine for as long as it takes."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
            ray.init(
                address="local", num_cpus=workers, object_store_memory=_RAY_STORE_BYTES, include_dashboard=False, log_to_driver=False,
                logging_level="error",
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"to the Ray cluster at {address}" if address else "to a Ray instance on this machine"
        raise AquatintError(f"no connection {where}: {error}", hint="start it with `ray start`, or correct or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()
