"""Concurrent calls share round trips; what is lost, slow, full or cancelled on the way costs nobody else a task."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from asynq_aio import (
    BrokerFullError,
    BrokerUnavailableError,
    Client,
    EnqueueManyError,
    RedisClientOpt,
    Task,
    TaskIDConflictError,
    TaskInfo,
    _outbox,
)
from asynq_aio._broker.store import Fault
from asynq_aio._wire import keys
from tests.client.conftest import Gate, pending_ids, turns
from tests.servers import Servers, own_standalone

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ONE = pytest.mark.parametrize("topology", ["standalone-valkey9"], indirect=True)
CLUSTER = pytest.mark.parametrize("topology", ["cluster-redis7"], indirect=True)


def outboxes(client: Client) -> _outbox.Outboxes:
    """Those of a client that was used."""
    assert client._outboxes is not None
    return client._outboxes


def fail(fault: Fault, times: int = 1) -> Callable[[str, Sequence[str | bytes]], Fault | None]:
    """For the first attempts of the script."""
    left = times

    def hook(name: str, names: Sequence[str | bytes]) -> Fault | None:
        nonlocal left
        if name != "enqueue" or not left:
            return None
        left -= 1
        return fault

    return hook


async def script_calls(server: Servers) -> int:
    """How many scripts all nodes have been asked to run."""
    total = 0
    for port in server.ports:
        async with redis.asyncio.Redis(host="127.0.0.1", port=port, protocol=2) as node:
            if (await node.info("replication"))["role"] == "master":
                stats = await node.info("commandstats")
                total += sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha"))
    return total


async def test_a_thousand_tasks_are_a_handful_of_round_trips(empty_server: Servers, queue: str) -> None:
    """Two calls of 500, and at most one more where the server has yet to learn the script."""
    async with Client(empty_server.uri) as client:
        before = await script_calls(empty_server)
        await client.enqueue_many([Task("webhooks:sync", {"data": n}) for n in range(1000)], queue=queue)
        assert await script_calls(empty_server) - before <= 3


async def test_callers_of_one_turn_share_a_call(empty_server: Servers, queue: str) -> None:
    """64 of them: one call, and one more to teach the server the script."""
    async with Client(empty_server.uri) as client:
        await client.enqueue("t", queue=f"{queue}-0")  # connected
        before = await script_calls(empty_server)
        await asyncio.gather(*(client.enqueue("t", {"n": n}, queue=queue) for n in range(64)))
        assert await script_calls(empty_server) - before <= 2


@ONE
async def test_who_comes_while_a_call_is_in_flight_goes_with_the_next(
    client: Client, redis: Any, queue: str, gate: Gate
) -> None:
    """One call in flight per queue; then calls of at most 500 tasks, in call order; numbers rise."""
    gate.shut()
    first = asyncio.create_task(client.enqueue("t", queue=queue, task_id="first"))
    await gate.arrived()
    others = [asyncio.create_task(client.enqueue("t", queue=queue, task_id=str(n))) for n in range(1200)]
    await turns()
    assert gate.calls == [(queue, 1)]
    gate.open()
    await asyncio.gather(first, *others)
    assert gate.calls == [(queue, 1), (queue, 500), (queue, 500), (queue, 200)]
    assert gate.numbers == sorted(set(gate.numbers))
    assert await pending_ids(redis, queue) == ["first", *map(str, range(1200))]


@ONE
async def test_an_idle_client_sends_at_once(client: Client, queue: str, gate: Gate) -> None:
    """No timer: the call is made in the next turn of the event loop."""
    await client.enqueue("t", queue=queue)
    gate.shut()
    waiting = asyncio.create_task(client.enqueue("t", queue=queue))
    await turns(3)
    assert gate.calls[1:] == [(queue, 1)]
    gate.open()
    await waiting


@ONE
async def test_calls_are_cut_at_a_mebibyte(client: Client, queue: str, gate: Gate) -> None:
    """Three tasks of 300 KiB fit into a call, and one that is larger than a call goes alone."""
    await client.enqueue_many([("t", b"x" * (300 << 10))] * 7 + [("t", b"x" * (2 << 20)), ("t", b"x")], queue=queue)
    assert [count for _, count in gate.calls] == [3, 3, 1, 1, 1]


@ONE
async def test_queues_do_not_wait_for_each_other(client: Client, redis: Any, queue: str, gate: Gate) -> None:
    """A queue whose node does not answer holds up nobody else's tasks, however many of its own wait."""
    slow, quick = f"{queue}-slow", f"{queue}-quick"
    gate.shut(only=slow)
    stuck = asyncio.create_task(client.enqueue_many([("t", n) for n in range(12_000)], queue=slow))
    await gate.arrived()
    await turns(50)
    assert outboxes(client).tasks == _outbox.WAITING_TASKS
    infos = await asyncio.gather(*(client.enqueue("t", queue=quick) for _ in range(1000)))
    assert await pending_ids(redis, quick) == [info.id for info in infos]
    gate.open()
    assert len(await stuck) == 12_000
    assert await redis.llen(keys.pending(slow)) == 12_000


