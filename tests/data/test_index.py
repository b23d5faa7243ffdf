import os
import shutil
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data import index as index_module
from aquatint.data import indexing
from aquatint.data.index import SCHEMA, Index, IndexWriter, Lookup, fixed_bytes, index_name, load_index, stamp_of, take
from aquatint.data.manifest import scan
from aquatint.data.places import Identity, Opener, Place
from aquatint.data.sources import folder
from aquatint.data.sources.listing import Source
from aquatint.errors import StorageError
from tests import zoo
from tests.data.test_manifest import MAX_PIXELS, draw

SIZES_HW = [(24, 32), (32, 24), (40, 40)]


class Spy(Opener):
    """Counts what is opened, and whose times are asked for, by the last part of the path."""

    def __init__(self):
        super().__init__()
        self.opened, self.asked = [], []

    def open(self, place):
        self.opened.append(Path(place.path).name)
        return super().open(place)

    def identity(self, path):
        self.asked.append(Path(path).name)
        return super().identity(path)


def settle():
    """Waits until a change of a file is sure to show in its times."""
    time.sleep(0.03)


def scanned(tmp_path, *sources, **options):
    """What a scan gives, and what it opened."""
    settle()
    spy = options.pop("opener", None) or Spy()
    found = scan(
        sources or [Source(str(tmp_path / "pictures"))],
        **{"opener": spy, "max_pixels": MAX_PIXELS, "index_folder": tmp_path / "index", "quarantine": {}, **options},
    )
    return found, sorted(spy.opened)


@pytest.fixture
def pictures(tmp_path):
    """Nine pictures with captions, one without, and a bad one."""
    folder = tmp_path / "pictures"
    for index in range(9):
        draw(folder / f"{index}.png", (index, 0, 0), SIZES_HW[index % 3], caption=f"number {index}")
    draw(folder / "bare.png", zoo.BLUE)
    (folder / "bad.png").write_bytes(b"<html>")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The second start


def test_nothing_is_opened_twice_and_nothing_is_written_twice(tmp_path, pictures):
    first, opened = scanned(tmp_path)
    assert opened == sorted(path.name for path in pictures.iterdir())
    assert first.num_read == 11
    written = {path: path.stat().st_ino for path in (tmp_path / "index").iterdir()}
    second, opened = scanned(tmp_path)
    assert opened == []
    assert second.num_read == 0
    assert second == first
    assert {path: path.stat().st_ino for path in (tmp_path / "index").iterdir()} == written


def test_it_is_the_same_with_and_without_an_index(tmp_path, pictures):
    assert scanned(tmp_path)[0] == scanned(tmp_path, index_folder=None)[0] == scanned(tmp_path)[0]


def test_a_changed_caption_is_read_again_and_its_picture_is_not(tmp_path, pictures):
    before, _ = scanned(tmp_path)
    (pictures / "3.txt").write_text("number x")
    after, opened = scanned(tmp_path)
    assert opened == ["3.txt"]
    assert after.num_read == 1
    (row,) = [row for row in range(len(after)) if after.picture(row) != before.picture(row)]
    assert after.picture(row) == replace(before.picture(row), captions=("number x",))
    assert scanned(tmp_path)[1] == []


def test_what_can_be_decoded_smaller_is_known_by_content_and_stays_known(tmp_path, pictures):
    (pictures / "3.png").write_bytes(zoo.encoded(zoo.plain(), "JPEG"))
    for caption in ("number 3", "number x"):
        (pictures / "3.txt").write_text(caption)
        found, _ = scanned(tmp_path)
        assert [found.name(row) for row in np.flatnonzero(found.is_reducible)] == ["pictures/3.png"]
        assert found.is_reducible.shape == (len(found),)


