"""`asynq-aio dev`: a private server, a worker, a reload."""

from __future__ import annotations

import re
import signal
import socket
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Command


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("flags", [[], ["--cluster"]])
def test_from_the_first_terminal_to_the_second(command: Command, flags: list[str], until: Callable[..., None]) -> None:
    """It says the address; a task that is enqueued there is worked; Ctrl-C ends the server too."""
    with command.running("dev", "app:mux", *flags, env={"ASYNQ_URI": "127.0.0.1:1", "ASYNQ_PASSWORD": "x"}) as dev:
        found = re.search(r"export ASYNQ_URI=(\S+)", dev.wait_for("export ASYNQ_URI="))
        assert found
        uri = found[1]
        assert uri.startswith("redis-cluster://" if flags else "redis://")
        enqueued = command("task", "enqueue", "-t", "email:welcome", "-l", "hello", env={"ASYNQ_URI": uri})
        assert enqueued.returncode == 0, enqueued.stderr
        dev.wait_for("sent hello")
        dev.wait_for("(email:welcome) of queue default starts")  # at debug, which is the level here
        port = int(uri.rpartition(":")[2])
        assert _listens(port)
        dev.send(signal.SIGINT)
        assert dev.end() == 0
        until(lambda: not _listens(port), "the server is gone")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--uri", "127.0.0.1:1"], "dev has a Redis server of its own; --uri would lead elsewhere"),
        (["--port", "7", "--cluster"], "--port is the port of one server"),
        (["--queues", "="], "a queue without a name"),
    ],
)
def test_what_makes_no_sense(command: Command, flags: list[str], reason: str) -> None:
    """Usage errors, before a server is started."""
    told = command("dev", "app:mux", *flags)
    assert (told.returncode, told.stdout) == (2, "")
    assert reason in told.stderr


def test_a_server_of_ones_own_elsewhere(command: Command) -> None:
    """A program whose server leads elsewhere would not work on the private one."""
    command.write(
        "from app import mux\nfrom asynq_aio import AsyncServer\nserver = AsyncServer('127.0.0.1:1')\n", "mine.py"
    )
    with command.running("dev", "mine:server") as dev:
        dev.wait_for("with its own settings; dev cannot change them")
        dev.wait_for("waiting for a change of the code")
        assert dev.stop() == 0


def test_a_port_of_ones_own(command: Command) -> None:
    """--port is where it listens; a taken one is an error that says so."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = command("dev", "app:mux", "--port", str(taken.getsockname()[1]))
    assert told.returncode == 1
    assert "is taken by another program" in told.stderr
    assert "Traceback" not in told.stderr
