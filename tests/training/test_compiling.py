"""Compiling is said when it took long, and once."""

import pytest

from aquatint.training import compiling
from aquatint.training.compiling import CompileClock


def test_what_took_long_is_said_once(monkeypatch: pytest.MonkeyPatch):
    spent, said = [5.0], []
    monkeypatch.setattr(compiling, "compile_seconds", lambda: spent[0])
    clock = CompileClock(compiles=True)
    for seconds in (5.0, 5.5, 46.5, 46.5):
        spent[0] = seconds
        clock.look(said.append)
    assert said == ["compiled blocks for a new shape of pictures, in 41 s"]


def test_without_compiling_nobody_looks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiling, "compile_seconds", lambda: pytest.fail("looked"))
    CompileClock(compiles=False).look(pytest.fail)