def test_a_caption_that_comes_and_one_that_goes(tmp_path, pictures):
    scanned(tmp_path)
    (pictures / "bare.txt").write_text("new")
    (pictures / "3.txt").unlink()
    after, opened = scanned(tmp_path)
    assert opened == ["bare.txt"]
    captions = {one.name: one.captions for one in after.pictures()}
    assert (captions["pictures/3.png"], captions["pictures/bare.png"]) == ((), ("new",))


def test_a_changed_pixel_shows_though_name_size_and_time_are_the_same(tmp_path, pictures):
    before, _ = scanned(tmp_path)
    path = pictures / "4.png"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after, opened = scanned(tmp_path)
    assert opened == ["4.png", "4.txt"]
    changed = (before.digests != after.digests).any(axis=1)
    assert [before.name(row) for row in np.flatnonzero(changed)] == ["pictures/4.png"]


def test_a_touched_picture_is_read_again_and_nothing_is_different(tmp_path, pictures):
    before, _ = scanned(tmp_path)
    os.utime(pictures / "4.png", (1, 1))
    after, opened = scanned(tmp_path)
    assert opened == ["4.png", "4.txt"]
    assert after == before
    assert scanned(tmp_path)[1] == []


def test_a_copied_tree_without_its_times_is_seen_through_by_a_rehash(tmp_path, pictures, monkeypatch):
    """Where a file system keeps neither change times nor file numbers, a picture can change and look the same."""
    monkeypatch.setattr(folder, "identity_of", lambda status: Identity(status.st_size, status.st_mtime_ns, 0, 0))
    before, _ = scanned(tmp_path)
    path = pictures / "4.png"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scanned(tmp_path) == (before, [])
    draw(pictures / "new.png", zoo.GREEN)
    after, opened = scanned(tmp_path, rehash=True)
    assert len(opened) == 21
    assert "pictures/4.png: has other bytes than before, though its size and times are the same" in after.warnings
    assert len({digest.tobytes() for digest in after.digests} - {digest.tobytes() for digest in before.digests}) == 2
    assert scanned(tmp_path)[1] == []


def draw_mask(path, brightness):
    path.write_bytes(zoo.encoded(zoo.plain(brightness, (24, 32), "L"), "PNG"))


def test_a_changed_mask_is_read_again_and_its_picture_is_not(tmp_path, pictures):
    source = Source(str(pictures), masks="files")
    draw_mask(pictures / "0-masklabel.png", 255)
    before, _ = scanned(tmp_path, source)
    draw_mask(pictures / "0-masklabel.png", 100)
    after, opened = scanned(tmp_path, source)
    assert opened == ["0-masklabel.png", "0.txt"]
    assert (before.mask_digests != after.mask_digests).any(axis=1).tolist() == [True] + [False] * 9
    assert scanned(tmp_path, source)[1] == []


def test_pictures_that_come_and_go(tmp_path, pictures):
    scanned(tmp_path)
    (pictures / "2.png").unlink()
    (pictures / "8.png").rename(pictures / "0a.png")
    draw(pictures / "deep" / "z.png", zoo.GREEN)
    after, opened = scanned(tmp_path)
    assert opened == ["0a.png", "z.png"]
    assert after == scanned(tmp_path, index_folder=None)[0]
    assert scanned(tmp_path)[1] == []


@pytest.mark.parametrize("name", ["0.png", "bad.png", "bare.png"])  # the first used, the only rejected, the last used
def test_a_picture_that_goes_is_gone(tmp_path, pictures, name):
    scanned(tmp_path)
    (pictures / name).unlink()
    after, opened = scanned(tmp_path)
    assert opened == []
    assert after.listed == 10
    assert f"pictures/{name}" not in {one.name for one in (*after.pictures(), *after.rejected)}
    assert scanned(tmp_path) == (after, [])


def test_a_bad_picture_stays_bad_with_another_caption(tmp_path, pictures):
    first, _ = scanned(tmp_path)
    (pictures / "bad.txt").write_text("a caption")
    assert scanned(tmp_path)[0] == first


