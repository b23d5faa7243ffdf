import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.caption_text import split_tags
from aquatint.data.captions import (
    CaptionPolicy,
    Category,
    caption_report,
    caption_shares,
    draw_dropout,
    is_random,
    num_possible,
    render,
    variants,
    weighted_variants,
)
from aquatint.utils.seeds import generator

TAGS = "a, b, c, d, e, f, g, h"
PLAIN = CaptionPolicy(style="tags")
SHUFFLE = replace(PLAIN, shuffle=True)
DIGEST = bytes(range(16))


def rendered(captions, policy, count=1, **more):
    captions = [captions] if isinstance(captions, str) else captions
    texts = [render(captions, policy, generator(0, "x", position), **more) for position in range(count)]
    return texts[0] if count == 1 else texts


# Rendering


def test_prose_is_left_as_it_is():
    text = "A fox,  in the {snow|sun}.\nIt is cold,"
    policy = CaptionPolicy(shuffle=True, keep_first=0, keep_separator="snow", tag_drop_prob=1.0, categories=(Category(("*",), 1.0),))
    assert rendered(text, policy) == text
    assert variants((text,), DIGEST, policy) == (text,)
    assert not is_random(policy)


def test_tags_without_chance_keep_their_order():
    assert rendered("a,b , c\nd", PLAIN) == "a, b, c, d"
    assert rendered("a;b,c", replace(PLAIN, separator=";")) == "a; b,c"


def test_a_picture_without_a_caption_has_its_trigger_words():
    for style in ("tags", "prose"):
        assert rendered([], CaptionPolicy(style=style)) == ""
        assert rendered([], CaptionPolicy(style=style, trigger="sks fox")) == "sks fox"
        assert variants((), DIGEST, CaptionPolicy(style=style, trigger="sks fox", shuffle=True, variants=4)) == ("sks fox",)


@settings(max_examples=50, deadline=None)
@given(keep_first=st.integers(0, 10), position=st.integers(0, 1000))
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(keep_first, position):
    text = render([TAGS], replace(SHUFFLE, keep_first=keep_first), generator(0, "x", position))
    tags = split_tags(text, ",")
    assert sorted(tags) == sorted(split_tags(TAGS, ","))
    assert tags[:keep_first] == split_tags(TAGS, ",")[:keep_first]


def test_shuffling_shuffles_differently_at_each_position():
    assert len(set(rendered(TAGS, SHUFFLE, 50))) > 45


def test_every_order_of_the_shuffled_tags_is_equally_likely():
    counts = Counter(rendered("k, a, b, c", SHUFFLE, 1200))
    assert len(counts) == 6
    assert all(abs(count - 200) < 60 for count in counts.values())


def test_tags_are_dropped_at_their_rate_and_the_first_ones_never():
    texts = rendered(TAGS, replace(PLAIN, keep_first=2, tag_drop_prob=0.25), 1000)
    tags = [split_tags(text, ",") for text in texts]
    assert all(some[:2] == ["a", "b"] for some in tags)
    assert np.mean([len(some) - 2 for some in tags]) == pytest.approx(6 * 0.75, abs=0.15)
    assert all(some == sorted(some) for some in tags)


def test_dropping_all_tags_leaves_the_first_ones():
    assert rendered(TAGS, replace(PLAIN, tag_drop_prob=1.0)) == "a"
    assert rendered(TAGS, replace(PLAIN, keep_first=0, tag_drop_prob=1.0)) == ""


