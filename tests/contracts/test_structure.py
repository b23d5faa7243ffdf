"""docs/structure.md tells where everything lives. This holds it to the truth, both ways."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "aquatint"
ORIGINAL_NAMES = (
    "main.py", "config/", "args.py", "defaults.json", "loss_functions", "dataset_initializer", "loading", "validation",
    "bucket_manager", "image_grouper", "manipulations", "transforms", "caption_processor", "cacheing/memory",
    "cacheing/text_embeds", "cacheing/vae", "sampler", "core/base", "dataloader", "multiaspect/dataset", "models/SDXL",
    "model_loader", "pipeline", "optimizers/*", "setup_optimizers", "trainer", "training_steps", "StateTracker", "metrics",
    "utils/logging", "utils/*",
)  # fmt: skip


def tables():
    """The rows of each table of the page, as lists of cells."""
    found, current = [], []
    for line in [*(ROOT / "docs" / "structure.md").read_text().splitlines(), ""]:
        if line.startswith("|"):
            current.append([cell.strip() for cell in line.strip("|").split("|")])
        elif current:
            found.append(current[2:])
            current = []
    return found


def paths(cell):
    return [token for token in re.findall(r"`([^`]+)`", cell) if token.startswith(("src/", "tests/", "docs/"))]


def is_debris(path):
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts)


def rooms():
    """Folders of the package that hold something, and the modules beside them."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and not is_debris(path.relative_to(PACKAGE))]
    folders = {f"{p.parent.relative_to(ROOT).as_posix()}/" for p in files if p.parent != PACKAGE}
    return folders | {p.relative_to(ROOT).as_posix() for p in files if p.parent == PACKAGE and p.suffix == ".py"}


MAPPING, ROOMS = tables()


def test_every_name_of_the_original_structure_is_answered_once_and_in_order():
    assert [row[0].strip("`") for row in MAPPING] == list(ORIGINAL_NAMES)


@pytest.mark.parametrize("row", MAPPING, ids=lambda row: row[0].strip("`"))
def test_what_is_named_as_there_exists_and_what_is_to_come_does_not(row):
    name, where, what, to_come = row
    assert paths(where), f"{name}: say where it lives now"
    assert what, f"{name}: say what it does now"
    missing = [path for path in paths(where) + paths(what) if not (ROOT / path).exists()]
    assert not missing, f"{name}: docs/structure.md names {missing}, which is not there"
    arrived = [path for path in paths(to_come) if (ROOT / path).exists()]
    assert not arrived, f"{name}: {arrived} has arrived; move it to `Now in` in docs/structure.md"


def test_every_room_is_named_and_none_that_is_not_there():
    named = [path for row in ROOMS for path in paths(row[0])]
    assert len(named) == len(set(named))
    assert set(named) == rooms(), "the table of rooms in docs/structure.md and src/aquatint differ"


def test_every_room_says_what_it_is_for():
    assert [row[0] for row in ROOMS if not row[1]] == []


def test_every_decision_says_why_and_what_would_change_it():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text()
        headings = [line for line in text.splitlines() if line.startswith("#")]
        assert headings[0].startswith(f"# {page.name[:4]} ")
        assert headings[1:] == ["## Context", "## Choice", "## Consequences", "## What would make us change it"], page.name