def test_an_index_is_unchanged_only_if_every_row_comes_up_in_its_order(tmp_path, pictures):
    scanned(tmp_path)
    listed = indexing.list_source(Source(str(pictures)), Opener(), index_folder=tmp_path / "index", max_pixels=MAX_PIXELS)
    assert listed.is_unchanged
    assert listed.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 9]  # the rejected one is numbered last
    assert replace(listed, rows=np.arange(11)).is_unchanged
    for rows in ([1, 0, *range(2, 11)], [0, 0, *range(2, 11)], range(10), range(1, 11)):
        assert not replace(listed, rows=np.array(rows)).is_unchanged


def test_a_file_that_has_just_changed_is_looked_into_once_more(tmp_path, pictures, monkeypatch):
    """It may change again within the same tick of the clock, and then nothing would tell."""
    scanned(tmp_path)
    draw(pictures / "new.png", zoo.GREEN)
    with monkeypatch.context() as slow_clock:
        slow_clock.setattr(indexing, "_TICK_NS", 10**11)
        assert scanned(tmp_path)[1] == ["new.png"]
    assert scanned(tmp_path)[1] == ["new.png"]
    assert scanned(tmp_path)[1] == []


def test_what_could_not_be_read_is_tried_again(tmp_path, pictures):
    class Broken(Spy):
        def open(self, place):
            if place.path.endswith("5.png"):
                raise OSError(5, "Input/output error")
            if place.path.endswith("6.txt"):
                raise StorageError("the server does not answer", hint="wait")
            return super().open(place)

    before, _ = scanned(tmp_path, opener=Broken())
    reasons = {one.name: one.reason for one in before.rejected}
    assert reasons["pictures/5.png"] == "cannot be read: Input/output error"
    assert reasons["pictures/6.png"] == "its caption 6.txt cannot be read: the server does not answer"
    after, opened = scanned(tmp_path)
    assert opened == ["5.png", "5.txt", "6.png", "6.txt"]
    assert len(after) == 10


def test_rejected_pictures_get_another_chance_with_another_decoder(tmp_path, pictures, monkeypatch):
    first, _ = scanned(tmp_path)
    monkeypatch.setattr(indexing, "_DECODER", "Pillow of next year")
    second, opened = scanned(tmp_path)
    assert opened == ["bad.png"]
    assert second == first
    assert scanned(tmp_path)[1] == []


def test_quarantine_needs_no_reading(tmp_path, pictures):
    first, _ = scanned(tmp_path)
    second, opened = scanned(tmp_path, quarantine={first.picture(0).digest: "is broken inside"})
    assert opened == []
    assert second.rejected[-1].reason == "is broken inside"


# What decides what is in an index


def test_other_definitions_have_other_indexes(tmp_path):
    source = Source(str(tmp_path))
    others = [
        Source("elsewhere"), replace(source, kind="tar"), replace(source, caption_extensions=(".txt", ".json")),
        replace(source, caption_lines="alternatives"), replace(source, masks="files"), replace(source, mask_column="mask"),
        replace(source, picture_column="a"), replace(source, caption_columns=("a",)),
    ]  # fmt: skip
    names = {index_name(one, MAX_PIXELS) for one in [source, *others]} | {index_name(source, 1000)}
    assert len(names) == len(others) + 2


def test_what_a_picture_is_for_does_not_matter(tmp_path):
    source = Source(str(tmp_path))
    for other in (replace(source, role="validation"), replace(source, repeats=7), replace(source, trigger="x", loss_weight=2.0)):
        assert index_name(other, 1) == index_name(source, 1)


# Damage


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "zeros", "longer", "other"])
def test_a_damaged_index_is_made_anew(tmp_path, pictures, damage):
    first, _ = scanned(tmp_path)
    (path,) = (tmp_path / "index").iterdir()
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    worse = {
        "cut": data[:-100], "flipped": bytes(flipped), "empty": b"", "zeros": bytes(len(data)), "longer": data + b"x",
        "other": b"a text file\n" * 100,
    }  # fmt: skip
    path.unlink()  # or the pages would be lost that the first one still needs
    path.write_bytes(worse[damage])
    second, opened = scanned(tmp_path)
    assert len(opened) == 20
    assert second == first
    assert (first.num_damaged, second.num_damaged) == (0, 1)
    assert scanned(tmp_path)[0].num_damaged == 0
    assert scanned(tmp_path)[1] == []


