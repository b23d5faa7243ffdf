import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.caption_text import split_tags, tag_key
from aquatint.data.captions import CaptionPolicy, render
from aquatint.data.tags import (
    IGNORED,
    count_tags,
    drop_probs,
    frequency_text,
    middle_count,
    picture_weights,
    read_tags,
    tag_weights,
)
from aquatint.utils.seeds import generator

CAPTIONS = st.lists(st.lists(st.sampled_from(["a", "b", "B", "c c", "c_c", "solo", ""]), max_size=6).map(", ".join), min_size=1, max_size=8)


def test_tags_are_counted_once_per_caption_whatever_their_spelling():
    captions = ["1girl, Long_Hair, long hair", "long hair,, \nred hair", "", "a ||| b"]
    assert count_tags(captions, ",") == {"1girl": 1, "long hair": 2, "red hair": 1, "a ||| b": 1}
    assert count_tags(captions, ",", keep_separator="|||")["b"] == 1
    assert count_tags([], ",") == {}
    assert count_tags(["a_b c"], " ") == {"a b": 1, "c": 1}


@settings(max_examples=100, deadline=None)
@given(CAPTIONS)
def test_counting_equals_splitting_and_counting(captions):
    expected = Counter(key for caption in captions for key in {tag_key(tag) for tag in split_tags(caption, ",")})
    assert count_tags(captions, ",") == expected
    table = read_tags(captions, ",")
    assert len(table) == len(captions)
    for row, caption in enumerate(captions):
        own = [table.tags[place] for place in table.ids[table.starts[row] : table.starts[row + 1]]]
        assert sorted(own) == sorted({tag_key(tag) for tag in split_tags(caption, ",")})


def test_weights_of_tags():
    counts = np.array([1, 10, 12, 50, 100, 200, 500, 1000])
    weights = tag_weights(counts, middle=50)
    assert weights == pytest.approx([2, 2, 2, 1, 0.5**0.5, 0.5, 0.5, 0.5])
    assert tag_weights(counts, middle=50, power=0.0) == pytest.approx([1] * 8)
    assert tag_weights(np.array([25]), middle=50, power=1.0, lowest=0.1, highest=1.5) == pytest.approx([1.5])