def test_a_tag_that_a_higher_rate_keeps_is_kept_by_a_lower_one():
    few, many = (rendered(TAGS, replace(PLAIN, tag_drop_prob=prob), 200) for prob in (0.6, 0.3))
    assert all(set(split_tags(a, ",")) <= set(split_tags(b, ",")) for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize(
    ("caption", "start", "middle", "end"),
    [
        ("a, b ||| c, d, e", "ab", "cde", ""),
        ("a, b, ||| , c, d, e", "ab", "cde", ""),
        ("a|||b, c, d|||e", "a", "bcd", "e"),
        ("a|||b, c|||d|||e", "a", "bc", "de"),
        ("|||a, b, c", "", "abc", ""),
        ("a, b, c|||", "abc", "", ""),
        ("a, b, c, d", "a", "bcd", ""),
    ],
)
def test_marks_say_which_tags_stay(caption, start, middle, end):
    policy = replace(SHUFFLE, keep_separator="|||")
    for text in rendered(caption, policy, 30):
        letters = "".join(split_tags(text, ","))
        assert "|" not in text
        assert letters.startswith(start)
        assert letters.endswith(end)
        assert sorted(letters) == sorted(start + middle + end)
    texts = rendered(caption, replace(policy, shuffle=False, tag_drop_prob=1.0), 2)
    assert texts == [", ".join(start + end)] * 2


def test_categories_have_drop_rates_of_their_own():
    policy = CaptionPolicy(
        style="tags",
        keep_first=0,
        tag_drop_prob=0.5,
        categories=(Category(("artist:*", "By_*"), 1.0), Category(("rating:safe", "artist:known"), 0.0), Category(("rating:*",), 1.0)),
    )
    texts = rendered("artist:x, artist:known, Artist:Y, by z, rating:safe, rating:other, my rating:x, cat", policy, 400)
    counts = Counter(tag for text in texts for tag in split_tags(text, ","))
    assert counts["artist:known"] == counts["rating:safe"] == 400
    assert counts["my rating:x"] == pytest.approx(200, abs=60)
    assert counts["cat"] == pytest.approx(200, abs=60)
    assert set(counts) == {"artist:known", "rating:safe", "my rating:x", "cat"}


def test_of_two_categories_with_a_tag_the_first_counts():
    assert rendered("k, a_b", replace(PLAIN, categories=(Category(("a b",), 1.0), Category(("a b",), 0.0)))) == "k"
    assert rendered("k, a_b", replace(PLAIN, categories=(Category(("a*",), 1.0), Category(("*b",), 0.0)))) == "k"
    assert rendered("k, a_b", replace(PLAIN, categories=(Category(("a*",), 1.0), Category(("a b",), 0.0)))) == "k, a_b"


def test_letters_with_a_meaning_in_patterns_are_plain():
    policy = replace(PLAIN, categories=(Category(("x.(y)*",), 1.0),))
    assert rendered("k, x.(y) z, xa(y) z", policy) == "k, xa(y) z"


def test_weighted_dropping_uses_the_rate_of_each_tag():
    policy = replace(PLAIN, keep_first=0, tag_drop_prob=0.5, tag_drop="weighted", categories=(Category(("c",), 0.0),))
    texts = rendered("A_a, b, c, d", policy, 600, drop_probs={"a a": 0.9, "b": 0.1, "c": 1.0})
    counts = Counter(tag for text in texts for tag in split_tags(text, ","))
    assert [counts[tag] / 600 for tag in ("A_a", "b", "c", "d")] == pytest.approx([0.1, 0.9, 1.0, 0.5], abs=0.07)


def test_rates_of_tags_do_not_count_where_dropping_is_uniform():
    policy = replace(PLAIN, keep_first=0, tag_drop_prob=1.0, categories=(Category(("x",), 0.0),))
    assert rendered("a, b", policy, drop_probs={"a": 0.0, "b": 0.0}) == ""


@pytest.mark.parametrize(
    ("trigger", "caption", "expected"),
    [
        ("sks fox", "A fox in the snow", "sks fox, A fox in the snow"),
        ("sks fox", "", "sks fox"),
        ("sks fox", "SKS fox in the snow", "SKS fox in the snow"),
        ("sks fox", "sks foxes", "sks fox, sks foxes"),
        (" sks fox, ", "A fox", "sks fox, A fox"),
        ("A photo of sks:", "a fox", "A photo of sks: a fox"),
    ],
)
def test_trigger_words_stand_before_prose_once(trigger, caption, expected):
    assert rendered(caption, CaptionPolicy(trigger=trigger)) == expected
    assert variants((caption,), DIGEST, CaptionPolicy(trigger=trigger, variants=3)) == (expected,)


def test_trigger_words_are_tags_that_stay_in_front_once():
    policy = replace(SHUFFLE, trigger="sks, my style", keep_first=0, tag_drop_prob=1.0)
    assert rendered("a, My_Style, b", policy) == "sks, my style"
    texts = rendered("a, My_Style, b", replace(policy, tag_drop_prob=0.0, keep_first=1), 20)
    assert set(texts) == {"sks, my style, a, b"}


def test_one_of_several_captions_is_used():
    captions = ["one", "two", "three"]
    assert set(rendered(captions, CaptionPolicy(pick="first"), 50)) == {"one"}
    counts = Counter(rendered(captions, CaptionPolicy(), 900))
    assert [counts[caption] for caption in captions] == pytest.approx([300] * 3, abs=60)
    counts = Counter(rendered(captions, CaptionPolicy(pick=(3.0, 0.0, 1.0)), 800))
    assert counts.keys() == {"one", "three"}
    assert counts["one"] == pytest.approx(600, abs=60)


def test_weights_fit_to_the_number_of_captions():
    assert caption_shares(2, (1.0, 3.0, 4.0)) == (0.25, 0.75)
    assert caption_shares(3, (1.0, 3.0)) == (0.25, 0.75)
    assert caption_shares(1, (0.0, 1.0)) == (1.0,)
    assert caption_shares(2, (0.0, 0.0, 1.0)) == (1.0,)
    assert caption_shares(0, "random") == (1.0,)


def test_choices_are_made_where_they_are_wanted():
    text = "a {red|blue} fox"
    assert rendered(text, CaptionPolicy()) == text
    assert set(rendered(text, CaptionPolicy(wildcards=True), 50)) == {"a red fox", "a blue fox"}
    assert rendered(r"\{a\|b\}", CaptionPolicy(wildcards=True)) == "{a|b}"
    tags = replace(PLAIN, wildcards=True)
    assert set(rendered("x, {a, b|c}, {|y}", tags, 100)) == {"x, a, b, y", "x, a, b", "x, c, y", "x, c"}


def test_rendering_is_a_function_of_the_generator_and_survives_pickling():
    policy = replace(SHUFFLE, tag_drop_prob=0.3, categories=(Category(("a*",), 0.2),), wildcards=True, trigger="t")
    captions = [TAGS + ", {x|y}", "p, q, r, s"]
    first = rendered(captions, policy, 20)
    assert first == rendered(captions, policy, 20) == rendered(captions, pickle.loads(pickle.dumps(policy)), 20)
    assert policy == pickle.loads(pickle.dumps(policy))


def test_known_renderings():
    """Golden: a change would make every cached caption another one."""
    policy = replace(SHUFFLE, tag_drop_prob=0.25, variants=3)
    assert variants((TAGS,), DIGEST, policy) == ("a, c, f, b, e, d, g", "a, h, e, c, d", "a, e, h, b, g")
    assert rendered([TAGS, "x, y, z"], policy, 3) == ["a, d, h, g, e, c", "a, g, h, b, f, c, e, d", "x, z, y"]


# Variants


def test_variants_are_a_function_of_the_content():
    policy = replace(SHUFFLE, variants=4)
    first = variants((TAGS,), DIGEST, policy)
    assert len(first) == len(set(first)) == 4
    assert first == variants((TAGS,), DIGEST, policy)
    assert first == variants((TAGS,), DIGEST, replace(policy, variants=9))[:4]
    assert first != variants((TAGS,), bytes(16), policy)


@pytest.mark.parametrize("policy", [PLAIN, CaptionPolicy(shuffle=True, tag_drop_prob=0.5), CaptionPolicy(trigger="x")])
def test_a_caption_without_chance_has_one_variant(policy):
    policy = replace(policy, variants=8)
    assert len(variants((TAGS,), DIGEST, policy)) == 1
    assert num_possible((TAGS,), policy, 1) == 1
    assert not is_random(policy)


@pytest.mark.parametrize(
    "change", [{"shuffle": True}, {"tag_drop_prob": 0.1}, {"categories": (Category(("a",), 0.1),)}, {"wildcards": True}], ids=str
)
def test_what_makes_captions_random(change):
    assert is_random(replace(PLAIN, **change))


def test_shuffling_one_tag_has_one_variant():
    assert weighted_variants(("a, b",), DIGEST, replace(SHUFFLE, variants=8)) == {"a, b": pytest.approx(1.0)}


def test_all_texts_are_variants_when_they_are_few():
    policy = CaptionPolicy(wildcards=True, variants=4, pick=(1.0, 3.0))
    captions = ("a {red|blue} fox", "{a|a} fox")
    expected = {"a red fox": 0.125, "a blue fox": 0.125, "a fox": 0.75}
    assert weighted_variants(captions, DIGEST, policy) == weighted_variants(captions, bytes(16), policy) == expected
    assert variants(captions, DIGEST, policy) == tuple(expected)
    assert num_possible(captions, policy, 3) == 3
    assert num_possible(captions, policy, 2) is None
    assert num_possible((TAGS,), SHUFFLE, 100) is None


def test_captions_that_are_equal_are_one_variant():
    assert weighted_variants(("fox", "cat", "fox "), DIGEST, CaptionPolicy(variants=8)) == {"fox": pytest.approx(2 / 3), "cat": 1 / 3}


def test_captions_that_are_never_used_are_no_variants():
    assert variants(("fox", "cat"), DIGEST, CaptionPolicy(variants=8, pick=(0.0, 1.0))) == ("cat",)
    assert variants(("fox", "cat"), DIGEST, CaptionPolicy(variants=8, pick="first")) == ("fox",)


def test_more_captions_than_variants_share_them_evenly():
    captions = tuple("abcde")
    found = [variants(captions, bytes([number, *bytes(15)]), CaptionPolicy(variants=3)) for number in range(200)]
    assert {len(texts) for texts in found} == {3}
    counts = Counter(text for texts in found for text in texts)
    assert [counts[caption] for caption in captions] == pytest.approx([120] * 5, abs=30)


def test_captions_keep_their_probabilities_among_their_renderings():
    captions = ("1, a, b, c, d, e", "2, a, b, c, d, e", "3, a, b, c, d, e")
    texts = weighted_variants(captions, DIGEST, replace(SHUFFLE, variants=16, pick=(0.5, 0.3, 0.2)))
    shares = Counter()
    for text, weight in texts.items():
        shares[text[0]] += weight
    assert shares == {"1": pytest.approx(0.5), "2": pytest.approx(0.3), "3": pytest.approx(0.2)}


@settings(max_examples=100, deadline=None)
@given(
    captions=st.lists(st.text("ab,|{}\\ \n", max_size=12), max_size=4),
    policy=st.builds(
        CaptionPolicy,
        style=st.sampled_from(["tags", "prose"]),
        shuffle=st.booleans(),
        keep_first=st.integers(0, 2),
        keep_separator=st.sampled_from(["", "||"]),
        tag_drop_prob=st.sampled_from([0.0, 0.5]),
        wildcards=st.booleans(),
        pick=st.sampled_from(["first", "random", (1.0, 0.0, 2.0)]),
        trigger=st.sampled_from(["", "a", "t"]),
        variants=st.integers(1, 5),
    ),
    digest=st.binary(min_size=16, max_size=16),
)
def test_variants_are_different_renderings_whose_weights_add_up_to_one(captions, policy, digest):
    texts = weighted_variants(captions, digest, policy)
    assert 1 <= len(texts) <= policy.variants
    assert sum(texts.values()) == pytest.approx(1)
    assert variants(captions, digest, policy) == tuple(texts)
    possible = num_possible(captions, policy, policy.variants)
    if possible is not None:
        assert len(texts) == possible
        assert render(captions, policy, generator(1, "x", 0)) in texts


# Dropout


def test_captions_are_dropped_at_their_rates():
    drawn = [draw_dropout(3, position, prob=0.2, zeros_share=0.25) for position in range(10_000)]
    assert drawn.count("keep") == pytest.approx(8000, abs=160)
    assert drawn.count("zeros") == pytest.approx(500, abs=90)
    assert drawn.count("empty") == pytest.approx(1500, abs=150)


@pytest.mark.parametrize(
    ("prob", "zeros_share", "expected"),
    [(0.0, 0.5, {"keep"}), (1.0, 1.0, {"zeros"}), (1.0, 0.0, {"empty"}), (1.0, 0.5, {"zeros", "empty"})],
)
def test_dropout_at_its_limits(prob, zeros_share, expected):
    assert {draw_dropout(0, position, prob=prob, zeros_share=zeros_share) for position in range(200)} == expected


def test_dropout_is_a_function_of_seed_and_position():
    first = [draw_dropout(1, position, prob=0.5, zeros_share=0.5) for position in range(64)]
    assert first == [draw_dropout(1, position, prob=0.5, zeros_share=0.5) for position in range(64)]
    assert first != [draw_dropout(2, position, prob=0.5, zeros_share=0.5) for position in range(64)]


def test_a_higher_dropout_drops_what_a_lower_one_drops():
    low = {position for position in range(500) if draw_dropout(0, position, prob=0.1, zeros_share=0.5) != "keep"}
    high = {position for position in range(500) if draw_dropout(0, position, prob=0.3, zeros_share=0.5) != "keep"}
    assert low < high


# Text


def test_the_report_counts_chunks_and_names_the_longest():
    names = [f"pics/{number}.jpg" for number in range(8)]
    captions = [f"caption {number}" for number in range(7)] + ["x" * 300 + "\x1b"]
    counts = [
        (0, 1, False),
        (10, 1, False),
        (75, 1, False),
        (76, 2, True),
        (150, 2, False),
        (450, 6, False),
        (900, 12, True),
        (9, 1, False),
    ]
    text = caption_report(names, captions, counts)
    assert text.startswith("8 captions of 0 to 900 tokens, 76 in the middle; none is cut off\n")
    assert "  4 in 1 chunk\n  2 in 2 chunks\n  2 in 6 chunks or more\n" in text
    assert "the longest: pics/6.jpg (900 tokens), pics/5.jpg (450 tokens), pics/4.jpg (150 tokens)\n" in text
    assert "2 broken inside a tag or sentence, as no comma is near: pics/3.jpg, pics/6.jpg\n" in text
    assert text.count('tokens): "') == 5
    assert 'pics/0.jpg (0 tokens): "caption 0"\n' in text
    assert f'pics/7.jpg (9 tokens): "{"x" * 199}…"\n' in text


def test_the_report_of_few_captions():
    text = caption_report(["a.jpg"], ["red\nfox \x1b[31m"], [(3, 1, False)])
    assert text.splitlines() == [
        "1 caption of 3 tokens; none is cut off",
        "  1 in 1 chunk",
        "  the longest: a.jpg (3 tokens)",
        "for example:",
        '  a.jpg (3 tokens): "red\\nfox \\x1b[31m"',
    ]
    assert caption_report([], [], []) == "there are no captions\n"
