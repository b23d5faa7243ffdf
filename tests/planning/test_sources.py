from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.config.sections.data import SourceSection
from aquatint.data.sources.listing import Source
from aquatint.errors import DataError
from aquatint.planning.report import plan_of_steps, steps_lines
from aquatint.planning.sources import exactly, is_remote, kind_of, list_source, repeats_of, sources_of

from .small import config


def of(*sources, **sections):
    return config(data={"sources": [{"path": f"/{index}", **source} for index, source in enumerate(sources)]}, **sections)


# Kinds


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("pictures", "folder"),
        ("pictures.old", "folder"),
        ("a.jsonl", "table"),
        ("a.JSONL", "table"),
        ("a.csv", "table"),
        ("tables/*.parquet", "table"),
        ("meta.json", "table"),
        ("set-{000..123}.tar", "tar"),
        ("s3://bucket/set-*.tar", "tar"),
        ("https://host/a.parquet", "table"),
        ("s3://bucket/pictures", "folder"),
    ],
)
def test_the_kind_of_a_source_is_told_by_its_ending(path, kind):
    assert kind_of(SourceSection(path=path)) == kind
    assert kind_of(SourceSection(path=path, kind="tar")) == "tar", "the config has the last word"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_folder_with_a_metadata_file_is_a_table(tmp_path, name):
    section = SourceSection(path=str(tmp_path))
    assert kind_of(section) == "folder"
    (tmp_path / name).touch()
    assert kind_of(section) == "table"
    assert kind_of(SourceSection(path=str(tmp_path), kind="folder")) == "folder"


def test_everything_of_a_source_is_passed_on():
    section = {
        "path": "/a.csv", "role": "regularization", "repeats": 0.1, "loss_weight": 0.5, "caption_extensions": (".txt", ".json"),
        "caption_lines": "alternatives", "trigger": "ohwx", "picture_column": "file", "caption_columns": ("a", "b"), "mask_column": "m",
        "masks": "files",
    }  # fmt: skip
    (source,) = sources_of(config(data={"sources": [section]}))
    assert source == Source(**{**section, "kind": "table", "repeats": Fraction(1, 10)})
    (plain,) = sources_of(config(data={"sources": [{"path": "/a"}]}))
    assert plain == Source("/a")


@pytest.mark.parametrize(("number", "fraction"), [(1.0, 1), (0.1, Fraction(1, 10)), (2.5, Fraction(5, 2)), (1e-3, Fraction(1, 1000))])
def test_a_number_is_the_fraction_that_its_writer_meant(number, fraction):
    assert exactly(number) == fraction


# Repeats and shares


def test_repeats_are_taken_as_they_are():
    assert repeats_of(of({"repeats": 3}, {"repeats": 0.1}), [10, 5]) == (3, Fraction(1, 10))


def test_a_share_that_can_be_met_exactly_is():
    """A quarter of all beside 30 pictures shown twice: 20 samples of 8 pictures."""
    assert repeats_of(of({"repeats": 2}, {"share": 0.25}), [30, 8]) == (2, Fraction(20, 8))


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 10**6), min_size=2, max_size=5),
    shares=st.lists(st.integers(1, 240), min_size=4, max_size=4),
    repeats=st.sampled_from([1.0, 0.5, 3.0, 0.37]),
)
def test_shares_are_met_to_a_thousandth(counts, shares, repeats):
    """Of any sizes, for as long as an epoch has ten samples."""
    sources = [{"repeats": repeats}, *({"share": share / 1000} for share in shares[: len(counts) - 1])]
    found = repeats_of(of(*sources), counts)
    samples = [count * times for count, times in zip(counts, found, strict=True)]
    assert found[0] == exactly(repeats)
    if sum(samples) >= 10:
        for got, source in zip(samples[1:], sources[1:], strict=True):
            assert abs(got / sum(samples) - exactly(source["share"])) <= Fraction(1, 1000)


