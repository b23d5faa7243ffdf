import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.buckets import candidates, plan
from aquatint.data.manifest import Manifest, Picture, Rejected, Source, check_limits, ledger_text, name_of, scan, split
from aquatint.errors import DataError
from tests import zoo

ASPECTS_HW = [(64, 64), (64, 96), (96, 64), (64, 128), (128, 64), (48, 112), (112, 48), (72, 96), (96, 72)]


def scanned(*folders, extension=".txt", quarantine=None, **options):
    sources = [folder if isinstance(folder, Source) else Source(folder, extension) for folder in folders]
    return scan(sources, max_pixels=100_000_000, quarantine=quarantine or {}, **options)


def draw(path, color=zoo.RED, size_hw=(24, 32), caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zoo.encoded(zoo.plain(color, size_hw), "PNG"))
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def picture(index, digest=None, caption="x", repeats=1):
    digest = digest or random.Random(index).randbytes(16).hex()
    return Picture(Path(f"{index}.png"), f"{index}.png", digest, (64, 64), caption, repeats)


def rejected(index, reason="is broken"):
    return Rejected(f"bad{index}.png", Path(f"bad{index}.png"), reason, None)


def manifest_of(num_pictures, num_rejected=0, caption="x"):
    return Manifest(tuple(picture(index, caption=caption) for index in range(num_pictures)), tuple(map(rejected, range(num_rejected))))


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


def test_every_file_is_used_or_quarantined_with_its_reason(collection):
    manifest = scanned(collection)
    assert manifest.listed == 101
    assert (len(manifest.pictures), len(manifest.rejected)) == (89, 12)
    reasons = {one.path.name: one.reason for one in manifest.rejected}
    assert all(specimen.reason in reasons[specimen.name] for specimen in zoo.REFUSED[:12])
    names = {one.name for one in (*manifest.pictures, *manifest.rejected)}
    assert names == {
        f"{collection.name}/{path.relative_to(collection).as_posix()}"
        for path in collection.rglob("*")
        if path.is_file() and path.suffix != ".txt"
    }
    assert all(one.caption == f"picture {int(one.path.stem)}" for one in manifest.pictures)
    assert all(one.size_hw == ASPECTS_HW[int(one.path.stem) % 9] for one in manifest.pictures)


def test_the_ledger_adds_up_and_names_every_quarantined_file(collection):
    manifest = scanned(collection)
    text = ledger_text(manifest)
    assert text.startswith("101 pictures listed = 89 used + 12 quarantined\n89 have a caption, 0 have none\n")
    assert all(f"  {one.name}: {one.reason}\n" in text for one in manifest.rejected)


def test_no_picture_is_lost_on_the_way_to_the_buckets(collection):
    manifest = scanned(collection)
    shapes = candidates(resolution=256, step=32, min_side=128, max_side=512, max_aspect=4.0)
    sizes = np.array([one.size_hw for one in manifest.pictures])
    result = plan(sizes, np.ones(len(sizes), np.int64), shapes, min_count=8, area_weight=0.5, upscale_weight=1.0)
    counts = np.bincount(result.assignment)
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
    assert {one.path.name for one in manifest.rejected} == {specimen.name for specimen in zoo.REFUSED}
    assert {one.path.name: one.size_hw for one in manifest.pictures} == {one.name: one.size_hw for one in (*zoo.USED, *zoo.BROKEN)}
    for specimen in zoo.USED:
        assert not specimen.notice or any(specimen.name in text and specimen.notice in text for text in manifest.warnings)


def test_a_digest_is_that_of_the_bytes_and_of_nothing_else(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "deep" / "b.png")
    draw(tmp_path / "c.png", zoo.BLUE)
    before = {one.path.name: one.digest for one in scanned(tmp_path).pictures}
    assert before["a.png"] == before["b.png"] != before["c.png"]
    (tmp_path / "a.png").rename(tmp_path / "d.png")
    os.utime(tmp_path / "c.png", (1, 1))
    after = {one.path.name: one.digest for one in scanned(tmp_path).pictures}
    assert (after["d.png"], after["c.png"]) == (before["a.png"], before["c.png"])
    assert len(after["d.png"]) == 32


