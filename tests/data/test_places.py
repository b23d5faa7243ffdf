import hashlib
import io
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aquatint.data.places import Identity, Opener, Place

DATA = bytes(range(256)) * 1024


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)
    return path


def test_a_whole_file_is_opened(file):
    with Opener().open(Place(str(file))) as opened:
        assert opened.read() == DATA
        assert opened.seek(-3, os.SEEK_END) == len(DATA) - 3
        assert opened.read() == DATA[-3:]


@pytest.mark.parametrize(("start", "length"), [(0, 10), (1000, 70_000), (len(DATA) - 5, 5), (len(DATA), 0), (77, -1), (0, len(DATA))])
def test_a_part_of_a_file_is_a_file(file, start, length):
    part = DATA[start:] if length < 0 else DATA[start : start + length]
    with Opener().open(Place(str(file), start, length)) as opened:
        assert opened.read() == part
        assert opened.read() == b""
        assert opened.seek(0) == 0
        assert opened.read(7) == part[:7]
        assert opened.tell() == min(7, len(part))
        assert opened.seek(2, os.SEEK_CUR) == min(7, len(part)) + 2
        assert opened.read(300_000) == part[min(7, len(part)) + 2 :]
        assert opened.seek(0, os.SEEK_END) == len(part)
        assert opened.seek(len(part) + 9) == len(part) + 9
        assert opened.read(1) == b""


def test_no_position_is_before_a_part(file):
    with Opener().open(Place(str(file), 100, 10)) as opened, pytest.raises(OSError, match="before the start"):
        opened.seek(-1, os.SEEK_CUR)


def num_open():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_part_is_read_only_and_closes(file):
    opened = Opener().open(Place(str(file), 5, 5))
    assert opened.readable()
    assert opened.seekable()
    assert not opened.writable()
    before = num_open()
    opened.close()
    opened.close()
    assert num_open() == before - 1
    with pytest.raises(ValueError):
        opened.read()


@pytest.mark.parametrize(("start", "length"), [(0, len(DATA) + 1), (len(DATA) - 1, 2), (len(DATA) + 1, -1), (-1, 5)])
def test_a_part_that_the_file_no_longer_has_is_an_error(file, start, length):
    with pytest.raises(OSError, match="shorter than when it was listed"):
        Opener().open(Place(str(file), start, length))


def test_a_file_that_is_cut_off_while_it_is_open_is_an_error_and_not_an_early_end(file):
    for read in (lambda opened: opened.read(), lambda opened: opened.read(200_000), lambda opened: hashlib.file_digest(opened, "sha256")):
        file.write_bytes(DATA)
        with Opener().open(Place(str(file), 10, 200_000)) as opened:
            os.truncate(file, 100_000)
            with pytest.raises(OSError, match="shorter than when it was listed"):
                read(opened)


def test_parts_read_as_pictures_are_read_in_many_threads(file):
    opener = Opener()

    def read(start):
        with opener.open(Place(str(file), start, 1000)) as opened:
            return opened.read(10) + opened.read()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(0, 200_000, 1000))) == [DATA[start : start + 1000] for start in range(0, 200_000, 1000)]


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), str(tmp_path), "/dev/zero"):
        for place in (Place(path), Place(path, 0, 10)):
            with pytest.raises(OSError, match="it is not a plain file"):
                Opener().open(place)
        with pytest.raises(OSError, match="it is not a plain file"):
            Opener().identity(path)


def test_what_becomes_a_pipe_after_it_was_looked_at_does_not_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("aquatint.data.places.stat_plain", lambda path: Path(path).stat())
    worker = threading.Thread(target=lambda: Opener().open(Place(str(tmp_path / "pipe"))).close(), daemon=True)
    worker.start()
    worker.join(5)
    assert not worker.is_alive()


def test_missing_files_are_missing(tmp_path):
    for place in (Place(str(tmp_path / "gone")), Place(str(tmp_path / "gone"), 1, 2), Place(str(tmp_path / "gone"), 1, column="image")):
        with pytest.raises(FileNotFoundError):
            Opener().open(place)
    with pytest.raises(FileNotFoundError):
        Opener().identity(str(tmp_path / "gone"))


def test_names_in_no_encoding_are_opened(tmp_path):
    path = f"{tmp_path}/\udcff.jpg"
    Path(path).write_bytes(b"x")
    with Opener().open(Place(path)) as opened:
        assert opened.read() == b"x"


def test_an_identity_changes_with_the_file(file):
    opener = Opener()
    first = opener.identity(str(file))
    status = file.stat()
    assert first == Identity(len(DATA), status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    file.with_name("b").write_bytes(DATA)
    os.utime(file.with_name("b"), ns=(status.st_atime_ns, status.st_mtime_ns))
    file.with_name("b").replace(file)
    assert opener.identity(str(file)) != first


def test_an_opener_can_be_sent_to_another_process(file, tmp_path):
    opener = pickle.loads(pickle.dumps(Opener(tmp_path / "downloads")))
    with opener.open(Place(str(file), 3, 4)) as opened:
        assert opened.read() == DATA[3:7]
    assert opener.downloads.folder == tmp_path / "downloads"


def test_a_part_serves_whatever_reads_files(file):
    with Opener().open(Place(str(file), 256, 512)) as opened:
        assert hashlib.file_digest(opened, "sha256").digest() == hashlib.sha256(DATA[256:768]).digest()
    with Opener().open(Place(str(file), 256, 512)) as opened:
        assert list(io.TextIOWrapper(opened, "latin-1", newline="")) != []