def test_a_source_without_pictures_takes_no_share():
    assert repeats_of(of({}, {"share": 0.25}, {"share": 0.5}), [30, 0, 10]) == (1, 1, 3)


def test_shares_alone_are_shares_among_each_other():
    """Of what else there was, nothing can be used: as many samples as pictures, 1 : 3."""
    first, second, third = repeats_of(of({}, {"share": 0.1}, {"share": 0.3}), [0, 20, 20])
    assert (20 * second, 20 * third) == (10, 30)
    assert first == 1


# Listing


def test_a_listing_counts_pictures_and_those_without_a_caption(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "notes.pdf").touch()
    listing = list_source(Source(str(tmp_path)))
    assert listing.num_pictures == 3
    assert listing.bare == [f"{tmp_path.name}/b.png", f"{tmp_path.name}/c.png"]
    assert listing.remarks.others == {".pdf": 1}


def test_rows_of_a_table_have_their_captions_with_them(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").touch()
    table = tmp_path / "a.jsonl"
    table.write_text('{"image": "a.png", "caption": "x"}\n{"image": "b.png", "caption": ""}\n{"image": "c.png", "caption": "y"}\n')
    listing = list_source(Source(str(table), kind="table"))
    assert (listing.num_pictures, len(listing.bare)) == (2, 1)
    assert len(listing.remarks.problems) == 1


def test_a_source_that_is_not_there_is_an_error_with_its_path(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path / "none")):
        list_source(Source(str(tmp_path / "none")))


def test_what_is_elsewhere_is_known_by_its_name():
    assert is_remote(Source("s3://bucket/a"))
    assert not is_remote(Source("/a"))


# Steps


def lines_of(settings, pictures):
    return "\n".join(steps_lines(settings, pictures, plan_of_steps(settings, pictures)))


def test_what_is_held_out_is_not_trained_and_never_from_regularization():
    """A tenth of 40 pictures shown twice; 10 others are shown once."""
    settings = of({"repeats": 2}, {"role": "regularization"}, validation={"share": 0.1})
    plan = plan_of_steps(settings, [40, 10])
    assert plan.samples_per_epoch == 2 * 36 + 10
    assert "about 4 pictures of these for validation only" in lines_of(settings, [40, 10])


def test_a_source_for_validation_is_all_that_is_held_out():
    settings = of({"repeats": 2}, {"role": "validation"}, validation={"share": 0.1})
    text = lines_of(settings, [40, 10])
    assert plan_of_steps(settings, [40, 10]).samples_per_epoch == 80
    assert "/1: 10 pictures for validation only" in text
    assert "of these" not in text


def test_a_share_is_planned_as_it_is_trained():
    settings = of({}, {"share": 0.25, "role": "regularization"}, validation={"every": None})
    assert plan_of_steps(settings, [30, 1000]).samples_per_epoch == 40
    assert "/1: 1,000 pictures, 25% of all samples" in lines_of(settings, [30, 1000])
    assert "for validation" not in lines_of(settings, [30, 1000]), "nothing is held out if nothing is measured"


def test_a_part_of_a_repeat_is_planned_too():
    settings = of({"repeats": 0.25}, validation={"every": None})
    assert plan_of_steps(settings, [10]).samples_per_epoch == 2
    assert plan_of_steps(settings, [1]).samples_per_epoch == 1
    assert "/0: 10 pictures × 0.25 repeats = 2" in lines_of(settings, [10])


def test_what_is_elsewhere_is_not_counted_and_shows_no_secret():
    settings = of({}, {"path": "https://user:secret@host/a.parquet?token=secret"}, validation={"every": None})
    assert lines_of(settings, [10, 0]).splitlines()[1] == "https://host/a.parquet: not counted before the run begins"


def test_nothing_to_train_on_is_said():
    settings = of({"role": "train"}, {"role": "validation"})
    assert plan_of_steps(settings, [0, 10]) is None
    assert lines_of(settings, [0, 10]).endswith("there is nothing to train on yet")