def test_a_missing_index_is_no_damage(tmp_path, pictures):
    scanned(tmp_path)
    shutil.rmtree(tmp_path / "index")
    second, opened = scanned(tmp_path)
    assert len(opened) == 20
    assert second.num_damaged == 0


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_damage_goes_unnoticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("index") / "a.index"
    written(path, rows(20))
    good = path.read_bytes()
    start = data.draw(st.integers(0, len(good) - 1))
    bad = good[:start] + data.draw(st.binary(max_size=8)) + good[data.draw(st.integers(start, len(good))) :]
    path.write_bytes(bad)
    assert (load_index(path) is None) == (bad != good)


# Interruptions and company


def test_an_interrupted_first_reading_is_not_lost(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(indexing, "_PART_SECONDS", 0.0)
    monkeypatch.setattr(indexing, "_ROWS_AT_ONCE", 4)

    class Stopped(Spy):
        def open(self, place):
            if place.path.endswith("bad.png"):  # behind the numbers, and before the one without a caption
                raise KeyboardInterrupt
            return super().open(place)

    with pytest.raises(KeyboardInterrupt):
        scanned(tmp_path, opener=Stopped())
    assert {path.suffix for path in (tmp_path / "index").iterdir()} == {".part"}
    after, opened = scanned(tmp_path)
    assert opened == ["8.png", "8.txt", "bad.png", "bare.png"]
    assert [path.suffix for path in (tmp_path / "index").iterdir()] == [".index"]
    assert after == scanned(tmp_path, index_folder=None)[0]
    assert scanned(tmp_path)[1] == []


def test_saving_in_parts_gives_the_same_index(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(indexing, "_ROWS_AT_ONCE", 3)
    whole, _ = scanned(tmp_path)
    monkeypatch.setattr(indexing, "_PART_SECONDS", 0.0)
    in_parts, _ = scanned(tmp_path, index_folder=tmp_path / "other")
    assert in_parts == whole
    (one,), (other,) = (list((tmp_path / name).iterdir()) for name in ("index", "other"))
    assert load_index(one).rows.equals(load_index(other).rows)


def test_a_damaged_part_is_counted_and_removed(tmp_path, pictures):
    scanned(tmp_path)
    (path,) = (tmp_path / "index").iterdir()
    path.with_name(f"{path.stem}.0123.part").write_bytes(b"nothing")
    after, opened = scanned(tmp_path)
    assert (after.num_damaged, opened) == (1, [])
    assert list((tmp_path / "index").iterdir()) == [path]


def test_several_may_scan_at_once(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(indexing, "_PART_SECONDS", 0.0)
    monkeypatch.setattr(indexing, "_ROWS_AT_ONCE", 2)
    settle()
    found, troubles = [], []

    def work():
        try:
            for _ in range(3):
                os.utime(pictures / "0.png")
                found.append(scanned(tmp_path)[0])
        except BaseException as error:
            troubles.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not troubles
    assert all(one == found[0] for one in found)
    scanned(tmp_path)
    assert scanned(tmp_path)[1] == []
    assert [path.suffix for path in (tmp_path / "index").iterdir()] == [".index"]


def test_an_index_that_is_replaced_can_still_be_read(tmp_path, pictures):
    first, _ = scanned(tmp_path)
    kept = list(first.pictures())
    for path in pictures.glob("*.txt"):
        path.write_text("another and much longer caption than it was")
    scanned(tmp_path)
    shutil.rmtree(tmp_path / "index")
    assert list(first.pictures()) == kept


# Tables and tars


def write_table(pictures, rows):
    path = pictures / "metadata.jsonl"
    path.write_text("".join(f'{{"file_name": "{name}", "text": "{text}"}}\n' for name, text in rows))
    return Source(str(path), kind="table")


def test_an_unchanged_table_is_not_read_but_its_files_are_asked(tmp_path, pictures):
    source = write_table(pictures, [("0.png", "zero"), ("1.png", "one"), ("bad.png", "bad")])
    first, opened = scanned(tmp_path, source)
    assert opened == ["0.png", "1.png", "bad.png", "metadata.jsonl"]
    spy = Spy()
    second, opened = scanned(tmp_path, source, opener=spy)
    assert second == first
    assert opened == []
    assert sorted(spy.asked) == ["0.png", "1.png", "bad.png", "metadata.jsonl"]
    os.utime(pictures / "1.png", (1, 1))
    assert scanned(tmp_path, source)[1] == ["1.png", "metadata.jsonl"]
    assert scanned(tmp_path, source)[1] == []
    (pictures / "1.png").unlink()
    third, opened = scanned(tmp_path, source)
    assert opened == ["metadata.jsonl"]
    assert [(one.name, one.bad) for one in third.rejected if "1.png" in one.reason] == [("metadata.jsonl, line 2", True)]


def test_a_table_that_has_just_changed_is_read_once_more(tmp_path, pictures, monkeypatch):
    source = write_table(pictures, [("0.png", "zero")])
    itself, has_settled = Opener().identity(source.path), indexing._has_settled
    monkeypatch.setattr(indexing, "_has_settled", lambda some, now: itself not in (some := list(some)) and has_settled(some, now))
    scanned(tmp_path, source)
    monkeypatch.undo()
    assert scanned(tmp_path, source)[1] == ["metadata.jsonl"]
    assert scanned(tmp_path, source)[1] == []


def test_a_file_that_a_table_misses_may_come_later(tmp_path, pictures):
    source = write_table(pictures, [("0.png", "zero"), ("later.png", "later")])
    first, _ = scanned(tmp_path, source)
    assert (len(first), first.listed) == (1, 2)
    draw(pictures / "later.png", zoo.GREEN)
    second, opened = scanned(tmp_path, source)
    assert opened == ["later.png", "metadata.jsonl"]
    assert len(second) == 2


def test_a_table_that_was_touched_is_read_once(tmp_path, pictures):
    source = write_table(pictures, [("0.png", "zero")])
    first, _ = scanned(tmp_path, source)
    os.utime(pictures / "metadata.jsonl", (1, 1))
    assert scanned(tmp_path, source) == (first, ["metadata.jsonl"])
    assert scanned(tmp_path, source) == (first, [])
    assert scanned(tmp_path, source, rehash=True) == (first, ["0.png", "metadata.jsonl"])


def test_the_masks_of_an_unchanged_table_are_asked_too(tmp_path, pictures):
    draw_mask(pictures / "m.png", 255)
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "zero", "mask": "m.png"}\n')
    source = Source(str(pictures / "metadata.jsonl"), kind="table", mask_column="mask")
    before, _ = scanned(tmp_path, source)
    assert before.picture(0).mask == Place(str(pictures / "m.png"))
    assert scanned(tmp_path, source) == (before, [])
    draw_mask(pictures / "m.png", 100)
    after, opened = scanned(tmp_path, source)
    assert opened == ["m.png", "metadata.jsonl"]
    assert (before.mask_digests != after.mask_digests).any()


def test_a_changed_table_reads_no_picture_again(tmp_path, pictures):
    scanned(tmp_path, write_table(pictures, [("0.png", "zero"), ("1.png", "one")]))
    second, opened = scanned(tmp_path, write_table(pictures, [("0.png", "zero"), ("1.png", "two")]))
    assert opened == ["metadata.jsonl"]
    assert [one.captions for one in second.pictures()] == [("zero",), ("two",)]


def test_the_same_picture_may_be_in_a_table_twice(tmp_path, pictures):
    source = write_table(pictures, [("0.png", "zero"), ("0.png", "none"), ("0.png", "zero")])
    first, _ = scanned(tmp_path, source)
    assert [one.captions for one in first.pictures()] == [("zero",), ("none",), ("zero",)]
    assert scanned(tmp_path, source) == (first, [])


def write_tar(path, names, pictures):
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(pictures / name, name)


def test_an_unchanged_tar_is_not_opened(tmp_path, pictures):
    write_tar(tmp_path / "a.tar", ["0.png", "0.txt", "bad.png"], pictures)
    write_tar(tmp_path / "b.tar", ["1.png", "1.txt"], pictures)
    source = Source(str(tmp_path / "*.tar"), kind="tar")
    first, _ = scanned(tmp_path, source)
    assert [one.captions for one in first.pictures()] == [("number 0",), ("number 1",)]
    assert scanned(tmp_path, source) == (first, [])
    write_tar(tmp_path / "b.tar", ["1.png", "1.txt", "2.png"], pictures)
    second, opened = scanned(tmp_path, source)
    assert set(opened) == {"a.tar", "b.tar"}
    assert [len(one.captions) for one in second.pictures()] == [1, 1, 0]
    write_tar(tmp_path / "c.tar", ["3.png"], pictures)
    assert len(scanned(tmp_path, source)[0]) == 4


def test_what_could_not_be_read_of_a_tar_is_tried_again(tmp_path, pictures):
    class Broken(Spy):
        def open(self, place):
            if 0 < place.start < 2000:  # the first one
                raise OSError(5, "Input/output error")
            return super().open(place)

    write_tar(tmp_path / "a.tar", ["0.png", "1.png"], pictures)
    source = Source(str(tmp_path / "a.tar"), kind="tar")
    assert len(scanned(tmp_path, source, opener=Broken())[0]) == 1
    assert len(scanned(tmp_path, source)[0]) == 2


def test_what_a_tar_says_of_itself_is_remembered(tmp_path, pictures):
    (pictures / "notes.md").write_text("x")
    write_tar(tmp_path / "a.tar", ["0.png", "2.txt", "0.png", "notes.md"], pictures)
    source = Source(str(tmp_path / "a.tar"), kind="tar")
    first, _ = scanned(tmp_path, source)
    assert first.warnings
    assert first.others == {".md": 1}
    assert len(first.rejected) == 1
    assert scanned(tmp_path, source) == (first, [])


def test_captions_in_tars_are_json_if_they_look_like_it(tmp_path, pictures):
    (pictures / "0.json").write_text('{"caption": "from json"}')
    (pictures / "1.txt").write_text("{red|blue} fox")
    write_tar(tmp_path / "a.tar", ["0.png", "0.json", "1.png", "1.txt"], pictures)
    source = Source(str(tmp_path / "a.tar"), kind="tar", caption_extensions=(".json", ".txt"))
    assert [one.captions for one in scanned(tmp_path, source)[0].pictures()] == [("from json",), ("{red|blue} fox",)]


# Columns


def rows(count, reasons=()):
    columns = {field.name: pa.nulls(count, field.type) for field in SCHEMA}
    columns["name"] = pa.array([f"{row}.png" for row in range(count)])
    columns["stamp"] = pa.array([row.to_bytes(16, "big") for row in range(1, count + 1)], pa.binary(16))
    columns["reason"] = pa.array(["is bad" if row in reasons else None for row in range(count)], pa.string())
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def written(path, *tables, rejected=None, metadata=None):
    with path.open("wb") as file:
        writer = IndexWriter(file)
        for table in tables:
            writer.add(table, SCHEMA.empty_table())
        writer.add(SCHEMA.empty_table(), rejected or SCHEMA.empty_table())
        writer.finish(metadata or {})


def test_an_index_is_what_was_written(tmp_path):
    bad = rows(3, reasons=range(3))
    written(tmp_path / "a.index", rows(5), rows(2), rejected=bad, metadata={"problems": [["a", "ö"]]})
    index = load_index(tmp_path / "a.index")
    assert index.used.equals(pa.concat_tables([rows(5), rows(2)]))
    assert index.rejected.equals(bad)
    assert index.metadata == {"problems": [["a", "ö"]]}
    assert len(index) == 10


@pytest.mark.parametrize("is_local", [True, False])
def test_an_index_is_mapped_where_that_is_safe(tmp_path, monkeypatch, is_local):
    """A file that is shortened under a mapping would end the process."""
    monkeypatch.setattr(index_module, "_LOCAL", {"ext4", "overlay", "tmpfs", "xfs", "btrfs"} if is_local else set())
    path = tmp_path / "a.index"
    written(path, rows(5))
    index = load_index(path)
    mapped = str(path) in Path("/proc/self/maps").read_text()
    assert mapped == is_local
    assert index.used.equals(rows(5))


def test_any_arrow_program_can_read_an_index(tmp_path):
    written(tmp_path / "a.index", rows(5))
    with (tmp_path / "a.index").open("rb") as file:
        assert pa.ipc.open_stream(file).read_all().equals(rows(5))


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), max_size=6), data=st.data())
def test_rows_are_taken_in_any_order(sizes, data):
    table = pa.concat_tables([SCHEMA.empty_table(), *(rows(size) for size in sizes)])
    wanted = np.array(data.draw(st.lists(st.integers(0, len(table) - 1), max_size=20) if len(table) else st.just([])), dtype=np.int64)
    assert take(table, wanted).to_pylist() == [table.slice(row, 1).to_pylist()[0] for row in wanted.tolist()]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([bytes(16), b"a" * 16, b"a" * 8 + b"b" * 8, b"b" * 16, b"c" * 16]), max_size=12))
