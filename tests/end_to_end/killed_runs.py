"""Run as a program by the resume test: starts each config in a child of its own and kills it after a given step."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from aquatint.config.schema import Config
from aquatint.training import build, trainer


def die_after(config: Config, steps: int) -> None:
    real = trainer.train_step

    def train_step(parts, batches, step):
        if step == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(parts, batches, step)

    trainer.train_step = train_step
    build.train_run(config)


def main(steps: int, paths: list[str]) -> None:
    torch.set_num_threads(1)
    for path in paths:
        child = os.fork()
        if child == 0:
            die_after(Config.model_validate(json.loads(Path(path).read_text())), steps)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{path} ended with {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{path} ended with {status}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
