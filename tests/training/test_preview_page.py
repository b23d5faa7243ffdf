import re
from html.parser import HTMLParser

import numpy as np

from aquatint.training.preview_page import Caption, Listed, PreviewRow, Summary, page

PIXEL = b"RIFF-some-bytes"


def row(name="pictures/a.jpg", **changes):
    values = {
        "name": name, "original_hw": (2000, 3000), "bucket_hw": (832, 1216), "scale": 0.416, "cropped": 0.0256,
        "time_ids": (2000, 3000, 0, 16, 832, 1216), "crop_box": (0.0, 0.0128, 1.0, 0.9872), "flipped": False,
        "picture": PIXEL, "original": PIXEL, "mime": "image/webp", "captions": (Caption("a cat", 1.0, (("a", "cat"),)),),
    }  # fmt: skip
    return PreviewRow(**{**values, **changes})


class Page(HTMLParser):
    """The page as a browser takes it: text by tag, attributes, and whether every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags, self.stack = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_everything_that_the_unet_is_told_stands_there():
    html = page([row()], Summary("Portrait", (("pictures", "1"),)))
    text = " ".join(Page(html).texts)
    for words in ("3000 × 2000", "1216 × 832", "reduced to 42%", "2.6% cropped", "original 2000, 3000, crop from 0, 16, target 832, 1216",
                  "2 tokens in 1 chunk of 77"):  # fmt: skip
        assert words in text, words


def test_the_page_needs_nothing_from_outside():
    parsed = Page(page([row()], Summary("x", (), plot_png=b"png")))
    assert parsed.stack == []
    assert all(image["src"].startswith("data:") for image in parsed.all("img"))
    policy = next(meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"(src|href)=\"(?!data:)", page([row()], Summary("x", ())))


def test_names_and_captions_are_text_whatever_they_hold():
    evil = '"><script>alert(1)</script>'
    listed = Listed(evil, evil, ((evil, evil),))
    html = page(
        [row(name=evil, captions=(Caption(evil, 0.5, ((evil,),)),), source=evil, remarks=(evil,), role=evil)],
        Summary(evil, ((evil, evil),), tables=((evil, evil),), lists=(listed,)),
    )
    parsed = Page(html)
    assert len(parsed.all("script")) == 1
    assert "alert(1)" in " ".join(parsed.texts)
    assert parsed.stack == []


def test_captions_that_take_turns_say_how_often():
    captions = (Caption("one", 0.75, (("one",),)), Caption("", 0.25, ((),)))
    text = " ".join(Page(page([row(captions=captions)], Summary("x", ()))).texts)
    assert "75% of its samples; 1 token in 1 chunk" in text
    assert "no caption" in text


def test_chunks_are_told_apart():
    tokens = tuple(f"t{number}" for number in range(80))
    html = page([row(captions=(Caption("long", 1.0, (tokens[:75], tokens[75:])),))], Summary("x", ()))
    assert "80 tokens in 2 chunks of 77" in html
    assert html.count('class="chunk"') == 2


def test_the_frame_is_where_the_crop_is():
    html = page([row(crop_box=(0.1, 0.2, 0.6, 0.9))], Summary("x", ()))
    assert "top:10.00%;left:20.00%;width:70.00%;height:50.00%" in html


def test_a_mask_is_shown_beside_the_picture():
    assert html_images(page([row(mask=b"png")], Summary("x", ()))) == html_images(page([row()], Summary("x", ()))) + 1


def html_images(html):
    return len(Page(html).all("img"))


def test_thousands_of_names_are_one_page():
    entries = tuple((f"{number}.jpg", "blurred") for number in np.arange(5000))
    html = page([], Summary("x", (), lists=(Listed("Blurred", "soft", entries, thumbnails=((PIXEL, PIXEL),)),)))
    assert html.count("<li>") == 5000
    assert html_images(html) == 2
