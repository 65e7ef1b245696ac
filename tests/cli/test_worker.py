"""`asynq-aio worker`: one process."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import SyncClient, __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tests.cli.conftest import Command, Running


@pytest.fixture
def client(uri: str) -> Generator[SyncClient]:
    """To enqueue with."""
    with SyncClient(uri) as made:
        yield made


def _get(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def _health(running: Running) -> str:
    found = re.search(r"http://127\.0\.0\.1:\d+/", running.wait_for("health: http"))
    assert found
    return found[0]


def _entries(look: Any, pid: int) -> list[bytes]:
    """The server entries of a process."""
    return [key for key in look.zrange("asynq:servers", 0, -1) if f":{pid}:".encode() in key]


def test_it_works_until_a_signal(command: Command, uri: str, queue: str, client: SyncClient, look: Any) -> None:
    """What a person sees from the start to the summary, and that TERM waits for what runs."""
    with command.running("worker", "app:mux", "-u", uri, "--queues", f"{queue}=6,{queue}low=3", "-c", "7") as worker:
        worker.wait_for("connected to Redis at")
        client.enqueue("email:welcome", {"to": 1}, queue=queue, headers={"a": "b"})
        worker.wait_for("""sent {"to":1} {'a': 'b'}""")
        client.enqueue("email:broken", b"", queue=f"{queue}low")
        worker.wait_for("no such address")
        client.enqueue("email:long", 0.5, queue=queue)
        worker.wait_for("begun")
        assert len(_entries(look, worker.pid)) == 1
        assert worker.stop() == 0
        text = worker.text
    assert f"asynq-aio {__version__} on Python" in text
    assert f"pid {worker.pid}" in text
    assert f"connecting to Redis at {uri.removeprefix('redis://')}" in text
    assert re.search(r"connected to .*: Valkey 9\.\d+\.\d+, no cluster", text)
    assert f"queues: {queue}=6, {queue}low=3 (weighted); concurrency 7" in text
    assert "handlers: email:welcome, email:long, email:broken, loop:block" in text
    assert f"ended {worker.pid}" in text
    assert re.search(r"processed 3 tasks in \d+\.\d s: 2 succeeded, 1 retried, 0 archived, 0 requeued", text)
    assert _entries(look, worker.pid) == []


def test_burst(command: Command, uri: str, queue: str, client: SyncClient) -> None:
    """It ends when the queues are empty, by itself, with exit code 0; at debug each start and end is said."""
    ids = [client.enqueue("email:welcome", {"to": n}, queue=queue).id for n in range(3)]
    told = command("worker", "app:make", "--queues", queue, "--burst", "--strict", "--log-level", "debug", "--uri", uri)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("sent") == 3
    for task_id in ids:
        assert len([line for line in told.stderr.splitlines() if task_id in line and " debug " in line]) == 2
    assert f"queues: {queue}=1 (strict)" in told.stderr
    assert "processed 3 tasks" in told.stderr


def test_quieter_and_louder(command: Command, uri: str, queue: str, client: SyncClient) -> None:
    """At info no task is named; at warn nothing is said when all is well."""
    task_id = client.enqueue("email:welcome", 1, queue=queue).id
    assert task_id not in command("worker", "app:mux", "--queues", queue, "--burst", "-u", uri).stderr
    told = command("worker", "app:mux", "--queues", queue, "--burst", "--log-level", "warn", "-u", uri)
    assert (told.returncode, told.stderr) == (0, "")


def test_json_lines(command: Command, uri: str, queue: str, client: SyncClient) -> None:
    """Each line on stderr is an object, and the facts are fields of it."""
    client.enqueue("email:broken", 1, queue=queue)
    told = command("worker", "app:mux", "--queues", queue, "--burst", "--log-format", "json", "--uri", uri)
    lines = [json.loads(line) for line in told.stderr.splitlines()]
    facts: dict[str, Any] = {}
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "pid", "message"}
        facts |= line
    assert facts["version"] == __version__
    assert facts["queues"] == {queue: 1}
    assert facts["handlers"][0] == "email:welcome"
    assert facts["redis_server"] == "valkey"
    assert (facts["processed"], facts["retried"]) == (1, 1)


def test_the_programs_own_server(command: Command, uri: str, queue: str, client: SyncClient) -> None:
    """Its settings hold; the flags that would change them are refused by name."""
    command.write(
        f"from app import mux\nfrom asynq_aio import AsyncServer\n"
        f"server = AsyncServer({uri!r}, queues=[{queue!r}], concurrency=3)\n",
        "mine.py",
    )
    client.enqueue("email:welcome", 1, queue=queue)
    told = command("worker", "mine:server", "--burst")
    assert told.returncode == 0, told.stderr
    assert "concurrency 3" in told.stderr
    assert "sent" in told.stdout
    refused = command("worker", "mine:server", "--burst", "--queues", "a", "--strict", "--uri", "127.0.0.1:1")
    assert refused.returncode == 2
    assert (
        "error: mine:server is an AsyncServer with its own settings; --queues, --strict, --uri cannot change them"
        in (refused.stderr)
    )
    assert "hint: leave the flags out, or name the mux" in refused.stderr
    assert command("worker", "mine:server", "--burst", "--uri", uri).returncode == 0  # it says the same


def test_the_program_finds_the_redis_of_the_flags(command: Command, uri: str, queue: str, client: SyncClient) -> None:
    """`Client()` in the user's module leads to where --uri does."""
    command.write(
        "import app\nfrom asynq_aio import Client, ServeMux, Task\nmux = ServeMux()\nclient = Client()\n"
        "@mux.handler('first')\nasync def first(task: Task) -> None:\n"
        f"    await client.enqueue('email:welcome', 'second', queue={queue!r})\n"
        "mux.include(app.mux)\n",
        "chain.py",
    )
    client.enqueue("first", 1, queue=queue)
    with command.running(
        "worker", "chain:mux", "--queues", queue, "-u", uri, env={"ASYNQ_URI": "127.0.0.1:1"}
    ) as worker:
        worker.wait_for('sent "second"')
        assert worker.stop() == 0


