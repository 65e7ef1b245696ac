"""Tables and log lines."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING

import pytest

from asynq_aio.cli.logs import LogFormat, LogLevel, start_logging
from asynq_aio.cli.output import print_table

if TYPE_CHECKING:
    from collections.abc import Generator


@pytest.fixture
def _logging_put_back() -> Generator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_table_is_gos(capsys: pytest.CaptureFixture[str]) -> None:
    """A rule as long as each title, cells two spaces apart, padding kept, nothing cut."""
    print_table(["Queue", "Cluster KeySlot"], [["images", "9450"], ["a-name-that-is-long" * 10, "1"]])
    header, rule, first, second = capsys.readouterr().out.splitlines()
    width = len("a-name-that-is-long" * 10) + 2
    assert header == "Queue".ljust(width) + "Cluster KeySlot  "
    assert rule == "-----".ljust(width) + "---------------  "
    assert first == "images".ljust(width) + "9450".ljust(17)
    assert second.startswith("a-name-that-is-long" * 10 + "  1")


def test_a_table_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """The titles stay."""
    print_table(["Queue"], [])
    assert capsys.readouterr().out == "Queue  \n-----  \n"


@pytest.mark.usefixtures("_logging_put_back")
def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """One object per line: what was given as extra, errors too, and whatever cannot be JSON as its repr."""
    start_logging(LogLevel.DEBUG, LogFormat.JSON)
    log = logging.getLogger("mine")
    log.warning("two\nlines %s", "\udc80", extra={"task": {1, 2}, "id": "x"})
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"], first["id"]) == ("warn", "mine", "two\nlines ?", "x")
    assert first["task"] == "{1, 2}"
    assert first["time"].endswith("Z")
    assert second["error"].endswith("ValueError: bad")


@pytest.mark.usefixtures("_logging_put_back")
def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Time, level, pid, logger, message; what is below the level is not there."""
    start_logging(LogLevel.INFO, LogFormat.TEXT)
    logging.getLogger("mine").debug("no")
    logging.getLogger("mine").error("yes %d", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "error [" in line
    assert line.endswith("mine: yes 1")
    assert sys.stderr.isatty() is False
    assert "\x1b" not in line
