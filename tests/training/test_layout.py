from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from aquatint.data.crop import Crop, fit
from aquatint.data.ledger import ledger_text
from aquatint.data.sampler import Group, Order
from aquatint.errors import DataError
from aquatint.training.layout import latent_requests, mask_requests
from tests.runs import small_config
from tests.training.manifests import DIGESTS, Row, digest, digest_of, layout_of, some

TAGS = {"style": "tags", "shuffle": True, "keep_first": 0}


@pytest.fixture
def config(tmp_path):
    """A config whose sources have the paths /0, /1 …, and what is given of each."""
    (tmp_path / "pictures").mkdir()

    def build(*sources, **sections):
        data = {"sources": [{"path": f"/{index}", **source} for index, source in enumerate(sources or ({},))], **sections.pop("data", {})}
        return small_config(tmp_path, tmp_path / "base.safetensors", data=data, **sections)

    return build


def names(side):
    return [side.samples.names[row] for row in range(len(side.samples))]


def names_of(rows):
    return {f"{row.content}.png" for row in rows}


def texts_of(side):
    """The texts of each picture, by its name."""
    return {name: [side.texts[text] for text in side.samples.text_of[row]] for row, name in enumerate(names(side))}


# Who is trained


def test_every_picture_is_trained_or_held_out(config):
    layout = layout_of(config(), some(40))
    trained, held_out = set(names(layout.train)), set(names(layout.held_out))
    assert len(held_out) == 2
    assert trained | held_out == names_of(some(40))
    assert not trained & held_out
    assert not layout.held_out_is_trained


def test_nothing_is_held_out_when_validation_is_off(config):
    layout = layout_of(config(validation={"every": None}), some(40))
    assert len(layout.train.samples) == 40
    assert len(layout.held_out.samples) == 0


def test_with_share_zero_the_measured_pictures_are_trained_too(config):
    layout = layout_of(config(validation={"share": 0.0}), some(40))
    assert len(layout.train.samples) == 40
    assert len(layout.held_out.samples) == 2
    assert layout.held_out_is_trained


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_pictures_for_regularization_are_trained_and_never_measured(config, share):
    own, general = some(6), some(30, 100, source=1)
    settings = config({}, {"role": "regularization"}, validation={"share": share, "max_pictures": 20})
    layout = layout_of(settings, own + general)
    assert set(names(layout.held_out)) <= names_of(own)
    assert len(layout.held_out.samples) > 0
    assert names_of(general) <= set(names(layout.train))


def test_pictures_for_validation_are_measured_and_never_trained(config):
    own, measured = some(20), some(8, 100, source=1)
    settings = config({}, {"role": "validation"}, validation={"max_pictures": 64})
    layout = layout_of(settings, own + measured)
    assert set(names(layout.train)) == names_of(own)
    assert set(names(layout.held_out)) == names_of(measured)
    assert not layout.held_out_is_trained


def test_a_copy_of_a_picture_for_validation_is_not_trained(config):
    copy = Row(100, name="copy.png")
    layout = layout_of(config({}, {"role": "validation"}), [*some(20), copy, Row(100, source=1)])
    assert "copy.png" not in names(layout.train)


def test_no_more_pictures_are_measured_than_wanted_and_none_that_nobody_asks_for(config):
    rows = some(20) + some(8, 100, source=1)
    few = layout_of(config({}, {"role": "validation"}, validation={"max_pictures": 3}), rows)
    assert len(few.held_out.samples) == 3
    assert len(few.train.samples) == 20
    again = layout_of(config({}, {"role": "validation"}, validation={"max_pictures": 4}), rows)
    assert set(names(few.held_out)) < set(names(again.held_out)), "which ones is decided by their content"
    off = layout_of(config({}, {"role": "validation"}, validation={"every": None}), rows)
    assert len(off.held_out.samples) == 0
    assert len(off.train.samples) == 20
    assert not off.held_out_is_trained