@ONE
async def test_waiting_is_bounded_and_fair(
    client: Client, redis: Any, queue: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound callers wait before their tasks are encoded; they are let in as they came."""
    monkeypatch.setattr(_outbox, "WAITING_TASKS", 4)
    monkeypatch.setattr(_outbox, "CALL_TASKS", 2)
    gate.shut()
    callers = [asyncio.create_task(client.enqueue("t", queue=queue, task_id="0"))]
    await gate.arrived()
    callers += [asyncio.create_task(client.enqueue("t", queue=queue, task_id=str(n))) for n in range(1, 13)]
    await turns()
    outbox = outboxes(client).of(queue)
    assert (outbox.tasks, len(outbox.waiting), len(outbox.callers)) == (4, 4, 8)
    callers[2].cancel()  # waits in the outbox: its place is the next caller's
    callers[7].cancel()  # waits for a place
    await turns()
    assert (outbox.tasks, len(outbox.callers)) == (4, 6)
    gate.open()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [n for n, result in enumerate(results) if isinstance(result, asyncio.CancelledError)] == [2, 7]
    assert await pending_ids(redis, queue) == [str(n) for n in range(13) if n not in (2, 7)]
    assert (outboxes(client).tasks, outboxes(client).bytes, outboxes(client).crowded) == (0, 0, {})


@ONE
async def test_waiting_is_bounded_in_bytes(
    client: Client, redis: Any, queue: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large payloads count by their size; one larger than the whole bound still goes when nothing else waits."""
    monkeypatch.setattr(_outbox, "WAITING_BYTES", 3 << 20)
    gate.shut()
    tasks = [("t", b"x" * (1 << 20)) for _ in range(6)]
    many = asyncio.create_task(client.enqueue_many([*tasks, ("t", b"x" * (5 << 20))], queue=queue))
    await gate.arrived()
    await turns(20)
    assert outboxes(client).of(queue).bytes <= 3 << 20
    gate.open()
    infos = await many
    assert await pending_ids(redis, queue) == [info.id for info in infos]
    assert outboxes(client).bytes == 0


# -- cancelled callers


@ONE
async def test_a_caller_cancelled_in_time_takes_its_task_back(
    client: Client, redis: Any, queue: str, gate: Gate
) -> None:
    """Those in the same outbox are not touched."""
    gate.shut()
    first = asyncio.create_task(client.enqueue("t", queue=queue, task_id="first"))
    await gate.arrived()
    gone = asyncio.create_task(client.enqueue("t", queue=queue, task_id="gone"))
    stays = asyncio.create_task(client.enqueue("t", queue=queue, task_id="stays"))
    many = asyncio.create_task(client.enqueue_many([("t", n) for n in range(700)], queue=queue))
    await turns()
    gone.cancel()
    many.cancel()
    await turns()
    gate.open()
    await asyncio.gather(first, stays)
    for cancelled in (gone, many):
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    assert await pending_ids(redis, queue) == ["first", "stays"]
    assert (outboxes(client).tasks, outboxes(client).bytes) == (0, 0)


@ONE
async def test_a_caller_cancelled_too_late_does_not_stop_the_call(
    client: Client, redis: Any, queue: str, gate: Gate
) -> None:
    """What has been taken for a call goes, with the tasks of the others."""
    gate.shut()
    gone = asyncio.create_task(client.enqueue("t", queue=queue, task_id="gone"))
    stays = asyncio.create_task(client.enqueue("t", queue=queue, task_id="stays"))
    await gate.arrived()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    gate.open()
    await stays
    assert await pending_ids(redis, queue) == ["gone", "stays"]


@ONE
async def test_random_cancels_lose_and_double_nothing(client: Client, redis: Any, queue: str) -> None:
    """Whoever was not cancelled finds his task exactly once; the counts come back to zero."""

    async def enqueue(n: int) -> None:
        if n % 3:
            await client.enqueue("t", queue=queue, task_id=str(n))
        else:
            async with asyncio.timeout(n % 7 * 0.002):
                await client.enqueue("t", queue=queue, task_id=str(n))

    results: list[BaseException | None] = []
    for first in range(0, 3000, 300):
        results += await asyncio.gather(*(enqueue(n) for n in range(first, first + 300)), return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), TimeoutError}
    ids = await pending_ids(redis, queue)
    assert len(ids) == len(set(ids))
    assert {str(n) for n, result in enumerate(results) if result is None} <= set(ids)
    assert (outboxes(client).tasks, outboxes(client).bytes) == (0, 0)


