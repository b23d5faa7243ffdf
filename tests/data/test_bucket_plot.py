import io

import numpy as np
from PIL import Image

from aquatint.data.bucket_plot import plot_buckets
from aquatint.data.bucket_sets import bucket_sets
from aquatint.data.buckets import fit_loss, plan, report

SETTINGS = {"resolution": 1024, "step": 32, "min_side": 512, "max_side": 2048, "max_aspect": 4.0, "area_weight": 0.5}


def drawn(sizes, **tiers):
    result = plan(sizes, np.ones(len(sizes)), bucket_sets("aquatint", **SETTINGS, **tiers), min_count=8, max_upscale=1.5)
    inside = result.assignment >= 0
    rows = report(result, sizes, np.ones(len(sizes)))
    return plot_buckets(rows, *fit_loss(sizes[inside], result.shapes[result.assignment[inside]]))


def pixels(png):
    picture = Image.open(io.BytesIO(png))
    picture.load()
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB")).reshape(-1, 3)


def has(png, color):
    return (pixels(png) == color).all(axis=1).sum() > 500


BLUE, PALE, RED = (59, 110, 165), (127, 167, 207), (200, 85, 61)


def test_the_plot_shows_tiers_and_what_is_enlarged():
    rng = np.random.default_rng(0)
    large, small = rng.integers(1100, 3000, (200, 2)), rng.integers(500, 800, (100, 2))
    plain, tiered = drawn(large), drawn(np.concatenate([large, small]), tiers=(768,))
    assert has(plain, BLUE)
    assert not has(plain, RED)
    assert not has(plain, PALE)
    assert has(tiered, RED)
    assert has(tiered, PALE)
    assert drawn(large) == plain


def test_one_picture_or_none_can_be_drawn_too():
    assert has(drawn(np.array([[1300, 1000]])), BLUE)
    assert not has(drawn(np.array([[10, 10]])), BLUE)
