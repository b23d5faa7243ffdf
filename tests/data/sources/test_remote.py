"""Folders and tars in an object store: a server on this machine that speaks S3."""

import io
import json
import tarfile

import pytest

from aquatint.data import downloads
from aquatint.data.places import Opener, Place
from aquatint.data.sources.folder import list_folder
from aquatint.data.sources.listing import Remarks, Source
from aquatint.data.sources.tar import containers, list_tars
from aquatint.errors import DataError, StorageError, UsageError
from tests.servers import object_store, web

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:moto"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:aiobotocore"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:werkzeug"),
    pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def store():
    with object_store() as address:
        yield address


@pytest.fixture
def bucket(store, monkeypatch):
    """An empty bucket's client: `put(key, data)` and so on. Nothing of the surroundings is asked for credentials or regions."""
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": store,
        "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.01)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    yield client
    for item in client.list_objects_v2(Bucket="pictures").get("Contents", ()):
        client.delete_object(Bucket="pictures", Key=item["Key"])
    client.close()


def put(bucket, **files):
    for name, data in files.items():
        bucket.put_object(Bucket="pictures", Key=name, Body=data)


def tar(**members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(opener, place):
    with opener.open(place) as file:
        return file.read()


def test_an_object_is_read_through_the_copy_until_it_changes(bucket, tmp_path):
    put(bucket, **{"a.jpg": b"one" * 1000})
    opener = Opener(tmp_path)
    before = opener.identity("s3://pictures/a.jpg")
    assert before.size == 3000
    assert read(opener, Place("s3://pictures/a.jpg")) == b"one" * 1000
    bucket.delete_object(Bucket="pictures", Key="a.jpg")
    assert read(opener, Place("s3://pictures/a.jpg", 3, 3)) == b"one"
    put(bucket, **{"a.jpg": b"two" * 1000})
    assert opener.identity("s3://pictures/a.jpg") != before
    assert read(opener, Place("s3://pictures/a.jpg")) == b"two" * 1000
    (record,) = (json.loads(path.read_bytes()) for path in tmp_path.glob("*.json"))
    assert record["url"] == "s3://pictures/a.jpg"
    assert record["size"] == 3000


def test_large_objects_come_whole(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_CHUNK_BYTES", 1 << 20)
    data = bytes(range(256)) * (12 << 12)
    put(bucket, large=data)
    assert read(Opener(tmp_path), Place("s3://pictures/large")) == data


def test_what_is_not_there_or_not_allowed_is_an_error(bucket, tmp_path):
    opener = Opener(tmp_path)
    with pytest.raises(FileNotFoundError):
        opener.identity("s3://pictures/gone.jpg")
    with pytest.raises(FileNotFoundError):
        opener.open(Place("s3://pictures/gone.jpg"))
    put(bucket, **{"folder/a.jpg": b"1"})
    with pytest.raises(IsADirectoryError):
        opener.identity("s3://pictures/folder")
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_leaves_nothing(bucket, tmp_path, monkeypatch):
    put(bucket, **{"a.jpg": b"one"})
    opener = Opener(tmp_path)
    opener.identity("s3://pictures/a.jpg")
    bucket.put_object(Bucket="pictures", Key="a.jpg", Body=b"changed")
    with pytest.raises(StorageError, match=r"could not read s3://pictures/a\.jpg: 7 of 3 bytes came"):
        opener.open(Place("s3://pictures/a.jpg"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_a_store_is_listed_as_one_on_a_disk(bucket, tmp_path):
    names = ["b.jpg", "b.txt", "a/c.png", "a.b/d.gif", "a/.hidden.jpg", "e.npz", "b-masklabel.png", "masks/f.png", "f.jpg", "q.txt"]
    put(bucket, **{f"set/{name}": name.encode() for name in names})
    put(bucket, **{"set2/other.jpg": b"x", "set/empty/": b""})
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(name.encode())
    opener = Opener(tmp_path / "downloads")

    def listed(path):
        remarks = Remarks()
        source = Source(path, masks="files")
        entries = [
            (entry.name, *(read(opener, place) if place else None for place in (entry.picture, entry.caption, entry.mask)))
            for entry in list_folder(source, opener, remarks)
        ]
        return entries, [text.replace(path, "") for text in remarks.warnings], remarks.others, remarks.problems

    found = listed("s3://pictures/set")
    assert found == listed(str(tmp_path / "set"))
    assert [name for name, *_ in found[0]] == ["set/a.b/d.gif", "set/a/c.png", "set/b.jpg", "set/f.jpg"]
    assert listed("s3://pictures/set/")[0] == found[0]


def test_a_listing_tells_the_same_identities_as_the_objects_themselves(bucket, monkeypatch):
    put(bucket, **{"set/a.jpg": b"1", "set/a.txt": b"22"})
    (entry,) = list_folder(Source("s3://pictures/set"), Opener(), Remarks())
    assert entry.identity == Opener().identity("s3://pictures/set/a.jpg")
    assert entry.caption_identity == Opener().identity("s3://pictures/set/a.txt")


def test_an_old_listing_does_not_hide_a_change(bucket):
    put(bucket, **{"set/a.jpg": b"1"})
    opener = Opener()
    (before,) = list_folder(Source("s3://pictures/set"), opener, Remarks())
    put(bucket, **{"set/a.jpg": b"2", "set/b.jpg": b"3"})
    assert opener.identity("s3://pictures/set/a.jpg") != before.identity
    assert [entry.name for entry in list_folder(Source("s3://pictures/set"), opener, Remarks())] == ["set/a.jpg", "set/b.jpg"]


def test_objects_of_a_listing_are_not_asked_for_one_by_one(bucket, monkeypatch):
    put(bucket, **{f"set/{number}.jpg": b"1" for number in range(5)})
    monkeypatch.setattr(downloads, "_info", lambda url: pytest.fail("asked"))
    assert len(list(list_folder(Source("s3://pictures/set"), Opener(), Remarks()))) == 5


def test_a_folder_that_is_not_in_the_store_is_an_error(bucket):
    with pytest.raises(DataError, match="the picture folder s3://pictures/gone does not exist"):
        list(list_folder(Source("s3://pictures/gone"), Opener(), Remarks()))


def test_a_web_server_has_no_folders():
    with pytest.raises(UsageError, match="cannot be asked for the pictures"):
        list(list_folder(Source("https://user:pw@127.0.0.1/pictures/"), Opener(), Remarks()))


def test_tars_in_a_store_are_downloaded_and_their_members_are_ranges(bucket, tmp_path):
    shards = {
        f"sets/x-{number}.tar": tar(**{f"{number}.jpg": b"picture %d" % number, f"{number}.txt": b"caption %d" % number})
        for number in range(7)
    }
    put(bucket, **shards)
    opener, remarks = Opener(tmp_path), Remarks()
    source = Source("s3://pictures/sets/x-{0..6}.tar", kind="tar")
    entries = list(list_tars(source, opener, remarks))
    assert [entry.name for entry in entries] == [f"x-{number}.tar/{number}.jpg" for number in range(7)]
    assert [read(opener, entry.picture) for entry in entries] == [b"picture %d" % number for number in range(7)]
    assert [read(opener, entry.caption) for entry in entries] == [b"caption %d" % number for number in range(7)]
    assert entries[0].picture.path == "s3://pictures/sets/x-0.tar"
    assert entries[0].identity == opener.identity("s3://pictures/sets/x-0.tar")
    assert remarks == Remarks()
    every = tuple(f"s3://pictures/{name}" for name in shards)
    for path in ("s3://pictures/sets/x-{0..6}.tar", "s3://pictures/sets/*.tar", "s3://pictures/sets/"):
        assert containers(Source(path, kind="tar"), opener) == every


def test_a_tar_that_is_not_in_the_store_is_an_error(bucket, tmp_path):
    put(bucket, **{"0.tar": tar(**{"a.jpg": b"1"})})
    entries = list_tars(Source("s3://pictures/{0..1}.tar", kind="tar"), Opener(tmp_path), Remarks())
    assert next(entries).name == "0.tar/a.jpg"
    with pytest.raises(DataError, match=r"s3://pictures/1\.tar cannot be read: it does not exist"):
        next(entries)
    with pytest.raises(DataError, match="there is no tar file"):
        containers(Source("s3://pictures/none-*.tar", kind="tar"), Opener())


def test_tars_on_a_web_server_may_have_a_key_in_their_address_which_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.01)
    with web() as site:
        site.files["/a.tar"] = tar(**{"a.jpg": b"1"})
        opener, remarks = Opener(tmp_path), Remarks()
        source = Source(f"{site.address}/a.tar?key=s3cr3t", kind="tar")
        (entry,) = list_tars(source, opener, remarks)
        assert entry.name == "a.tar/a.jpg"
        assert read(opener, entry.picture) == b"1"