def test_some_trained_pictures_are_measured_beside_those_held_out(config):
    """Those of the lowest digests, whatever the others are; none for regularization, and none twice."""
    validation = {"share": 0.2, "train_pictures": 3}
    layout = layout_of(config({}, {"role": "regularization"}, validation=validation), some(40) + some(10, 100, source=1))
    own = [name for name in names(layout.train) if name in names_of(some(40))]
    assert len(names(layout.known)) == 3
    assert set(names(layout.known)) == set(sorted(own, key=lambda name: digest(int(name.removesuffix(".png"))))[:3])
    assert not set(names(layout.known)) & set(names(layout.held_out))
    assert layout.known.samples.loss_weights.tolist() == [1.0] * 3


def test_no_trained_picture_is_measured_twice_or_when_nothing_is_measured(config):
    """Without held-out pictures, trained ones stand in for them."""
    assert len(layout_of(config(validation={"share": 0.0, "train_pictures": 3}), some(40)).known.samples) == 0
    assert len(layout_of(config(validation={"every": None, "train_pictures": 3}), some(40)).known.samples) == 0
    assert len(layout_of(config(validation={"share": 0.2, "train_pictures": 0}), some(40)).known.samples) == 0


def test_a_picture_that_is_too_small_is_left_out_with_the_reason(config):
    small = [Row(500, (20, 20)), Row(501, (24, 16))]
    layout = layout_of(config(buckets={"max_upscale": 2.0}), some(20) + small)
    assert not names_of(small) & {*names(layout.train), *names(layout.held_out)}
    reasons = {one.name: one.reason for one in layout.manifest.rejected}
    assert reasons["500.png"] == "is too small: 20 x 20 would be enlarged 3.2 times, and buckets.max_upscale is 2.0"
    assert "enlarged 4.0 times" in reasons["501.png"]
    text = ledger_text(layout.manifest)
    assert text.startswith("22 pictures listed = 20 used + 0 quarantined + 2 left out\n"), "it is no fault of theirs"
    assert "  500.png: is too small" in text


def test_a_set_of_pictures_that_are_all_too_small_is_refused_with_the_reason(config):
    with pytest.raises(DataError, match=r"there is no picture to train on: 5\d\d\.png is too small: .*buckets\.max_upscale is 2\.0"):
        layout_of(config(buckets={"max_upscale": 2.0}), [Row(500 + index, (20, 20)) for index in range(4)])


# How often, and with what weight


def test_a_group_is_a_source_in_a_bucket_with_its_repeats(config):
    rows = [Row(index, (64, 64), source=index % 2) for index in range(12)]
    wide = [Row(50 + index, (64, 256), source=1) for index in range(8)]
    settings = config({"repeats": 2}, {"repeats": 0.5}, validation={"every": None}, buckets={"max_side": 256, "max_aspect": 4.0})
    layout = layout_of(settings, rows + wide)
    assert layout.plan.shapes.tolist() == [[64, 64], [32, 128]]
    assert layout.groups == ((Group(6, Fraction(2)), Group(6, Fraction(1, 2))), (Group(8, Fraction(1, 2)),))
    samples = layout.train.samples
    assert samples.sources.tolist() == [0] * 6 + [1] * 6 + [1] * 8
    assert [len(bucket) for bucket in samples.buckets()] == [12, 8]
    assert [row.num_samples for row in layout.report] == [15, 4]


def test_over_many_epochs_each_picture_is_shown_as_often_as_its_source_says(config):
    own, general = some(8), some(10, 100, source=1)
    settings = config({"repeats": 3}, {"repeats": 0.4, "role": "regularization"}, validation={"every": None})
    layout = layout_of(settings, own + general)
    order = Order(0, layout.groups, 2)
    samples = layout.train.samples
    seen = Counter()
    for index in range(order.batches_before_epoch(5)):
        bucket, members = order.batch(index)
        seen.update(samples.names[samples.bucket(bucket).start + member] for member in members)
    assert seen.total() == 5 * (3 * 8 + 4)
    assert {seen[name] for name in names_of(own)} == {15}
    assert {seen[name] for name in names_of(general)} == {2}


