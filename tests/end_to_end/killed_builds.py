"""Run as a program by the test of the cache: builds one in children of its own, and kills them.

    python killed_builds.py kill|share|ray FOLDER

A round is one cache, `FOLDER/round-N`, with the numbers of pictures that its encoders got in `FOLDER/round-N.log`.
Prints one JSON object per round.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aquatint.data.engines import Local, Ray
from aquatint.data.shards import ShardStore
from tests.data.toys import build, make_toy, request

KILLS = 30
SHAPES = ((16, 24), (24, 16), (16, 16))
NUM_PICTURES = 33  # the last shard of each shape is not full
SHARD_ENTRIES = 5
SETTINGS = {"batch_size": 2, "shard_entries": SHARD_ENTRIES}


def requests_in(folder: Path) -> list[Any]:
    """The same in every process: pictures are there already, or are made now."""
    return [request(folder, red, shape) for red in range(NUM_PICTURES) for shape in SHAPES]


def start(folder: Path, number: int, requests: list[Any], seconds: float = 0.004) -> int:
    """Forks a builder of round `number`, and returns its process id."""
    child = os.fork()
    if child:
        return child
    cache, make = folder / f"round-{number}", partial(make_toy, log=folder / f"round-{number}.log", seconds=seconds)
    try:
        build(ShardStore(cache), requests, make, engine=Local(2), **SETTINGS)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def wait_for(child: int) -> int:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a builder ended with {status}"
    return status


def kill_at_random(folder: Path, requests: list[Any]) -> None:
    """Rounds of one builder after the other, each killed at some time, until there are enough."""
    dice = random.Random(0)
    kills = number = 0
    while kills < KILLS:
        killed = 0
        while kills + killed < KILLS:
            child = start(folder, number, requests)
            time.sleep(dice.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
            if wait_for(child) == 0:
                break
            killed += 1
        print(json.dumps({"round": number, "killed": killed}))
        kills += killed
        number += 1


def share(folder: Path, requests: list[Any]) -> None:
    """Round 0: two builders at once. Round 1: three, of which one is killed in the middle."""
    for number, size in enumerate((2, 3)):
        children = [start(folder, number, requests, seconds=0.01) for _ in range(size)]
        time.sleep(0.2)
        if size == 3:
            os.kill(children[0], signal.SIGKILL)
        print(json.dumps({"round": number, "ends": [wait_for(child) for child in children]}))


def with_ray(folder: Path, requests: list[Any]) -> None:
    """Two workers, of which one dies at picture 7."""
    make = partial(make_toy, log=folder / "round-0.log", deadly=7, seconds=0.01)
    failures = build(ShardStore(folder / "round-0"), requests, make, engine=Ray(2), **SETTINGS)
    print(json.dumps({"round": 0, "failures": len(failures)}))


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    {"kill": kill_at_random, "share": share, "ray": with_ray}[mode](folder, requests_in(folder))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
