"""A server whose Redis goes away, stands still, fills up or loses replies: every task is accounted for."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest
from redis.asyncio import Redis

from asynq_aio import AsyncServer, BrokerFullError, Client, Context, Task
from asynq_aio._broker.store import Fault
from asynq_aio._wire import keys
from tests.server.look import Counts, counted, counts, drained, there, until
from tests.servers import own_standalone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from asynq_aio import EmbeddedRedis

pytestmark = pytest.mark.timeout(180)

HOUR = timedelta(hours=1)
ALWAYS = {"appendfsync": "always"}
"""What Redis has acknowledged survives its `kill -9`."""


class Work:
    """Handlers that count how often each task has run."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.runs: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.seconds = seconds

    async def __call__(self, ctx: Context, task: Task) -> None:
        self.runs[ctx.task_id] += 1
        await asyncio.sleep(self.seconds)
        self.ended[ctx.task_id] += 1


def numbered(first: int, n: int) -> list[Task]:
    """So many tasks, each with its number as ID."""
    return [Task("x", {"n": at}, task_id=f"t{at}") for at in range(first, first + n)]


@asynccontextmanager
async def looker(server: EmbeddedRedis) -> AsyncIterator[Any]:
    """A plain client of a single server."""
    async with Redis(port=server.port, protocol=2) as client:
        yield client


# --- Redis is away -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_redis_is_killed_and_comes_back(queue: str, version: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Away for 5 s: running handlers go on, their outcomes are written when Redis is back, no task runs twice."""
    work = Work()
    go = asyncio.Event()

    async def handler(ctx: Context, task: Task) -> None:
        if task.type == "long":
            await go.wait()
        await work(ctx, task)

    async with own_standalone(version, appendonly=True, settings=ALWAYS) as own, Client(own.uri) as client:
        worker = AsyncServer(own.uri, queues=[queue], concurrency=20)
        async with worker.running(handler):
            for at in range(20):
                await client.enqueue("long", queue=queue, task_id=f"long{at}", max_retry=0)
            await until(lambda: worker.running_tasks == 20)
            await client.enqueue_many(numbered(0, 200), queue=queue)
            await anyio.to_thread.run_sync(own.kill)
            go.set()  # outcomes that cannot be written
            waiting = asyncio.create_task(client.enqueue("x", queue=queue, task_id="meanwhile"))
            await asyncio.sleep(5.0)
            assert work.ended.total() == 20
            assert not waiting.done(), "a producer waits, it gets no error"
            await anyio.to_thread.run_sync(own.restart)
            await waiting
            async with looker(own) as redis:
                await until(lambda: work.ended.total() == 221)
                await drained(redis, queue)
                assert await counts(redis, queue) == Counts()
                assert await counted(redis, queue) == (221, 0)
            assert set(work.runs.values()) == {1}
            assert worker.stats.lost == 0
            await until(lambda: worker.healthy)
    outages = [record for record in caplog.records if "refused" in record.message and record.levelname == "WARNING"]
    assert len(outages) < 12, [record.message for record in outages]


async def test_an_idle_server_survives_a_restart(queue: str) -> None:
    """Consumption resumes by itself: what others enqueue while the server's connections are dead is worked."""
    work = Work()
    async with (
        own_standalone(appendonly=True, settings=ALWAYS) as own,
        AsyncServer(own.uri, queues=[queue]).running(work) as worker,
    ):
        await until(lambda: worker.healthy)
        await asyncio.sleep(0.2)  # until it blocks on the queue
        await anyio.to_thread.run_sync(own.restart)
        async with Client(own.uri) as client:
            await client.enqueue("x", queue=queue, task_id="after")
            await client.enqueue("x", queue=queue, task_id="due", process_in=timedelta(milliseconds=200))
            await until(lambda: set(work.ended) == {"after", "due"}, seconds=20)


