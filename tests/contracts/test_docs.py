"""What the pages say about settings is true: every setting they name exists, every default is the schema's, every link leads somewhere."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from aquatint.config.describe import all_keys, generic
from aquatint.config.words import find_setting

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SECTIONS = {key.partition(".")[0] for key in all_keys()}
FILE_ENDINGS = {"toml", "txt", "json", "jsonl", "md", "png", "log", "html", "safetensors", "csv", "py"}
LARGEST_PLOT_BYTES = 60_000
DRAWN = ("weights", "schedules", "weightings", "noise", "timesteps", "sampling")


def settings_in(text):
    """Each `section.setting` or `section.setting = value` in backticks, as a key and a value or None."""
    for key, value in re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+)(?:\s?=\s?([^`]+))?`", text):
        if key.partition(".")[0] in SECTIONS and key.rpartition(".")[2] not in FILE_ENDINGS:
            yield key, value


def rows_of_defaults(text):
    """The rows of tables that are headed by `setting` and `default`."""
    for table in re.findall(r"^\| setting \| default \|[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", text, re.MULTILINE):
        for row in table.splitlines():
            key, default = (cell.strip().strip("`") for cell in row.split("|")[1:3])
            yield key, default


def written(default):
    """A default as the pages write it: – for none, numbers and words as they are."""
    return "–" if default is None else default if isinstance(default, str) else json.dumps(default)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_setting_that_a_page_names_exists(page):
    found = list(settings_in(page.read_text(encoding="utf-8")))
    assert [key for key, _ in found if generic(key) not in all_keys()] == []
    for key, value in found:
        setting = find_setting(generic(key))
        if value and setting is not None and setting.choices:
            choice = tomllib.loads(f"x = {value}")["x"]
            assert not isinstance(choice, str) or choice in setting.choices, f"`{key} = {value}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_default_that_a_page_names_is_the_default(page):
    for key, default in rows_of_defaults(page.read_text(encoding="utf-8")):
        assert default == written(find_setting(key).default), key


@pytest.mark.parametrize("section", ["diffusion", "noise", "timesteps"])
def test_every_setting_of_the_methods_has_a_row_with_its_default(section):
    rows = {key for page in PAGES for key, _ in rows_of_defaults(page.read_text(encoding="utf-8"))}
    assert {key for key in all_keys() if key.startswith(f"{section}.")} <= rows


def headings(page):
    """The anchors of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_of_a_page_lead_somewhere(page):
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))):
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in headings(path), f"{target}#{anchor}"


@pytest.mark.parametrize("name", DRAWN)
def test_plots_of_the_methods_are_small(name):
    assert (ROOT / "docs" / "images" / f"{name}.png").stat().st_size < LARGEST_PLOT_BYTES


def test_the_script_that_draws_them_knows_the_same_names():
    script = runpy.run_path(str(ROOT / "docs" / "plots.py"))
    assert tuple(script["PLOTS"]) == DRAWN
    assert script["small"](script["PLOTS"]["noise"]())[:4] == b"\x89PNG"


def test_the_search_for_settings_finds_them():
    text = '`noise.offset`, `model.prediction = "flow"`, `run.toml`, `metrics.jsonl`, `a.b`, `noise`, `[noise]`, `data.sources.0.path`'
    assert list(settings_in(text)) == [("noise.offset", ""), ("model.prediction", '"flow"'), ("data.sources.0.path", "")]
    table = "| setting | default | |\n|---|---|---|\n| `a.b` | `0.5` | words |\n| `a.c` | – | |\n\n| other | default |\n"
    assert list(rows_of_defaults(table)) == [("a.b", "0.5"), ("a.c", "–")]