def test_health(command: Command, uri: str, queue: str, client: SyncClient) -> None:
    """Alive and ready while it works; not ready while it drains; 404 with what there is elsewhere."""
    with command.running("worker", "app:mux", "--queues", queue, "-u", uri, "--health-port", "0") as worker:
        base = _health(worker)
        worker.wait_for("connected to")
        client.enqueue("email:long", 1.5, queue=queue)
        worker.wait_for("begun")
        assert _get(f"{base}livez") == (200, {"status": "ok", "pid": worker.pid, "reason": None})
        status, answer = _get(f"{base}readyz")
        assert (status, answer["status"], answer["state"], answer["reason"]) == (200, "ok", "active", None)
        assert _get(f"{base}metrics") == (404, {"status": "not found", "paths": ["/livez", "/readyz"]})
        worker.send(signal.SIGTERM)
        worker.wait_for("once more to abort")
        worker.wait_for("shutting down: 1 handlers")
        status, answer = _get(f"{base}readyz")
        assert (status, answer["status"]) == (503, "failed")
        assert answer["reason"]
        assert _get(f"{base}livez")[0] == 200
        assert worker.end() == 0


def test_a_taken_health_port(command: Command, uri: str) -> None:
    """Said at the start, with what to do."""
    import socket

    with socket.create_server(("0.0.0.0", 0)) as taken:
        told = command("worker", "app:mux", "-u", uri, "--health-port", str(taken.getsockname()[1]))
    assert told.returncode == 1
    assert "error: cannot listen on the health port" in told.stderr
    assert "give another --health-port" in told.stderr


def test_quiet(command: Command, uri: str, queue: str, client: SyncClient, until: Callable[..., None]) -> None:
    """After TSTP it takes no more tasks and stays; another worker gets them."""
    with command.running("worker", "app:mux", "--queues", queue, "-u", uri) as worker:
        worker.wait_for("connected to")
        client.enqueue("email:long", 0.3, queue=queue)
        worker.wait_for("begun")
        worker.send(signal.SIGTSTP)
        worker.wait_for("no more tasks are taken")
        client.enqueue("email:welcome", "other", queue=queue)
        worker.wait_for("ended")
        assert "other" in command("worker", "app:mux", "--queues", queue, "-u", uri, "--burst").stdout
        assert worker.process.poll() is None
        assert worker.stop() == 0
        assert "other" not in worker.text


