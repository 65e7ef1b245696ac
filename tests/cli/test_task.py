"""`asynq-aio task enqueue`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio._wire import codec

if TYPE_CHECKING:
    from tests.cli.conftest import Command


def _message(look: Any, queue: str, task_id: str) -> Any:
    """The message as it stands in Redis."""
    return codec.decode_task(look.hget(f"asynq:{{{queue}}}:t:{task_id}", "msg"))


def test_it_says_id_and_queue(command: Command, uri: str, queue: str, look: Any) -> None:
    """In Go's words, on stdout; the payload is what stood on the line."""
    told = command(
        "task", "enqueue", "-t", "email:welcome", "-l", '{"to": "ü"}', "--queue", queue, "--id", "x-1", "-u", uri
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, f"Enqueued task x-1 to queue {queue}\n", "")
    message = _message(look, queue, "x-1")
    assert (message.type, message.payload, message.retry, message.timeout) == (
        "email:welcome",
        '{"to": "ü"}'.encode(),
        25,
        1800,
    )


def test_every_option(command: Command, uri: str, queue: str, look: Any) -> None:
    """By Go's names, with underscores or dashes."""
    told = command(
        *("task", "enqueue", "--type_name", "a", "--payload", "", "--queue", queue, "--id", "x", "--retry", "3"),
        *("--timeout", "1m30s", "--deadline", "2033-05-18T03:33:20Z", "--unique", "1h", "--retention", "24h"),
        *("--process_in", "5m", "--header", "a=b", "--header", "c=d=e", "--uri", uri),
    )
    assert told.returncode == 0, told.stderr
    message = _message(look, queue, "x")
    assert (message.retry, message.timeout, message.deadline, message.retention) == (3, 90, 2_000_000_000, 86_400)
    assert dict(message.headers) == {"a": "b", "c": "d=e"}
    assert message.unique_key.startswith(f"asynq:{{{queue}}}:unique:a:")
    due = look.zscore(f"asynq:{{{queue}}}:scheduled", "x")
    assert 200 < due - time.time() <= 301


def test_a_group(command: Command, uri: str, queue: str, look: Any) -> None:
    """It waits to be aggregated."""
    told = command("task", "enqueue", "-t", "a", "-l", "1", "--queue", queue, "--group", "g", "-u", uri, "--json")
    assert json.loads(told.stdout)["state"] == "aggregating"
    assert look.smembers(f"asynq:{{{queue}}}:groups") == {b"g"}


def test_as_json(command: Command, uri: str, queue: str) -> None:
    """For programs."""
    told = command(
        *("task", "enqueue", "-t", "a", "-l", "1", "--queue", queue, "--id", "x", "-u", uri, "--json"),
        *("--process-at", "2033-05-18T03:33:20Z"),
    )
    assert json.loads(told.stdout) == {
        "id": "x",
        "queue": queue,
        "type": "a",
        "state": "scheduled",
        "next_process_at": "2033-05-18T03:33:20+00:00",
    }


def test_a_taken_id_is_a_failure(command: Command, uri: str, queue: str) -> None:
    """Exit code 1, on stderr."""
    line = ["task", "enqueue", "-t", "a", "-l", "1", "--queue", queue, "--id", "x", "-u", uri]
    assert command(*line).returncode == 0
    told = command(*line)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith("error: task ID conflicts with another task")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["--timeout", "30"],
            "'30' is no duration; expected a number with a unit, such as 30s, 1h30m; did you mean 30s?",
        ),
        (["--deadline", "2033-05-18T03:33:20"], "has no offset from UTC"),
        (["--retry", "-1"], "Invalid value for '--retry'"),
        (["--header", "x"], "'x' is no header; expected key=value"),
        (["--process-in", "1s", "--process-at", "2033-05-18T03:33:20Z"], "process_at"),
        (["--queue", " "], "queue name must contain one or more characters"),
        (["--type-name", " "], "task typename cannot be empty"),
        (["--unique", "-1s"], "unique"),
        (["--id", ""], "task ID cannot be empty"),
    ],
)
def test_wrong_options_are_usage_errors(command: Command, uri: str, flags: list[str], reason: str) -> None:
    """Exit code 2, and what was expected."""
    told = command("task", "enqueue", "-t", "a", "-l", "1", *flags, "-u", uri)
    assert (told.returncode, told.stdout) == (2, "")
    assert reason.lower() in told.stderr.lower()
    assert "Traceback" not in told.stderr
