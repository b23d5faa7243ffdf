"""Jobs are cut at the same places whatever is done already, and several processes share them out."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from aquatint.data import claims, jobs
from aquatint.data.claims import remove_abandoned, try_claim
from aquatint.data.jobs import Job, Todo, missing, plan_jobs
from aquatint.data.shards import ShardStore


@dataclass(frozen=True)
class Wish:
    number: int
    shape: tuple[int, ...] = (8, 8)
    picture: int | None = None

    @property
    def key(self) -> bytes:
        return self.number.to_bytes(16, "big")

    @property
    def subject(self) -> bytes:
        return self.key if self.picture is None else self.picture.to_bytes(16, "big")


def numbers(planned: Iterable[Job]) -> list[list[int]]:
    return [[wish.number for wish in job.requests] for job in planned]


def publish(folder: Path, requests: Iterable[Wish]) -> None:
    ShardStore(folder).write({wish.key: {"x": torch.tensor([wish.number])} for wish in requests})


# Planning


def test_a_job_has_one_shape_and_the_largest_come_first() -> None:
    wishes = [Wish(number, shape) for number, shape in enumerate([(8, 8), (8, 16), (8, 8), (16, 8), (8, 8), (8, 16)])]
    assert numbers(plan_jobs(wishes, 2)) == [[1, 5], [3], [0, 2], [4]]


def test_each_key_is_planned_once() -> None:
    assert numbers(plan_jobs([Wish(1), Wish(2), Wish(1), Wish(3)], 2)) == [[1, 2], [3]]
    assert plan_jobs([], 2) == ()


def test_without_finished_jobs_the_rest_is_cut_at_the_same_places() -> None:
    dice = random.Random(0)
    wishes = [Wish(number, dice.choice([(8, 8), (8, 16), (24, 8)])) for number in range(200)]
    planned = plan_jobs(wishes, 7)
    for _ in range(20):
        done = set(dice.sample(range(len(planned)), dice.randrange(len(planned))))
        gone = {wish.key for place in done for wish in planned[place].requests}
        left = plan_jobs([wish for wish in wishes if wish.key not in gone], 7)
        assert [job.digest for job in left] == [job.digest for place, job in enumerate(planned) if place not in done]


def test_a_jobs_name_is_that_of_its_keys() -> None:
    assert Job((Wish(1), Wish(2))).digest == Job((Wish(1, (9, 9)), Wish(2))).digest
    assert len({Job((Wish(1), Wish(2))).digest, Job((Wish(2), Wish(1))).digest, Job((Wish(1),)).digest}) == 3


def test_only_what_has_no_entry_is_missing(tmp_path: Path) -> None:
    publish(tmp_path, [Wish(1), Wish(3)])
    assert missing(ShardStore(tmp_path), [Wish(number) for number in (0, 1, 2, 3, 2)]) == [Wish(0), Wish(2)]


# Claims


def test_a_claim_is_one_processes_own_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "a.lock"
    claim = try_claim(path)
    assert claim is not None
    assert try_claim(path) is None
    assert f"process {os.getpid()}" in path.read_text()
    claim.release()
    assert not path.exists()
    again = try_claim(path)
    assert again is not None
    again.release()


def hold(path: Path, pipe: Connection) -> None:
    pipe.send(try_claim(path) is not None)
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    other = fork.Process(target=hold, args=(tmp_path / "a.lock", theirs))
    other.start()
    assert ours.recv()
    assert try_claim(tmp_path / "a.lock") is None
    remove_abandoned(tmp_path)
    assert (tmp_path / "a.lock").exists()  # not abandoned
    other.kill()
    other.join()
    remove_abandoned(tmp_path)
    assert not (tmp_path / "a.lock").exists()


def test_of_many_that_want_a_claim_at_once_one_has_it(tmp_path: Path) -> None:
    """Also while others remove the file: a lock on a file that has lost its name is no claim."""
    holders = 0
    most = 0
    guard = threading.Lock()
    count = 0

    def want() -> None:
        nonlocal holders, most, count
        for _ in range(200):
            claim = try_claim(tmp_path / "a.lock")
            if claim is None:
                continue
            with guard:
                holders += 1
                count += 1
                most = max(most, holders)
            with guard:
                holders -= 1
            claim.release()

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert count >= 200


def test_a_lock_on_a_file_that_was_removed_in_the_meantime_is_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock, removed = tmp_path / "a.lock", claims.fcntl.flock, []

    def late(descriptor: int, mode: int) -> None:
        if not removed:
            removed.append(path.unlink())
        flock(descriptor, mode)

    monkeypatch.setattr(claims.fcntl, "flock", late)
    claim = try_claim(path)
    assert claim is not None
    assert os.path.samestat(os.fstat(claim.descriptor), path.stat())
    claim.release()


def test_a_disk_without_locks_grants_every_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, mode: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claims.fcntl, "flock", unsupported)
    claim = try_claim(tmp_path / "a.lock")
    assert claim is not None
    claim.release()


# What is left


def todo(folder: Path, count: int, **settings: Any) -> Todo:
    return Todo(ShardStore(folder), [Wish(number) for number in range(count)], 2, **settings)


def test_jobs_are_handed_out_once_and_their_claims_end_with_them(tmp_path: Path) -> None:
    with todo(tmp_path, 5) as left:
        taken = [left.take(wait=False) for _ in range(3)]
        assert numbers(job for job in taken if job) == [[0, 1], [2, 3], [4]]
        assert left.take(wait=True) is None
        assert len(list((tmp_path / "claims").iterdir())) == 3
        for job in taken:
            assert job is not None
            left.finish(job)
        assert list((tmp_path / "claims").iterdir()) == []


def test_two_builders_share_the_jobs_out(tmp_path: Path) -> None:
    with todo(tmp_path, 6) as one, todo(tmp_path, 6) as other:
        first, second, third = one.take(wait=False), other.take(wait=False), one.take(wait=False)
        assert numbers([first, second, third]) == [[0, 1], [2, 3], [4, 5]]
        assert one.take(wait=False) is None
        for builder, job in ((one, first), (one, third), (other, second)):
            publish(tmp_path, job.requests)
            builder.finish(job)
        assert one.take(wait=True) is None
        assert other.take(wait=True) is None


def test_progress_counts_what_others_have_made(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with todo(tmp_path, 6, on_progress=lambda done, total: seen.append((done, total))) as left:
        publish(tmp_path, [Wish(0), Wish(1)])
        job = left.take(wait=False)
        assert numbers([job]) == [[2, 3]]
        left.advance(job, 1, [])
        left.advance(job, 1, [])
        left.finish(job)
        publish(tmp_path, [Wish(4), Wish(5)])
        assert left.take(wait=False) is None
    assert seen == [(2, 6), (3, 6), (4, 6), (6, 6)]


def test_what_another_builder_leaves_behind_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits while the other has the job, and takes it when the other ends without having finished it."""
    waited: list[float] = []
    with todo(tmp_path, 2) as one:
        other = todo(tmp_path, 2)
        with other:
            assert other.take(wait=False) is not None

            def sleep(seconds: float) -> None:
                waited.append(seconds)
                if len(waited) == 3:
                    other.__exit__(None, None, None)

            monkeypatch.setattr(jobs.time, "sleep", sleep)
            job = one.take(wait=True)
    assert numbers([job]) == [[0, 1]]
    assert len(waited) == 3


