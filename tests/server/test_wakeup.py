"""When a task starts: at once when it is enqueued, at its moment when it is due; and how quiet a server is between."""

from __future__ import annotations

import asyncio
import statistics
import time
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from asynq_aio import AsyncServer, Client, Context, Task
from asynq_aio._wire import codec, keys
from asynq_aio._wire.messages import TaskMessage
from tests import servers
from tests.server.look import Counts, counts, until

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.timeout(120)


class Starts:
    """A handler that writes down when its tasks began."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        self._changed = asyncio.Event()

    async def __call__(self, ctx: Context, task: Task) -> None:
        self.at[ctx.task_id] = time.monotonic()
        self._changed.set()

    async def of(self, task_id: str) -> float:
        """Wait for the start of this task."""
        async with asyncio.timeout(60):
            while task_id not in self.at:
                self._changed.clear()
                await self._changed.wait()
        return self.at[task_id]


async def idle(server: AsyncServer, redis: Any, queue: str) -> None:
    """Wait until the server has found the queue empty and blocks on it."""
    processor = server._processor
    assert processor is not None
    await until(lambda: not processor._queues[queue].ready and not processor._queues[queue].claiming)
    await asyncio.sleep(0.15)  # the blocking peek is on its way


# --- wake-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", servers.TOPOLOGIES, indirect=True)
async def test_an_idle_server_starts_a_task_at_once(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Milliseconds from `enqueue` to the handler, one after the other; far from any polling interval."""
    starts = Starts()
    async with AsyncServer(uri, queues=[queue]).running(starts) as server:
        await idle(server, redis, queue)
        took: list[float] = []
        for at in range(30):
            begin = time.monotonic()
            await client.enqueue("x", queue=queue, task_id=f"t{at}")
            took.append(await starts.of(f"t{at}") - begin)
    assert statistics.median(took) < 0.05, took


async def test_a_go_producer_wakes_us_too(uri: str, queue: str, redis: Any) -> None:
    """A plain LPUSH, as Go's enqueue script does, is enough: nothing of ours is needed on the other side."""
    starts = Starts()
    async with AsyncServer(uri, queues=[queue]).running(starts) as server:
        took: list[float] = []
        for at in range(8):
            await idle(server, redis, queue)
            begin = time.monotonic()
            message = TaskMessage(type="x", id=f"t{at}", queue=queue, retry=3, timeout=60)
            await redis.hset(
                keys.task(queue, f"t{at}"), mapping={"msg": codec.encode_task(message), "state": "pending"}
            )
            await redis.lpush(keys.pending(queue), f"t{at}")
            took.append(await starts.of(f"t{at}") - begin)
    assert statistics.median(took) < 0.25, took


async def test_a_burst_after_silence_is_spread_over_all_slots(uri: str, queue: str, client: Client, redis: Any) -> None:
    """One push wakes the server; everything that comes with it is taken as fast as there are slots."""
    starts = Starts()
    async with AsyncServer(uri, queues=[queue], concurrency=200).running(starts) as server:
        await idle(server, redis, queue)
        infos = await client.enqueue_many([Task("x", {"n": n}) for n in range(200)], queue=queue)
        began = [await starts.of(info.id) for info in infos]
    assert max(began) - min(began) < 2


