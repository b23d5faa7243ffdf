"""Every error says what to do about it, in a message without a bare object in it."""

import ast
import inspect
from pathlib import Path

import pytest

from aquatint import errors

SOURCE = Path(errors.__file__).parent
NAMES = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, errors.AquatintError)}


def test_a_hint_cannot_be_forgotten():
    with pytest.raises(TypeError, match="hint"):
        errors.StorageError("something went wrong")


def test_an_error_is_shown_with_its_hint():
    assert str(errors.DataError("no pictures", hint="add some")) == "error: no pictures\n\nhint: add some"


def test_exit_codes_are_documented_and_distinct():
    codes = {one.exit_code for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, errors.AquatintError)}
    assert codes == {1, 2, 3, 4, 5, 6, 7, 75}
    for code in codes:
        assert f"({code})" in (errors.__doc__ or "") or f"(exit {code})" in (errors.__doc__ or "")


def raised_hints() -> list[tuple[str, ast.expr]]:
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in NAMES:
                found += [(f"{path.name}:{node.lineno}", keyword.value) for keyword in node.keywords if keyword.arg == "hint"]
    return found


def test_hints_are_sentences_and_not_empty():
    hints = raised_hints()
    assert len(hints) > 20
    plain = [(place, value.value) for place, value in hints if isinstance(value, ast.Constant)]
    internal = {"shards.py"}  # there an error is made only to carry its message to another one
    assert [place for place, text in plain if len(text) < 10 and place.split(":")[0] not in internal] == []
    assert [place for place, text in plain if (text.endswith(".") and not text.endswith("...")) or text[:1].isupper()] == []
