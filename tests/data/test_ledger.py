import json
from dataclasses import replace
from fractions import Fraction

import pytest

from aquatint.data.ledger import check_limits, ledger_text, summary, write_ledger
from aquatint.data.manifest import Rejected
from aquatint.data.places import Place
from aquatint.data.sources.listing import Source
from aquatint.errors import DataError
from tests.data.synthetic import manifest as synthetic
from tests.data.test_manifest import draw, scanned

SOURCES = [
    Source("/own"),
    Source("/class", role="regularization", repeats=Fraction(1, 2)),
    Source("https://me:secret@host/held?key=secret", role="validation"),
]


def of_roles(train=0, regularization=0, validation=0, rejected=(), **options):
    numbers = [0] * train + [1] * regularization + [2] * validation
    return replace(synthetic(len(numbers), source_of=numbers, sources=SOURCES, **options), rejected=tuple(rejected))


# Limits


@pytest.mark.parametrize(
    ("used", "bad", "share", "fine"),
    [(99, 1, 0.01, True), (198, 2, 0.01, True), (197, 3, 0.01, False), (9, 1, 0.01, True), (8, 2, 0.01, False), (71, 29, 0.29, True)],
)
def test_a_set_may_have_a_stated_share_of_bad_pictures_but_always_one(used, bad, share, fine):
    manifest = synthetic(used, num_rejected=bad)
    if fine:
        check_limits(manifest, max_bad_share=share, max_uncaptioned_share=1.0)
    else:
        with pytest.raises(DataError, match=f"{bad} of {used + bad} pictures cannot be used, more than the 1.0%") as caught:
            check_limits(manifest, max_bad_share=share, max_uncaptioned_share=1.0)
        assert "bad0.png (is broken), bad1.png (is broken)" in caught.value.message
        assert caught.value.exit_code == 3


def test_a_share_of_zero_allows_no_bad_picture():
    with pytest.raises(DataError, match="1 of 100"):
        check_limits(synthetic(99, num_rejected=1), max_bad_share=0.0, max_uncaptioned_share=1.0)


def test_only_some_of_many_bad_pictures_are_named():
    with pytest.raises(DataError) as caught:
        check_limits(synthetic(10, num_rejected=20), max_bad_share=0.5, max_uncaptioned_share=1.0)
    assert caught.value.message.endswith("bad3.png (is broken), bad4.png (is broken) and 15 more")


def test_nothing_but_bad_pictures_is_an_error_whatever_the_limit():
    with pytest.raises(DataError, match=r"none of the 1 pictures can be used: bad0\.png \(is broken\)"):
        check_limits(synthetic(0, num_rejected=1), max_bad_share=1.0, max_uncaptioned_share=1.0)


def test_pictures_that_are_left_out_are_not_bad():
    manifest = synthetic(100).without(dict.fromkeys(range(40), "is too small"), bad=False)
    check_limits(manifest, max_bad_share=0.0, max_uncaptioned_share=1.0)


@pytest.mark.parametrize("role", ["train", "regularization", "validation"])
def test_limits_are_those_of_what_is_trained(role):
    number = ["train", "regularization", "validation"].index(role)
    manifest = of_roles(50, 50, 50, rejected=[Rejected(f"{i}.png", "is broken", number) for i in range(10)])
    if role == "validation":
        check_limits(manifest, max_bad_share=0.01, max_uncaptioned_share=0.0)
    else:
        with pytest.raises(DataError, match="10 of 110"):
            check_limits(manifest, max_bad_share=0.01, max_uncaptioned_share=0.0)


def test_a_source_for_validation_must_have_something_to_measure():
    manifest = of_roles(50, rejected=[Rejected("a.png", "is broken", 2)])
    with pytest.raises(DataError, match=r"none of the 1 pictures in https://host/held can be used: a\.png"):
        check_limits(manifest, max_bad_share=1.0, max_uncaptioned_share=1.0)


def test_regularization_alone_is_nothing_to_train_on():
    with pytest.raises(DataError, match="none of the 1 pictures"):
        check_limits(of_roles(0, 10, 10, rejected=[Rejected("a.png", "is broken")]), max_bad_share=1.0, max_uncaptioned_share=1.0)


