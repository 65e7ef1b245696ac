"""The command as a whole: help, version, mistakes, exit codes."""

from __future__ import annotations

import json
import re
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import pytest

from asynq_aio import __version__
from asynq_aio.cli.app import main

if TYPE_CHECKING:
    from tests.cli.conftest import Command


@pytest.mark.parametrize("arguments", [["version"], ["--version"], ["version", "--cluster", "-u", "x"]])
def test_version(command: Command, arguments: list[str]) -> None:
    """The version, on stdout."""
    told = command(*arguments)
    assert (told.returncode, told.stdout) == (0, f"asynq-aio version {__version__}\n")


def test_version_as_json(command: Command) -> None:
    """For programs."""
    assert json.loads(command("version", "--json").stdout)["version"] == __version__


@pytest.mark.parametrize(
    "words", [[], ["worker"], ["dev"], ["task"], ["task", "enqueue"], ["queue"], ["queue", "ls"], ["version"]]
)
def test_help_has_an_example(capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """Each command that does something shows how; each has the flags of the connection."""
    assert main([*words, "--help"]) == 0
    shown = capfd.readouterr().out
    assert "--cluster-addrs" in shown
    if words not in (["task"], ["queue"]):
        assert "Example: asynq-aio" in shown


@pytest.mark.parametrize(
    ("words", "reason", "hint"),
    [
        (["queue", "lst"], "No such command 'lst'. Did you mean 'list', 'ls'?", "see asynq-aio queue --help"),
        (["wroker", "app:mux"], "No such command 'wroker'. Did you mean 'worker'?", "see asynq-aio --help"),
        (["queue", "ls", "--clustre"], "No such option: --clustre", "see asynq-aio queue ls --help"),
        (["queue", "ls", "--db", "x"], "Invalid value for '--db' / '-n'", "see asynq-aio queue ls --help"),
        (["task", "enqueue", "-t", "x"], "Missing option '--payload'", "see asynq-aio task enqueue --help"),
        (["worker"], "Missing argument", "see asynq-aio worker --help"),
        (["queue", "ls", "surplus"], "unexpected extra argument", "see asynq-aio queue ls --help"),
        (["queue", "ls", "-u", "foo://x"], 'unsupported Redis URI scheme: "foo"', ""),
    ],
)
def test_mistakes_are_usage_errors(capfd: pytest.CaptureFixture[str], words: list[str], reason: str, hint: str) -> None:
    """Exit code 2; on stderr what was wrong and where help is; nothing on stdout."""
    assert main(words) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert reason in shown.err
    assert hint in shown.err
    assert "Traceback" not in shown.err


def test_no_command_shows_the_help(command: Command) -> None:
    """Without a command: the help, and exit code 2."""
    told = command()
    assert told.returncode == 2
    assert "worker" in told.stdout + told.stderr
    assert "error:" not in told.stderr


def test_no_escapes_where_no_terminal_is(command: Command) -> None:
    """Neither help nor errors have colours in a pipe, nor with --no-color."""
    for words in (["--help"], ["queue", "lst"], ["--no-color", "worker", "--help"]):
        told = command(*words)
        assert not re.search(r"\x1b\[", told.stdout + told.stderr)


def test_the_script_is_installed() -> None:
    """`asynq-aio` is `python -m asynq_aio`."""
    (script,) = entry_points(group="console_scripts", name="asynq-aio")
    assert script.load() is main