def test_a_share_is_a_share_of_what_is_trained(config):
    """A picture that is held out, or too small, does not count."""
    own, general = some(40), [*some(10, 100, source=1), Row(200, (8, 8), source=1)]
    settings = config({"repeats": 2}, {"share": 0.25, "role": "regularization"}, buckets={"max_upscale": 2.0})
    layout = layout_of(settings, own + general)
    counts = np.bincount(layout.train.samples.sources)
    assert counts.tolist() == [38, 10]
    assert layout.repeats[1] * 10 == pytest.approx(Fraction(76, 3), abs=0.0005)
    assert f"/1: 11 pictures listed = 10 used + 0 quarantined + 1 left out; for regularization, {float(layout.repeats[1]):g} times" in (
        ledger_text(layout.manifest)
    )


def test_repeats_do_not_count_in_validation(config):
    layout = layout_of(config({"repeats": 3}), some(40))
    assert sum(group.count * group.repeats for groups in layout.groups for group in groups) == 3 * 38
    assert len(layout.held_out.samples) == 2


def test_samples_weigh_what_their_source_says(config):
    settings = config({}, {"loss_weight": 0.25, "role": "regularization"}, {"role": "validation"})
    layout = layout_of(settings, some(8) + some(6, 100, source=1) + some(2, 200, source=2))
    samples = layout.train.samples
    assert dict(zip(samples.sources.tolist(), samples.loss_weights.tolist(), strict=True)) == {0: 1.0, 1: 0.25}
    assert layout.held_out.samples.loss_weights.tolist() == [1.0, 1.0]


def test_tag_weights_have_a_mean_of_one_over_what_is_shown(config):
    common = some(20, captions=("1girl, park, dog",))
    rare = some(4, 100, captions=("1girl, volcano, castle",), source=1)
    tags = {"tag_weights": {"enabled": True}, "style": "tags"}
    settings = config({"repeats": 3}, {"repeats": 0.5}, captions=tags, validation={"every": None})
    layout = layout_of(settings, common + rare)
    samples = layout.train.samples
    times = np.array([float(layout.repeats[source]) for source in samples.sources])
    weights = samples.loss_weights.astype(np.float64)
    assert np.average(weights, weights=times) == pytest.approx(1.0, abs=1e-6)
    assert weights[samples.sources == 1].min() > 1 > weights[samples.sources == 0].max()
    halved = layout_of(
        config({"repeats": 3}, {"repeats": 0.5, "loss_weight": 0.5}, captions=tags, validation={"every": None}), common + rare
    )
    assert halved.train.samples.loss_weights == pytest.approx(np.where(samples.sources == 1, 0.5, 1.0) * weights)


# Texts


def test_cached_texts_are_renderings_with_their_shares(config):
    rows = [Row(index, captions=("a, b, c, d, e",)) for index in range(10)] + [Row(90, captions=("only",))]
    layout = layout_of(config(captions={**TAGS, "variants": 4}, validation={"every": None}), rows)
    side = layout.train
    assert side.samples.captions is None
    texts = texts_of(side)
    assert {len(found) for name, found in texts.items() if name != "90.png"} <= {3, 4}
    assert all(sorted(text.split(", ")) == list("abcde") for name, found in texts.items() for text in found if name != "90.png")
    assert texts["90.png"] == ["only"]
    assert len(side.samples.text_keys) == len(side.texts) == len(side.samples.text_weights)
    sums = [sum(side.samples.text_weights[text] for text in side.samples.text_of[row]) for row in range(11)]
    assert sums == pytest.approx([1.0] * 11)


def test_texts_that_are_encoded_as_they_come_are_kept_as_they_are_written(config):
    rows = [Row(index, captions=(f"first, {index}", "second")) for index in range(9)] + [Row(90, captions=())]
    layout = layout_of(config(captions=TAGS), rows)
    side = layout.train
    assert side.samples.captions is not None
    assert (side.texts, len(side.samples.text_keys)) == ((), 0)
    written = {name: [side.samples.captions[text] for text in side.samples.text_of[row]] for row, name in enumerate(names(side))}
    for name, found in written.items():
        assert found == ([""] if name == "90.png" else [f"first, {name[:-4]}", "second"])
    assert layout.held_out.samples.captions is None, "what is measured stays the same, and is cached"
    assert len(layout.held_out.texts) == len(layout.held_out.samples) == 1


