"""All engines make the same shards, and whatever becomes of a worker, an error says so or nothing is lost."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from aquatint.data import engines
from aquatint.data.engines import Failure, Local, Processes, Ray, choose_engine, how_it_ended
from aquatint.data.shards import ShardStore
from aquatint.errors import AquatintError, DataError, UsageError
from tests.data.toys import ToyEncoder, build, encoded_rows, files_of, make_toy, request

SHAPES = ((16, 24), (24, 16))


@pytest.fixture(autouse=True, scope="module")
def one_thread_each() -> Any:
    """Workers start in half the time without a pool of threads for each library."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.__setitem__("OMP_NUM_THREADS", before)


def make_requests(folder: Path, count: int = 10) -> list[Any]:
    return [request(folder, red, shape) for red in range(count) for shape in SHAPES]


def test_engines_are_known_by_name() -> None:
    assert choose_engine("local", 3) == Local()
    assert choose_engine("processes", 3) == Processes(3)
    assert choose_engine("ray", 3, gpus=True) == Ray(3, 1.0)
    assert choose_engine("ray", 3) == Ray(3, 0.0)


# Processes


def test_processes_make_what_one_would_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    requests, log = make_requests(tmp_path), tmp_path / "log"
    clean, store = ShardStore(tmp_path / "clean"), ShardStore(tmp_path / "cache")
    build(clean, requests, ToyEncoder)
    seen: list[tuple[int, int]] = []
    make = partial(make_toy, log=log, deadly=5)
    failures = build(store, requests, make, engine=Processes(2), on_progress=lambda done, total: seen.append((done, total)))
    assert failures == {}
    assert files_of(store.folder) == files_of(clean.folder)
    assert log.with_suffix(".died").exists()
    assert seen[-1] == (20, 20)
    assert all(0 <= done <= 20 for done, _ in seen)
    assert 20 <= encoded_rows(log) <= 20 + 2 * 4  # the jobs that the killed one had
    assert active_children() == []
    assert list((store.folder / "claims").iterdir()) == []


def test_failures_come_from_processes_as_they_do_from_here(tmp_path: Path) -> None:
    requests = make_requests(tmp_path, 4)
    make, told = partial(make_toy, nan=2), []
    here = build(ShardStore(tmp_path / "here"), requests, make)
    there = build(ShardStore(tmp_path / "there"), requests, make, engine=Processes(1), on_failure=lambda *failure: told.append(failure))
    assert here == there == dict(told)
    assert len(here) == 1
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


def test_an_error_in_a_process_arrives_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        build(ShardStore(tmp_path / "cache"), make_requests(tmp_path, 2), refuse, engine=Processes(1))
    assert str(caught.value) == "error: the pictures are no good\n\nhint: take others"
    assert active_children() == []


def refuse() -> ToyEncoder:
    raise DataError("the pictures are no good", hint="take others")


def test_a_mistake_in_a_process_arrives_with_its_trace() -> None:
    try:
        [][1]
    except IndexError as mistake:
        error = pickle.loads(pickle.dumps(Failure.of(mistake))).error()
    assert type(error) is AquatintError
    assert error.message == "a process that encodes has failed: IndexError: list index out of range"
    assert "[][1]" in str(error.__cause__)


def test_an_error_for_lack_of_memory_says_what_to_do() -> None:
    in_torch = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    for error in (MemoryError(), in_torch, torch.AcceleratorError("CUDA error: out of memory")):
        assert "cache.batch_size" in Failure.of(error).hint


def test_processes_that_always_die_are_not_started_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "MAX_ATTEMPTS", 2)
    with pytest.raises(AquatintError, match=r"die again and again \(signal 9, Killed\)") as caught:
        build(ShardStore(tmp_path / "cache"), make_requests(tmp_path, 2), die, engine=Processes(1))
    assert "cache.workers" in caught.value.hint
    assert list((tmp_path / "cache" / "claims").iterdir()) == []