def test_a_second_signal_aborts(command: Command, uri: str, queue: str, client: SyncClient, look: Any) -> None:
    """The handler is cancelled and its task goes back to the queue."""
    task_id = client.enqueue("email:long", 600, queue=queue).id
    with command.running("worker", "app:mux", "--queues", queue, "-u", uri, "--shutdown-timeout", "10m") as worker:
        worker.wait_for("begun")
        worker.send(signal.SIGINT)
        worker.wait_for("shutting down: 1 handlers")
        worker.send(signal.SIGINT)
        worker.end()
        assert "1 requeued" in worker.text
    assert look.lrange(f"asynq:{{{queue}}}:pending", 0, -1) == [task_id.encode()]


def test_a_handler_on_a_thread_cannot_hold_up_the_exit(
    command: Command, uri: str, queue: str, client: SyncClient, look: Any
) -> None:
    """A thread cannot be stopped: its task goes back to the queue, and the process ends without it."""
    task_id = client.enqueue("thread:long", 600, queue=queue).id
    with command.running("worker", "app:mux", "--queues", queue, "-u", uri, "--shutdown-timeout", "100ms") as worker:
        worker.wait_for("begun")
        assert worker.stop() == 0
        assert "1 handlers on threads go on" in worker.text
    assert look.lrange(f"asynq:{{{queue}}}:pending", 0, -1) == [task_id.encode()]


def test_an_outage_is_said_and_survived(command: Command, queue: str) -> None:
    """A Redis that is absent at the start: it waits, and works when Redis is there."""
    from asynq_aio import EmbeddedRedis

    redis = EmbeddedRedis()
    redis.start()
    try:
        uri = f"{redis.uri}?deadline=2s"
        redis.kill()
        with command.running("worker", "app:mux", "--queues", queue, "-u", uri, "--health-port", "0") as worker:
            worker.wait_for("calls wait for it")
            status, answer = _get(f"{_health(worker)}readyz")
            assert status == 503
            assert "has not answered yet" in answer["reason"]
            assert _get(f"{_health(worker)}livez")[0] == 200
            redis.restart()
            with SyncClient(redis.uri) as client:
                client.enqueue("email:welcome", "at last", queue=queue)
            worker.wait_for('sent "at last"')
            assert worker.text.count("calls wait for it") == 1
            assert worker.stop() == 0
    finally:
        redis.stop()


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (["--queues", "a=x"], 2, "the weight of queue 'a' is 'x'; expected a whole number of at least 1"),
        (["--queues", "}a"], 2, "begins with '}'"),
        (["--concurrency", "0"], 2, "Invalid value for '--concurrency'"),
        (["--processes", "0"], 2, "Invalid value for '--processes'"),
        (["--shutdown-timeout", "8"], 2, "did you mean 8s?"),
        (["--shutdown-timeout", "-8s"], 2, "expected 0 or more"),
        (["--log-level", "loud"], 2, "Invalid value for '--log-level'"),
        (["--cluster"], 2, "is a single Redis server, not a node of a cluster"),
        (["--password", "geheim"], 1, "refused access"),
        (["--uri", "embedded://", "--processes", "2"], 2, "asynq-aio dev app:mux"),
    ],
)
def test_wrong_flags(command: Command, uri: str, flags: list[str], code: int, reason: str) -> None:
    """What was wrong, what is expected; no traceback, no secret."""
    told = command("worker", "app:mux", "-u", uri, *flags)
    assert told.returncode == code
    assert reason in told.stderr
    assert "Traceback" not in told.stderr
    assert "geheim" not in told.stderr


def test_a_mux_without_handlers(command: Command, uri: str) -> None:
    """It would fail every task that it takes."""
    command.write("from asynq_aio import ServeMux\nmux = ServeMux()\n", "empty.py")
    told = command("worker", "empty:mux", "-u", uri)
    assert told.returncode == 2
    assert "error: empty:mux has no handlers" in told.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_uvloop_where_it_is_installed(command: Command, uri: str, queue: str, installed: bool) -> None:
    """The start says which loop it is."""
    if not installed:
        command.write("import sys\nsys.modules['uvloop'] = None\n", "sitecustomize.py")
    told = command(
        *("worker", "app:mux", "-u", uri, "--queues", queue, "--burst"), env={"PYTHONPATH": str(command.directory)}
    )
    assert told.returncode == 0, told.stderr
    assert f"and {'uvloop' if installed else 'asyncio'};" in told.stderr
    assert os.environ.get("PYTHONPATH") != str(command.directory)
