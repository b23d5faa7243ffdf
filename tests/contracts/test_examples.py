"""Every example is a config without a mistake, but for the files of yours that it names."""

from pathlib import Path

import pytest

from aquatint.config.load import load_config

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads(path: Path):
    config = load_config(path, [])
    assert config.run.name == path.stem


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