def test_keys_are_found_where_they_first_are(keys):
    column = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    wanted = [bytes(16), b"a" * 16, b"b" * 16, b"d" * 16]
    found = Lookup(column).find(np.frombuffer(b"".join(wanted), np.uint8).reshape(-1, 16)).tolist()
    assert found[0] == found[3] == -1
    for key, row in zip(wanted[1:3], found[1:3], strict=True):
        twin = next((other for other in keys if other[:8] == key[:8]), None)
        assert row == (keys.index(key) if twin == key else -1)


def test_columns_of_bytes_are_arrays_also_when_sliced_or_null():
    column = pa.chunked_array([pa.array([b"a" * 16, None, b"c" * 16], pa.binary(16)), pa.array([b"d" * 16, b"e" * 16], pa.binary(16))])
    expected = np.frombuffer(b"a" * 16 + bytes(16) + b"c" * 16 + b"d" * 16 + b"e" * 16, np.uint8).reshape(-1, 16)
    np.testing.assert_array_equal(fixed_bytes(column), expected)
    np.testing.assert_array_equal(fixed_bytes(column.slice(1, 3)), expected[1:4])
    assert fixed_bytes(column.slice(0, 0)).shape == (0, 16)
    assert fixed_bytes(pa.nulls(4, pa.binary(16))).tolist() == [[0] * 16] * 4


def test_stamps_tell_places_and_versions_apart():
    identity = Identity(1, 2, 3, 4)
    places = [Place("a"), Place("b"), Place("a", 1), Place("a", 0, 1), Place("a", 0, -1, "x"), Place("\udcff")]
    identities = [identity, *(identity._replace(**{name: 9}) for name in Identity._fields), None]
    stamps = {stamp_of(place, one) for place in places for one in identities}
    assert len(stamps) == len(places) * len(identities)
    assert stamp_of(None, None) == bytes(16)


def test_an_empty_index_knows_nothing():
    assert len(Index()) == 0
    assert Index().by_stamp.find(np.ones((2, 16), np.uint8)).tolist() == [-1, -1]
