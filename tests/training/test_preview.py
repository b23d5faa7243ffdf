import re
from html import unescape

import numpy as np
import pytest

from aquatint.cli.main import run
from aquatint.data.crop import Crop
from aquatint.data.image import decode_image, encode_webp, save_png
from aquatint.data.places import Opener
from aquatint.training import preview as module
from aquatint.training.preview import buckets_run, card, planned, preview_run, spread, texts_of, view_of
from tests import zoo
from tests.runs import small_config

SIZES_HW = [(96, 96), (80, 120), (120, 80)]


def sharp(size_hw, seed):
    """Noise of large pixels: nothing is blurred, and no two are alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (size_hw[0] // 4, size_hw[1] // 4, 3), dtype=np.uint8)
    return small.repeat(4, axis=0).repeat(4, axis=1)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for index in range(9):
        save_png(folder / f"{index}.png", sharp(SIZES_HW[index % 3], index))
        (folder / f"{index}.txt").write_text(f"number {index}, paper, <b>ink</b>")
    return folder


@pytest.fixture
def config(tmp_path, pictures):
    """The base model is not there, and need not be."""

    def build(source=None, **sections):
        data = {"sources": [{"path": str(pictures), **(source or {})}], "max_bad_share": 0.5, **sections.pop("data", {})}
        buckets = {"resolution": 64, "min_side": 32, "max_side": 128, **sections.pop("buckets", {})}
        return small_config(tmp_path, tmp_path / "missing.safetensors", data=data, buckets=buckets, **sections)

    return build


def page_of(config, tmp_path, **settings):
    return preview_run(config, tmp_path / "preview.html", **settings).read_text()


def text_of(html):
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)))


def headings(html):
    return {unescape(re.sub(r"<[^>]+>", "", title)).split("  ")[0].rstrip("0123456789 ") for title in re.findall(r"<h2>(.*?)</h2>", html)}


def articles(html):
    return dict(zip(re.findall(r"<h2>(pictures/[^<]+)</h2>", html), re.findall(r"<article.*?</article>", html, re.DOTALL), strict=True))


def cards_of(config):
    layout = planned(config)
    return {one.name: one for row in range(len(layout.train.rows)) for one in card(config, layout, row, Opener())}


def test_a_page_is_written_without_a_model_and_without_encoding_anything(config, tmp_path):
    html = page_of(config(validation={"every": None}), tmp_path)
    text = text_of(html)
    assert articles(html).keys() == {f"pictures/{index}.png" for index in range(9)}
    for words in ("9 used, 0 left out", "9 captions of", "9 pictures listed = 9 used", "9 pictures in"):
        assert words in text, words
    assert "number 3, paper, <b>ink</b>" in text
    assert "<b>ink" not in html, "captions are text"
    assert headings(html) >= {"Buckets", "Captions", "Every file accounted for"}
    assert not headings(html) & {"Exact copies", "Look-alikes", "Blurred", "Almost of one colour", "Much enlarged", "Tags"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"index"}, "nothing is encoded"


def test_the_command_line_needs_no_model_either(tmp_path, pictures, capsys):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nbase = "missing.safetensors"\n\n[[data.sources]]\npath = "pictures"\n\n[buckets]\nresolution = 64\nmin_side = 32\n'
    )
    output = tmp_path / "page.html"
    assert run(["data", "preview", str(path), "--output", str(output), "--pictures", "2", "--inspect", "3"]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert len(articles(output.read_text())) == 2
    assert run(["data", "buckets", str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("width x height")
    assert shown.endswith(f"wrote {tmp_path / 'plot.png'}\n")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert run(["data", "preview", str(path), "data.sources.0.path=nowhere"]) == 3
    assert "hint: " in capsys.readouterr().err


def test_each_card_shows_the_crop_that_is_trained(config):
    settings = config(crop={"mode": "random", "variants": 2}, validation={"every": None})
    layout = planned(settings)
    for row in range(len(layout.train.rows)):
        (one,) = card(settings, layout, row, Opener())
        crop = Crop.from_row(layout.train.crops[row, row % 2])
        assert one.time_ids == crop.time_ids
        picture = layout.manifest.picture(int(layout.train.rows[row]))
        with Opener().open(picture.place) as file:
            assert one.picture == encode_webp(module.cropping.apply(decode_image(file, "#ffffff", 10**6), crop))
        top, left, bottom, right = one.crop_box
        (height, width), (resized_height, resized_width) = crop.target_hw, crop.resized_hw
        assert (bottom - top, right - left) == pytest.approx((height / resized_height, width / resized_width))
        assert one.cropped == pytest.approx(1 - (bottom - top) * (right - left))


def test_mirrored_samples_are_shown_mirrored_as_often_as_they_are(config, tmp_path):
    settings = config(crop={"flip_prob": 0.4}, validation={"every": None})
    samples = planned(settings).train.samples
    views = [view_of(settings, samples, row) for row in range(2000)]
    assert set(views) == {0, 1}
    assert sum(views) / 2000 == pytest.approx(0.4, abs=0.05)
    always = config(crop={"flip_prob": 1.0}, validation={"every": None})
    assert all(one.flipped for one in cards_of(always).values())
    html = page_of(always, tmp_path)
    assert html.count(", mirrored</figcaption>") == 9
    assert "1 per picture, 100% of the samples mirrored" in text_of(html)
    plain = planned(config(crop={"mode": "random", "variants": 3}))
    assert [view_of(config(), plain.train.samples, row) for row in range(6)] == [0, 1, 2, 0, 1, 2]


def test_masks_are_shown_where_there_are_any(config, pictures, tmp_path):
    mask = np.zeros((96, 96, 3), np.uint8)
    mask[:, 48:] = 255
    save_png(pictures / "0-masklabel.png", mask)
    settings = config({"masks": "files"}, crop={"flip_prob": 1.0}, validation={"every": None})
    cards = cards_of(settings)
    assert [name for name, one in cards.items() if one.mask is not None] == ["pictures/0.png"]
    seen = zoo.Image.open(zoo.io.BytesIO(cards["pictures/0.png"].mask))
    assert seen.size == cards["pictures/0.png"].bucket_hw[::-1]
    levels = np.asarray(seen)[:, :, 0]
    assert levels[:, :20].mean() > 250, "mirrored as the picture is"
    assert levels[:, -20:].mean() < 5
    assert page_of(settings, tmp_path).count("where the loss counts") == 1


def test_a_mask_that_cannot_be_decoded_is_a_remark(config, pictures):
    save_png(pictures / "0-masklabel.png", sharp((96, 96), 50))
    path = pictures / "0-masklabel.png"
    path.write_bytes(zoo.cut(path.read_bytes(), 0.6))
    one = cards_of(config({"masks": "files"}, validation={"every": None}))["pictures/0.png"]
    assert one.mask is None
    assert any("its mask cannot be used: is a damaged PNG file" in remark for remark in one.remarks)


def test_captions_are_shown_as_they_are_rendered(config, tmp_path):
    """Cached: each with its share. As they come: some of them, without pretending to know how often."""
    tags = {"style": "tags", "shuffle": True, "keep_first": 0, "dropout_prob": 0.1}
    cached = config({"trigger": "ohwx"}, captions={**tags, "variants": 3}, validation={"every": None})
    layout = planned(cached)
    for row in range(9):
        shown = list(texts_of(cached, layout, row))
        assert {caption.text for caption in shown} == {layout.train.texts[text] for text in layout.train.samples.text_of[row]}
        assert sum(caption.share for caption in shown) == pytest.approx(0.9 if len(shown) > 1 else 1.0)
        assert all(caption.text.startswith("ohwx, ") for caption in shown)
    online = config({"trigger": "ohwx"}, captions=tags, validation={"every": None})
    layout = planned(online)
    shown = list(texts_of(online, layout, 0))
    assert len(shown) == 4
    assert len({caption.text for caption in shown}) == 4
    assert all(sorted(caption.text.split(", ")) == sorted(shown[0].text.split(", ")) for caption in shown)
    assert {caption.share for caption in shown} == {1.0}
    text = text_of(page_of(online, tmp_path))
    assert "rendered anew at every step" in text
    assert "% of its samples" not in text
    assert "3 more as it is rendered" in text


def test_a_choice_between_few_is_shown_with_its_shares(config, pictures):
    (pictures / "0.txt").write_text("a {red|blue} circle")
    settings = config(captions={"wildcards": True, "dropout_prob": 0.0}, validation={"every": None})
    layout = planned(settings)
    row = next(row for row in range(9) if layout.train.samples.names[row] == "pictures/0.png")
    shown = {caption.text: caption.share for caption in texts_of(settings, layout, row)}
    assert shown == {"a red circle": pytest.approx(0.5, abs=0.2), "a blue circle": pytest.approx(0.5, abs=0.2)}
    assert sum(shown.values()) == pytest.approx(1.0)


def test_tokens_are_shown_chunk_by_chunk(config, pictures):
    (pictures / "0.txt").write_text(", ".join(f"word{index}" for index in range(40)))
    (caption,) = cards_of(config(validation={"every": None}))["pictures/0.png"].captions
    assert len(caption.chunks) == 2
    assert "".join(caption.chunks[0]).startswith("word0,word1,")


def test_copies_look_alikes_and_odd_pictures_are_listed_once(config, pictures, tmp_path):
    for ending in (".png", ".txt"):
        (pictures / f"copy{ending}").write_bytes((pictures / f"0{ending}").read_bytes())
    save_png(pictures / "alike.png", (sharp((80, 120), 1) * 0.97).astype(np.uint8))
    save_png(pictures / "flat.png", np.full((96, 96, 3), 90, np.uint8))
    (pictures / "blurred.png").write_bytes(zoo.encoded(zoo.textured((96, 96), seed=3), "PNG"))
    save_png(pictures / "small.png", sharp((32, 32), 70))
    for name in ("alike", "flat", "blurred", "small"):
        (pictures / f"{name}.txt").write_text(name)
    html = page_of(config(validation={"every": None}), tmp_path)
    lists = dict(re.findall(r"<h2>([^<]+) <small>\d+</small></h2>(.*?)</section>", html, re.DOTALL))
    entries = {title: [text_of(entry).strip() for entry in re.findall(r"<span>(.*?)</span>", body)] for title, body in lists.items()}
    assert entries == {
        "Exact copies": ["pictures/0.png and pictures/copy.png"],
        "Look-alikes": ["pictures/1.png and pictures/alike.png"],
        "Blurred": [entries["Blurred"][0]],
        "Almost of one colour": ["pictures/flat.png contrast 0.0"],
        "Much enlarged": ["pictures/small.png 2.0 times"],
    }
    assert entries["Blurred"][0].startswith("pictures/blurred.png sharpness ")


def test_what_is_left_out_stands_in_the_ledger_and_what_cannot_be_decoded_is_no_card(config, pictures, tmp_path):
    (pictures / "bad.png").write_bytes(b"not a picture")
    (pictures / "0.png").write_bytes(zoo.cut((pictures / "0.png").read_bytes(), 0.6))
    save_png(pictures / "tiny.png", sharp((16, 16), 60))
    (pictures / "tiny.txt").write_text("tiny")
    html = page_of(config(buckets={"max_upscale": 2.0}, validation={"every": None}), tmp_path)
    assert "11 pictures listed = 9 used + 1 quarantined + 1 left out" in text_of(html)
    assert "pictures/tiny.png: is too small" in text_of(html)
    assert articles(html).keys() == {f"pictures/{index}.png" for index in range(1, 9)}


def test_what_is_said_of_a_source_stands_on_its_pictures(config, tmp_path, pictures):
    sources = [{"path": str(pictures), "repeats": 2.5, "loss_weight": 0.5, "role": "train"}]
    html = page_of(config(data={"sources": sources}, validation={"every": None}), tmp_path)
    assert text_of(html).count("2.5 × per epoch, loss weight 0.5") == 9


def test_no_more_is_shown_and_looked_at_than_asked_for(config, tmp_path):
    html = page_of(config(validation={"every": None}), tmp_path, num_pictures=4, num_inspected=0)
    assert len(articles(html)) == 4
    assert "Captions" not in headings(html)
    assert "there are no captions" not in text_of(html)


@pytest.mark.parametrize(("count", "wanted"), [(0, 5), (5, 5), (3, 5), (100, 7), (100, 1), (10, 0)])
def test_pictures_are_spread_over_the_set(count, wanted):
    rows = spread(count, wanted)
    assert len(rows) == min(count, wanted)
    assert rows == sorted(set(rows))
    assert all(0 <= row < count for row in rows)
    if len(rows) > 1:
        assert max(np.diff(rows)) - min(np.diff(rows)) <= 1


def test_the_table_of_buckets_names_what_lies_in_small_ones(config, tmp_path):
    text = buckets_run(config(validation={"every": None}, buckets={"resolution": 96, "max_side": 192}), None)
    assert text.splitlines()[0].startswith("width x height")
    assert "9 pictures in 3 buckets" in text
    small = text.partition("buckets of 8 pictures or fewer")[2]
    assert all(f"pictures/{index}.png" in small for index in range(9))
    assert "fewer" not in buckets_run(config(validation={"every": None}), None)
