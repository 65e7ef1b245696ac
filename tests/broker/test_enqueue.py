"""New tasks -> pending, scheduled or a group: one script for many, one verdict each, safe to repeat."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import (
    BrokerError,
    BrokerFullError,
    Client,
    DuplicateTaskError,
    EnqueueManyError,
    OutcomeUnknownError,
    Task,
    TaskIDConflictError,
)
from asynq_aio import _outbox as outbox
from asynq_aio._broker import enqueue
from asynq_aio._broker.store import Fault, Store
from asynq_aio._wire import codec, keys
from tests import seed, servers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.enqueue import Entry
    from asynq_aio.errors import AsynqError
    from tests.clock import FrozenClock

_numbers = itertools.count(1)
MINUTE_NS = 60 * 1_000_000_000


async def put(store: Store, queue: str, entries: Sequence[Entry], *, client: str = "c") -> list[AsynqError | None]:
    """All entries, in as many calls as it takes."""
    verdicts = []
    for part in enqueue.chunks(entries):
        verdicts += await enqueue.enqueue(store, queue, part, client_id=client, number=next(_numbers))
    return verdicts


# -- one task


@pytest.mark.parametrize("ttl", [0, 600])
async def test_pending(frozen: Store, redis: Any, queue: str, clock: FrozenClock, ttl: int) -> None:
    """A task stands at the left of pending, with the nanosecond since when it waits; its lock holds its ID."""
    await seed.pending(redis, queue, [seed.message(queue, "before")])
    entry = seed.entry(queue, "a", unique_ttl=ttl)
    made = entry.new.message
    assert await put(frozen, queue, [entry]) == [None]
    found = await seed.look(redis, queue)
    assert found.pop("t:before")
    assert found == {"pending": ["a", "before"], "t:a": seed.fields(made, "pending", pending_since=clock.now_ns)}
    if ttl:
        holder, left = await seed.unique(redis, made) or ("", 0)
        assert (holder, 590 <= left <= 600) == ("a", True)


@pytest.mark.parametrize("ttl", [0, 600])
@pytest.mark.parametrize("rest_ns", [0, 1, 999_999_999])
async def test_scheduled(frozen: Store, redis: Any, queue: str, clock: FrozenClock, ttl: int, rest_ns: int) -> None:
    """The score is the due second, cut off; the rest stands in a field of ours, and only where there is one."""
    due_ns = clock.now_ns + MINUTE_NS + rest_ns
    entry = seed.entry(queue, "a", due_ns=due_ns, unique_ttl=ttl)
    assert await put(frozen, queue, [entry]) == [None]
    exact = {"aio_due_ns": due_ns} if rest_ns else {}
    assert await seed.look(redis, queue) == {
        "scheduled": {"a": clock.unix + 60},
        "t:a": seed.fields(entry.new.message, "scheduled", **exact),
    }
    assert (await redis.ttl(entry.new.message.unique_key) > 590) if ttl else True


async def test_scheduled_with_a_group(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """F8: the group is kept in `aio_group`; the field `group`, by which Go would park the task, stays unset (K15)."""
    entry = seed.entry(queue, "a", due_ns=clock.now_ns + MINUTE_NS, group="g")
    assert await put(frozen, queue, [entry]) == [None]
    assert await seed.look(redis, queue) == {
        "scheduled": {"a": clock.unix + 60},
        "t:a": seed.fields(entry.new.message, "scheduled", aio_group="g"),
    }


@pytest.mark.parametrize("ttl", [0, 600])
async def test_grouped(frozen: Store, redis: Any, queue: str, clock: FrozenClock, ttl: int) -> None:
    """The group is listed, holds the ID with the second of its coming, and the hash names group and lock."""
    entry = seed.entry(queue, "a", group="g", unique_ttl=ttl)
    assert await put(frozen, queue, [entry]) == [None]
    assert await seed.look(redis, queue) == {
        "groups": ["g"],
        "g:g": {"a": clock.unix},
        "t:a": seed.fields(entry.new.message, "aggregating", group="g"),
    }
    assert (await redis.ttl(entry.new.message.unique_key) > 590) if ttl else True


async def test_registration(frozen: Store, redis: Any, queue: str) -> None:
    """A queue is made known to every inspector."""
    await enqueue.register(frozen, queue)
    assert await redis.sismember(keys.QUEUES, queue)


async def test_a_queue_that_somebody_removes_is_registered_again(
    uri: str, redis: Any, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F3: a client does not remember for ever that a queue is known."""
    monkeypatch.setattr(outbox, "REGISTER_SECONDS", 0.0)
    async with Client(uri) as client:
        await client.enqueue("ty", queue=queue)
        assert await redis.srem(keys.QUEUES, queue) == 1
        await client.enqueue("ty", queue=queue)
    assert await redis.sismember(keys.QUEUES, queue)


