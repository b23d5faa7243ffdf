import errno
import os
import random
import unicodedata
from pathlib import Path

import pytest

from aquatint.data.places import Opener
from aquatint.data.sources.folder import containers, list_folder
from aquatint.data.sources.listing import Remarks, Source
from aquatint.errors import DataError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def listed(folder, **settings):
    remarks = Remarks()
    return list(list_folder(Source(str(folder), **settings), Opener(), remarks)), remarks


def names(entries):
    return [entry.name for entry in entries]


def captions(entries):
    return {entry.name: Path(entry.caption.path).name for entry in entries if entry.caption}


def masks(entries):
    return {entry.name: entry.mask.path.rpartition("/pics/")[2] for entry in entries if entry.mask}


@pytest.fixture
def pics(tmp_path):
    (tmp_path / "pics").mkdir()
    return tmp_path / "pics"


def test_pictures_are_listed_by_the_bytes_of_their_paths_with_folders_inside(pics):
    touch(pics, "b.jpg", "a.PNG", "deep/er/c.webp", "deep/d.avif", "a.b/e.gif", "a/f.bmp", "é.jpg", "deep-er.jpg", "Z.jpg")
    entries, remarks = listed(pics)
    paths = [os.fsencode(entry.picture.path) for entry in entries]
    assert paths == sorted(paths)
    assert names(entries)[:4] == ["pics/Z.jpg", "pics/a.PNG", "pics/a.b/e.gif", "pics/a/f.bmp"]
    assert len(entries) == 9
    assert remarks == Remarks()


def test_an_entry_tells_where_the_files_are_and_which_version_of_them(pics):
    touch(pics, "a.jpg", "a.txt")
    (entry,), _ = listed(f"{pics}/")
    assert entry.picture.path == str(pics / "a.jpg")
    assert entry.identity == Opener().identity(str(pics / "a.jpg"))
    assert entry.caption_identity == Opener().identity(str(pics / "a.txt"))
    (pics / "a.jpg").write_bytes(b"other")
    (changed,), _ = listed(pics)
    assert changed.identity != entry.identity
    assert changed.caption_identity == entry.caption_identity


def test_each_file_is_asked_for_its_times_once(pics, monkeypatch):
    touch(pics, "a.jpg", "a.txt", "b.jpg", "c.npz")
    asked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *args, **options: asked.append(os.fspath(path)) or stat(path, *args, **options))
    listed(pics)
    monkeypatch.undo()
    assert sorted(path for path in asked if Path(path).is_file()) == [str(pics / name) for name in ("a.jpg", "a.txt", "b.jpg")]


def test_a_listing_is_lazy_folder_by_folder(pics, monkeypatch):
    touch(pics, "a/x.jpg", "b/y.jpg")
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: scanned.append(Path(place).name) or scandir(place))
    entries = list_folder(Source(str(pics)), Opener(), Remarks())
    next(entries)
    assert scanned == ["pics", "a"]


def test_folders_are_no_containers(pics):
    assert containers(Source(str(pics)), Opener()) is None


@pytest.mark.parametrize(("make", "reason"), [(False, "does not exist"), (True, "is not a folder")])
def test_a_source_that_is_no_folder_is_an_error(pics, make, reason):
    if make:
        touch(pics, "x")
    with pytest.raises(DataError, match=reason):
        listed(pics / "x")


def test_pictures_in_formats_that_cannot_be_read_are_listed_and_not_lost(pics):
    touch(pics, "a.heic", "b.jxl")
    assert names(listed(pics)[0]) == ["pics/a.heic", "pics/b.jxl"]


def test_hidden_names_are_skipped_and_counted(pics):
    touch(pics, ".a.jpg", "._b.jpg", ".thumbs/c.jpg", "d.jpg")
    entries, remarks = listed(pics)
    assert names(entries) == ["pics/d.jpg"]
    assert remarks.others == {"hidden": 2}


def test_other_files_are_counted_by_their_ending(pics):
    touch(pics, "a.jpg", "a.txt", "b.npz", "c.npz", "README", "d.JSON")
    assert listed(pics)[1].others == {".npz": 2, "": 1, ".json": 1}


# Captions


def test_captions_are_found_by_name_and_ending(pics):
    touch(pics, "a.jpg", "a.txt", "b.jpg", "b.caption", "c/a.jpg", "d.e.jpg", "d.e.txt")
    assert captions(listed(pics)[0]) == {"pics/a.jpg": "a.txt", "pics/d.e.jpg": "d.e.txt"}
    assert captions(listed(pics, caption_extensions=(".caption",))[0]) == {"pics/b.jpg": "b.caption"}
    assert captions(listed(pics, caption_extensions=())[0]) == {}