@pytest.mark.parametrize(
    ("captions", "online"),
    [
        ({}, False),
        ({"style": "tags"}, False),
        (TAGS, True),
        ({**TAGS, "variants": 2}, False),
        ({**TAGS, "text": "cached"}, False),
        ({"text": "online"}, True),
        ({"wildcards": True}, True),
    ],
)
def test_captions_that_vary_are_encoded_as_they_come_unless_the_config_says_otherwise(config, captions, online):
    assert (layout_of(config(captions=captions), some(8)).train.samples.captions is not None) == online


def test_trigger_words_are_those_of_the_source(config):
    rows = some(8) + some(8, 100, source=1)
    layout = layout_of(config({"trigger": "ohwx"}, {}, validation={"share": 0.5, "max_pictures": 4}), rows)
    for side in (layout.train, layout.held_out):
        texts = texts_of(side)
        assert {tuple(found) for name, found in texts.items() if int(name[:-4]) < 100} == {("ohwx, a red circle",)}
        assert {tuple(found) for name, found in texts.items() if int(name[:-4]) >= 100} <= {("a red circle",)}


def test_prompts_are_encoded_whatever_becomes_of_captions(config):
    samples = {"prompts": ["x", "y"], "negative_prompt": "z"}
    for captions in ({}, TAGS):
        assert layout_of(config(captions=captions, samples=samples), some(8)).prompts.keys() == {"", "x", "y", "z"}


def test_weighted_drops_know_how_frequent_tags_are(config):
    rows = some(16, captions=("common, x",)) + some(2, 100, captions=("rare, x",))
    captions = {**TAGS, "tag_drop_prob": 0.2, "tag_drop": "weighted"}
    layout = layout_of(config(captions=captions, validation={"every": None}), rows)
    assert layout.drop_probs["rare"] < layout.drop_probs["common"]
    assert layout_of(config(captions={**captions, "tag_drop": "uniform"}), rows).drop_probs is None


# Crops


def test_what_is_measured_is_shown_plainly(config):
    """The first caption as it is written, with its trigger words; a crop from the middle; not mirrored."""
    rows = [Row(index, (64, 100), captions=("b, a, c, d", "other")) for index in range(40)]
    crop = {"mode": "random", "variants": 3, "flip_prob": 0.5}
    captions = {**TAGS, "variants": 4, "tag_drop_prob": 0.5, "categories": [{"tags": ["a"], "drop_prob": 1.0}]}
    layout = layout_of(config({"trigger": "ohwx"}, crop=crop, captions=captions), rows)
    side = layout.held_out
    assert side.texts == ("ohwx, b, a, c, d",) * 2
    assert side.crops.shape == (2, 1, 9)
    (shape,) = {tuple(shape) for shape in layout.plan.shapes.tolist()}
    assert [Crop.from_row(row) for row in side.crops[:, 0]] == [fit((64, 100), shape)] * 2


def test_random_crops_and_mirrors_are_views_of_one_picture(config):
    layout = layout_of(config(crop={"mode": "random", "variants": 3, "flip_prob": 0.5}), [Row(index, (64, 100)) for index in range(40)])
    samples, crops = layout.train.samples, layout.train.crops
    assert samples.latent_keys.shape == (38, 6, 16)
    assert max(len({bytes(key) for key in keys}) for keys in samples.latent_keys) == 6
    for row in range(38):
        views = [Crop.from_row(crop) for crop in crops[row]]
        assert [view.flipped for view in views] == [False, True] * 3
        assert [view.left for view in views[::2]] == [view.left for view in views[1::2]]
        assert [tuple(ids) for ids in samples.time_ids[row].tolist()] == [view.time_ids for view in views]