@pytest.mark.parametrize(
    ("counts", "middle"),
    [([], 1), ([7], 7), ([1, 1, 1, 1, 100], 100), ([10, 10, 10], 10), ([1] * 60 + [50], 1), ([5, 6, 7], 6)],
)
def test_the_middle_count_is_that_of_the_middle_use(counts, middle):
    uses = sorted(count for count in counts for _ in range(count))
    found = middle_count(np.array(counts, dtype=np.int64))
    assert found == middle
    assert not uses or found == uses[(len(uses) - 1) // 2]


def captions_with_counts():
    """`often` in 16 captions, `middle` in 8, `rarely` in 4 and one each of `1girl` and of nothing."""
    return ["often"] * 8 + ["often, solo, middle"] * 8 + ["rarely, masterpiece, best quality"] * 4 + ["1girl", ""]


def test_a_picture_weighs_the_geometric_mean_of_its_tags():
    table = read_tags(captions_with_counts(), ",")
    weights = picture_weights(table, np.ones(len(table)))
    often, middle, rarely = tag_weights(np.array([16, 8, 4]), middle=16)  # 16 of the 28 uses are of `often`
    assert (often, middle, rarely) == (1.0, pytest.approx(2**0.5), 2.0)
    expected = np.array([often] * 8 + [(often * middle) ** 0.5] * 8 + [rarely] * 4 + [1.0, 1.0])
    assert weights == pytest.approx(expected / expected.mean())
    assert weights.mean() == pytest.approx(1, abs=1e-12)


def test_the_mean_over_what_is_shown_is_one():
    captions = captions_with_counts()
    table = read_tags(captions, ",")
    repeats = np.linspace(0.25, 9, len(captions))
    weights = picture_weights(table, repeats)
    assert np.average(weights, weights=repeats) == pytest.approx(1, abs=1e-12)
    plain = picture_weights(table, np.ones(len(captions)))
    assert weights / weights[0] == pytest.approx(plain / plain[0])


def test_ignored_tags_change_nothing():
    captions = captions_with_counts()
    bare = [", ".join(tag for tag in split_tags(caption, ",") if tag in ("often", "middle", "rarely")) for caption in captions]
    ones = np.ones(len(captions))
    assert picture_weights(read_tags(captions, ","), ones) == pytest.approx(picture_weights(read_tags(bare, ","), ones))
    kept = picture_weights(read_tags(captions, ","), ones, ignore=())
    assert kept[-2] > kept[-1]  # 1girl is rare here
    more = picture_weights(read_tags(captions, ","), ones, ignore=(*IGNORED, "mid*", "Often", "rarely"))
    assert more == pytest.approx(ones)


def test_pictures_without_tags_weigh_the_same():
    assert picture_weights(read_tags(["", ""], ","), [1, 3]).tolist() == [1, 1]


@settings(max_examples=100, deadline=None)
@given(CAPTIONS, st.data())
def test_weights_equal_the_formula_written_out(captions, data):
    repeats = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=len(captions), max_size=len(captions)))
    tags = [sorted({tag_key(tag) for tag in split_tags(caption, ",")} - {"solo"}) for caption in captions]
    counts = Counter(tag for own in tags for tag in own)
    uses = sorted(counts[tag] for own in tags for tag in own)
    middle = uses[(len(uses) - 1) // 2] if uses else 1
    means = [np.prod([min(max((middle / counts[tag]) ** 0.5, 0.5), 2.0) ** (1 / len(own)) for tag in own]) for own in tags]
    expected = np.array(means) * sum(repeats) / np.dot(means, repeats)
    assert picture_weights(read_tags(captions, ","), repeats) == pytest.approx(expected)


def mean_drop(table, probs):
    return sum(probs[tag] * count for tag, count in zip(table.tags, table.counts.tolist(), strict=True)) / table.counts.sum()


@settings(max_examples=100, deadline=None)
@given(CAPTIONS, st.floats(0, 1))
def test_the_drop_rates_of_all_tags_have_the_wanted_mean(captions, prob):
    table = read_tags(captions, ",")
    probs = drop_probs(table, prob)
    assert probs.keys() == set(table.tags)
    assert all(0 <= one <= 1 for one in probs.values())
    if probs:
        assert mean_drop(table, probs) == pytest.approx(prob, abs=1e-9)


def test_frequent_tags_are_dropped_more_often():
    captions = ["a, b"] * 100 + ["a"] * 1500 + ["c"]
    table = read_tags(captions, ",")
    probs = drop_probs(table, 0.2, lowest=0.25)
    assert probs["a"] > probs["b"] == probs["c"]
    assert probs["a"] == pytest.approx(2 * probs["b"])  # the middle count is that of `a`: weights 1, 2 and 2
    high = drop_probs(table, 0.98)
    assert high["a"] == 1.0
    assert 0 < high["b"] < 1
    assert mean_drop(table, high) == pytest.approx(0.98)


def test_rates_are_used_by_rendering():
    captions = ["a, b"] * 8 + ["a"] * 92
    policy = replace(CaptionPolicy(style="tags"), keep_first=0, tag_drop_prob=0.3, tag_drop="weighted")
    probs = drop_probs(read_tags(captions, ","), 0.3)
    texts = [render(["a, b"], policy, generator(0, "x", position), drop_probs=probs) for position in range(800)]
    counts = Counter(tag for text in texts for tag in split_tags(text, ","))
    assert [counts["a"] / 800, counts["b"] / 800] == pytest.approx([1 - probs["a"], 1 - probs["b"]], abs=0.06)


def test_the_table_of_frequencies():
    text = frequency_text(Counter({"fox": 1200, "cat": 3, "dog": 3, "x\x1b": 1, "y": 1}), top=4)
    assert text.splitlines() == [
        "1,208 tags, 5 different ones, 2 of them used once",
        "      1,200  fox",
        "          3  cat",
        "          3  dog",
        "          1  x\\x1b",
    ]


def test_twenty_thousand_captions_take_a_moment():
    rng = np.random.default_rng(0)
    captions = [", ".join(f"tag {number}" for number in row) for row in rng.zipf(1.3, (20_000, 20)).tolist()]
    start = time.process_time()
    weights = picture_weights(read_tags(captions, ","), np.ones(len(captions)))
    assert time.process_time() - start < 1.5  # a fifth of that is usual, and 15 s for a million allowed
    assert len(weights) == len(captions)
