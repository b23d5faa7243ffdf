import numpy as np
import pytest

from aquatint.training.reasons import Wanted, in_words, name_digests, reasons, remember, remembered

NAMES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
FILE, CROP, ENCODER = "whose file changed", "whose bucket or crop changed", "because the autoencoder changed"


def wanted(names=NAMES, files=(0, 1, 2, 3), crops=(0, 0, 0, 0), encoder="one"):
    parts = {FILE: np.array(files, dtype=np.uint8).reshape(-1, 1), CROP: np.array(crops, dtype=np.uint8).reshape(-1, 1)}
    return Wanted(name_digests(names), parts, {ENCODER: encoder})


ALL = np.arange(4)


def test_the_first_time_everything_is_new():
    assert reasons(wanted(), None, ALL) == {"new": 4}


def test_each_row_has_one_reason():
    before = wanted(names=["d.jpg", "c.jpg", "b.jpg"], files=(3, 9, 1), crops=(0, 5, 7))
    assert reasons(wanted(), before, ALL) == {"new": 1, FILE: 1, CROP: 1, "no longer in the cache": 1}


def test_what_is_the_same_for_all_comes_first():
    assert reasons(wanted(files=(9, 9, 9, 9)), wanted(encoder="other"), ALL) == {ENCODER: 4}


def test_nothing_missing_has_no_reason():
    assert reasons(wanted(), wanted(), np.arange(0)) == reasons(wanted(), None, np.arange(0)) == {}


def test_it_is_remembered(tmp_path):
    remember(tmp_path / "wanted.safetensors", wanted())
    again = remembered(tmp_path / "wanted.safetensors")
    assert again is not None
    assert reasons(wanted(files=(0, 1, 2, 8)), again, np.array([3])) == {FILE: 1}


@pytest.mark.parametrize("content", [None, b"", b"junk" * 10])
def test_without_a_memory_there_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "wanted.safetensors").write_bytes(content)
    assert remembered(tmp_path / "wanted.safetensors") is None


def test_the_most_frequent_reason_comes_first():
    assert in_words({"new": 2, FILE: 1200}) == "1,200 whose file changed, 2 new"
