"""What commands print: results on stdout, what went wrong on stderr, and how it looks on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final, Self, TextIO

import orjson

from asynq_aio import (
    AsynqError,
    BrokerAuthError,
    BrokerFullError,
    BrokerUnavailableError,
    ConfigError,
    InvalidTaskError,
)

__all__ = [
    "FAILED",
    "OK",
    "USAGE",
    "CommandError",
    "explain",
    "print_error",
    "print_json",
    "print_note",
    "print_table",
    "styled",
]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2


class CommandError(Exception):
    """The command ends here: `message` says what was wrong, `hint` what to do, `detail` goes before both as it is."""

    def __init__(self, message: str, *, hint: str = "", detail: str = "", code: int = FAILED) -> None:
        super().__init__(message)
        self.message, self.hint, self.detail, self.code = message, hint, detail, code

    def about(self, what: str) -> Self:
        """The same, of one thing among several."""
        return type(self)(f"{what}: {self.message}", hint=self.hint, detail=self.detail, code=self.code)


def explain(error: AsynqError) -> CommandError:
    """The same error for a person at a terminal: with what to do there, and with an exit code."""
    match error:
        case BrokerAuthError():
            return CommandError(
                str(error),
                hint="check --username and --password (ASYNQ_USERNAME, ASYNQ_PASSWORD), or the URI's user:password@",
            )
        case BrokerUnavailableError():
            return CommandError(
                str(error), hint="is Redis running there? Another address goes into --uri, ASYNQ_URI or ~/.asynq.yaml"
            )
        case BrokerFullError():
            return CommandError(str(error), hint="raise maxmemory, or delete tasks that nobody needs")
        case ConfigError() | InvalidTaskError():
            return CommandError(str(error), code=USAGE)
        case _:
            return CommandError(str(error))


def styled(text: str, code: str, stream: TextIO) -> str:
    """The text in an ANSI style such as "1" (bold), where the stream is a terminal and colours are wanted."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def print_error(error: CommandError) -> None:
    """What was wrong and what to do, on stderr."""
    if error.detail:
        print(error.detail.rstrip("\n"), file=sys.stderr)
    print(f"{styled('error:', '1;31', sys.stderr)} {error.message}", file=sys.stderr)
    if error.hint:
        print(f"{styled('hint:', '1', sys.stderr)} {error.hint}", file=sys.stderr)


def print_note(text: str) -> None:
    """Something that a person wants to know and a pipe does not."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A header, a rule of dashes as long as each title, and the rows, two spaces apart, as Go's command prints them.

    Wide cells are never cut or wrapped: the output is for grep and awk too.

    Source:
        hibiken/asynq 0.26, tools/asynq/cmd/cmd.go: printTable
    """
    widths = [max(map(len, column)) + 2 for column in zip(titles, *rows, strict=True)]
    print(
        "".join(
            styled(title, "1", sys.stdout) + " " * (width - len(title))
            for title, width in zip(titles, widths, strict=True)
        )
    )
    print("".join(("-" * len(title)).ljust(width) for title, width in zip(titles, widths, strict=True)))
    for row in rows:
        print("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
