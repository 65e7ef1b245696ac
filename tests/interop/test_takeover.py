"""Workers that die: the other side takes up their tasks by Go's rule of expired leases, and no others."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from asynq_aio import AsyncServer, Client, Context, Task
from asynq_aio._wire import keys
from tests.interop.go_peer import GoInspector, GoWorker
from tests.server.look import state_becomes, until
from tests.server.program import Worker

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from tests.servers import Servers

HOUR = timedelta(hours=1)
LONG_EXPIRED = 40
"""Seconds; Go leaves a lease alone for 30 s after its end."""


class DoomedGoWorker(GoWorker):
    """One that does not end by itself: it is killed, at the end of its block at the latest."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._reading is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reading
        self._process.stdin.close()


def in_a_second(_retried: int, _exc: BaseException, _task: Task) -> timedelta:
    """A short retry delay."""
    return timedelta(seconds=1)


async def expire(redis: Any, queue: str, task_id: str) -> None:
    """As if its owner had been gone for long enough."""
    assert await redis.zadd(keys.lease(queue), {task_id: int(time.time()) - LONG_EXPIRED}, xx=True, ch=True) == 1


async def test_python_takes_over_from_a_killed_go_worker(
    server: Servers, uri: str, queue: str, redis: Any, client: Client, go_inspector: GoInspector
) -> None:
    """Killed in mid-work: its task is retried once its lease is 30 s past its end, as a failure; not before.

    Nor is the task of a Go worker that lives, though its hash names a server of ours that is gone: Go leaves that field
    behind where it takes a task over.
    """
    beside = f"{queue}-beside"
    seen: dict[str, Context] = {}

    async def handler(ctx: Context, _task: Task) -> bytes:
        seen[ctx.task_id] = ctx
        return b"by Python"

    for task_id in ("due", "not-yet"):
        await client.enqueue("wait", task_id, queue=queue, task_id=task_id, retention=HOUR, headers={"h": task_id})
    await client.enqueue("wait", queue=beside, task_id="alive")
    await redis.hset(keys.task(beside, "alive"), "aio_owner", "host:1:gone/1")

    async with AsyncExitStack() as stack:
        killed = await stack.enter_async_context(DoomedGoWorker(server, {queue: 1}))
        living = await stack.enter_async_context(DoomedGoWorker(server, {beside: 1}))
        await asyncio.gather(killed.started("due"), killed.started("not-yet"), living.started("alive"))
        await killed.kill()
        await expire(redis, queue, "due")
        untouched = await redis.zscore(keys.lease(queue), "not-yet")
        orphaned = {task["id"]: task["is_orphaned"] for task in await go_inspector.list(queue, "active")}
        assert orphaned == {"due": True, "not-yet": False}

        ours = AsyncServer(uri, queues=[queue, beside], retry_delay=in_a_second)
        await stack.enter_async_context(ours.running(handler))
        await state_becomes(redis, queue, "due", "completed")
        assert set(seen) == {"due"}
        assert (seen["due"].retried, dict(seen["due"].headers)) == (1, {"h": "due"})
        assert await redis.zscore(keys.lease(queue), "not-yet") == untouched
        assert (await go_inspector.task(queue, "not-yet"))["state"] == "active"
        found = await go_inspector.task(queue, "due")
        assert (found["retried"], found["last_error"]) == (1, "asynq: task lease expired")

        await expire(redis, queue, "not-yet")
        await state_becomes(redis, queue, "not-yet", "completed")
        info = await go_inspector.queue(queue)
        assert (info["processed"], info["failed"], info["completed"], info["size"]) == (4, 2, 2, 2)

        assert set(seen) == {"due", "not-yet"}
        assert (await go_inspector.task(beside, "alive"))["state"] == "active"
        assert [event["event"] for event in living.events] == ["ready", "start"]
        assert ours.stats.recovered == 2


async def test_go_takes_over_from_a_killed_python_worker(
    server: Servers, uri: str, queue: str, redis: Any, client: Client, go_inspector: GoInspector, tmp_path: Path
) -> None:
    """The fields that we add to a task do not keep Go from recovering it; what it runs then is ours no more."""
    headers = {"h": "kept"}
    for task_id in ("due", "not-yet"):
        await client.enqueue("sleep", {"seconds": 600}, queue=queue, task_id=task_id, retention=HOUR, headers=headers)
    async with Worker(uri, queue, tmp_path) as killed:
        await until(lambda: sum(line.event == "start" for line in killed.lines()) == 2)
    assert killed.exit_status == -9
    await expire(redis, queue, "due")
    async with GoWorker(server, {queue: 1}) as worker:
        event = await worker.event(lambda event: event["event"] == "end")
        await state_becomes(redis, queue, "due", "completed")
    assert (event["id"], event["retried"], event["headers"]) == ("due", 1, headers)
    found = await go_inspector.task(queue, "due")
    assert (found["retried"], found["last_error"]) == (1, "asynq: task lease expired")
    assert (await go_inspector.task(queue, "not-yet"))["state"] == "active"
    info = await go_inspector.queue(queue)
    assert (info["processed"], info["failed"]) == (2, 1)