async def test_many_servers_share_one_queue(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Ten idle servers, one task after the other: each runs once, and every start is prompt."""
    starts = Starts()
    runs: list[str] = []

    async def handler(ctx: Context, task: Task) -> None:
        runs.append(ctx.task_id)
        await starts(ctx, task)

    async with asyncio.TaskGroup() as group:
        workers = [AsyncServer(uri, queues=[queue]) for _ in range(10)]
        for worker in workers:
            group.create_task(worker.run(handler))
        for worker in workers:
            await until(lambda worker=worker: worker.healthy)  # type: ignore[misc]
        took: list[float] = []
        for at in range(20):
            begin = time.monotonic()
            await client.enqueue("x", queue=queue, task_id=f"t{at}")
            took.append(await starts.of(f"t{at}") - begin)
        for worker in workers:
            await worker.shutdown()
    assert sorted(runs) == sorted(f"t{at}" for at in range(20))
    assert statistics.median(took) < 0.25, took


# --- due times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["standalone-redis7", "cluster-valkey9"], indirect=True)
async def test_due_tasks_start_at_their_moment(
    server: servers.Servers, uri: str, queue: str, client: Client, redis: Any
) -> None:
    """Never early by Redis' own clock, fractions of a second included; and soon after it."""
    at: dict[str, float] = {}
    due: dict[str, float] = {}

    async with Redis(port=server.ports[0]) as clock:

        async def handler(ctx: Context, _task: Task) -> None:
            seconds, microseconds = await clock.time()
            at[ctx.task_id] = seconds + microseconds / 1e6

        async with AsyncServer(uri, queues=[queue]).running(handler) as worker:
            await idle(worker, redis, queue)
            for n in range(24):
                info = await client.enqueue("x", queue=queue, process_in=timedelta(seconds=0.35 + n * 0.11))
                assert info.next_process_at is not None
                due[info.id] = info.next_process_at.timestamp()
            await until(lambda: len(at) == 24)
    late = {task_id: moment - due[task_id] for task_id, moment in at.items()}
    assert min(late.values()) >= -1e-5, late  # a datetime has no nanoseconds
    assert statistics.median(late.values()) < 0.1, late
    assert await counts(redis, queue) == Counts()


async def test_a_task_that_is_due_earlier_than_all_others_is_announced(
    uri: str, queue: str, client: Client, redis: Any
) -> None:
    """The forwarder sleeps until the first due moment; one that comes before it does not wait for the next look."""
    starts = Starts()
    server = AsyncServer(uri, queues=[queue], delayed_task_check_interval=timedelta(hours=1))
    async with server.running(starts):
        await idle(server, redis, queue)
        await client.enqueue("x", queue=queue, task_id="late", process_in=timedelta(hours=2))
        began = time.monotonic()
        await client.enqueue("x", queue=queue, task_id="early", process_in=timedelta(milliseconds=300))
        assert 0.25 < await starts.of("early") - began < 5


async def test_retries_are_due_on_time(uri: str, queue: str, client: Client, redis: Any) -> None:
    """A retry in a second comes in about a second, though the looks are an hour apart."""
    at: list[float] = []

    async def handler(_task: Task) -> None:
        at.append(time.monotonic())
        if len(at) < 3:
            raise ValueError("again")

    server = AsyncServer(
        uri,
        queues=[queue],
        delayed_task_check_interval=timedelta(hours=1),
        retry_delay=lambda retried, exc, task: timedelta(seconds=1),
    )
    async with server.running(handler):
        await client.enqueue("x", queue=queue)
        await until(lambda: len(at) == 3)
    assert all(later - earlier < 3 for earlier, later in pairwise(at)), at


async def test_gos_scheduled_tasks_are_found(uri: str, queue: str, redis: Any) -> None:
    """Go announces nothing: a look each interval finds what is due, many hundreds at once, also in a paused queue."""
    starts = Starts()
    server = AsyncServer(uri, queues=[queue], delayed_task_check_interval=timedelta(milliseconds=200))
    n = 450
    async with server.running(starts):
        await idle(server, redis, queue)
        pipe = redis.pipeline()
        now = int(time.time())
        for at in range(n):
            message = TaskMessage(type="x", id=f"t{at}", queue=queue, retry=3, timeout=60)
            pipe.hset(keys.task(queue, f"t{at}"), mapping={"msg": codec.encode_task(message), "state": "scheduled"})
            pipe.zadd(f"asynq:{{{queue}}}:scheduled", {f"t{at}": now - 5})
        await pipe.execute()
        await until(lambda: len(starts.at) == n)


# --- silence -------------------------------------------------------------------------------------------------------


async def calls(server: Any) -> Mapping[str, int]:
    """How often each command was called, those inside of scripts included."""
    stats = await server.info("commandstats")
    return {name.removeprefix("cmdstat_"): facts["calls"] for name, facts in stats.items()}


async def test_an_idle_server_is_near_silent(queue: str) -> None:
    """At most 1.5 calls a second with one queue, as Redis counts them; none of them a script."""
    async with (
        servers.own_standalone() as own,
        Redis(port=own.port) as client,
        AsyncServer(own.uri, queues=[queue]).running(Starts()) as server,
    ):
        await idle(server, client, queue)
        await asyncio.sleep(2.0)  # what a start asks for once
        before, began = await calls(client), time.monotonic()
        await asyncio.sleep(30.0)  # the interval that is counted: peeks every 10 s, pings every 15 s
        after, took = await calls(client), time.monotonic() - began
    made = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
    made.pop("info", None)
    made.pop("client|setinfo", None)
    assert sum(made.values()) / took <= 1.5, made
    assert not {name for name in made if name.startswith(("eval", "fcall"))}, made