def test_a_job_that_is_given_back_comes_again_and_counts_once(tmp_path: Path) -> None:
    seen: list[int] = []
    with todo(tmp_path, 4, on_progress=lambda done, total: seen.append(done)) as left:
        job = left.take(wait=False)
        left.advance(job, 2, [])
        left.give_back(job)
        assert left.take(wait=False) is job
        left.advance(job, 2, [])
        left.finish(job)
        left.advance(left.take(wait=False), 2, [])
    assert seen == [2, 2, 4]


def test_whoever_cuts_at_other_places_is_followed(tmp_path: Path) -> None:
    """Another builder left out picture 1 from the start, with both of its views 1 and 5: its jobs are 0 2, 3 4, 6 7."""
    wishes = [Wish(number, picture=1 if number in (1, 5) else None) for number in range(8)]
    with Todo(ShardStore(tmp_path), wishes, 2) as left:
        first = left.take(wait=False)
        assert numbers([first]) == [[0, 1]]
        left.advance(first, 2, [(wishes[1].subject, "is damaged")])
        left.finish(first)
        publish(tmp_path, [Wish(0), Wish(2)])
        publish(tmp_path, [Wish(3), Wish(4)])
        second = left.take(wait=False)
        assert numbers([second]) == [[6, 7]]
        left.advance(second, 2, [])
        left.finish(second)
        assert left.take(wait=True) is None


def test_what_was_impossible_elsewhere_moves_no_cut(tmp_path: Path) -> None:
    """Another builder with the same jobs could not make 1: the rest is cut as before, and 1 is tried at the end."""
    with todo(tmp_path, 7) as left:
        publish(tmp_path, [Wish(0)])
        jobs = [left.take(wait=False) for _ in range(4)]
        assert numbers(jobs) == [[2, 3], [4, 5], [6], [1]]


def test_half_of_a_job_is_cut_anew_with_the_rest(tmp_path: Path) -> None:
    seen: list[int] = []
    with todo(tmp_path, 7, on_progress=lambda done, total: seen.append(done)) as left:
        publish(tmp_path, [Wish(0), Wish(100)])
        job = left.take(wait=False)
        assert numbers([job]) == [[1, 2]]
        left.advance(job, 2, [])
    assert seen == [1, 3]


def test_failures_are_told_once(tmp_path: Path) -> None:
    told: list[tuple[bytes, str]] = []
    with todo(tmp_path, 4, on_failure=lambda subject, reason: told.append((subject, reason))) as left:
        job = left.take(wait=False)
        left.advance(job, 1, [(b"x", "first")])
        left.advance(job, 1, [(b"x", "second")])
    assert told == [(b"x", "first")]
    assert left.failures == {b"x": "first"}
