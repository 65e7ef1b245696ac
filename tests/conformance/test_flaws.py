"""Flaws of Go that show in a running server, and the table of all rows that have a test."""

from __future__ import annotations

import ast
import asyncio
import re
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tests.conformance as table
from asynq_aio import AsyncServer, Client, Context, Task
from asynq_aio._broker.store import Fault
from asynq_aio._wire import codec, keys
from tests import seed
from tests.server import look

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parent.parent.parent
ROWS = ("F1", "F3", "F4", "F8", "F9", "F11", "F12", "F17", "F21", "F22", "F26", "F27", "F28", "F31")
GO_POLLS_EVERY = 0.5
"""Seconds: Go's server sleeps 0.5 to 1.5 s between two looks at an empty queue."""


def test_each_row_has_a_test() -> None:
    """Every row of this part has one, and it is there, under that name."""
    named = re.findall(r"^    (F\d+) .* (tests/\S+\.py)::(\w+)$", table.__doc__ or "", re.MULTILINE)
    assert tuple(row for row, _, _ in named) == ROWS
    for row, path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, row


async def test_an_idle_server_is_woken(uri: str, queue: str, redis: Any) -> None:
    """F1: a task pushed by a Go client, into a queue that was found empty, starts before Go would look again."""
    started: asyncio.Queue[str] = asyncio.Queue()

    async def handler(ctx: Context, _task: Task) -> None:
        started.put_nowait(ctx.task_id)

    waits = []
    # Nothing polls: were the server not woken, it would find the task after ten seconds.
    server = AsyncServer(uri, queues=[queue], task_check_interval=timedelta(hours=1))
    async with server.running(handler):
        for number in range(5):
            made = seed.message(queue, str(number))
            pushed = time.monotonic()
            await seed.pending(redis, queue, [made])
            assert await started.get() == made.id
            waits.append(time.monotonic() - pushed)
            await look.drained(redis, queue)
    assert statistics.median(waits) < GO_POLLS_EVERY


async def test_a_timeout_ends_the_handler(uri: str, queue: str) -> None:
    """F21: its slot is given away when the handler has ended, not before: never more handlers than `concurrency`."""
    running = most = 0
    ended = asyncio.Event()

    async def handler(task: Task) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            if task.type == "slow":
                await asyncio.Event().wait()
        finally:
            if task.type == "slow":
                await asyncio.sleep(0.05)  # a cleanup that takes a while
            running -= 1
            if task.type == "next":
                ended.set()

    async with Client(uri) as client:
        await client.enqueue("slow", queue=queue, timeout=timedelta(seconds=1))
        await client.enqueue("next", queue=queue)
    async with AsyncServer(uri, queues=[queue], concurrency=1).running(handler), asyncio.timeout(look.PATIENCE):
        await ended.wait()
    assert (running, most) == (0, 1)


async def test_an_error_handler_may_raise(uri: str, queue: str, redis: Any, caplog: pytest.LogCaptureFixture) -> None:
    """F22: what `on_error` raises is logged; the task goes its way, and so do the next ones."""

    async def handler(_task: Task) -> None:
        raise ValueError("boom")

    def on_error(_ctx: Context, _task: Task, _exc: BaseException) -> None:
        raise RuntimeError("broken")

    async with Client(uri) as client, AsyncServer(uri, queues=[queue], on_error=on_error).running(handler) as server:
        for task_id in "ab":
            await client.enqueue("ty", task_id=task_id, queue=queue)
            found = await look.state_becomes(redis, queue, task_id, "retry")
            assert found.error == "boom"
        assert server.healthy
    assert sum("on_error raised" in record.message for record in caplog.records) == 2


async def test_an_outcome_outlives_an_outage(uri: str, queue: str, redis: Any) -> None:
    """F31: Redis is away when the handlers end; outcomes are kept, written once it is back, nothing runs twice."""
    outage = asyncio.Event()
    tried = asyncio.Event()
    runs: list[str] = []

    async def handler(ctx: Context, task: Task) -> None:
        runs.append(ctx.task_id)
        outage.set()
        if task.type == "fails":
            raise ValueError("boom")

    def away(name: str, _keys: object) -> Fault | None:
        if name == "finish" and outage.is_set():
            tried.set()
            return Fault.NOT_SENT
        return None

    server = AsyncServer(uri, queues=[queue], retry_delay=lambda _retried, _exc, _task: timedelta(hours=1))
    server._store.faults = away
    server._store.deadline = 0.2
    async with Client(uri) as client:
        await client.enqueue_many([Task("works", task_id="a"), Task("fails", task_id="b")], queue=queue)
    async with server.running(handler):
        await look.until(lambda: len(runs) == 2)
        await tried.wait()
        await asyncio.sleep(3 * server._store.deadline)  # the outage is longer than a call's deadline
        assert await redis.llen(keys.active(queue)) == 2
        server._store.faults = None
        await look.drained(redis, queue)
    found = await seed.look(redis, queue, ["a"])
    assert sorted(runs) == ["a", "b"]
    assert (list(found["retry"]), "t:a" in found) == (["b"], False)
    assert codec.decode_task(found["t:b"]["msg"]).error_msg == "boom"
    assert await seed.counters(redis, queue) == {"processed": 2, "failed": 1, "processed_on": 2, "failed_on": 1}
    assert server.stats.lost == 0
