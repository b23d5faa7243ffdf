import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from aquatint.data.places import Opener
from aquatint.data.sources.listing import Remarks, Source
from aquatint.data.sources.tar import containers, list_tars
from aquatint.errors import DataError
from tests import zoo


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def archive(*members, format=tarfile.USTAR_FORMAT):
    """A tar of names with contents, or of `member`s."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for one in members:
            info, data = one if isinstance(one[0], tarfile.TarInfo) else member(*one)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def written(path, *members, **options):
    path.write_bytes(archive(*members, **options))
    return path


def listed(path, **settings):
    remarks = Remarks()
    return list(list_tars(Source(str(path), kind="tar", **settings), Opener(), remarks)), remarks


def read(place):
    with Opener().open(place) as file:
        return file.read()


def contents(entries):
    """Names of pictures with the bytes of the picture, caption and mask."""
    return {entry.name: tuple(read(place) if place else None for place in (entry.picture, entry.caption, entry.mask)) for entry in entries}


def names(entries):
    return [entry.name for entry in entries]


def test_members_are_ranges_of_their_tar_in_its_order(tmp_path):
    path = written(
        tmp_path / "s.tar", ("b.jpg", b"one"), ("b.txt", b"A b."), ("a.png", b"two"), ("dir/c.webp", b"x" * 5000), ("a.txt", b"")
    )
    entries, remarks = listed(path)
    assert contents(entries) == {
        "s.tar/b.jpg": (b"one", b"A b.", None),
        "s.tar/a.png": (b"two", b"", None),
        "s.tar/dir/c.webp": (b"x" * 5000, None, None),
    }
    assert names(entries) == ["s.tar/b.jpg", "s.tar/a.png", "s.tar/dir/c.webp"]
    assert {entry.identity for entry in entries} == {Opener().identity(str(path))}
    assert entries[0].caption_identity == entries[0].identity
    assert remarks == Remarks()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_in_every_dialect(tmp_path, format):
    long = "folder/" * 25 + "ü" * (60 if format != tarfile.USTAR_FORMAT else 20)
    path = written(tmp_path / "s.tar", (f"{long}.jpg", b"one"), (f"{long}.txt", b"two"), ("./a.jpg", b"3"), format=format)
    assert contents(listed(path)[0]) == {f"s.tar/{long}.jpg": (b"one", b"two", None), "s.tar/a.jpg": (b"3", None, None)}


def test_names_that_cannot_be_printed_are_escaped(tmp_path):
    path = written(
        tmp_path / "s.tar", ("a\nb.jpg", b"1"), (b"\xff.jpg".decode("utf-8", "surrogateescape"), b"2"), format=tarfile.GNU_FORMAT
    )
    assert names(listed(path)[0]) == ["s.tar/a\\nb.jpg", "s.tar/\\udcff.jpg"]


def test_captions_have_the_pictures_name_or_else_its_webdataset_key(tmp_path):
    path = written(
        tmp_path / "s.tar",
        ("1.jpg", b""" """), ("1.json", b"{}"), ("1.txt", b"one"), ("1.cls", b"7"),
        ("2.input.jpg", b" "), ("2.target.png", b" "), ("2.txt", b"two"),
        ("3.4.jpg", b" "), ("3.4.txt", b"three"), ("3.txt", b"nobody's"),
        ("5/a.jpg", b" "), ("a.txt", b"elsewhere"),
    )  # fmt: skip
    entries, remarks = listed(path)
    assert {name: caption for name, (_, caption, _) in contents(entries).items()} == {
        "s.tar/1.jpg": b"one",
        "s.tar/2.input.jpg": b"two",
        "s.tar/2.target.png": b"two",
        "s.tar/3.4.jpg": b"three",
        "s.tar/5/a.jpg": None,
    }
    assert remarks.warnings == [
        "pictures of the same name share one caption; rename them if that is not meant: s.tar/2.input.jpg and s.tar/2.target.png",
        f"2 caption files in {path} without a picture: s.tar/3.txt, s.tar/a.txt",
    ]
    assert remarks.others == {".json": 1, ".cls": 1}
    entries, _ = listed(path, caption_extensions=(".json", ".cls"))
    assert {name: caption for name, (_, caption, _) in contents(entries).items() if caption} == {"s.tar/1.jpg": b"{}"}
    entries, _ = listed(path, caption_extensions=(".cls", ".json"))
    assert contents(entries)["s.tar/1.jpg"] == (b" ", b"7", None)


def test_masks_lie_in_the_tar_too(tmp_path):
    path = written(
        tmp_path / "s.tar", ("x/a.jpg", b"1"), ("x/a.mask.png", b"m"), ("x/b.jpg", b"2"), ("x/masks/b.png", b"n"), ("y-masklabel.png", b"o")
    )
    entries, remarks = listed(path, masks="files")
    assert contents(entries) == {"s.tar/x/a.jpg": (b"1", None, b"m"), "s.tar/x/b.jpg": (b"2", None, b"n")}
    assert remarks.warnings == [f"1 mask in {path} without a picture: s.tar/y-masklabel.png"]


class Canary:
    def __reduce__(self):
        return os.mkdir, (os.environ["AQUATINT_CANARY"],)


def test_pickles_and_programs_are_counted_and_never_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("AQUATINT_CANARY", str(tmp_path / "canary"))
    bomb = pickle.dumps(Canary())
    endings = ("pyd", "pickle", "pkl", "pth", "npy")
    path = written(tmp_path / "s.tar", ("a.jpg", b"1"), *((f"a.{ending}", bomb) for ending in endings))
    entries, remarks = listed(path)
    assert contents(entries) == {"s.tar/a.jpg": (b"1", None, None)}
    assert remarks.others == {f".{ending}": 1 for ending in endings}
    assert not (tmp_path / "canary").exists()


def test_members_that_cannot_be_used_are_named_with_the_reason(tmp_path):
    path = written(
        tmp_path / "s.tar",
        ("good.jpg", b"1"),
        member("../up.jpg", b"2"),
        member("/etc/absolute.jpg", b"3"),
        member("x/../../sly.jpg", b"4"),
        member("link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg"),
        member("device.jpg", type=tarfile.CHRTYPE),
        member("pipe.jpg", type=tarfile.FIFOTYPE),
        member("sparse.jpg", type=tarfile.GNUTYPE_SPARSE),
        ("good.jpg", b"another"),
        ("empty.jpg", b""),
        member("folder.jpg", type=tarfile.DIRTYPE),
        member("../up.bin", b"5"),
        member("device.bin", type=tarfile.BLKTYPE),
        member("good.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    )
    before = sorted(tmp_path.parent.rglob("*"))
    entries, remarks = listed(path)
    assert contents(entries) == {"s.tar/good.jpg": (b"1", None, None)}
    assert dict(remarks.problems) == {
        "s.tar/../up.jpg": "its name leads out of the archive",
        "s.tar/etc/absolute.jpg": "its name leads out of the archive",
        "s.tar/x/../../sly.jpg": "its name leads out of the archive",
        "s.tar/link.jpg": "is a link, which is not followed",
        "s.tar/hard.jpg": "is a link, which is not followed",
        "s.tar/device.jpg": "is not a plain file",
        "s.tar/pipe.jpg": "is not a plain file",
        "s.tar/sparse.jpg": "is a sparse file, which is not stored in one piece",
        "s.tar/good.jpg": "is in the archive twice; the first one is used",
        "s.tar/empty.jpg": "the file is empty",
    }
    assert len(remarks.problems) == 10
    assert remarks.others == {".bin": 2}
    assert remarks.warnings == [
        "captions that cannot be used, so that their pictures have none: s.tar/good.txt (is a link, which is not followed)"
    ]
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_hidden_members_are_counted(tmp_path):
    path = written(tmp_path / "s.tar", ("a.jpg", b"1"), ("._a.jpg", b"2"), (".thumbs/b.jpg", b"3"))
    entries, remarks = listed(path)
    assert names(entries) == ["s.tar/a.jpg"]
    assert remarks.others == {"hidden": 2}


# Damage


def two(tmp_path):
    """Two pictures of 1000 bytes: headers at 0 and 1536, the end mark at 3072."""
    return written(tmp_path / "s.tar", ("a.jpg", bytes(1000)), ("b.jpg", bytes(1000)))


def test_of_a_tar_cut_off_in_a_picture_the_rest_is_used(tmp_path):
    path = two(tmp_path)
    os.truncate(path, 2500)
    entries, remarks = listed(path)
    assert names(entries) == ["s.tar/a.jpg"]
    assert remarks.problems[0] == ("s.tar/b.jpg", "the archive ends before it does")
    assert remarks.problems[1] == ("s.tar", "is damaged or cut off at byte 3,072; the members after it are lost")


def test_of_a_tar_cut_off_in_a_header_the_rest_is_used(tmp_path):
    path = two(tmp_path)
    os.truncate(path, 1700)
    entries, remarks = listed(path)
    assert names(entries) == ["s.tar/a.jpg"]
    assert remarks.problems == [("s.tar", "is damaged or cut off at byte 1,536; the members after it are lost")]


def test_a_tar_without_an_end_mark_may_be_cut_off(tmp_path):
    path = two(tmp_path)
    os.truncate(path, 3072)
    entries, remarks = listed(path)
    assert len(entries) == 2
    assert remarks.warnings == ["s.tar has no end mark: if it was cut off there, the members after it are lost"]


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = two(tmp_path)
    data = bytearray(path.read_bytes())
    data[1540] ^= 0xFF
    path.write_bytes(data)
    entries, remarks = listed(path)
    assert names(entries) == ["s.tar/a.jpg"]
    assert remarks.problems == [("s.tar", "is damaged or cut off at byte 1,536; the members after it are lost")]


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"<html>" * 200, bytes(100)])
def test_what_is_no_tar_is_a_problem(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    entries, remarks = listed(tmp_path / "s.tar")
    assert entries == []
    assert [name for name, _ in remarks.problems] == ["s.tar"]


def test_an_empty_tar_is_fine(tmp_path):
    assert listed(written(tmp_path / "s.tar")) == ([], Remarks())


def header(name=b"a.jpg", size=0, kind=b"0"):
    """A header with a right checksum and any size, also a negative one (in base 256)."""
    number = b"%011o\0" % size if 0 <= size < 8**11 else (size % (1 << 96) | ((0xFF if size < 0 else 0x80) << 88)).to_bytes(12, "big")
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + number + b"00000000000\0" + b" " * 8 + kind).ljust(
        512, b"\0"
    )
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "data",
    [
        header(size=-512) * 3,
        header() + header(b"b.jpg", size=-512) + bytes(1024),
        header() + header(b"b.jpg") + header(b"c.jpg", size=-1024) + bytes(1024),
        header() + header(b"x", size=-512, kind=b"x") + header(b"b.jpg"),
        header(size=1 << 70) + bytes(1024),
        header() + header(b"x", size=1 << 33, kind=b"x") + bytes(1024),
        header() + header(b"././@LongLink", size=1 << 33, kind=b"L") + bytes(1024),
        header(b"x", size=0, kind=b"x") * 5000,
    ],
    ids=[
        "backwards",
        "on the spot",
        "back again",
        "negative extension",
        "beyond all disks",
        "8 GB of pax",
        "8 GB of name",
        "endless extensions",
    ],
)
def test_headers_that_lie_end_the_tar_and_nothing_else(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    _, remarks = listed(tmp_path / "s.tar")
    assert remarks.problems
    assert remarks.problems[-1][0].startswith("s.tar")


def test_wherever_a_tar_is_damaged_its_listing_ends_with_true_ranges(tmp_path):
    """Never an exception or a range outside of the file. Bytes are changed and files are cut all over, from a fixed seed."""
    rng = np.random.default_rng(5)
    long = "n" * 150
    parts = [(f"{long}{index}.{ending}", bytes(700)) for index in range(4) for ending in ("jpg", "txt")]
    wholes = [archive(*parts, format=format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    found = set()
    for attempt in range(300):
        data = bytearray(wholes[attempt % 2])
        for _ in range(rng.integers(1, 4)):
            block = int(rng.integers(len(data) // 512)) * 512
            data[block + int(rng.integers(0, 300))] = int(rng.integers(256))
        (tmp_path / "s.tar").write_bytes(data[: rng.integers(len(data))] if attempt % 5 == 0 else data)
        entries, _ = listed(tmp_path / "s.tar")
        size = (tmp_path / "s.tar").stat().st_size
        assert all(0 <= entry.picture.start <= entry.picture.start + entry.picture.length <= size for entry in entries)
        found.add(len(entries))
    assert len(found) > 3


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_with_the_way_out(tmp_path, kind):
    with tarfile.open(tmp_path / "s.tar", f"w:{kind}") as tar:
        tar.addfile(*member("a.jpg"))
    with pytest.raises(DataError, match="is compressed") as caught:
        listed(tmp_path / "s.tar")
    assert "unpack it once with" in caught.value.hint


# Which files


def found(path):
    return [Path(name).name for name in containers(Source(str(path), kind="tar"), Opener())]


def test_tars_are_named_by_file_folder_star_or_braces(tmp_path):
    for number in range(8, 12):
        written(tmp_path / f"x-{number:03}.tar", (f"{number}.jpg", b"1"))
    every = [f"x-{number:03}.tar" for number in range(8, 12)]
    assert found(tmp_path / "x-009.tar") == every[1:2]
    assert found(tmp_path) == every
    assert found(tmp_path / "*.tar") == every
    assert found(tmp_path / "x-{008..011}.tar") == every
    assert found(tmp_path / "x-{011..008}.tar") == every
    assert found(tmp_path / "x-0{08,11}.tar") == [every[0], every[3]]
    assert found(tmp_path / "x-{00{8,9},010}.tar") == every[:3]
    assert found(tmp_path / "x-0{0..1}[01].tar") == every[2:]
    assert names(listed(tmp_path)[0]) == [f"x-{number:03}.tar/{number}.jpg" for number in range(8, 12)]


def test_a_name_with_braces_that_is_there_is_meant_as_it_is(tmp_path):
    written(tmp_path / "{1..2}*.tar")
    assert found(tmp_path / "{1..2}*.tar") == ["{1..2}*.tar"]


def test_numbers_are_padded_as_in_a_shell(tmp_path):
    assert found(tmp_path / "{8..11}") == ["10", "11", "8", "9"]
    assert found(tmp_path / "{0008..9}.tar") == ["0008.tar", "0009.tar"]
    assert found(tmp_path / "{a}{,}{}.tar") == ["{a}{}.tar"]


def test_braces_that_stand_for_too_many_files_are_an_error(tmp_path):
    for braces in ("{0..99999999999999}", "{0..999}{0..999}{0..999}"):
        with pytest.raises(DataError, match="stands for more than 100,000 files"):
            found(tmp_path / f"{braces}.tar")


def test_a_missing_tar_is_an_error(tmp_path):
    written(tmp_path / "1.tar")
    with pytest.raises(DataError, match=r"the tar file .*2\.tar cannot be read: No such file"):
        listed(tmp_path / "{1..2}.tar")
    with pytest.raises(DataError, match="there is no tar file"):
        listed(tmp_path / "*.tgz")


def test_a_listing_is_lazy_tar_by_tar(tmp_path):
    written(tmp_path / "1.tar", ("a.jpg", b"1"))
    (tmp_path / "2.tar").write_bytes(b"\x1f\x8b")
    entries = list_tars(Source(str(tmp_path), kind="tar"), Opener(), Remarks())
    assert next(entries).name == "1.tar/a.jpg"
    with pytest.raises(DataError):
        next(entries)


def test_pictures_of_a_tar_load_as_those_of_a_folder(tmp_path):
    from aquatint.data.image import digest_picture, load_image, quiet_decoders, read_header

    zoo.write(tmp_path / "folder", zoo.USED)
    paths = sorted((tmp_path / "folder").iterdir())
    entries, _ = listed(written(tmp_path / "s.tar", *((path.name, path.read_bytes()) for path in paths)))
    opener = Opener()
    for path, entry in zip(paths, entries, strict=True):
        with opener.open(entry.picture) as packed, path.open("rb") as plain, quiet_decoders():
            assert digest_picture(packed) == digest_picture(plain)
            assert read_header(packed, 10**8) == read_header(plain, 10**8)
            assert (load_image(packed, "#ffffff", 10**8) == load_image(plain, "#ffffff", 10**8)).all()