# -- many


def mixed(queue: str, count: int, clock: FrozenClock) -> list[Entry]:
    """Tasks of every kind in turn: pending, scheduled, grouped; each without and with a lock."""
    kinds: list[dict[str, Any]] = [{}, {"due_ns": clock.now_ns + MINUTE_NS}, {"group": "g"}]
    return [
        seed.entry(queue, f"{number:05}", unique_ttl=600 * (number % 2), **kinds[number % 3]) for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 999, 10_000])
async def test_many(frozen: Store, redis: Any, queue: str, clock: FrozenClock, count: int) -> None:
    """However many, of whatever kind: each is where it belongs, in order, whole, and 500 go in one call."""
    entries = mixed(queue, count, clock)
    calls = frozen.stats.calls
    assert await put(frozen, queue, entries) == [None] * count
    assert frozen.stats.calls - calls == -(-count // 500)
    found = await seed.look(redis, queue)
    ids = [entry.new.message.id for entry in entries]
    assert found.get("pending", []) == ids[::3][::-1]
    assert found.get("scheduled", {}) == dict.fromkeys(ids[1::3], clock.unix + 60)
    assert found.get("g:g", {}) == dict.fromkeys(ids[2::3], clock.unix)
    states: list[dict[str, Any]] = [
        {"state": "pending", "pending_since": str(clock.now_ns)},
        {"state": "scheduled"},
        {"state": "aggregating", "group": "g"},
    ]
    for number, entry in enumerate(entries):
        made = entry.new.message
        locked = {"unique_key": made.unique_key} if made.unique_key else {}
        assert found[f"t:{made.id}"] == {"msg": entry.encoded, **states[number % 3], **locked}
    held = [entry.new.message for entry in entries if entry.new.unique_ttl]
    assert [await redis.get(made.unique_key) for made in held[::97]] == [made.id.encode() for made in held[::97]]


def test_calls_are_cut_by_number_and_size(queue: str) -> None:
    """500 tasks or 1 MiB go in a call; what is larger goes alone; order is kept."""
    small = [seed.entry(queue, f"{number}") for number in range(1_001)]
    assert [len(part) for part in enqueue.chunks(small)] == [500, 500, 1]
    large = [seed.entry(queue, f"{number}", payload=bytes(400_000)) for number in range(5)]
    assert [len(part) for part in enqueue.chunks(large)] == [2, 2, 1]
    huge = seed.entry(queue, "huge", payload=bytes(2_000_000))
    assert [list(part) for part in enqueue.chunks([small[0], huge, small[1]])] == [[small[0]], [huge], [small[1]]]
    assert list(enqueue.chunks([])) == []


# -- verdicts


async def test_a_taken_id_leaves_no_lock(frozen: Store, redis: Any, queue: str) -> None:
    """F4: a task whose ID is taken is refused, its lock is free, the task that has the ID is as it was."""
    first = seed.message(queue, "a", payload=b"first")
    await seed.pending(redis, queue, [first])
    second = seed.entry(queue, "a", unique_ttl=600, payload=b"second")
    [error] = await put(frozen, queue, [second])
    assert isinstance(error, TaskIDConflictError)
    assert (error.queue, error.task_id) == (queue, "a")
    assert await seed.unique(redis, second.new.message) is None
    assert await seed.look(redis, queue) == {"pending": ["a"], "t:a": seed.fields(first, "pending")}


@pytest.mark.parametrize("state", ["active", "scheduled", "retry", "archived", "completed", "aggregating"])
async def test_an_id_is_taken_in_every_state(frozen: Store, redis: Any, queue: str, state: str) -> None:
    """Whatever the state of the task that has the ID: archived and completed ones have it too."""
    await seed.hashes(redis, queue, [seed.message(queue, "a")], state)
    [error] = await put(frozen, queue, [seed.entry(queue, "a")])
    assert isinstance(error, TaskIDConflictError)


@pytest.mark.parametrize("kind", [{}, {"due_ns": 2**62}, {"group": "g"}])
async def test_a_held_lock(frozen: Store, redis: Any, queue: str, kind: dict[str, Any]) -> None:
    """A task whose lock is held is refused, with the holder's ID; lock and TTL stay; it comes before a taken ID."""
    first = seed.entry(queue, "a", unique_ttl=600, payload=b"same")
    assert await put(frozen, queue, [first]) == [None]
    await redis.expire(first.new.message.unique_key, 77)
    before = await seed.look(redis, queue)
    for task_id in ("b", "a"):
        [error] = await put(frozen, queue, [seed.entry(queue, task_id, unique_ttl=600, payload=b"same", **kind)])
        assert isinstance(error, DuplicateTaskError)
        assert (error.unique_key, error.holder_id) == (first.new.message.unique_key, "a")
    holder, left = await seed.unique(redis, first.new.message) or ("", 0)
    assert (holder, 70 <= left <= 77) == ("a", True)
    assert await seed.look(redis, queue, ["b"]) == before


async def test_twice_in_one_batch(frozen: Store, redis: Any, queue: str) -> None:
    """F11: of two tasks of one ID, or of one lock, in a batch, the second one is refused, and says so."""
    verdicts = await put(
        frozen,
        queue,
        [
            seed.entry(queue, "a"),
            seed.entry(queue, "a"),
            seed.entry(queue, "b", unique_ttl=600, payload=b"same"),
            seed.entry(queue, "c", unique_ttl=600, payload=b"same"),
            seed.entry(queue, "d", group="g"),
            seed.entry(queue, "d", due_ns=2**62),
        ],
    )
    assert [type(verdict) for verdict in verdicts] == [
        type(None),
        TaskIDConflictError,
        type(None),
        DuplicateTaskError,
        type(None),
        TaskIDConflictError,
    ]
    assert isinstance(verdicts[3], DuplicateTaskError)
    assert verdicts[3].holder_id == "b"
    found = await seed.look(redis, queue, ["c"])
    assert (found["pending"], found["g:g"].keys(), "t:c" in found, "scheduled" in found) == (
        ["b", "a"],
        {"d"},
        False,
        False,
    )


async def test_a_batch_of_the_client(uri: str, redis: Any, queue: str) -> None:
    """F11: `enqueue_many` tells a verdict for each task, and keeps every option: lock, group, due time, headers."""
    async with Client(uri) as client:
        await client.enqueue("ty", task_id="taken", queue=queue)
        tasks = [
            Task("ty", b"1", task_id="a", unique_for=timedelta(minutes=10)),
            Task("ty", b"2", task_id="taken"),
            Task("ty", b"1", task_id="b", unique_for=timedelta(minutes=10)),
            Task("ty", b"3", task_id="c", group="g", headers={"own": "1"}),
            Task("ty", b"4", task_id="d", process_in=timedelta(hours=1)),
        ]
        with pytest.raises(EnqueueManyError) as raised:
            await client.enqueue_many(tasks, queue=queue, headers={"all": "2"})
    kinds = [type(result).__name__ for result in raised.value.results]
    assert kinds == ["TaskInfo", "TaskIDConflictError", "DuplicateTaskError", "TaskInfo", "TaskInfo"]
    found = await seed.look(redis, queue)
    assert (found["pending"], list(found["g:g"]), list(found["scheduled"])) == (["a", "taken"], ["c"], ["d"])
    assert codec.decode_task(found["t:c"]["msg"]).headers == {"own": "1", "all": "2"}
    assert codec.decode_task(found["t:a"]["msg"]).headers == {"all": "2"}


# -- damage


async def test_damage_refuses_one_task_alone(frozen: Store, redis: Any, queue: str) -> None:
    """A key of a wrong type under a task, its lock or its group is that task's error; the others are enqueued."""
    locked = seed.entry(queue, "locked", unique_ttl=600)
    await redis.rpush(keys.task(queue, "task"), "no hash")
    await redis.rpush(locked.new.message.unique_key, "no string")
    await redis.set(keys.group(queue, "bad"), "no set")
    verdicts = await put(
        frozen,
        queue,
        [
            seed.entry(queue, "a"),
            seed.entry(queue, "task"),
            locked,
            seed.entry(queue, "grouped", group="bad"),
            seed.entry(queue, "b", group="good", unique_ttl=600),
        ],
    )
    kinds = [type(verdict) for verdict in verdicts]
    assert kinds == [type(None), TaskIDConflictError, DuplicateTaskError, BrokerError, type(None)]
    assert "WRONGTYPE" in str(verdicts[3])
    found = await seed.look(redis, queue, ["task", "locked", "grouped"])
    assert (found["pending"], found["groups"], list(found["g:good"])) == (["a"], ["good"], ["b"])
    assert not found.keys() & {"t:locked", "t:grouped"}


@pytest.mark.parametrize(("container", "refused"), [("scheduled", "s"), ("groups", "g")])
async def test_a_damaged_container_refuses_its_tasks_alone(
    frozen: Store, redis: Any, queue: str, container: str, refused: str
) -> None:
    """Where `scheduled` or `groups` is of a wrong type, tasks that would enter it are refused, and only those."""
    await redis.set(f"asynq:{{{queue}}}:{container}", "damaged")
    entries = [seed.entry(queue, "p"), seed.entry(queue, "s", due_ns=2**62), seed.entry(queue, "g", group="g")]
    verdicts = await put(frozen, queue, entries)
    assert [entry.new.message.id for entry, verdict in zip(entries, verdicts, strict=True) if verdict] == [refused]
    assert not await redis.exists(keys.task(queue, refused))
    assert await redis.lrange(keys.pending(queue), 0, -1) == [b"p"]


async def test_a_damaged_list_refuses_the_call_whole(frozen: Store, redis: Any, queue: str) -> None:
    """Where `pending` is of a wrong type nothing is written, of no task, not even the ledger."""
    await redis.set(keys.pending(queue), "damaged")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        await put(frozen, queue, [seed.entry(queue, "s", due_ns=2**62), seed.entry(queue, "p", unique_ttl=600)])
    left = [name async for name in redis.scan_iter(match=f"asynq:{{{queue}}}:*", count=10_000)]
    assert left == [keys.pending(queue).encode()]


# -- repeats


async def test_a_lost_reply_enqueues_once(frozen: Store, redis: Any, queue: str) -> None:
    """The call is repeated, known by its number, and answered with the verdicts of its first copy."""
    assert await put(frozen, queue, [seed.entry(queue, "taken")]) == [
        None
    ]  # the node knows the script now: no NOSCRIPT
    faults = iter([Fault.REPLY_LOST, Fault.REPLY_LOST, None])
    frozen.faults = lambda name, _keys: next(faults) if name == "enqueue" else None
    verdicts = await put(frozen, queue, [seed.entry(queue, "a"), seed.entry(queue, "taken")])
    assert [type(verdict) for verdict in verdicts] == [type(None), TaskIDConflictError]
    assert await redis.lrange(keys.pending(queue), 0, -1) == [b"a", b"taken"]


async def test_a_repeat_is_known_whatever_became_of_the_task(frozen: Store, redis: Any, queue: str) -> None:
    """A task that was taken and done before the repeat arrives is not enqueued again."""
    entries = [seed.entry(queue, "a", unique_ttl=600)]
    assert await enqueue.enqueue(frozen, queue, entries, client_id="c", number=7) == [None]
    await redis.delete(keys.pending(queue), keys.task(queue, "a"), entries[0].new.message.unique_key)
    assert await enqueue.enqueue(frozen, queue, entries, client_id="c", number=7) == [None]
    assert await seed.look(redis, queue, ["a"]) == {}


async def test_a_late_first_copy_does_nothing(frozen: Store, redis: Any, queue: str) -> None:
    """A number below the last one is of a call that nobody waits for any more."""
    assert await enqueue.enqueue(frozen, queue, [seed.entry(queue, "b")], client_id="c", number=8) == [None]
    with pytest.raises(OutcomeUnknownError):
        await enqueue.enqueue(frozen, queue, [seed.entry(queue, "a")], client_id="c", number=7)
    assert await redis.lrange(keys.pending(queue), 0, -1) == [b"b"]


async def test_clients_have_ledgers_of_their_own(frozen: Store, redis: Any, queue: str) -> None:
    """Numbers are those of one client and one queue; a ledger outlives every repeat, then expires."""
    for client in ("c", "d"):
        entries = [seed.entry(queue, client)]
        assert await enqueue.enqueue(frozen, queue, entries, client_id=client, number=1) == [None]
    assert await redis.lrange(keys.pending(queue), 0, -1) == [b"d", b"c"]
    for client in ("c", "d"):
        assert 50 < await redis.ttl(keys.enqueue_ledger(queue, client)) <= max(60, 2 * frozen.deadline)


# -- hints


async def test_the_earliest_due_time_is_announced(frozen: Store, queue: str, clock: FrozenClock) -> None:
    """A due time that is not later than all others is published, so that forwarders need not look; others are not."""
    heard: list[str] = []
    async with asyncio.timeout(20), await frozen.subscribe(keys.DUE_CHANNEL) as subscription:
        for task_id, minutes in (("first", 9), ("later", 10), ("earlier", 8), ("as-early", 8)):
            await put(frozen, queue, [seed.entry(queue, task_id, due_ns=clock.now_ns + minutes * MINUTE_NS)])
        # By the node of the queue: the messages of one node keep their order.
        await frozen.call("PUBLISH", keys.DUE_CHANNEL, f"{queue} end", key=keys.pending(queue))
        async for channel, data in subscription:
            if channel == keys.DUE_CHANNEL and data.decode().startswith(queue):
                heard.append(data.decode())
                if data.decode().endswith("end"):
                    break
    assert heard == [queue, queue, queue, f"{queue} end"]


# -- a full Redis


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_full_redis_refuses_producers_whole(version: servers.Version) -> None:
    """With memory full, no call of any kind writes anything, not even a lock or a ledger; the caller is told."""
    async with servers.own_standalone(version) as server, Store(server.uri) as store:
        server.execute("CONFIG", "SET", "maxmemory", "1")
        kinds: list[dict[str, Any]] = [{}, {"due_ns": 2**62}, {"group": "g"}]
        for kind in kinds:
            for ttl in (0, 600):
                with pytest.raises(BrokerFullError):
                    await put(store, "q", [seed.entry("q", "a", unique_ttl=ttl, **kind)])
        assert server.execute("DBSIZE") == 0


def test_entries_are_values(queue: str) -> None:
    """An entry cannot change between its first copy and a repeat."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        seed.entry(queue, "a").encoded = b""  # type: ignore[misc]
