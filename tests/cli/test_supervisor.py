"""`--processes` and `--reload`: one process that keeps others running."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import termios
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import SyncClient
from tests.cli.test_worker import _entries, _get, _health

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tests.cli.conftest import Command, Running


@pytest.fixture
def client(uri: str) -> Generator[SyncClient]:
    """To enqueue with."""
    with SyncClient(uri) as made:
        yield made


def _children(running: Running) -> list[int]:
    """The worker processes, by what the health port says."""
    _, answer = _get(f"{_health(running)}livez")
    return [process["pid"] for process in answer["processes"]]


def _ready(running: Running) -> bool:
    return _get(f"{_health(running)}readyz")[0] == 200


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_two_processes(
    command: Command, uri: str, queue: str, client: SyncClient, look: Any, until: Callable[..., None]
) -> None:
    """Each has a server entry; TERM drains both; the sums are said; no secret is on a command line."""
    line = ["worker", "app:mux", "--queues", queue, "-c", "1", "--processes", "2", "--health-port", "0"]
    with command.running(*line, env={"ASYNQ_URI": uri}) as worker:
        until(lambda: _ready(worker), "both are ready")
        children = _children(worker)
        assert len(set(children)) == 2
        for pid in children:
            assert len(_entries(look, pid)) == 1
            assert uri.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert os.getpgid(pid) == pid  # Ctrl-C in a terminal does not reach it
        for _ in range(2):
            client.enqueue("email:long", 0.8, queue=queue)
        worker.wait_for("begun", times=2)
        worker.send(signal.SIGTERM)
        assert worker.end() == 0
        text = worker.text
    assert {int(pid) for pid in re.findall(r"begun (\d+)", text)} == set(children)
    assert {int(pid) for pid in re.findall(r"ended (\d+)", text)} == set(children)
    assert re.search(r"all processes: processed 2 tasks in \d+\.\d s: 2 succeeded", text)
    assert all(_entries(look, pid) == [] for pid in children)


def test_a_killed_child_is_started_anew(
    command: Command, uri: str, queue: str, client: SyncClient, until: Callable[..., None]
) -> None:
    """SIGKILL of a child: said, not ready meanwhile, another takes its place."""
    line = ["worker", "app:mux", "--queues", queue, "-u", uri, "--processes", "2", "--health-port", "0"]
    with command.running(*line) as worker:
        until(lambda: _ready(worker), "both are ready")
        first, second = _children(worker)
        os.kill(first, signal.SIGKILL)
        worker.wait_for(f"process {first} was killed by SIGKILL; starting another in")
        status, answer = _get(f"{_health(worker)}readyz")
        assert status == 503
        assert answer["processes"][0]["reason"] == "was killed by SIGKILL"
        until(lambda: _ready(worker), "both are ready again")
        assert first not in _children(worker)
        assert second in _children(worker)
        client.enqueue("email:welcome", "still", queue=queue)
        worker.wait_for('sent "still"')
        assert worker.stop() == 0


def test_children_outlive_no_supervisor(
    command: Command, uri: str, queue: str, client: SyncClient, until: Callable[..., None]
) -> None:
    """SIGKILL of the supervisor: its children drain and end by themselves."""
    line = ["worker", "app:mux", "--queues", queue, "-u", uri, "--processes", "2", "--health-port", "0"]
    with command.running(*line) as worker:
        until(lambda: _ready(worker), "both are ready")
        children = _children(worker)
        client.enqueue("email:long", 0.5, queue=queue)
        worker.wait_for("begun")
        worker.send(signal.SIGKILL)
        worker.wait_for("the supervisor is gone; ending", times=2)
        worker.wait_for("ended")
        until(lambda: all(map(_gone, children)), "the children are gone")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_in_a_terminal(command: Command, uri: str, queue: str, client: SyncClient, processes: str) -> None:
    """The terminal signals its whole foreground group; each worker hears of it once, and drains."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    line = ["worker", "app:mux", "--queues", queue, "-u", uri, "--processes", processes]
    try:
        with command.running(*line, before=take_terminal) as worker:
            for count in range(1, int(processes) + 1):
                worker.wait_for("connected to", times=count)
            client.enqueue("email:long", 0.5, queue=queue)
            worker.wait_for("begun")
            os.write(ours, b"\x03")
            assert worker.end() == 0
            text = worker.text
    finally:
        os.close(ours)
        os.close(theirs)
    assert text.count("shutting down; once more to abort") == int(processes)
    assert "again: aborting" not in text
    assert "ended" in text


def test_quiet_reaches_all(command: Command, uri: str, queue: str, until: Callable[..., None]) -> None:
    """TSTP of the supervisor: its children take no more tasks, and so does one that comes later."""
    line = ["worker", "app:mux", "--queues", queue, "-u", uri, "--processes", "2", "--health-port", "0"]
    with command.running(*line) as worker:
        until(lambda: _ready(worker), "both are ready")
        worker.send(signal.SIGTSTP)
        worker.wait_for("stopped: no more tasks are taken", times=2)
        os.kill(_children(worker)[0], signal.SIGKILL)
        worker.wait_for("stopped: no more tasks are taken", times=3)
        assert worker.stop() == 0