# -- lost replies, outages


@CLUSTER
async def test_a_lost_reply_is_one_task_and_a_success(client: Client, redis: Any, queue: str) -> None:
    """The repeat is recognised: the same verdicts, nothing twice. In a batch too."""
    client._door.store.faults = fail(Fault.REPLY_LOST, 2)
    info = await client.enqueue("t", queue=queue, task_id="x", unique_for=timedelta(hours=1))
    assert info.id == "x"
    client._door.store.faults = fail(Fault.REPLY_LOST)
    results = await client.enqueue_many(
        [Task("t", task_id=str(n % 400)) for n in range(800)], queue=queue, return_exceptions=True
    )
    kinds = [type(result) for result in results]
    assert kinds == [TaskInfo] * 400 + [TaskIDConflictError] * 400
    assert await pending_ids(redis, queue) == ["x", *map(str, range(400))]


@ONE
async def test_a_call_that_was_not_sent_is_sent_again(client: Client, redis: Any, queue: str) -> None:
    """The caller notices nothing."""
    client._door.store.faults = fail(Fault.NOT_SENT, 3)
    info = await client.enqueue("t", queue=queue)
    assert await pending_ids(redis, queue) == [info.id]


@ONE
@pytest.mark.parametrize("fault", list(Fault))
async def test_at_the_deadline_every_waiter_is_told(server: Servers, redis: Any, queue: str, fault: Fault) -> None:
    """Each gets an error of his own that says whether anything was sent; those who waited behind were not."""
    async with Client(RedisClientOpt(server.uri.removeprefix("redis://"), deadline=timedelta(seconds=0.5))) as client:
        await client.enqueue("t", queue=f"{queue}-0")
        client._door.store.faults = fail(fault, 1_000_000)
        first = asyncio.create_task(client.enqueue("t", queue=queue, task_id="first"))
        await turns(20)
        behind = [asyncio.create_task(client.enqueue("t", queue=queue, task_id=str(n))) for n in range(3)]
        errors = await asyncio.gather(first, *behind, return_exceptions=True)
        assert all(isinstance(error, BrokerUnavailableError) for error in errors)
        assert len(set(map(id, errors))) == 4
        sent = fault is Fault.REPLY_LOST
        assert [getattr(error, "sent", None) for error in errors] == [sent, False, False, False]
        assert "did not answer enqueue within" in str(errors[0])
        assert await pending_ids(redis, queue) == (["first"] if sent else [])

        client._door.store.faults = None
        await client.enqueue("t", queue=queue, task_id="after")
        assert (await pending_ids(redis, queue))[-1] == "after"
        assert (outboxes(client).tasks, outboxes(client).bytes) == (0, 0)


@ONE
@pytest.mark.parametrize("fault", list(Fault))
async def test_who_came_later_waits_for_his_own_deadline(
    server: Servers, redis: Any, queue: str, gate: Gate, fault: Fault
) -> None:
    """The first caller's deadline ends his wait, not that of those in the same call; nobody's task is doubled."""
    async with Client(RedisClientOpt(server.uri.removeprefix("redis://"), deadline=timedelta(seconds=1.5))) as client:
        await client.enqueue("t", queue=queue, task_id="before")
        # The first call is held, so that two callers who came 0.75 s apart go with the same one, the next.
        gate.shut()
        held = asyncio.create_task(client.enqueue("t", queue=queue, task_id="held"))
        await gate.arrived()
        early = asyncio.create_task(client.enqueue("t", queue=queue, task_id="early"))
        await turns()
        await asyncio.sleep(0.75)  # it is about the distance between two deadlines
        late = asyncio.create_task(client.enqueue("t", queue=queue, task_id="late"))
        await turns()
        calls = 0

        def hook(name: str, names: Sequence[str | bytes]) -> Fault | None:
            nonlocal calls
            calls += name == "enqueue"
            return fault if name == "enqueue" and calls > 1 and not early.done() else None

        client._door.store.faults = hook
        gate.open()
        await held
        with pytest.raises(BrokerUnavailableError) as caught:
            await early
        assert caught.value.sent is (fault is Fault.REPLY_LOST)
        assert (await late).id == "late"
        ids = await pending_ids(redis, queue)
        assert ids == ["before", "held", *(["early"] if caught.value.sent else []), "late"]