def test_of_several_endings_the_first_that_exists_counts(pics):
    touch(pics, "a.jpg", "a.txt", "a.caption", "b.jpg", "b.caption", "c.jpg", "c.JSON", "d.caption")
    entries, remarks = listed(pics, caption_extensions=(".txt", ".caption", ".json"))
    assert captions(entries) == {"pics/a.jpg": "a.txt", "pics/b.jpg": "b.caption", "pics/c.jpg": "c.JSON"}
    assert remarks.warnings == [f"1 caption file in {pics} without a picture: pics/d.caption"]


def test_a_caption_ending_may_have_several_dots(pics):
    touch(pics, "a.jpg", "a.wd14.txt", "a.txt")
    assert captions(listed(pics, caption_extensions=(".wd14.txt",))[0]) == {"pics/a.jpg": "a.wd14.txt"}
    entries, remarks = listed(pics, caption_extensions=(".wd14.txt", ".txt"))
    assert captions(entries) == {"pics/a.jpg": "a.wd14.txt"}
    assert remarks.warnings == []


def test_captions_are_found_when_case_or_unicode_form_differ(pics):
    name = unicodedata.normalize("NFD", "Bär")
    touch(pics, "IMG_1.JPG", "img_1.TXT", f"{name}.jpg", "Bär.txt")
    assert len(captions(listed(pics)[0])) == 2


def test_the_exact_caption_wins_over_a_similar_one(pics):
    touch(pics, "a.jpg", "A.JPG", "a.txt", "A.txt", "a.TXT")
    assert captions(listed(pics)[0]) == {"pics/a.jpg": "a.txt", "pics/A.JPG": "A.txt"}


def test_pictures_that_share_a_caption_are_named(pics):
    touch(pics, "a.jpg", "a.png", "a.txt", "B.JPG", "b.jpg", "b.txt", "c.jpg", "c.png")
    (warning,) = listed(pics)[1].warnings
    assert warning.endswith("if that is not meant: pics/B.JPG and pics/b.jpg, pics/a.jpg and pics/a.png")


def test_captions_without_a_picture_are_named(pics):
    touch(pics, "a.jpg", "a.txt", "b.txt", "a.jpg.txt")
    assert listed(pics)[1].warnings == [f"2 caption files in {pics} without a picture: pics/a.jpg.txt, pics/b.txt"]


def test_of_many_names_a_few_are_told_and_the_rest_counted(pics):
    touch(pics, "a.jpg", *(f"{number:04}.txt" for number in range(1234)))
    (warning,) = listed(pics)[1].warnings
    assert warning.startswith("1,234 caption files")
    assert warning.endswith("pics/0019.txt and 1,214 more")


def test_a_caption_that_cannot_be_opened_still_belongs_to_its_picture(pics):
    touch(pics, "a.jpg")
    (pics / "a.txt").symlink_to("gone.txt")
    (entry,), _ = listed(pics)
    assert entry.caption.path == str(pics / "a.txt")
    assert entry.caption_identity is None


# Masks


@pytest.mark.parametrize("mask", ["a-masklabel.png", "a.mask.png", "a_mask.webp", "A-MaskLabel.PNG", "masks/a.png"])
def test_a_mask_belongs_to_its_picture_and_is_none_itself(pics, mask):
    touch(pics, "a.jpg", "b.jpg", mask)
    entries, remarks = listed(pics, masks="files")
    assert names(entries) == ["pics/a.jpg", "pics/b.jpg"]
    assert masks(entries) == {"pics/a.jpg": mask}
    assert entries[0].mask_identity == Opener().identity(str(pics / mask))
    assert remarks == Remarks()


def test_of_several_masks_the_most_telling_name_counts(pics):
    touch(pics, "a.jpg", "a-masklabel.png", "a.mask.png", "a_mask.png", "masks/a.png", "b.jpg", "b_mask.png", "masks/b.png")
    assert masks(listed(pics, masks="files")[0]) == {"pics/a.jpg": "a-masklabel.png", "pics/b.jpg": "b_mask.png"}


def test_folders_of_masks_lie_beside_their_pictures(pics):
    touch(pics, "x/a.jpg", "x/masks/a.png", "x/masks/a.json", "y/a.jpg", "a.jpg")
    entries, remarks = listed(pics, masks="files")
    assert masks(entries) == {"pics/x/a.jpg": "x/masks/a.png"}
    assert remarks.others == {".json": 1}


def test_masks_without_a_picture_are_named_and_are_no_pictures(pics):
    touch(pics, "a.jpg", "z-masklabel.png", "masks/q.png", "masks/deeper/a.png")
    entries, remarks = listed(pics, masks="files")
    assert names(entries) == ["pics/a.jpg"]
    assert remarks.warnings == [f"3 masks in {pics} without a picture: pics/masks/deeper/, pics/masks/q.png, pics/z-masklabel.png"]


