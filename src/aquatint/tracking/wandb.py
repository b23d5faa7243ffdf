"""Weights & Biases, in a process of its own.

The library can ask for a login, wait for a server that does not answer, and hold up the end of the program. So it runs
in a child that gets rows through a pipe and has no terminal. The trainer only ever writes to the pipe without waiting,
and at its end gives the child a limited time to finish.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from aquatint.storage import write_json

ID_FILE = "wandb.json"
MAX_PENDING_BYTES = 1 << 22  # some twenty thousand rows


class WandbTracker:
    """Logs to W&B from the run folder `folder`, under the same W&B run after every resume. Needs `aquatint[wandb]`.

    Methods raise RuntimeError with W&B's own words when the child has given up, and never wait for it; `close` waits
    for at most `close_seconds`. The API key is W&B's affair (WANDB_API_KEY or `wandb login`) and never seen here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        entity: str | None,
        mode: str,
        name: str,
        config: Mapping[str, Any],
        start_seconds: float = 30.0,
        close_seconds: float = 30.0,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise RuntimeError('wandb is not installed: run `pip install "aquatint[wandb]"`')
        self._folder, self._close_seconds = folder, close_seconds
        self._pending = bytearray()
        command = [sys.executable, "-P", "-m", "aquatint.tracking.wandb"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, bufsize=0
        )
        for pipe in (self._child.stdin, self._child.stdout):
            os.set_blocking(_open_pipe(pipe).fileno(), False)
        start = {"project": project, "entity": entity, "mode": mode, "name": name, "id": run_id(folder), "dir": str(folder)}
        self._send({"start": start, "config": dict(config), "seconds": start_seconds})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._send({"log": {"step": step, **values}})

    def image(self, step: int, name: str, path: Path) -> None:
        self._send({"image": name, "step": step, "path": str(path.absolute())})

    def close(self) -> None:
        deadline = time.monotonic() + self._close_seconds
        self._send({"finish": True})
        stdin = _open_pipe(self._child.stdin)
        while self._pending and time.monotonic() < deadline:
            select.select([], [stdin], [], 0.1)
            self._write()
        stdin.close()
        try:
            code = self._child.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            late = f"it was not done {self._close_seconds:g} seconds after the run's end"
            raise self._give_up(f"{late}; `wandb sync` uploads what lies in {self._folder}/wandb") from None
        if code != 0:
            raise self._give_up()
        _open_pipe(self._child.stdout).close()

    def _send(self, message: Mapping[str, Any]) -> None:
        self._pending += json.dumps(message).encode() + b"\n"
        if len(self._pending) > MAX_PENDING_BYTES:
            raise self._give_up("it takes rows too slowly")
        self._write()

    def _write(self) -> None:
        try:
            with suppress(BlockingIOError):
                while self._pending:
                    del self._pending[: os.write(_open_pipe(self._child.stdin).fileno(), self._pending[:65536])]
        except BrokenPipeError:
            raise self._give_up() from None

    def _give_up(self, reason: str | None = None) -> RuntimeError:
        """Ends the child and what it started (it leads a process group of its own). Its last words are the reason if there is no other."""
        if self._child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        stdin, stdout = _open_pipe(self._child.stdin), _open_pipe(self._child.stdout)
        words = (stdout.read() or b"").decode(errors="replace").strip()
        stdin.close()
        stdout.close()
        return RuntimeError(reason or words or f"its process ended with code {self._child.returncode}")


def run_id(folder: Path) -> str:
    """The W&B id of a run, made at the first call and the same ever after. Raises StorageError."""
    path = folder / ID_FILE
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["id"])
    new = secrets.token_hex(8)
    write_json(path, {"id": new})
    return new


def _open_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def main() -> int:
    """The child: reads messages until the end of its input, and leaves its last words on what was standard output."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the trainer answers it, and then closes the pipe
    report = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        _serve(json.loads(line) for line in sys.stdin)
    except Exception as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=report, flush=True)
        return 1
    return 0


def _serve(messages: Iterator[dict[str, Any]]) -> None:
    import wandb

    first = next(messages)
    settings = wandb.Settings(init_timeout=first["seconds"], console="off", silent=True, disable_git=True, save_code=False)
    run = wandb.init(**first["start"], config=first["config"], resume="allow", settings=settings)
    run.define_metric("*", step_metric="step")  # W&B's own step refuses to go back, as it must after a resume
    finished = False
    for message in messages:
        if "log" in message:
            run.log(message["log"])
        elif "image" in message:
            run.log({message["image"]: wandb.Image(message["path"]), "step": message["step"]})
        finished = finished or "finish" in message
    run.finish(exit_code=0 if finished else 1)


if __name__ == "__main__":
    sys.exit(main())
