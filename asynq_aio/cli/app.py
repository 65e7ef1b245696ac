"""The command `asynq-aio`: what there is, and how it ends.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from asynq_aio import AsynqError, __version__
from asynq_aio.cli import queue, task
from asynq_aio.cli.connection import Connection, connected
from asynq_aio.cli.dev import dev
from asynq_aio.cli.output import FAILED, OK, CommandError, explain, print_error, print_json
from asynq_aio.cli.worker import worker

__all__ = ["app", "main"]

_INTERRUPTED: Final = 130

app = typer.Typer(
    name="asynq-aio",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Go's flags have underscores, ours dashes; both are understood.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"asynq-aio version {__version__}")
        raise typer.Exit


@app.callback()
@connected
def root(
    connection: Connection,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Work on, make and look at the tasks of asynq, in Redis or a Redis Cluster.

    Flags may have dashes or underscores; those of the connection may stand before or after the command.

    [bold]Example:[/bold] asynq-aio worker app:mux --uri redis://localhost:6379
    """


@app.command("version")
@connected
def print_version(
    connection: Connection,  # noqa: ARG001  (its flags may stand anywhere)
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the version.

    [bold]Example:[/bold] asynq-aio version --json
    """
    if as_json:
        print_json({"version": __version__, "python": ".".join(map(str, sys.version_info[:3]))})
    else:
        print(f"asynq-aio version {__version__}")


app.command("worker")(connected(worker))
app.command("dev")(connected(dev))
app.add_typer(task.app, name="task")
app.add_typer(queue.app, name="queue")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, `sys.argv` unless given, and return the exit code; expected errors have no traceback."""
    words = _read_bools(sys.argv[1:] if arguments is None else arguments)
    if "--no-color" in words:
        os.environ["NO_COLOR"] = "1"  # also what the help texts and the processes that are started go by
    try:
        code = app(words, prog_name="asynq-aio", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        code = _explain(error)
        if code is None:
            raise
    return code if isinstance(code, int) else OK


def _explain(error: BaseException) -> int | None:
    """Tell what went wrong and return the exit code; None for what nobody expected: its traceback is wanted."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    match error:
        case CommandError():
            told = error
        case AsynqError():
            told = explain(error)
        case typer.TyperException():
            # Without a command there is the help text, and no message.
            told = CommandError(error.format_message(), hint=_usage(error), code=error.exit_code)
        case KeyboardInterrupt() | typer.Abort():
            return _INTERRUPTED
        case BrokenPipeError():
            # The reader, `head` say, has enough. Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        case _:
            return None
    if told.message:
        print_error(told)
    return told.code


def _usage(error: typer.TyperException) -> str:
    """Where there is help for the command that was used wrongly."""
    context = getattr(error, "ctx", None)
    return f"see {context.command_path} --help" if isinstance(context, typer.Context) or context else ""


def _read_bools(words: Sequence[str]) -> list[str]:
    """Go's spelling of the flags of the connection that are on or off: `--cluster=false` is `--no-cluster` here."""
    ready: list[str] = []
    for at, word in enumerate(words):
        if word == "--":
            return [*ready, *words[at:]]
        found = re.fullmatch(r"--(cluster|tls|insecure)=(1|t|true|0|f|false)", word, re.IGNORECASE)
        if found is None:
            ready.append(word)
        else:
            ready.append(f"--{found[1]}" if found[2].lower() in {"1", "t", "true"} else f"--no-{found[1]}")
    return ready