def test_too_many_pictures_without_a_caption_are_an_error():
    manifest = of_roles(100, 0, 3, caption=None)
    check_limits(manifest, max_bad_share=0.0, max_uncaptioned_share=1.0)
    with pytest.raises(DataError, match=r"100 of 100 pictures have no caption, more than the 1\.0%.*: pictures/00000000\.jpg, "):
        check_limits(manifest, max_bad_share=0.0, max_uncaptioned_share=0.01)


def test_an_empty_caption_is_none(tmp_path):
    for index in range(20):
        draw(tmp_path / f"{index:02}.png", (index, 0, 0), caption="x" if index else " ")
    check_limits(scanned(tmp_path), max_bad_share=0.0, max_uncaptioned_share=0.05)
    with pytest.raises(DataError, match=r"1 of 20 pictures have no caption.*/00\.png"):
        check_limits(scanned(tmp_path), max_bad_share=0.0, max_uncaptioned_share=0.04)


def test_trigger_words_are_a_caption():
    manifest = synthetic(10, caption=None, sources=[Source("/own", trigger="ohwx cat")])
    check_limits(manifest, max_bad_share=0.0, max_uncaptioned_share=0.0)


def test_captions_with_another_ending_are_pointed_out(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "a.caption").write_text("x")
    with pytest.raises(DataError) as caught:
        check_limits(scanned(tmp_path), max_bad_share=0.0, max_uncaptioned_share=0.01)
    assert "set caption_extensions in data.sources if the other files there (1 .caption) are the captions" in caught.value.hint
    check_limits(scanned(Source(str(tmp_path), caption_extensions=(".caption",))), max_bad_share=0.0, max_uncaptioned_share=0.01)


# The ledger


def test_the_ledger_adds_up_and_names_every_picture_that_is_not_used():
    manifest = synthetic(90, num_rejected=12).without({7: "is too small"}, bad=False)
    text = ledger_text(manifest)
    assert text.startswith("102 pictures listed = 89 used + 12 quarantined + 1 left out\n89 have a caption, 0 have none\n")
    assert all(f"  {one.name}: {one.reason}\n" in text for one in manifest.rejected)
    assert text.index("Quarantined") < text.index("bad11.png") < text.index("Left out:\n") < text.index("00000007.jpg")


def test_the_ledger_has_every_source_and_no_secret():
    manifest = of_roles(3, 2, 1, rejected=[Rejected("a.png", "is broken", 1)])
    text = ledger_text(manifest)
    assert "  /own: 3 pictures listed = 3 used + 0 quarantined; for training, once per epoch\n" in text
    assert "  /class: 3 pictures listed = 2 used + 1 quarantined; for regularization, 0.5 times per epoch\n" in text
    assert "  https://host/held: 1 pictures listed = 1 used + 0 quarantined; for validation\n" in text
    assert "secret" not in text
    assert summary(manifest) == "7 pictures listed = 6 used + 1 quarantined"


def test_other_files_are_in_the_ledger(tmp_path):
    draw(tmp_path / "a.png")
    for name in ("a.npz", "b.npz", "notes", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    assert "Left alone:\n  2 .npz, 1 without an ending, 1 hidden\n" in ledger_text(scanned(tmp_path))


def test_the_ledger_of_machines_has_a_line_for_each_of_them(tmp_path):
    url = Place("https://me:secret@host/held/b.png?key=secret")
    rejected = [
        Rejected("a.png", "is broken", 0, Place("/own/a.png"), b"\1" * 16),
        Rejected("b.png", "is öde", 2, url),
        Rejected("row 3", "x"),
    ]
    manifest = of_roles(3, 2, 1, rejected=rejected).without({1: "is too small"}, bad=False)
    write_ledger(manifest, tmp_path)
    assert (tmp_path / "ledger.txt").read_text() == ledger_text(manifest)
    lines = (tmp_path / "ledger.jsonl").read_text()
    first, second, third, fourth = map(json.loads, lines.splitlines())
    assert first == {
        "name": "a.png", "path": "/own/a.png", "source": "/own", "role": "train", "skipped": "quarantined", "reason": "is broken",
        "digest": "01" * 16,
    }  # fmt: skip
    assert (second["path"], second["role"], second["digest"]) == ("https://host/held/b.png", "validation", None)
    assert third["path"] is None
    assert (fourth["skipped"], fourth["name"]) == ("left out", "pictures/00000001.jpg")
    assert "secret" not in lines
    assert "öde" in lines