async def test_redis_is_frozen(queue: str) -> None:
    """SIGSTOP for 7 s, a black hole: connections are there and say nothing; afterwards all goes on, nothing twice."""
    work = Work(0.01)
    async with own_standalone() as own, Client(own.uri) as client:
        worker = AsyncServer(own.uri, queues=[queue], concurrency=10)
        async with worker.running(work):
            await client.enqueue_many(numbered(0, 1500), queue=queue)
            await until(lambda: work.ended.total() > 200)
            os.kill(own.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(7.0)
            finally:
                os.kill(own.pid, signal.SIGCONT)
            async with looker(own) as redis:
                await until(lambda: len(work.ended) == 1500)
                await drained(redis, queue)
                assert await counts(redis, queue) == Counts()
                assert await counted(redis, queue) == (1500, 0)
        assert set(work.runs.values()) == {1}


async def test_connections_are_killed_all_the_time(queue: str) -> None:
    """CLIENT KILL of everything, again and again, under load: each task runs once and is counted once."""
    work = Work(0.002)
    n = 3000
    async with own_standalone() as own, Client(own.uri) as client, looker(own) as redis:
        worker = AsyncServer(own.uri, queues=[queue], concurrency=20)
        storm = asyncio.Event()

        async def kill() -> None:
            while not storm.is_set():
                await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                await asyncio.sleep(random.uniform(0.01, 0.06))

        async with worker.running(work):
            killer = asyncio.create_task(kill())
            for first in range(0, n, 300):
                await client.enqueue_many(numbered(first, 300), queue=queue)
            await until(lambda: len(work.ended) == n)
            storm.set()
            await killer
            await drained(redis, queue)
            assert await counts(redis, queue) == Counts()
            assert await counted(redis, queue) == (n, 0)
        assert set(work.runs.values()) == {1}
        assert worker.stats.succeeded == n
        assert worker.stats.lost == 0


# --- replies are lost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
async def test_replies_are_lost(queue: str, seed: int, uri: str, client: Client, redis: Any) -> None:
    """A third of all scripts go unsent or unanswered, claims and outcomes alike: each task runs and counts once."""
    work = Work(0.001)
    rng = random.Random(seed)
    n = 400
    lost: Counter[str] = Counter()

    def faults(name: str, _keys: Sequence[str | bytes]) -> Fault | None:
        if name in ("claim", "finish", "adopt", "regain", "forward") and rng.random() < 0.3:
            fault = rng.choice([Fault.NOT_SENT, Fault.REPLY_LOST])
            lost[f"{name}: {fault.name}"] += 1
            return fault
        return None

    def retry_delay(_retried: int, _exc: BaseException, _task: Task) -> timedelta:
        return timedelta(0)

    failed: set[str] = set()

    async def handler(ctx: Context, task: Task) -> None:
        await work(ctx, task)
        if task.payload.get_int("n") % 4 == 0 and ctx.task_id not in failed:
            failed.add(ctx.task_id)
            raise ValueError("once")

    await client.enqueue_many(numbered(0, n), queue=queue, unique_for=HOUR)
    worker = AsyncServer(uri, queues=[queue], concurrency=10, retry_delay=retry_delay)
    worker._store.faults = faults
    async with worker.running(handler):
        await until(lambda: worker.stats.succeeded == n)
        await drained(redis, queue)
    assert len(lost) >= 4, lost
    assert await counts(redis, queue) == Counts()
    assert await counted(redis, queue) == (n + n // 4, n // 4)
    assert work.runs == Counter({f"t{at}": 2 if at % 4 == 0 else 1 for at in range(n)})
    assert worker.stats.lost == 0
    assert [key async for key in redis.scan_iter(match=f"asynq:{{{queue}}}:unique:*", count=5000)] == []
    assert [key async for key in redis.scan_iter(match=f"asynq:{{{queue}}}:t:*", count=5000)] == []


async def test_a_claim_that_is_lost_at_shutdown(queue: str, uri: str, client: Client, redis: Any) -> None:
    """Its reply never came and the server ends: what it took goes back to the queue before the server is gone."""
    taken = asyncio.Event()

    def faults(name: str, _keys: Sequence[str | bytes]) -> Fault | None:
        if name == "claim":
            taken.set()
            return Fault.REPLY_LOST
        if name == "adopt" and server.state == "active":
            return Fault.NOT_SENT
        return None

    work = Work()
    # Redis knows the script by now: it is no NOSCRIPT that is lost.
    await AsyncServer(uri, queues=[queue]).run(work, burst=True)
    await client.enqueue_many(numbered(0, 7), queue=queue)
    server = AsyncServer(uri, queues=[queue], concurrency=5)
    server._store.faults = faults
    async with server.running(work):
        await taken.wait()
        await until_active(redis, queue)
    assert await counts(redis, queue) == Counts(pending=7)
    assert (await redis.lrange(keys.pending(queue), 0, -1))[::-1] == [b"t%d" % at for at in range(7)]
    assert not work.runs


async def test_a_task_given_back_is_not_lost(queue: str, uri: str, client: Client, redis: Any) -> None:
    """The reply to its requeue is lost, and it runs elsewhere when the requeue is repeated: no outcome is missing."""
    working = asyncio.Event()
    again = asyncio.Event()
    cut = False

    def faults(name: str, _keys: Sequence[str | bytes]) -> Fault | None:
        nonlocal cut
        if name != "finish":
            return None
        if cut:
            return None if again.is_set() else Fault.NOT_SENT
        cut = True
        return Fault.REPLY_LOST

    async def waits(_task: Task) -> None:
        working.set()
        await asyncio.Event().wait()

    async def takes(_task: Task) -> None:
        again.set()

    # Redis knows the script by then: it is no NOSCRIPT that is lost.
    await client.enqueue("x", queue=queue, task_id="warm-up")
    await AsyncServer(uri, queues=[queue]).run(takes, burst=True)
    again.clear()
    first = AsyncServer(uri, queues=[queue], shutdown_timeout=timedelta(0))
    first._store.faults = faults
    await client.enqueue("x", queue=queue)
    run = asyncio.create_task(first.run(waits))
    await working.wait()
    async with AsyncServer(uri, queues=[queue]).running(takes) as second:
        first.abort()
        await again.wait()
        await run
        await until(lambda: second.stats.succeeded == 1)
    assert (first.stats.requeued, first.stats.lost) == (1, 0)
    assert (second.stats.succeeded, second.stats.lost) == (1, 0)
    assert await counts(redis, queue) == Counts()


async def until_active(redis: Any, queue: str) -> None:
    """Wait until something is taken."""

    async def holds() -> bool:
        return bool(await redis.llen(keys.active(queue)))

    await until(holds)


# --- memory --------------------------------------------------------------------------------------------------------


async def test_a_full_redis_is_drained(queue: str) -> None:
    """No memory left: producers get a clear error, workers go on, with retries and archiving, and leases hold."""
    work = Work(0.001)

    async def handler(ctx: Context, task: Task) -> None:
        await work(ctx, task)
        if task.type == "fails" and ctx.retried == 0:
            raise ValueError("once")

    settings = {"maxmemory-policy": "noeviction"}
    async with own_standalone(settings=settings) as own, Client(own.uri) as client, looker(own) as redis:
        await client.enqueue_many(numbered(0, 300), queue=queue)
        await client.enqueue("fails", queue=queue, task_id="fails")
        await client.enqueue("fails", queue=queue, task_id="kept", max_retry=0)
        await redis.config_set("maxmemory", "1mb")
        with pytest.raises(BrokerFullError, match="maxmemory"):
            await client.enqueue("x", queue=queue)
        worker = AsyncServer(own.uri, queues=[queue], retry_delay=lambda *_: timedelta(0))
        async with worker.running(handler):
            await until(lambda: len(work.ended) == 302 and work.ended["fails"] == 2)
            await drained(redis, queue)
            heartbeater = worker._heartbeater
            assert heartbeater is not None
            await heartbeater.run_once()
            assert worker.healthy
        assert (await there(redis, queue, "kept")).state == "archived"
        assert await counts(redis, queue) == Counts(archived=1)
        await redis.config_set("maxmemory", "0")
        await client.enqueue("x", queue=queue)