@ONE
async def test_an_outage_gives_up_the_rest_of_many(
    server: Servers, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task has its verdict, after one deadline, not after one for each call."""
    monkeypatch.setattr(_outbox, "WAITING_TASKS", 600)
    async with Client(RedisClientOpt(server.uri.removeprefix("redis://"), deadline=timedelta(seconds=0.5))) as client:
        client._door.store.faults = fail(Fault.NOT_SENT, 1_000_000)
        with pytest.raises(EnqueueManyError) as caught:
            await client.enqueue_many([("t", n) for n in range(5000)], queue=queue)
        assert len(caught.value.errors) == 5000
        assert {type(error) for error in caught.value.errors} == {BrokerUnavailableError}
        assert "not tried, after the tasks before it" in str(caught.value.results[-1])


async def test_a_full_redis_refuses_and_nothing_is_written(queue: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every task gets BrokerFullError; the log says that the queue could not be registered; later all is well."""
    async with own_standalone() as server, Client(server.uri) as client:
        server.execute("CONFIG", "SET", "maxmemory", "1")
        with caplog.at_level(logging.WARNING, "asynq_aio"):
            with pytest.raises(BrokerFullError):
                await client.enqueue("t", queue=queue, unique_for=timedelta(hours=1))
            with pytest.raises(EnqueueManyError) as caught:
                await client.enqueue_many([("t", n) for n in range(600)], queue=queue)
        assert {type(error) for error in caught.value.errors} == {BrokerFullError}
        assert len(set(map(id, caught.value.errors))) == 600
        assert server.execute("DBSIZE") == 0
        assert [record.message for record in caplog.records if "could not be registered" in record.message]
        server.execute("CONFIG", "SET", "maxmemory", "0")
        assert (await client.enqueue("t", queue=queue)).queue == queue


# -- registration


@CLUSTER
async def test_a_queue_is_registered_again(client: Client, redis: Any, queue: str) -> None:
    """After a minute, at the next enqueue, whoever has deleted it meanwhile (F3)."""
    await client.enqueue("t", queue=queue)
    await redis.srem(keys.QUEUES, queue)
    await client.enqueue("t", queue=queue)
    assert not await redis.sismember(keys.QUEUES, queue)
    outboxes(client).of(queue).register_at = 0.0  # a minute has gone
    await client.enqueue("t", queue=queue)
    await asyncio.gather(*outboxes(client).beside)
    assert await redis.sismember(keys.QUEUES, queue)


@ONE
async def test_a_queue_is_known_before_it_has_a_task(client: Client, redis: Any, queue: str, gate: Gate) -> None:
    """The first call waits for the registration."""
    gate.shut()
    first = asyncio.create_task(client.enqueue("t", queue=queue))
    await gate.arrived()
    assert await redis.sismember(keys.QUEUES, queue)
    gate.open()
    await first


async def test_a_registration_that_fails_fails_no_enqueue(queue: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with its reason, once, however often it is tried again."""
    async with own_standalone() as server, Client(server.uri) as client:
        server.execute("SET", keys.QUEUES, "no set")
        with caplog.at_level(logging.WARNING, "asynq_aio"):
            for _ in range(5):
                await client.enqueue("t", queue=queue)
                outboxes(client).of(queue).register_at = 0.0  # the next one tries again
        assert server.execute("LLEN", keys.pending(queue)) == 5
        messages = [record.message for record in caplog.records]
        assert len(messages) == 1
        assert "WRONGTYPE" in messages[0]


@ONE
async def test_a_registration_that_hangs_only_delays(client: Client, redis: Any, queue: str) -> None:
    """Its node may be down while the queue's is up: the tasks go, and the registration when it can."""
    hanging = True

    def hook(name: str, names: Sequence[str | bytes]) -> Fault | None:
        return Fault.NOT_SENT if hanging and name == "SADD" else None

    client._door.store.faults = hook
    info = await client.enqueue("t", queue=queue)
    assert await pending_ids(redis, queue) == [info.id]
    assert not await redis.sismember(keys.QUEUES, queue)
    hanging = False
    await asyncio.gather(*outboxes(client).beside)
    assert await redis.sismember(keys.QUEUES, queue)


@ONE
async def test_outboxes_of_idle_queues_are_dropped(client: Client, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that makes up queue names does not grow for ever; numbers go on rising."""
    monkeypatch.setattr(_outbox, "OUTBOXES_KEPT", 3)
    monkeypatch.setattr(_outbox, "REGISTER_SECONDS", 0.0)
    for n in range(10):
        await client.enqueue("t", queue=f"{queue}-{n}")
    assert len(outboxes(client)._of) <= 4