def die() -> ToyEncoder:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_ctrl_c_ends_the_processes_and_keeps_what_is_finished(tmp_path: Path) -> None:
    requests, store, clean = make_requests(tmp_path), ShardStore(tmp_path / "cache"), ShardStore(tmp_path / "clean")

    def interrupt(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build(store, requests, partial(make_toy, seconds=0.05), engine=Processes(1), on_progress=interrupt)
    assert active_children() == []
    assert time.monotonic() - started < 30
    assert len(store) >= 4
    assert list((store.folder / "claims").iterdir()) == []
    build(clean, requests, ToyEncoder)
    assert files_of(store.folder).items() <= files_of(clean.folder).items()


def test_nothing_is_started_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, store = make_requests(tmp_path, 2), ShardStore(tmp_path / "cache")
    build(store, requests, ToyEncoder)
    monkeypatch.setattr(engines._Crew, "_start", lambda *_: pytest.fail("a process was started"))
    build(store, requests, ToyEncoder, engine=Processes(2))


@pytest.mark.parametrize(
    ("allowed", "counted", "expected"),
    [
        (None, 0, [None, None, None]),
        (None, 2, ["0", "1", "0"]),
        ("3, 5", 9, ["3", "5", "3"]),
        ("GPU-1a", 1, ["GPU-1a", "GPU-1a", "GPU-1a"]),
        ("", 0, ["", "", ""]),
    ],
)
def test_processes_share_out_the_gpus(
    monkeypatch: pytest.MonkeyPatch, allowed: str | None, counted: int, expected: list[str | None]
) -> None:
    monkeypatch.setattr(engines.torch.cuda, "device_count", lambda: counted)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert [engines._gpu_of(number) for number in range(3)] == expected


def test_an_end_is_told_in_words() -> None:
    assert how_it_ended(-9) == "signal 9, Killed"
    assert how_it_ended(1) == "exit code 1"
    assert how_it_ended(None) == "exit code None"


# A worker and its parent, in one process


class Pipe:
    """A parent that hangs up after some messages."""

    def __init__(self, jobs: list[Any], patience: int = 1000) -> None:
        self.jobs, self.patience, self.sent = jobs, patience, []
        self.hung_up = threading.Event()

    def recv(self) -> Any:
        if self.jobs:
            return self.jobs.pop(0)
        self.hung_up.wait(10)
        raise EOFError

    def send(self, message: Any) -> None:
        if len(self.sent) >= self.patience:
            self.hung_up.set()
            raise BrokenPipeError
        self.sent.append(message)
        if isinstance(message, tuple) and message[0] == "finish" and not self.jobs:
            self.hung_up.set()


@pytest.fixture
def same_signals() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def serve(folder: Path, pipe: Pipe, encoder: Callable[[], ToyEncoder]) -> None:
    from aquatint.data.cache import LatentWork
    from aquatint.data.places import Opener

    work = LatentWork(encoder, Opener(), "#ffffff", 10**6, "float16", 3)
    engines._serve(pipe, work, folder, None, 1)  # type: ignore[arg-type]


def jobs_of(folder: Path) -> list[Any]:
    from aquatint.data.jobs import plan_jobs

    return list(plan_jobs(make_requests(folder, 4), 4))


@pytest.mark.usefixtures("same_signals")
def test_a_worker_tells_what_it_does(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path)
    pipe = Pipe(list(jobs))
    serve(tmp_path / "cache", pipe, ToyEncoder)
    told = [message if isinstance(message, str) else message[:3] for message in pipe.sent]
    first, second = (job.digest for job in jobs)
    assert told[0] == "ready"
    assert [message for message in told if message[0] == "advance"] == [
        ("advance", first, 3), ("advance", first, 1), ("advance", second, 3), ("advance", second, 1),
    ]  # fmt: skip
    assert {message[1] for message in told if message[0] == "finish"} == {first, second}
    assert len(ShardStore(tmp_path / "cache")) == 8


@pytest.mark.usefixtures("same_signals")
def test_a_worker_whose_parent_is_gone_stops(tmp_path: Path) -> None:
    encoder = ToyEncoder()
    pipe = Pipe(jobs_of(tmp_path), patience=2)
    serve(tmp_path / "cache", pipe, lambda: encoder)
    assert len(encoder.batches) == 2


# Ray


def test_without_ray_an_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError) as caught:
        build(ShardStore(tmp_path / "cache"), make_requests(tmp_path, 1), ToyEncoder, engine=Ray(2))
    assert "pip install 'aquatint[ray]'" in str(caught.value)


def test_without_work_ray_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, store = make_requests(tmp_path, 1), ShardStore(tmp_path / "cache")
    build(store, requests, ToyEncoder)
    monkeypatch.setitem(sys.modules, "ray", None)
    build(store, requests, ToyEncoder, engine=Ray(2))
    assert len(store) == len(requests)
