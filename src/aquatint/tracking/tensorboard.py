"""TensorBoard event files, written without torch or TensorFlow."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoardTracker:
    """Writes event files into `folder`. Needs the extra `aquatint[tensorboard]`.

    After a resume from `start_step` TensorBoard forgets what an earlier process logged beyond it.
    """

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))
        if start_step > 0:
            started = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=start_step + 1, session_log=started))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def image(self, step: int, name: str, path: Path) -> None:
        png = path.read_bytes()
        height, width = png_size_hw(png)
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(step, [self._summary.Value(tag=name, image=image)])

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, values: list[Any]) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()


def png_size_hw(png: bytes) -> tuple[int, int]:
    """Height and width from the first chunk of a PNG (PNG specification, 11.2.2). Raises ValueError if it is none."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError("not a PNG file")
    width, height = struct.unpack(">II", png[16:24])
    return height, width