def test_focus_crops_are_centred_where_something_stands_out(config):
    rows = [Row(index, (64, 128)) for index in range(8)]
    settings = config(crop={"mode": "focus"}, validation={"every": None}, buckets={"max_aspect": 1.5})
    layout = layout_of(settings, rows, focus={digest(0): (0.5, 0.0), digest(1): (0.5, 1.0), digest(2): (0.5, 0.4)})
    lefts = {name: int(layout.train.crops[row, 0, 5]) for row, name in enumerate(names(layout.train))}
    assert layout.plan.shapes.tolist() == [[64, 64]]
    assert (lefts["0.png"], lefts["1.png"], lefts["2.png"], lefts["3.png"]) == (0, 64, 19, 32)


# Masks


def test_a_mask_has_a_key_for_each_view_and_a_picture_without_one_none(config):
    rows = [Row(index, (64, 100), mask=index if index < 6 else None) for index in range(12)]
    settings = config({"masks": "files"}, crop={"mode": "random", "variants": 2, "flip_prob": 0.5}, validation={"every": None})
    samples = layout_of(settings, rows).train.samples
    for row in range(12):
        keys = [samples.mask_key(row, view) for view in range(4)]
        if int(samples.names[row][:-4]) < 6:
            assert len(set(keys)) == 4
            assert None not in keys
        else:
            assert keys == [None] * 4
    assert layout_of(settings, some(4)).train.samples.mask_keys is None


def test_opacity_and_a_mask_of_the_same_bytes_are_two_things(config):
    rows = [Row(index, mask=index) for index in range(4)]
    files, alpha = (
        layout_of(config({"masks": kind}, validation={"every": None}), rows).train.samples.mask_keys for kind in ("files", "alpha")
    )
    assert files.shape == alpha.shape
    assert not (files == alpha).all(axis=2).any()


# Requests


def test_requests_are_for_what_is_missing_in_the_order_of_the_files(config):
    rows = [Row(index, SIZES[index % 3], mask=index % 2 or None) for index, SIZES in enumerate([[(64, 64), (48, 80), (80, 48)]] * 12)]
    settings = config({"masks": "files"}, crop={"mode": "random", "variants": 2}, validation={"every": None})
    layout = layout_of(settings, rows)
    side = layout.train
    missing = np.zeros((12, 2), bool)
    missing[[1, 5, 7], 0] = True
    missing[5, 1] = True
    found = list(latent_requests(layout.manifest, side, missing))
    assert {request.key for request in found} == {
        side.samples.latent_key(row, view) for row, view in zip(*np.nonzero(missing), strict=True)
    }
    order = [int(request.place.path[1:-4]) for request in found]
    assert order == sorted(order)
    assert Counter(order).most_common(1)[0][1] == 2
    for request in found:
        assert request.picture_digest == digest(int(request.place.path[1:-4]))
    everything = np.ones((12, 2), bool)
    masks = list(mask_requests(layout.manifest, side, everything))
    assert {request.place.path for request in masks} == {"/masks/1.png"}
    assert len(masks) == 2 * 6
    assert {request.mask_digest for request in masks} == {digest(1001)}
    assert {request.kind for request in masks} == {"file"}


# Decoded smaller


def large(count, **changes):
    return [Row(index, (400, 300), **changes) for index in range(count)]


def test_a_large_jpeg_is_decoded_smaller_and_a_large_png_or_a_small_jpeg_is_not(config):
    rows = [*large(4, is_reducible=True), *(Row(10 + index, (400, 300)) for index in range(4)), *some(4, 20, is_reducible=True)]
    scaled, whole = (layout_of(config(data={"decode": decode}, validation={"every": None}), rows) for decode in ("scaled", "whole"))
    contents = scaled.manifest.digests[scaled.train.rows]
    is_large_jpeg = np.isin(scaled.train.rows, range(4))
    assert np.array_equal(contents, whole.manifest.digests[whole.train.rows])
    assert (scaled.train.reductions[:, 0] > 1).tolist() == is_large_jpeg.tolist()
    assert (whole.train.reductions == 1).all()
    same = (scaled.train.samples.latent_keys == whole.train.samples.latent_keys).all(axis=(1, 2))
    assert same.tolist() == (~is_large_jpeg).tolist()
    for name in ("time_ids", "bucket_starts", "text_keys"):
        assert np.array_equal(getattr(scaled.train.samples, name), getattr(whole.train.samples, name))
    found = list(latent_requests(scaled.manifest, scaled.train, np.ones((len(rows), 1), bool)))
    assert {request.reduction for request in found if request.crop.original_hw == (400, 300)} == {1, 2}
    assert all(request.reduction == 1 for request in found if request.crop.original_hw != (400, 300))


