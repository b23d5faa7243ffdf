import re
import warnings

import pytest

from aquatint.utils.logging import logged


def test_each_record_becomes_a_line_with_time_and_level():
    lines = []
    with logged(lines.append, name="aquatint.test") as logger:
        logger.info("saved step %d", 500)
        logger.warning("a picture\nof two lines")
        logger.debug("too much")
    assert len(lines) == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ info: saved step 500\n", lines[0])
    assert lines[1].endswith("Z warning: a picture\n    of two lines\n")


def test_python_warnings_are_kept_too():
    lines = []
    with warnings.catch_warnings(), logged(lines.append):
        warnings.simplefilter("always")
        warnings.warn("this will change", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning: this will change" in lines[0]


def test_after_the_block_nothing_is_kept_and_everything_is_as_before():
    lines = []
    with logged(lines.append, name="aquatint.test") as logger:
        inside = logger.level
    logger.warning("later")
    assert lines == []
    assert (inside, logger.level, logger.handlers) == (20, 0, [])


def test_an_error_while_writing_reaches_who_logged():
    def full(line):
        raise OSError("no space")

    with logged(full, name="aquatint.test") as logger, pytest.raises(OSError, match="no space"):
        logger.info("hello")
