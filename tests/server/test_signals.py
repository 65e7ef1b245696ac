"""Workers as processes that are told to end, to be quiet, to end at once: what their tasks become."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import Client, Task
from asynq_aio._wire import codec, keys
from tests.server.look import Counts, counted, counts, state_becomes, there, until
from tests.server.program import Worker, events

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_sigterm_gives_back_what_does_not_end(
    uri: str, queue: str, client: Client, redis: Any, tmp_path: Path, loop: str
) -> None:
    """It drains and exits with 0; what did not end in time is next in the queue, in its order, `retried` unchanged."""
    n = 600
    tasks = [Task("sleep", {"seconds": 0.02, "n": at}, task_id=f"t{at}") for at in range(n)]
    await client.enqueue_many(tasks, queue=queue)
    for task_id in ("long", "long-too"):
        await client.enqueue("sleep", {"seconds": 3600}, queue=queue, task_id=task_id, max_retry=5)
        await _set_retried(redis, queue, task_id, 3)
        await redis.lrem(keys.pending(queue), 1, task_id)
    await redis.rpush(keys.pending(queue), "long-too", "long")  # next to be taken: long, then long-too
    async with Worker(uri, queue, tmp_path, concurrency=20, shutdown_timeout=0.5, uvloop=loop == "uvloop") as worker:
        await until(lambda: sum(line.event == "done" for line in worker.lines()) > 100)
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0
    done = set(events(tmp_path, "done"))
    left = await counts(redis, queue)
    assert left == Counts(pending=n + 2 - len(done)), "nothing is active, nothing is lost, nothing is counted twice"
    assert await redis.lrange(keys.pending(queue), -2, -1) == [b"long-too", b"long"]
    for task_id in ("long", "long-too"):
        found = await there(redis, queue, task_id)
        assert (found.state, found.message.retried, found.error) == ("pending", 3, "")
        assert "aio_owner" not in found.fields
        assert found.fields["pending_since"].isdigit()
    assert events(tmp_path, "cancelled") == {"long": 1, "long-too": 1}
    assert await counted(redis, queue) == (len(done), 0)
    assert [key async for key in redis.scan_iter(match=f"asynq:*:{worker.pid}:*", count=5000)] == [], "it is not shown"

    await redis.delete(keys.task(queue, "long"), keys.task(queue, "long-too"))
    await redis.ltrim(keys.pending(queue), 0, -3)
    async with Worker(uri, queue, tmp_path, concurrency=20, burst=True) as second:
        assert await second.ended() == 0
    assert events(tmp_path, "done") == {f"t{at}": 1 for at in range(n)}
    assert await counts(redis, queue) == Counts()


async def test_a_second_signal_aborts(uri: str, queue: str, client: Client, redis: Any, tmp_path: Path) -> None:
    """The first one waits for the handlers, the second one does not; a handler that is deaf holds up neither."""
    await client.enqueue("sleep", {"seconds": 3600}, queue=queue, task_id="long")
    await client.enqueue("deaf", queue=queue, task_id="deaf")
    async with Worker(uri, queue, tmp_path, shutdown_timeout=3600) as worker:
        await until(lambda: sum(line.event == "start" for line in worker.lines()) == 2)
        worker.signal(signal.SIGINT)
        await until(lambda: "shutting down" in worker.log.read_text())
        await asyncio.sleep(0.2)  # it goes on, and nothing tells so
        assert worker.exit_status is None
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0
    assert await counts(redis, queue) == Counts(pending=2)


async def test_sigtstp_takes_no_more(uri: str, queue: str, client: Client, redis: Any, tmp_path: Path) -> None:
    """Quiet: what runs goes on, nothing new is taken, the server is shown as stopped; SIGTERM ends it."""
    await client.enqueue("sleep", {"seconds": 0.3}, queue=queue, task_id="running")
    async with Worker(uri, queue, tmp_path) as worker:
        await until(lambda: worker.lines()[-1].event == "start")
        worker.signal(signal.SIGTSTP)
        await until(lambda: "stopped" in worker.log.read_text())
        await client.enqueue("sleep", {"seconds": 0}, queue=queue, task_id="late")
        await until(lambda: worker.lines()[-1].event == "done")

        async def shown() -> bool:
            entries = [key async for key in redis.scan_iter(match=f"asynq:servers:*:{worker.pid}:*", count=5000)]
            return [codec.decode_server_info(await redis.get(key)).status for key in entries] == ["stopped"]

        await until(shown)
        assert (await counts(redis, queue)).pending == 1
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0
    assert events(tmp_path, "start") == {"running": 1}


async def test_sigterm_while_redis_is_away(queue: str, tmp_path: Path) -> None:
    """A worker that never got to Redis ends as soon as it is told to, with 0."""
    async with Worker("redis://127.0.0.1:1/0", queue, tmp_path, wait=False) as worker:
        await until(lambda: "calls wait for it" in worker.log.read_text())
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0
    assert events(tmp_path, "start") == {}


async def test_a_task_that_kills_its_process_is_archived(
    uri: str, queue: str, client: Client, redis: Any, tmp_path: Path
) -> None:
    """With max_recoveries=0 the next server does not run it; it says why, and works on."""
    await client.enqueue("die", queue=queue, task_id="killer")
    async with Worker(uri, queue, tmp_path, max_recoveries=0) as victim:
        assert await victim.ended() == -signal.SIGKILL
        async with Worker(uri, queue, tmp_path, max_recoveries=0) as survivor:
            found = await state_becomes(redis, queue, "killer", "archived")
            await client.enqueue("sleep", {"seconds": 0}, queue=queue)
            await until(lambda: any(line.event == "done" for line in survivor.lines()))
            survivor.signal(signal.SIGTERM)
            assert await survivor.ended() == 0
    assert "the server died while it ran this task" in found.error
    assert found.message.retried == 0
    assert await counted(redis, queue) == (2, 1)


async def _set_retried(redis: Any, queue: str, task_id: str, retried: int) -> None:
    found = await there(redis, queue, task_id)
    message = dataclasses.replace(found.message, retried=retried)
    await redis.hset(keys.task(queue, task_id), "msg", codec.encode_task(message))