def test_the_mask_of_a_jpeg_that_is_decoded_smaller_is_what_it_was(config):
    scaled, whole = (
        layout_of(config({"masks": "files"}, data={"decode": decode}), large(8, is_reducible=True, mask=1))
        for decode in ("scaled", "whole")
    )
    assert np.array_equal(scaled.train.samples.mask_keys, whole.train.samples.mask_keys)


@pytest.mark.parametrize("is_reducible", [True, False])
def test_how_pictures_are_decoded_is_in_the_digest_where_it_makes_a_difference(config, is_reducible):
    rows = large(8, is_reducible=is_reducible)
    scaled, whole = (digest_of(config(data={"decode": decode}), rows) for decode in ("scaled", "whole"))
    assert (scaled != whole) == is_reducible


# What is the same, and what is not


def test_another_caption_or_encoder_is_another_entry(config):
    layouts = [
        layout_of(config(), some(40)),
        layout_of(config(), some(40, captions=("a blue square",))),
        layout_of(config(), some(40), digests=DIGESTS | {"text_encoders": "c"}),
        layout_of(config(), some(40), digests=DIGESTS | {"vae": "d"}),
    ]
    first, caption, text, vae = (
        ({bytes(key) for key in layout.train.samples.latent_keys[:, 0]}, {bytes(key) for key in layout.train.samples.text_keys})
        for layout in layouts
    )
    assert caption[0] == first[0]
    assert not caption[1] & first[1]
    assert text[0] == first[0]
    assert not text[1] & first[1]
    assert not vae[0] & first[0]
    assert vae[1] == first[1]


def with_masks():
    return [Row(row.content, row.size_hw, mask=1) for row in some(40)]


DECIDING = {
    "batch size": {"training": {"batch_size": 3}},
    "accumulation": {"training": {"accumulation_steps": 2}},
    "seed": {"run": {"name": "test", "seed": 1}},
    "flips": {"crop": {"flip_prob": 0.5}},
    "crops": {"crop": {"mode": "random"}},
    "resolution": {"buckets": {"resolution": 96}},
    "dropout": {"captions": {"dropout_prob": 0.2}},
    "kind of dropout": {"captions": {"dropout_zeros_share": 0.2}},
    "colour behind": {"data": {"alpha_color": "#000000"}},
    "number format": {"cache": {"latent_dtype": "float32"}},
    "who is held out": {"validation": {"share": 0.3, "max_pictures": 20}},
    "tag weights": {"captions": {"style": "tags", "tag_weights": {"enabled": True}}},
    "online": {"captions": {"text": "online"}},
}
NOT_DECIDING = {
    "length": {"training": {"length": "99 steps"}},
    "optimizer": {"optimizer": {"learning_rate": 1e-2}},
    "prompts": {"samples": {"prompts": ["x"]}},
    "workers": {"loader": {"workers": 3}},
    "engine": {"cache": {"engine": "processes", "workers": 2}},
    "packing": {"cache": {"batch_size": 7, "shard_entries": 9}},
    "name": {"run": {"name": "other"}},
}


def base(config, **sections):
    rows = [Row(row.content, row.size_hw, (f"tag{row.content % 3}, tag{row.content % 5}",)) for row in some(40)]
    return digest_of(config(**sections), rows)


@pytest.mark.parametrize("name", DECIDING)
def test_what_decides_a_batch_is_in_the_digest(config, name):
    assert base(config, **DECIDING[name]) != base(config)


@pytest.mark.parametrize("name", NOT_DECIDING)
def test_what_does_not_decide_a_batch_is_not(config, name):
    assert base(config, **NOT_DECIDING[name]) == base(config)


