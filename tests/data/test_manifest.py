import os
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.bucket_sets import bucket_sets
from aquatint.data.buckets import plan
from aquatint.data.ledger import ledger_text
from aquatint.data.manifest import TAKEN_OUT, Rejected, scan, split
from aquatint.data.places import Opener, Place
from aquatint.data.sources.listing import Source
from aquatint.errors import DataError
from tests import zoo
from tests.data.synthetic import manifest as synthetic

ASPECTS_HW = [(64, 64), (64, 96), (96, 64), (64, 128), (128, 64), (48, 112), (112, 48), (72, 96), (96, 72)]
MAX_PIXELS = 100_000_000


def scanned(*folders, quarantine=None, opener=None, index_folder=None, **options):
    sources = [folder if isinstance(folder, Source) else Source(str(folder)) for folder in folders]
    return scan(
        sources, opener=opener or Opener(), max_pixels=MAX_PIXELS, index_folder=index_folder, quarantine=quarantine or {}, **options
    )  # fmt: skip


def draw(path, color=zoo.RED, size_hw=(24, 32), caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zoo.encoded(zoo.plain(color, size_hw), "PNG"))
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def by_file(manifest):
    return {Path(one.place.path).name: one for one in manifest.pictures()}


def reasons_of(manifest):
    return {one.name.rpartition("/")[2]: one.reason for one in manifest.rejected}


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """89 good pictures over 9 aspect ratios and 12 bad ones, in folders, each with a caption."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(89):
        path = folder / f"part {index % 3}" / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zoo.encoded(zoo.textured(ASPECTS_HW[index % 9], seed=index), "PNG"))
        path.with_suffix(".txt").write_text(f"picture {index}")
    zoo.write(folder / "bad", zoo.REFUSED[:12])
    for specimen in zoo.REFUSED[:12]:
        (folder / "bad" / specimen.name).with_suffix(".txt").write_text("a bad one")
    return folder


def test_every_file_is_used_or_rejected_with_its_reason(collection):
    manifest = scanned(collection)
    assert manifest.listed == 101
    assert (len(manifest), len(manifest.rejected)) == (89, 12)
    reasons = reasons_of(manifest)
    assert all(specimen.reason in reasons[specimen.name] for specimen in zoo.REFUSED[:12])
    names = {one.name for one in (*manifest.pictures(), *manifest.rejected)}
    assert names == {
        f"{collection.name}/{path.relative_to(collection).as_posix()}"
        for path in collection.rglob("*")
        if path.is_file() and path.suffix != ".txt"
    }
    for name, one in by_file(manifest).items():
        number = int(Path(name).stem)
        assert one.captions == (f"picture {number}",)
        assert one.size_hw == ASPECTS_HW[number % 9]


def test_columns_say_what_the_pictures_say(collection):
    manifest = scanned(collection)
    pictures = list(manifest.pictures())
    assert [tuple(size) for size in manifest.sizes_hw.tolist()] == [one.size_hw for one in pictures]
    assert [digest.tobytes() for digest in manifest.digests] == [one.digest for one in pictures]
    assert manifest.sizes_hw.dtype == np.int32
    assert manifest.source_of.dtype == np.int16
    assert manifest.has_caption.all()
    assert [manifest.picture(row) for row in range(len(manifest))] == pictures
    assert [manifest.name(row) for row in range(len(manifest))] == [one.name for one in pictures]
    assert manifest.captions(3) == pictures[3].captions
    some = [5, 0, 88, 7]
    assert list(manifest.rows(some).pictures()) == list(manifest.pictures(some)) == [pictures[row] for row in some]
    with pytest.raises(IndexError):
        manifest.picture(89)


def test_no_picture_is_lost_on_the_way_to_the_buckets(collection):
    manifest = scanned(collection)
    sets = bucket_sets("aquatint", resolution=256, step=32, min_side=128, max_side=512, max_aspect=4.0, area_weight=0.5)
    counts = np.bincount(plan(manifest.sizes_hw, np.ones(len(manifest)), sets, min_count=8).assignment)
    assert counts.sum() + len(manifest.rejected) == manifest.listed == 101
    assert counts.min() >= 8


def test_a_scan_changes_nothing_and_is_the_same_again(collection):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in collection.rglob("*") if path.is_file()}
    first = scanned(collection)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in collection.rglob("*") if path.is_file()} == before
    assert scanned(collection) == first


def test_every_animal_of_the_zoo_has_its_verdict(tmp_path):
    zoo.write(tmp_path, (*zoo.USED, *zoo.BROKEN, *zoo.REFUSED))
    manifest = scanned(tmp_path)
    assert reasons_of(manifest).keys() == {specimen.name for specimen in zoo.REFUSED}
    assert {name: one.size_hw for name, one in by_file(manifest).items()} == {one.name: one.size_hw for one in (*zoo.USED, *zoo.BROKEN)}
    for specimen in zoo.USED:
        assert not specimen.notice or any(specimen.name in text and specimen.notice in text for text in manifest.warnings)


def test_a_digest_is_that_of_the_bytes_and_of_nothing_else(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "deep" / "b.png")
    draw(tmp_path / "c.png", zoo.BLUE)
    before = {name: one.digest for name, one in by_file(scanned(tmp_path)).items()}
    assert before["a.png"] == before["b.png"] != before["c.png"]
    (tmp_path / "a.png").rename(tmp_path / "d.png")
    os.utime(tmp_path / "c.png", (1, 1))
    after = {name: one.digest for name, one in by_file(scanned(tmp_path)).items()}
    assert (after["d.png"], after["c.png"]) == (before["a.png"], before["c.png"])
    assert len(after["d.png"]) == 16


def test_a_known_digest(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert scanned(tmp_path).rejected[0].digest.hex() == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b-128 of nothing


def test_a_quarantined_content_is_set_aside_under_any_name(tmp_path):
    draw(tmp_path / "a.png", caption="x")
    draw(tmp_path / "b.png", zoo.BLUE)
    digest = scanned(tmp_path).picture(0).digest
    (tmp_path / "a.png").rename(tmp_path / "z.png")
    manifest = scanned(tmp_path, quarantine={digest: "is a damaged PNG file: broken data stream", bytes(16): "x"})
    assert reasons_of(manifest) == {"z.png": "is a damaged PNG file: broken data stream"}
    assert manifest.rejected[0].bad
    assert len(manifest) == 1
    assert len(scanned(tmp_path, quarantine={digest[:8] + bytes(8): "is another picture"})) == 2


# Captions


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b"\xef\xbb\xbfa fox\r\n", ("a fox",)), ("\ufeffa fox".encode("utf-16-le"), ("a fox",)), (b"", ()), (b" \n", ()),
        (b"caf\xe9", ("café",)), (b"one\ntwo\n", ("one\ntwo",)),
    ],
)  # fmt: skip
def test_captions_are_decoded(tmp_path, data, captions):
    draw(tmp_path / "a.png", caption=data)
    assert scanned(tmp_path).picture(0).captions == captions


def test_each_line_is_a_caption_if_that_is_asked_for(tmp_path):
    draw(tmp_path / "a.png", caption=" a fox\n\n in snow \r\n")
    assert scanned(Source(str(tmp_path), caption_lines="alternatives")).captions(0) == ("a fox", "in snow")


def test_a_json_file_may_hold_several_captions(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"captions": ["a fox", "snow\\nand ice"]}')
    endings = (".json", ".txt")
    assert scanned(Source(str(tmp_path), caption_extensions=endings)).captions(0) == ("a fox", "snow\nand ice")
    both = Source(str(tmp_path), caption_extensions=endings, caption_lines="alternatives")
    assert scanned(both).captions(0) == ("a fox", "snow", "and ice")


def test_a_broken_json_file_sets_its_picture_aside(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"captions": ')
    manifest = scanned(Source(str(tmp_path), caption_extensions=(".json",)))
    assert reasons_of(manifest)["a.png"].startswith("its caption a.json is not JSON")


def test_an_older_encoding_is_used_with_a_warning_that_names_the_file(tmp_path):
    draw(tmp_path / "a.png", caption=b"caf\xe9")
    draw(tmp_path / "b.png", zoo.BLUE, caption=b"caf\xe9 au lait")
    (warning,) = scanned(tmp_path).warnings
    assert warning.startswith(f"{tmp_path.name}/a.png, {tmp_path.name}/b.png: its caption is in the older Windows-1252 encoding")


def test_an_undecodable_caption_sets_its_picture_aside_with_the_place(tmp_path):
    draw(tmp_path / "a.png", caption=b"a \x81")
    draw(tmp_path / "b.png")
    (one,) = scanned(tmp_path).rejected
    assert one.reason == "its caption a.txt is neither UTF-8, UTF-16 nor Windows-1252 from byte 2 on; save it as UTF-8"
    assert one.digest is not None


def test_pictures_that_share_a_caption_are_used_with_a_warning(tmp_path):
    draw(tmp_path / "a.png", caption="one for both")
    (tmp_path / "a.jpg").write_bytes(zoo.encoded(zoo.plain(), "JPEG"))
    manifest = scanned(tmp_path)
    assert [one.captions for one in manifest.pictures()] == [("one for both",)] * 2
    assert manifest.warnings == (
        f"pictures of the same name share one caption; rename them if that is not meant: {tmp_path.name}/a.jpg and {tmp_path.name}/a.png",
    )


def test_captions_without_a_picture_are_a_warning(tmp_path):
    draw(tmp_path / "a.png", caption="x")
    (tmp_path / "b.txt").write_text("lost")
    assert scanned(tmp_path).warnings == (f"1 caption file in {tmp_path} without a picture: {tmp_path.name}/b.txt",)


# Masks


def test_masks_are_digested_and_checked(tmp_path):
    for name in ("a", "b", "c"):
        draw(tmp_path / f"{name}.png", zoo.RED, (32, 32 + ord(name)))
    (tmp_path / "a-masklabel.png").write_bytes(zoo.encoded(zoo.plain(255, (32, 32 + ord("a")), "L"), "PNG"))
    (tmp_path / "b-masklabel.png").write_bytes(b"<html>")
    manifest = scanned(Source(str(tmp_path), masks="files"))
    one, other = manifest.pictures()
    assert one.mask == Place(str(tmp_path / "a-masklabel.png"))
    assert len(one.mask_digest) == 16
    assert (other.mask, other.mask_digest) == (None, b"")
    assert manifest.mask_digests.any(axis=1).tolist() == [True, False]
    assert reasons_of(manifest)["b.png"].startswith("its mask b-masklabel.png is a web page")
    assert not manifest.warnings


@pytest.mark.parametrize("size_hw", [(64, 128), (64, 32), (32, 65)])
def test_a_mask_of_another_size_sets_its_picture_aside(tmp_path, size_hw):
    draw(tmp_path / "a.png", size_hw=(32, 64))
    (tmp_path / "a-masklabel.png").write_bytes(zoo.encoded(zoo.plain(255, size_hw, "L"), "PNG"))
    size = f"{size_hw[1]} x {size_hw[0]}"
    assert reasons_of(scanned(Source(str(tmp_path), masks="files"))) == {
        "a.png": f"its mask a-masklabel.png has {size} pixels, and the picture 64 x 32; save it in the same size"
    }


# Odd files


def test_exact_copies_are_a_warning(tmp_path):
    draw(tmp_path / "a.png", caption="x")
    draw(tmp_path / "b.png", caption="y")
    assert scanned(tmp_path).warnings == (f"2 pictures have an exact copy: {tmp_path.name}/a.png, {tmp_path.name}/b.png",)


def test_a_source_inside_another_is_a_warning(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "best" / "b.png", zoo.BLUE)
    manifest = scanned(tmp_path, Source(str(tmp_path / "best"), repeats=Fraction(3)))
    assert [(one.name.rpartition("/")[2], one.source) for one in manifest.pictures()] == [("a.png", 0), ("b.png", 0), ("b.png", 1)]
    inner = tmp_path / "best"
    assert f"the source {inner} lies in the source {tmp_path}, and both use its pictures (2 uses in all)" in manifest.warnings


def test_links_that_lead_nowhere_and_pipes_are_rejected_and_never_block(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "a.txt")
    draw(tmp_path / "b.png", zoo.BLUE)
    reasons = reasons_of(scanned(tmp_path))
    assert reasons.pop("circle.png").startswith("cannot be read: ")
    assert reasons == {
        "a.png": "its caption a.txt cannot be read: it is not a plain file",
        "lost.png": "is a link to a file that does not exist",
        "pipe.png": "cannot be read: it is not a plain file",
    }


def test_a_file_that_cannot_be_read_is_rejected(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", zoo.BLUE)

    class Locked(Opener):
        def open(self, place):
            if place.path.endswith("a.png"):
                raise PermissionError(13, "Permission denied")
            return super().open(place)

    manifest = scanned(tmp_path, opener=Locked())
    where = Place(str(tmp_path / "a.png"))
    assert manifest.rejected == (Rejected(f"{tmp_path.name}/a.png", "cannot be read: Permission denied", 0, where, None),)
    assert len(manifest) == 1


def test_names_that_are_not_text_are_used_and_printable(tmp_path):
    (tmp_path / "\udcff.png").write_bytes(zoo.encoded(zoo.plain(), "PNG"))
    draw(tmp_path / "a\nb.png", zoo.BLUE)
    draw(tmp_path / "Füchse im Schnee.png", zoo.GREEN)
    manifest = scanned(tmp_path)
    names = {one.name.rpartition("/")[2]: one.place.path for one in manifest.pictures()}
    assert names.keys() == {"\\udcff.png", "a\\nb.png", "Füchse im Schnee.png"}
    assert names["\\udcff.png"] == f"{tmp_path}/\udcff.png"
    assert ledger_text(manifest).encode()


def test_names_of_both_unicode_forms_are_two_pictures(tmp_path):
    for form in ("NFC", "NFD"):
        draw(tmp_path / unicodedata.normalize(form, "Bär.png"))
    assert scanned(tmp_path).listed == 2


def test_progress_counts_every_file(collection):
    seen = []
    scanned(collection, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(count, 101) for count in range(1, 102)]


def test_a_missing_or_empty_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match="gone does not exist"):
        scanned(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there are no pictures in .*empty: it is empty"):
        scanned(tmp_path / "empty")
    (tmp_path / "empty" / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"it holds only 1 \.zip"):
        scanned(tmp_path / "empty")


# Roles


def roles(*names):
    return [Source(f"/{name}", role=name) for name in names]


def of_contents(contents, source_of=None, sources=None):
    """A manifest whose digests are those of the numbers."""
    digests = np.random.Generator(np.random.Philox(key=7)).integers(0, 256, (64, 16), dtype=np.uint8)
    return synthetic(len(contents), digests=digests[np.array(contents, dtype=int)], source_of=source_of, sources=sources)


def test_a_picture_for_validation_is_never_trained_under_any_name(tmp_path):
    for name, color in (("a", zoo.RED), ("b", zoo.BLUE), ("c", zoo.GREEN)):
        draw(tmp_path / "train" / f"{name}.png", color)
    draw(tmp_path / "held" / "x.png", zoo.BLUE)
    manifest = scanned(tmp_path / "train", Source(str(tmp_path / "held"), role="validation"))
    assert [one.name for one in manifest.pictures()] == ["train/a.png", "train/c.png", "held/x.png"]
    (one,) = manifest.rejected
    assert (one.name, one.reason, one.bad, one.source) == ("train/b.png", TAKEN_OUT, False, 0)
    assert manifest.listed == 4
    assert manifest.warnings == ("1 picture is not trained, because the sources for validation have the same: train/b.png",)
    train, held = split(manifest, share=0.5, max_pictures=10)
    assert (train.tolist(), held.tolist()) == ([0, 1], [2])


def test_copies_among_pictures_for_validation_are_no_warning(tmp_path):
    draw(tmp_path / "train" / "a.png", zoo.RED)
    for name in ("x", "y"):
        draw(tmp_path / "held" / f"{name}.png", zoo.BLUE)
    assert not scanned(tmp_path / "train", Source(str(tmp_path / "held"), role="validation")).warnings


def test_with_a_source_for_validation_the_share_holds_out_nothing_more():
    manifest = of_contents(range(40), [0] * 30 + [1] * 10, roles("train", "validation"))
    train, held = split(manifest, share=0.5, max_pictures=1)
    assert train.tolist() == list(range(30))
    assert held.tolist() == list(range(30, 40))


def test_a_copy_of_a_picture_for_validation_is_on_neither_side():
    train, held = split(of_contents([1, 2, 3, 2], [0, 0, 0, 1], roles("train", "validation")), share=0.0, max_pictures=9)
    assert (train.tolist(), held.tolist()) == ([0, 2], [3])


def test_what_only_a_source_for_regularization_has_is_never_held_out():
    manifest = of_contents(range(60), [0] * 10 + [1] * 50, roles("train", "regularization"))
    train, held = split(manifest, share=1.0, max_pictures=100)
    assert len(held) == 5
    assert set(held.tolist()) < set(range(10))
    assert len(train) + len(held) == 60


def test_rejecting_keeps_the_sum():
    manifest = synthetic(100, num_rejected=3)
    smaller = manifest.without({17: "is too small", 3: "is broken"})
    assert smaller.listed == manifest.listed == 103
    assert [(one.name, one.reason) for one in smaller.rejected[3:]] == [
        (manifest.name(3), "is broken"),
        (manifest.name(17), "is too small"),
    ]
    rest = [row for row in range(100) if row not in (3, 17)]
    assert list(smaller.pictures()) == list(manifest.pictures(rest))
    assert manifest.without({}) is manifest


# The hold-out


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.integers(0, 40), max_size=80), share=st.floats(0, 0.5), max_pictures=st.integers(1, 20))
def test_a_split_keeps_every_picture_and_all_copies_on_one_side(contents, share, max_pictures):
    manifest = of_contents(contents)
    train, held = split(manifest, share=share, max_pictures=max_pictures)
    assert sorted((*train, *held)) == list(range(len(contents)))
    assert not {contents[row] for row in train} & {contents[row] for row in held}
    assert len(held) <= max_pictures
    assert bool(len(train)) == bool(contents)
    assert share > 0 or not len(held)


def reference_split(digests, share, max_pictures):
    """The rule in words of one picture at a time."""
    numbers = {digest: int(digest.hex()[:13], 16) / 16.0**13 for digest in digests}
    by_number = sorted(set(digests), key=lambda digest: (numbers[digest], digest))
    picked = [digest for digest in by_number if numbers[digest] < share] or by_number[: 1 if share > 0 else 0]
    held, room = set(), max_pictures
    for digest in picked[: len(by_number) // 2]:
        if digests.count(digest) <= room:
            held.add(digest)
            room -= digests.count(digest)
    return [row for row, digest in enumerate(digests) if digest in held]


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.integers(0, 40), max_size=80), share=st.floats(0, 1), max_pictures=st.integers(0, 20))
def test_a_split_is_that_of_the_rule(contents, share, max_pictures):
    manifest = of_contents(contents)
    expected = reference_split([digest.tobytes() for digest in manifest.digests], share, max_pictures)
    assert split(manifest, share=share, max_pictures=max_pictures)[1].tolist() == expected


def test_contents_that_agree_in_their_first_half_are_told_apart():
    digests = np.zeros((5, 16), np.uint8)
    digests[:, 7], digests[:, 15] = [0, 0, 1, 0, 1], [5, 3, 1, 3, 1]
    _, held = split(synthetic(5, digests=digests), share=0.5, max_pictures=5)
    assert held.tolist() == [1, 3]


def test_a_split_takes_its_share():
    _, held = split(synthetic(5000), share=0.1, max_pictures=5000)
    assert len(held) == pytest.approx(500, abs=70)


def test_other_pictures_do_not_change_the_side_of_one():
    whole = synthetic(1000)
    some = np.arange(0, 1000, 3)
    _, held = split(whole, share=0.1, max_pictures=1000)
    _, held_of_fewer = split(whole.rows(some), share=0.1, max_pictures=1000)
    assert set(some[held_of_fewer]) == set(held) & set(some)


def test_a_small_set_holds_out_one_if_anything_is_asked_for():
    for count in range(2, 30):
        assert len(split(synthetic(count), share=0.001, max_pictures=64)[1]) == 1
    assert not len(split(synthetic(1), share=0.5, max_pictures=64)[1])
    assert not len(split(synthetic(0), share=0.5, max_pictures=64)[1])


def test_no_more_is_held_out_than_allowed():
    assert len(split(synthetic(1000), share=0.5, max_pictures=64)[1]) == 64
