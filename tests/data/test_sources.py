import errno
import os
import unicodedata

import pytest

from aquatint.data.sources.folder import list_folder


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


def test_pictures_are_listed_sorted_with_folders_inside(tmp_path):
    touch(tmp_path, "b.jpg", "a.PNG", "deep/er/c.webp", "deep/d.avif", "a.b/e.gif")
    assert names(list_folder(tmp_path, ".txt").paths, tmp_path) == ["a.PNG", "a.b/e.gif", "b.jpg", "deep/d.avif", "deep/er/c.webp"]


def test_pictures_in_formats_that_cannot_be_read_are_listed_and_not_lost(tmp_path):
    touch(tmp_path, "a.heic", "b.jxl")
    assert names(list_folder(tmp_path, ".txt").paths, tmp_path) == ["a.heic", "b.jxl"]


def test_hidden_names_are_skipped_and_counted(tmp_path):
    touch(tmp_path, ".a.jpg", "._b.jpg", ".thumbs/c.jpg", "d.jpg")
    listing = list_folder(tmp_path, ".txt")
    assert names(listing.paths, tmp_path) == ["d.jpg"]
    assert listing.hidden == 2


def test_other_files_are_counted_by_their_ending(tmp_path):
    touch(tmp_path, "a.jpg", "a.txt", "b.npz", "c.npz", "README", "d.JSON")
    assert list_folder(tmp_path, ".txt").others == {".npz": 2, "": 1, ".json": 1}


def test_captions_are_found_by_name_and_ending(tmp_path):
    touch(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.caption", "c/a.jpg", "d.e.jpg", "d.e.txt")
    captions = list_folder(tmp_path, ".txt").captions
    assert {path.relative_to(tmp_path).as_posix(): text.name for path, text in captions.items()} == {"a.jpg": "a.txt", "d.e.jpg": "d.e.txt"}
    assert names(list_folder(tmp_path, ".caption").captions, tmp_path) == ["b.jpg"]


def test_a_caption_ending_may_have_several_dots(tmp_path):
    touch(tmp_path, "a.jpg", "a.wd14.txt", "a.txt")
    assert [text.name for text in list_folder(tmp_path, ".wd14.txt").captions.values()] == ["a.wd14.txt"]


def test_captions_are_found_when_case_or_unicode_form_differ(tmp_path):
    name = unicodedata.normalize("NFD", "Bär")
    touch(tmp_path, "IMG_1.JPG", "img_1.TXT", f"{name}.jpg", "Bär.txt")
    assert len(list_folder(tmp_path, ".txt").captions) == 2


def test_the_exact_caption_wins_over_a_similar_one(tmp_path):
    touch(tmp_path, "a.jpg", "A.JPG", "a.txt", "A.txt", "a.TXT")
    captions = list_folder(tmp_path, ".txt").captions
    assert {path.name: text.name for path, text in captions.items()} == {"a.jpg": "a.txt", "A.JPG": "A.txt"}


def test_pictures_that_share_a_caption_are_named(tmp_path):
    touch(tmp_path, "a.jpg", "a.png", "a.txt", "B.JPG", "b.jpg", "b.txt", "c.jpg", "c.png")
    listing = list_folder(tmp_path, ".txt")
    assert [names(group, tmp_path) for group in listing.shared] == [["B.JPG", "b.jpg"], ["a.jpg", "a.png"]]


def test_captions_without_a_picture_are_named(tmp_path):
    touch(tmp_path, "a.jpg", "a.txt", "b.txt", "a.jpg.txt")
    assert names(list_folder(tmp_path, ".txt").orphans, tmp_path) == ["a.jpg.txt", "b.txt"]


def test_links_are_followed_and_circles_end(tmp_path):
    touch(tmp_path, "set/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "set" / "round").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "self.jpg").symlink_to("self.jpg")
    assert names(list_folder(tmp_path / "set", ".txt").paths, tmp_path / "set") == ["a.jpg", "again/b.jpg", "self.jpg"]


def test_a_folder_that_looks_like_a_picture_is_a_folder(tmp_path):
    touch(tmp_path, "holiday.jpg/a.jpg")
    assert names(list_folder(tmp_path, ".txt").paths, tmp_path) == ["holiday.jpg/a.jpg"]


def test_names_in_no_encoding_are_listed(tmp_path):
    touch(tmp_path, "\udcff\udcfe.jpg")
    assert [os.fsencode(path.name) for path in list_folder(tmp_path, ".txt").paths] == [b"\xff\xfe.jpg"]


def test_a_folder_that_cannot_be_listed_is_named_and_the_others_are_read(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    scandir = os.scandir

    def fail(place):
        if str(place).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", fail)
    listing = list_folder(tmp_path, ".txt")
    assert names(listing.paths, tmp_path) == ["a.jpg"]
    assert listing.unreadable == (f"{tmp_path / 'closed'}: Permission denied",)


@pytest.mark.parametrize("count", [0, 3])
def test_a_listing_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch, count):
    touch(tmp_path, "b/x.jpg", "a/y.jpg", "c.jpg", "c.txt", "c.png")
    first = list_folder(tmp_path, ".txt")
    scandir = os.scandir

    class Turned:
        def __init__(self, place):
            self.entries = list(scandir(place))[::-1]

        def __enter__(self):
            return iter(self.entries[count:] + self.entries[:count])

        def __exit__(self, *args):
            return None

    monkeypatch.setattr(os, "scandir", Turned)
    assert list_folder(tmp_path, ".txt") == first