@pytest.mark.parametrize("text", ["cached", "online"])
def test_what_sources_and_captions_decide_is_in_the_digest(config, text):
    rows = some(20) + some(20, 100, source=1)
    captions = {"text": text}

    def of(*sources, pictures=rows, digests=DIGESTS, **more):
        return digest_of(config(*(sources or ({}, {})), captions={**captions, **more}), pictures, digests=digests)

    others = {
        "repeats": of({}, {"repeats": 0.5}),
        "share": of({}, {"share": 0.25}),
        "loss weight": of({}, {"loss_weight": 0.5}),
        "trigger": of({}, {"trigger": "ohwx"}),
        "trigger of the other": of({"trigger": "ohwx"}, {}),
        "captions": of(pictures=some(20) + some(20, 100, source=1, captions=("x",))),
        "several captions": of(pictures=some(20) + some(20, 100, source=1, captions=("a red circle", "x"))),
        "a mask": of(pictures=with_masks()[:20] + some(20, 100, source=1)),
        "text encoders": of(digests=DIGESTS | {"text_encoders": "c"}),
        "autoencoder": of(digests=DIGESTS | {"vae": "c"}),
        "another picture": of(pictures=[*rows, Row(999)]),
        "one source": of(pictures=some(20) + some(20, 100)),
    }
    assert len({of(), *others.values()}) == 1 + len(others)
    several = some(20) + some(20, 100, source=1, captions=("a red circle", "x"))
    assert of(pictures=several, pick="first") != of(pictures=several)
    if text == "cached":
        assert of(pictures=several, pick="first") == of(), "captions that are never used decide nothing"


@pytest.mark.parametrize("text", ["cached", "online"])
def test_names_and_the_order_of_files_decide_nothing(config, text):
    settings = config(captions={"text": text})
    rows = some(40)
    renamed = [Row(row.content, row.size_hw, row.captions, name=f"holiday/{row.content}.webp") for row in rows]
    assert digest_of(settings, renamed) == digest_of(settings, rows) == digest_of(settings, rows[::-1])


@pytest.mark.parametrize("text", ["cached", "online"])
def test_a_source_that_is_only_measured_decides_nothing_wherever_it_stands(config, text):
    """As long as nothing is held out of the others."""
    captions, off = {"text": text}, {"every": None}
    alone = digest_of(config({"trigger": "a"}, {}, captions=captions, validation=off), some(8) + some(8, 100, source=1))
    first = config({"role": "validation", "trigger": "b"}, {"trigger": "a"}, {}, captions=captions, validation={"every": "4 steps"})
    assert digest_of(first, [*some(3, 200), *some(8, source=1), *some(8, 100, source=2)]) == alone


def test_with_texts_encoded_as_they_come_it_matters_whose_trigger_words_are_whose(config):
    """Two sources with a bucket each: their pictures change places, and nothing else does."""
    settings = config(
        {"trigger": "a"}, {"trigger": "b"}, captions={"text": "online"}, validation={"every": None}, buckets={"max_aspect": 4.0}
    )
    tall, wide = [[Row(first + index, size) for index in range(8)] for first, size in ((0, (256, 64)), (50, (64, 256)))]

    def of(sources):
        return digest_of(settings, [Row(row.content, row.size_hw, source=source) for rows, source in sources for row in rows])

    assert of([(tall, 0), (wide, 1)]) != of([(tall, 1), (wide, 0)])


def test_with_texts_encoded_as_they_come_it_matters_where_one_caption_ends(config):
    settings = config(captions={"text": "online"}, validation={"every": None})
    first, second = (Row(content, captions=(text,)) for content, text in ((0, "ab"), (1, "c")))
    lower, upper = sorted([first, second], key=lambda row: digest(row.content))
    one, other = ([Row(lower.content, captions=(a,)), Row(upper.content, captions=(b,))] for a, b in (("ab", "c"), ("a", "bc")))
    assert digest_of(settings, one) != digest_of(settings, other)


def test_the_weight_outside_of_masks_decides_if_there_are_any(config):
    masked, floor = config({"masks": "files"}), {"data": {"mask_floor": 0.1}}
    assert digest_of(masked, with_masks()) != digest_of(config({"masks": "files"}, **floor), with_masks())