def test_a_known_digest(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert scanned(tmp_path).rejected[0].digest == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b-128 of nothing


def test_a_quarantined_content_is_set_aside_under_any_name(tmp_path):
    draw(tmp_path / "a.png", caption="x")
    draw(tmp_path / "b.png", zoo.BLUE)
    digest = scanned(tmp_path).pictures[0].digest
    (tmp_path / "a.png").rename(tmp_path / "z.png")
    manifest = scanned(tmp_path, quarantine={digest: "is a damaged PNG file: broken data stream"})
    assert [(one.path.name, one.reason) for one in manifest.rejected] == [("z.png", "is a damaged PNG file: broken data stream")]
    assert len(manifest.pictures) == 1


@pytest.mark.parametrize(
    ("data", "caption"),
    [(b"\xef\xbb\xbfa fox\r\n", "a fox"), ("\ufeffa fox".encode("utf-16-le"), "a fox"), (b"", ""), (b"caf\xe9", "café")],
)
def test_captions_are_decoded(tmp_path, data, caption):
    draw(tmp_path / "a.png", caption=data)
    assert scanned(tmp_path).pictures[0].caption == caption


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
    assert [one.caption for one in manifest.pictures] == ["one for both"] * 2
    assert manifest.warnings == (
        f"pictures of the same name share one caption; rename them if that is not meant: {tmp_path.name}/a.jpg and {tmp_path.name}/a.png",
    )


def test_captions_without_a_picture_are_a_warning(tmp_path):
    draw(tmp_path / "a.png", caption="x")
    (tmp_path / "b.txt").write_text("lost")
    assert scanned(tmp_path).warnings == (f"1 caption file in {tmp_path} without a picture: {tmp_path.name}/b.txt",)


def test_exact_copies_are_a_warning(tmp_path):
    draw(tmp_path / "a.png", caption="x")
    draw(tmp_path / "b.png", caption="y")
    assert scanned(tmp_path).warnings == (f"2 pictures have an exact copy: {tmp_path.name}/a.png, {tmp_path.name}/b.png",)


def test_a_source_inside_another_is_a_warning(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "best" / "b.png", zoo.BLUE)
    manifest = scanned(tmp_path, Source(tmp_path / "best", ".txt", repeats=3))
    assert [(one.path.name, one.repeats) for one in manifest.pictures] == [("a.png", 1), ("b.png", 1), ("b.png", 3)]
    assert any("both use its pictures" in warning for warning in manifest.warnings)


def test_links_that_lead_nowhere_and_pipes_are_quarantined_and_never_block(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "a.txt")
    draw(tmp_path / "b.png", zoo.BLUE)
    reasons = {one.path.name: one.reason for one in scanned(tmp_path).rejected}
    assert reasons.pop("circle.png").startswith("cannot be read: ")
    assert reasons == {
        "a.png": "its caption a.txt is not a plain file",
        "lost.png": "is a link to a file that does not exist",
        "pipe.png": "is not a plain file",
    }


def test_a_file_that_cannot_be_read_is_quarantined(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", zoo.BLUE)
    path_open = Path.open

    def fail(self, *args, **kwargs):
        if self.name == "a.png":
            raise PermissionError(13, "Permission denied")
        return path_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    manifest = scanned(tmp_path)
    assert manifest.rejected == (Rejected(f"{tmp_path.name}/a.png", tmp_path / "a.png", "cannot be read: Permission denied", None),)
    assert len(manifest.pictures) == 1


def test_names_are_printable_whatever_the_file_is_called(tmp_path):
    assert name_of(tmp_path / "a\nb\udcff\u202e.png", tmp_path) == f"{tmp_path.name}/a\\nb\\udcff\\u202e.png"
    assert name_of(tmp_path / "Füchse im Schnee.png", tmp_path) == f"{tmp_path.name}/Füchse im Schnee.png"
    draw(tmp_path / "\udcff.png")
    manifest = scanned(tmp_path)
    assert len(manifest.pictures) == 1
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


def test_other_files_are_in_the_ledger(tmp_path):
    draw(tmp_path / "a.png")
    for name in ("a.npz", "b.npz", "notes", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    assert "Left alone:\n  2 .npz, 1 without an ending, 1 hidden\n" in ledger_text(scanned(tmp_path))


# Limits


@pytest.mark.parametrize(
    ("used", "bad", "share", "fine"),
    [(99, 1, 0.01, True), (198, 2, 0.01, True), (197, 3, 0.01, False), (9, 1, 0.01, True), (8, 2, 0.01, False), (71, 29, 0.29, True)],
)
def test_a_set_may_have_a_stated_share_of_bad_pictures_but_always_one(used, bad, share, fine):
    if fine:
        check_limits(manifest_of(used, bad), max_bad_share=share, max_uncaptioned_share=1.0)
    else:
        with pytest.raises(DataError, match=f"{bad} of {used + bad} pictures cannot be used, more than the 1.0%") as caught:
            check_limits(manifest_of(used, bad), max_bad_share=share, max_uncaptioned_share=1.0)
        assert "bad0.png (is broken), bad1.png (is broken)" in caught.value.message
        assert caught.value.exit_code == 3


def test_a_share_of_zero_allows_no_bad_picture():
    with pytest.raises(DataError, match="1 of 100"):
        check_limits(manifest_of(99, 1), max_bad_share=0.0, max_uncaptioned_share=1.0)


def test_only_some_of_many_bad_pictures_are_named():
    with pytest.raises(DataError) as caught:
        check_limits(manifest_of(10, 20), max_bad_share=0.5, max_uncaptioned_share=1.0)
    assert caught.value.message.endswith("bad3.png (is broken), bad4.png (is broken) and 15 more")


def test_nothing_but_bad_pictures_is_an_error_whatever_the_limit():
    with pytest.raises(DataError, match=r"none of the 1 pictures can be used: bad0\.png \(is broken\)"):
        check_limits(manifest_of(0, 1), max_bad_share=1.0, max_uncaptioned_share=1.0)


@pytest.mark.parametrize("caption", [None, ""])
def test_too_many_pictures_without_a_caption_are_an_error(caption):
    manifest = Manifest((*manifest_of(98).pictures, picture(98, caption=caption), picture(99, caption=caption)), ())
    check_limits(manifest, max_bad_share=0.0, max_uncaptioned_share=0.02)
    with pytest.raises(DataError, match=r"2 of 100 pictures have no caption, more than the 1\.0%.*: 98\.png, 99\.png"):
        check_limits(manifest, max_bad_share=0.0, max_uncaptioned_share=0.01)


def test_captions_with_another_ending_are_pointed_out(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "a.caption").write_text("x")
    with pytest.raises(DataError) as caught:
        check_limits(scanned(tmp_path), max_bad_share=0.0, max_uncaptioned_share=0.01)
    assert "set caption_extension in data.sources if the other files there (1 .caption) are the captions" in caught.value.hint
    check_limits(scanned(tmp_path, extension=".caption"), max_bad_share=0.0, max_uncaptioned_share=0.01)


# The hold-out


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.integers(0, 40), max_size=80), share=st.floats(0, 0.5), max_pictures=st.integers(1, 20))
def test_a_split_keeps_every_picture_and_all_copies_on_one_side(contents, share, max_pictures):
    digests = {content: picture(content).digest for content in contents}
    manifest = Manifest(tuple(picture(index, digests[content]) for index, content in enumerate(contents)), ())
    train, held_out = split(manifest, share=share, max_pictures=max_pictures)
    assert sorted((*train, *held_out), key=manifest.pictures.index) == list(manifest.pictures)
    assert not {one.digest for one in train} & {one.digest for one in held_out}
    assert len(held_out) <= max_pictures
    assert bool(train) == bool(contents)
    assert share > 0 or not held_out


def test_a_split_takes_its_share():
    _, held_out = split(manifest_of(5000), share=0.1, max_pictures=5000)
    assert len(held_out) == pytest.approx(500, abs=70)


def test_other_pictures_do_not_change_the_side_of_one():
    whole = manifest_of(1000)
    fewer = Manifest(whole.pictures[::3], ())
    _, held_out = split(whole, share=0.1, max_pictures=1000)
    _, held_out_of_fewer = split(fewer, share=0.1, max_pictures=1000)
    assert set(held_out_of_fewer) == set(held_out) & set(fewer.pictures)


def test_a_small_set_holds_out_one_if_anything_is_asked_for():
    for count in range(2, 30):
        assert len(split(manifest_of(count), share=0.001, max_pictures=64)[1]) == 1
    assert split(manifest_of(1), share=0.5, max_pictures=64)[1] == ()


def test_no_more_is_held_out_than_allowed():
    assert len(split(manifest_of(1000), share=0.5, max_pictures=64)[1]) == 64
