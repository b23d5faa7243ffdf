import json
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from aquatint.data import downloads as module
from aquatint.data.downloads import Downloads, is_url, public_name, validators
from aquatint.data.places import Opener, Place
from aquatint.errors import AquatintError, StorageError, UsageError
from tests.servers import web

DATA = bytes(range(256)) * 5000
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning", "ignore:unclosed:ResourceWarning")


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.01)
    with web() as site:
        site.files["/a.bin"] = DATA
        yield site


def gets(site):
    return site.requests["GET /a.bin"]


def read(opener, url, *place):
    with opener.open(Place(url, *place)) as file:
        return file.read()


def test_a_file_is_downloaded_once_and_read_from_the_copy(site, tmp_path):
    url = f"{site.address}/a.bin"
    opener = Opener(tmp_path)
    assert read(opener, url) == DATA
    assert read(opener, url, 1000, 70_000) == DATA[1000:71_000]
    assert read(Opener(tmp_path), url) == DATA
    assert gets(site) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_the_server_is_asked_once_and_a_copy_of_the_opener_not_at_all(site, tmp_path):
    url = f"{site.address}/a.bin"
    opener = Opener(tmp_path)
    read(opener, url)
    before = site.requests.total()
    read(opener, url)
    assert read(pickle.loads(pickle.dumps(opener)), url) == DATA
    assert site.requests.total() == before


def test_a_changed_file_is_downloaded_again(site, tmp_path):
    url = f"{site.address}/a.bin"
    opener = Opener(tmp_path)
    before = opener.identity(url)
    assert before.size == len(DATA)
    read(opener, url)
    site.files["/a.bin"] = DATA[::-1]
    assert read(opener, url) == DATA  # what was listed is what is read
    assert opener.identity(url) != before
    assert read(opener, url) == DATA[::-1]
    assert read(Opener(tmp_path), url) == DATA[::-1]
    assert gets(site) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_without_validators_a_changed_size_is_noticed(site, tmp_path):
    site.has_etags = False
    url = f"{site.address}/a.bin"
    assert read(Opener(tmp_path), url) == DATA
    site.files["/a.bin"] = b"short"
    assert read(Opener(tmp_path), url) == b"short"


@pytest.mark.parametrize("field", ["cut", "refused"])
def test_a_download_that_fails_is_tried_again(site, tmp_path, field):
    setattr(site, field, 2)
    assert read(Opener(tmp_path), f"{site.address}/a.bin") == DATA
    assert gets(site) == 3


@pytest.mark.parametrize("field", ["cut", "refused"])
def test_a_download_that_fails_for_good_is_an_error_and_leaves_nothing(site, tmp_path, field):
    setattr(site, field, 1000)
    with pytest.raises(StorageError, match=rf"could not read {site.address}/a\.bin") as caught:
        read(Opener(tmp_path), f"{site.address}/a.bin?secret=s3cr3t")
    assert "s3cr3t" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert gets(site) == 4


def test_a_file_that_changes_while_it_is_downloaded_is_an_error_and_leaves_nothing(site, tmp_path, monkeypatch):
    url = f"{site.address}/a.bin"
    chunks = module._chunks

    def change(url):
        yield from chunks(url)
        site.files["/a.bin"] = DATA[::-1]

    monkeypatch.setattr(module, "_chunks", change)
    with pytest.raises(StorageError, match="was changed since it was listed"):
        read(Opener(tmp_path), url)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_blamed_on_the_server(site, tmp_path, monkeypatch):
    def full(url):
        yield b"x"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_chunks", full)
    with pytest.raises(StorageError, match=r"could not write .* No space left"):
        read(Opener(tmp_path), f"{site.address}/a.bin")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_downloads_left_behind_goes_and_what_others_write_stays(site, tmp_path):
    for name, age in {"a.tmp-01234567": 4000, "b.tmp-01234567": 100, "c.tmp": 4000}.items():
        (tmp_path / name).write_bytes(b"part")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    read(Opener(tmp_path), f"{site.address}/a.bin")
    assert sorted(path.name for path in tmp_path.iterdir() if len(path.name) < 20) == ["b.tmp-01234567", "c.tmp"]


def copy_of(folder):
    (copy,) = (path for path in folder.iterdir() if path.suffix != ".json")
    return copy


@pytest.mark.parametrize(
    "harm",
    [
        lambda copy: copy.write_bytes(DATA[:-1]),
        lambda copy: copy.write_bytes(DATA[:-1] + b"!"),
        lambda copy: copy.unlink(),
        lambda copy: copy.with_name(f"{copy.name}.json").unlink(),
        lambda copy: copy.with_name(f"{copy.name}.json").write_text("[" * 100_000),
        lambda copy: copy.with_name(f"{copy.name}.json").write_text("[1]"),
        lambda copy: copy.with_name(f"{copy.name}.json").write_bytes(b"\xff"),
    ],
)
def test_a_copy_that_is_not_what_was_downloaded_is_not_used(site, tmp_path, harm):
    url = f"{site.address}/a.bin"
    read(Opener(tmp_path), url)
    harm(copy_of(tmp_path))
    assert read(Opener(tmp_path), url) == DATA
    assert gets(site) == 2


def test_a_copy_that_was_only_touched_or_moved_is_checked_and_used(site, tmp_path):
    url = f"{site.address}/a.bin"
    read(Opener(tmp_path / "old"), url)
    os.utime(copy_of(tmp_path / "old"), (1, 1))
    (tmp_path / "old").rename(tmp_path / "new")
    assert read(Opener(tmp_path / "new"), url) == DATA
    assert gets(site) == 1