@pytest.mark.parametrize("setting", ["none", "alpha"])
def test_masks_that_are_not_asked_for_are_no_pictures_either(pics, setting):
    touch(pics, "a.jpg", "a-masklabel.png", "a-masklabel.webp", "carnival_mask.jpg")
    entries, remarks = listed(pics, masks=setting)
    assert names(entries) == ["pics/a.jpg", "pics/carnival_mask.jpg"]
    assert masks(entries) == {}
    (warning,) = remarks.warnings
    assert warning.startswith(f"2 masks in {pics} left alone")
    assert warning.endswith("pics/a-masklabel.png, pics/a-masklabel.webp")


def test_two_pictures_may_have_one_mask_and_a_caption_of_a_mask_is_an_orphan(pics):
    touch(pics, "a.jpg", "a.png", "a-masklabel.png", "a-masklabel.txt")
    entries, remarks = listed(pics, masks="files")
    assert set(masks(entries).values()) == {"a-masklabel.png"}
    assert len(masks(entries)) == 2
    assert remarks.warnings == [f"1 caption file in {pics} without a picture: pics/a-masklabel.txt"]


# Trees that are not as they should be


def test_links_are_followed_and_circles_end(pics):
    touch(pics, "a.jpg", "sub/b.jpg")
    (pics / "round").symlink_to(pics)
    (pics / "more").symlink_to(pics / "sub")
    entries, remarks = listed(pics)
    assert names(entries) == ["pics/a.jpg", "pics/more/b.jpg"]
    assert remarks == Remarks()


def test_links_that_lead_out_of_the_source_are_followed_and_named(pics):
    touch(pics, "a.jpg", "sub/c.jpg")
    touch(pics.parent, "pics2/b.jpg", "single.jpg")
    (pics / "more").symlink_to(pics.parent / "pics2")
    (pics / "sub" / "one.jpg").symlink_to("../../single.jpg")
    (pics / "inside.jpg").symlink_to("sub/c.jpg")
    entries, remarks = listed(pics)
    assert names(entries) == ["pics/a.jpg", "pics/inside.jpg", "pics/more/b.jpg", "pics/sub/c.jpg", "pics/sub/one.jpg"]
    assert remarks.warnings == [f"links lead out of {pics}, and what they lead to is used: more, sub/one.jpg"]


def test_what_is_no_file_is_a_problem_with_a_name(pics):
    touch(pics, "a.jpg")
    (pics / "dangling.jpg").symlink_to("gone.jpg")
    (pics / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(pics / "pipe.jpg")
    entries, remarks = listed(pics)
    assert names(entries) == ["pics/a.jpg"]
    assert remarks.problems == [
        ("pics/dangling.jpg", "is a link to a file that does not exist"),
        ("pics/pipe.jpg", "cannot be read: it is not a plain file"),
        ("pics/self.jpg", f"cannot be read: {os.strerror(errno.ELOOP)}"),
    ]


def test_a_folder_that_looks_like_a_picture_is_a_folder(pics):
    touch(pics, "holiday.jpg/a.jpg")
    assert names(listed(pics)[0]) == ["pics/holiday.jpg/a.jpg"]


def test_names_in_no_encoding_or_with_line_ends_are_listed_and_shown_escaped(pics):
    touch(pics, "\udcff\udcfe.jpg", "two\nlines.jpg", "ü\u202e.jpg")
    entries, _ = listed(pics)
    assert names(entries) == ["pics/two\\nlines.jpg", "pics/ü\\u202e.jpg", "pics/\\udcff\\udcfe.jpg"]
    assert os.fsencode(entries[2].picture.path).endswith(b"/\xff\xfe.jpg")


def test_a_folder_that_cannot_be_listed_is_named_and_the_others_are_read(pics, monkeypatch):
    touch(pics, "a.jpg", "closed/b.jpg")
    scandir = os.scandir

    def fail(place):
        if str(place).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", fail)
    entries, remarks = listed(pics)
    assert names(entries) == ["pics/a.jpg"]
    assert remarks.warnings == ["a folder could not be listed, and nothing in it is used: pics/closed: Permission denied"]


@pytest.mark.parametrize("seed", range(3))
def test_a_listing_does_not_depend_on_the_order_of_the_file_system(pics, monkeypatch, seed):
    touch(pics, "b/x.jpg", "a/y.jpg", "c.jpg", "c.txt", "c.png", "A.txt", "a.jpg", "a-masklabel.png", "a-masklabel.jpg", "q.TXT", "Q.txt")
    touch(pics, "k.jpg", "K.txt", "k.Txt", "k.tXt", "L.jpg", "l-masklabel.png", "l-masklabel.webp")
    first = listed(pics, masks="files")
    scandir = os.scandir

    class Turned:
        def __init__(self, place):
            self.entries = list(scandir(place))
            random.Random(seed).shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *args):
            return None

    monkeypatch.setattr(os, "scandir", Turned)
    assert listed(pics, masks="files") == first