def test_a_second_signal_aborts(command: Command, uri: str, queue: str, client: SyncClient, look: Any) -> None:
    """It is passed on: handlers are cancelled, their tasks go back to the queue."""
    task_id = client.enqueue("email:long", 600, queue=queue).id
    line = ["worker", "app:mux", "--queues", queue, "-u", uri, "--processes", "2", "--shutdown-timeout", "10m"]
    with command.running(*line) as worker:
        worker.wait_for("begun")
        worker.send(signal.SIGINT)
        worker.wait_for("shutting down: 1 handlers")
        worker.send(signal.SIGINT)
        worker.end()
    assert look.lrange(f"asynq:{{{queue}}}:pending", 0, -1) == [task_id.encode()]


def test_burst(command: Command, uri: str, queue: str, client: SyncClient) -> None:
    """All processes end when the queues are empty, and so does the supervisor."""
    for number in range(20):
        client.enqueue("email:welcome", number, queue=queue)
    told = command("worker", "app:mux", "--queues", queue, "-u", uri, "--processes", "2", "--burst")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("sent") == 20
    assert "all processes: processed 20 tasks" in told.stderr


@pytest.mark.parametrize(
    ("target", "flags", "code", "reason"),
    [
        ("app:mx", [], 2, "did you mean app:mux?"),
        ("bad:mux", [], 1, "module bad does not import: NameError"),
        ("app:mux", ["--password", "geheim"], 1, "refused access"),
        ("app:mux", ["--cluster"], 2, "is a single Redis server"),
    ],
)
def test_what_is_wrong_for_all_is_said_once(
    command: Command, uri: str, target: str, flags: list[str], code: int, reason: str
) -> None:
    """A child that cannot work at all is not started again and again; its exit code is that of the whole."""
    command.write("missing_name\n", "bad.py")
    told = command("worker", target, "-u", uri, "--processes", "2", *flags)
    assert told.returncode == code
    assert told.stderr.count(reason) == 1
    assert "geheim" not in told.stderr


def test_a_server_of_ones_own_elsewhere(command: Command, uri: str) -> None:
    """A flag that the program's own server cannot follow is refused with processes too."""
    command.write(
        "from app import mux\nfrom asynq_aio import AsyncServer\nserver = AsyncServer('127.0.0.1:1')\n", "mine.py"
    )
    told = command("worker", "mine:server", "-u", uri, "--processes", "2")
    assert told.returncode == 2
    assert "with its own settings; --uri cannot change them" in told.stderr


def test_a_server_of_ones_own(command: Command, uri: str, queue: str) -> None:
    """Without such flags each process runs the program's own server."""
    command.write(
        f"from app import mux\nfrom asynq_aio import AsyncServer\nserver = AsyncServer({uri!r}, queues=[{queue!r}])\n",
        "mine.py",
    )
    told = command("worker", "mine:server", "--processes", "2", "--burst")
    assert told.returncode == 0, told.stderr
    assert told.stderr.count(f"queues: {queue}=1") == 2


def test_json_lines(command: Command, uri: str, queue: str) -> None:
    """Of the supervisor and of its children alike."""
    told = command(
        *("worker", "app:mux", "--queues", queue, "-u", uri, "--processes", "2", "--burst", "--log-format", "json")
    )
    lines = [json.loads(line) for line in told.stderr.splitlines()]
    assert len({line["pid"] for line in lines}) == 3
    assert lines[0]["processes"] == 2


def test_reload(command: Command, uri: str, queue: str, client: SyncClient) -> None:
    """A change restarts the worker; code that does not import waits for the next change."""
    text = (
        "from asynq_aio import ServeMux, Task\nmux = ServeMux()\n@mux.handler('a')\nasync def a(task: Task) -> None:\n"
    )
    command.write(f"{text}    print('one', flush=True)\n", "live.py")
    with command.running("worker", "live:mux", "--queues", queue, "-u", uri, "--reload") as worker:
        worker.wait_for("connected to")
        client.enqueue("a", 1, queue=queue)
        worker.wait_for("one")
        command.write("x x\n", "live.py")
        worker.wait_for("live.py changed; restarting")
        worker.wait_for("SyntaxError")
        worker.wait_for("waiting for a change of the code")
        command.write(f"{text}    print('second', flush=True)\n", "live.py")
        worker.wait_for("connected to", times=2)
        client.enqueue("a", 1, queue=queue)
        worker.wait_for("second")
        assert worker.stop() == 0
        assert "all processes: processed 2 tasks" in worker.text


def test_reload_without_watchfiles(command: Command, uri: str) -> None:
    """Said before anything starts, with the extra's name."""
    command.write("import sys\nsys.modules['watchfiles'] = None\n", "sitecustomize.py")
    told = command("worker", "app:mux", "-u", uri, "--reload", env={"PYTHONPATH": str(command.directory)})
    assert told.returncode == 1
    assert "error: --reload needs watchfiles, which is not installed" in told.stderr
    assert "hint: pip install 'asynq_aio[reload]'" in told.stderr