def test_many_threads_download_a_file_once(site, tmp_path):
    opener, start = Opener(tmp_path), threading.Barrier(8)

    def work(index):
        start.wait()
        return read(opener, f"{site.address}/a.bin", index, 10)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [DATA[index : index + 10] for index in range(8)]
    assert gets(site) == 1


def test_two_openers_may_download_at_once(site, tmp_path):
    start = threading.Barrier(4)

    def work(index):
        start.wait()
        return read(Opener(tmp_path), f"{site.address}/a.bin")

    with ThreadPoolExecutor(4) as pool:
        assert all(data == DATA for data in pool.map(work, range(4)))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_not_there_is_missing_and_not_asked_for_again(site, tmp_path):
    for act in (lambda: read(Opener(tmp_path), f"{site.address}/gone?key=1"), lambda: Opener().identity(f"{site.address}/gone?key=1")):
        with pytest.raises(FileNotFoundError) as caught:
            act()
        assert caught.value.filename == f"{site.address}/gone"
    assert site.requests == {"HEAD /gone": 2, "GET /gone": site.requests["GET /gone"]}


@pytest.mark.parametrize(
    ("status", "error"), [(403, PermissionError), (401, PermissionError), (410, FileNotFoundError), (503, StorageError)]
)
def test_what_the_server_says_decides_whether_it_is_asked_again(site, tmp_path, status, error):
    site.status = status
    with pytest.raises(error):
        Opener(tmp_path).identity(f"{site.address}/a.bin")
    assert site.requests["HEAD /a.bin"] == (4 if error is StorageError else 1)


def test_a_server_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    with pytest.raises(StorageError, match=r"could not read http://127\.0\.0\.1:9/a") as caught:
        Opener(tmp_path).identity("http://user:passw0rd@127.0.0.1:9/a?key=s3cr3t")
    assert "s3cr3t" not in str(caught.value)
    assert "passw0rd" not in str(caught.value)


def test_nothing_that_is_written_holds_a_secret(site, tmp_path):
    read(Opener(tmp_path), f"{site.address}/a.bin?token=s3cr3t#part")
    written = b"".join(path.read_bytes() for path in tmp_path.glob("*.json")) + str(list(tmp_path.iterdir())).encode()
    assert b"s3cr3t" not in written
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["url"] == f"{site.address}/a.bin"


def test_without_a_folder_nothing_is_downloaded(site):
    with pytest.raises(UsageError, match="there is no folder"):
        read(Opener(), f"{site.address}/a.bin")


def test_an_address_of_no_known_kind_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="is no address that can be read"):
        Opener(tmp_path).identity("gopher://somewhere/a.bin")


def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch):
    def missing(*args, **options):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(AquatintError, match="Please install gcsfs") as caught:
        Opener(tmp_path).identity("gs://bucket/a.bin")
    assert caught.value.hint == "pip install aquatint[remote]"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        ("https://user:pw@host:1/a/b.tar?sig=x#y", "https://host:1/a/b.tar"),
        ("https://host?sig=x/y@z", "https://host"),
        ("https://user:p?w@host/a", "https://user:p"),
        ("/local/a?b#c@d.jpg", "/local/a?b#c@d.jpg"),
    ],
)
def test_public_names_hold_no_secrets(path, shown):
    assert public_name(path) == shown


def test_only_addresses_are_urls():
    assert is_url("s3://a")
    assert is_url("HTTP+x://a")
    assert not any(map(is_url, ["/a://b", "a:/b", "://b", "1a://b", "a b://c"]))


def test_validators_prefer_what_changes_with_the_content():
    first = validators({"size": 5, "ETag": '"1"', "LastModified": "now"})
    assert first == validators({"size": 5, "ETag": '"1"', "LastModified": "later"})
    assert first != validators({"size": 5, "ETag": '"2"', "LastModified": "now"})
    assert validators({"size": 5, "LastModified": "now"}) != validators({"size": 5, "LastModified": "later"})
    assert validators({"size": None}) == (-1, 0)
    assert all(0 <= validators({"ETag": str(number)})[1] < 1 << 63 for number in range(100))


def test_what_was_known_of_servers_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 3)
    monkeypatch.setattr(module, "_info", lambda url: {"size": 1})
    downloads = Downloads(tmp_path)
    for number in range(10):
        downloads.identity(f"http://host/{number}")
    assert list(downloads._known) == [f"http://host/{number}" for number in (7, 8, 9)]


def test_a_process_killed_in_a_download_leaves_nothing_that_is_trusted(site, tmp_path):
    """Killed with half of the bytes written, and between the file and its record."""
    script = """
import os, signal, sys
from pathlib import Path
from aquatint.data import downloads
def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "half":
    chunks = downloads._chunks
    downloads._chunks = lambda url: (chunk if index == 0 else kill() for index, chunk in enumerate([next(chunks(url))[:1000], b""]))
else:
    downloads.storage.write_json = kill
downloads.Downloads(Path(sys.argv[1])).fetch(sys.argv[2])
"""
    for moment in ("half", "unrecorded"):
        ran = subprocess.run([sys.executable, "-c", script, tmp_path, f"{site.address}/a.bin", moment], env=os.environ, check=False)
        assert ran.returncode == -9
        assert list(tmp_path.iterdir()) != []
        assert not list(tmp_path.glob("*.json"))
    assert read(Opener(tmp_path), f"{site.address}/a.bin") == DATA
