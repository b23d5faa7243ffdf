import struct
import zlib

import pytest

from aquatint.tracking.tensorboard import TensorBoardTracker, png_size_hw


def png(height, width):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + b"\x40" * 3 * width) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def read_back(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def steps(events, tag):
    return [event.step for event in events.Scalars(tag)]


def test_numbers_and_pictures_come_back_from_the_event_files(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(png(3, 5))
    tracker = TensorBoardTracker(tmp_path / "tensorboard")
    tracker.log(10, {"loss": 0.5, "val_loss": 0.25})
    tracker.log(20, {"loss": 0.125})
    tracker.image(20, "samples", picture)
    tracker.close()
    events = read_back(tmp_path / "tensorboard")
    assert [event.value for event in events.Scalars("loss")] == [0.5, 0.125]
    assert steps(events, "loss") == [10, 20]
    image = events.Images("samples")[0]
    assert (image.step, image.height, image.width, image.encoded_image_string) == (20, 3, 5, picture.read_bytes())


def test_after_a_resume_the_steps_that_are_done_again_are_there_once(tmp_path):
    first = TensorBoardTracker(tmp_path)
    for step in (10, 20, 30, 40):
        first.log(step, {"loss": 1.0})
    first.close()
    second = TensorBoardTracker(tmp_path, start_step=20)
    for step in (30, 40, 50):
        second.log(step, {"loss": 2.0})
    second.close()
    events = read_back(tmp_path)
    assert steps(events, "loss") == [10, 20, 30, 40, 50]
    assert [event.value for event in events.Scalars("loss")] == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_the_size_of_a_png_is_read_from_its_header():
    assert png_size_hw(png(7, 2)) == (7, 2)


def test_another_kind_of_picture_is_refused():
    with pytest.raises(ValueError, match="not a PNG"):
        png_size_hw(b"\xff\xd8\xff\xe0" + b"\0" * 30)
