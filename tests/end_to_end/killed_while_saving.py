"""Run as a program by the test of the same name: a run that is killed in the middle of a checkpoint that is written meanwhile."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from aquatint.config.schema import Config
from aquatint.training import checkpoint
from aquatint.training.build import train_run


def main(path: str, step: int) -> None:
    real = checkpoint.write_tensors

    def write_tensors(target: Path, *arguments, **settings) -> str:
        digest = real(target, *arguments, **settings)
        if f"step-{step:06}." in str(target) and threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGKILL)
        return digest

    checkpoint.write_tensors = write_tensors
    torch.set_num_threads(1)
    train_run(Config.model_validate(json.loads(Path(path).read_text())))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
