"""scheduled, retry -> pending or a group, at the very moment; a score is only the second of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import BrokerError, TaskState
from asynq_aio._broker import forward
from asynq_aio._broker.store import Store
from asynq_aio._server.duties.forwarder import Forwarder
from asynq_aio._wire import codec, keys
from tests import seed, servers

if TYPE_CHECKING:
    from tests.clock import FrozenClock

SOURCES = [TaskState.SCHEDULED, TaskState.RETRY]
SECOND_NS = 1_000_000_000


async def all_of(store: Store, queue: str, source: forward.Source, now_ns: int | None) -> list[forward.Forwarded]:
    """Until nothing moves any more."""
    passes = []
    while True:
        done = await forward.forward(store, queue, source, now_ns)
        passes.append(done)
        if not done.moved:
            return passes


@pytest.mark.parametrize("source", SOURCES)
async def test_what_is_due_becomes_pending(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, source: forward.Source
) -> None:
    """Due ones enter pending at the left, the earliest first, with the moment of it; message and lock stay."""
    tasks = [seed.message(queue, name, unique=True) for name in ("late", "early", "future")]
    offsets = (0, -100, 1)
    await seed.pending(redis, queue, [seed.message(queue, "before")])
    await seed.waiting(
        redis, queue, source, [(made, clock.unix + offset) for made, offset in zip(tasks, offsets, strict=True)]
    )
    before = await seed.look(redis, queue)
    done = await forward.forward(frozen, queue, source, clock.now_ns)
    assert done == (2, 0, (clock.unix + 1) * SECOND_NS)
    moved = {f"t:{made.id}": seed.fields(made, "pending", pending_since=clock.now_ns) for made in tasks[:2]}
    assert await seed.look(redis, queue) == before | moved | {
        "pending": ["late", "early", "before"],
        str(source): {"future": clock.unix + 1},
    }
    assert all([await seed.unique(redis, made) for made in tasks])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [1, 999, 10_000])
async def test_many(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, source: forward.Source, count: int
) -> None:
    """However many are due: 100 in a call, all in the order of their times."""
    names = [f"{number:05}" for number in range(count)]
    await seed.waiting(
        redis, queue, source, [(seed.message(queue, name), clock.unix - count + at) for at, name in enumerate(names)]
    )
    passes = await all_of(frozen, queue, source, clock.now_ns)
    assert len(passes) == 1 + -(-count // 100)
    assert passes[-1] == (0, 0, None)
    found = await seed.look(redis, queue)
    assert (found["pending"], str(source) in found) == (names[::-1], False)
    assert {found[f"t:{name}"]["state"] for name in names} == {"pending"}


@pytest.mark.parametrize("source", SOURCES)
async def test_nothing_is_due(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, source: forward.Source
) -> None:
    """The next due moment is told, None where there is no task; nothing is written."""
    assert await forward.first_due(frozen, queue, source) is None
    assert await forward.forward(frozen, queue, source, clock.now_ns) == (0, 0, None)
    await seed.waiting(redis, queue, source, [(seed.message(queue, "a"), clock.unix + 7)])
    before = await seed.look(redis, queue)
    assert await forward.first_due(frozen, queue, source) == clock.unix + 7
    assert await forward.forward(frozen, queue, source, clock.now_ns) == (0, 0, (clock.unix + 7) * SECOND_NS)
    assert await seed.look(redis, queue) == before


@pytest.mark.parametrize("source", SOURCES)
async def test_by_redis_own_clock(frozen: Store, redis: Any, queue: str, source: forward.Source) -> None:
    """Without a moment given, Redis' clock decides."""
    seconds, _ = await frozen.call("TIME", key=keys.pending(queue))
    tasks = [(seed.message(queue, "due"), int(seconds) - 1), (seed.message(queue, "not"), int(seconds) + 600)]
    await seed.waiting(redis, queue, source, tasks)
    assert await forward.forward(frozen, queue, source) == (1, 0, (int(seconds) + 600) * SECOND_NS)
    found = await seed.look(redis, queue)
    assert found["pending"] == ["due"]
    since = int(found["t:due"]["pending_since"])
    assert 0 <= since - int(seconds) * SECOND_NS < 60 * SECOND_NS


# -- the rest of the second


async def test_a_task_is_never_early(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """A task that is due within the current second waits for its nanosecond, and goes then."""
    due_ns = clock.now_ns + 500_000_001
    made = seed.message(queue, "a")
    await seed.waiting(redis, queue, "scheduled", [(made, clock.unix)], aio_due_ns=due_ns)
    before = await seed.look(redis, queue)
    for early_ns in (clock.now_ns, due_ns - 1):
        assert await forward.forward(frozen, queue, TaskState.SCHEDULED, early_ns) == (0, 0, due_ns)
    assert await seed.look(redis, queue) == before
    assert await forward.forward(frozen, queue, TaskState.SCHEDULED, due_ns) == (1, 0, None)
    assert await seed.look(redis, queue) == {
        "pending": ["a"],
        "t:a": seed.fields(made, "pending", pending_since=due_ns),
    }


@pytest.mark.parametrize("offset", [-1, 1, 3600])
async def test_a_stale_due_time_is_not_believed(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, offset: int
) -> None:
    """A Go program has given the task another score and left our field: the score counts."""
    made = seed.message(queue, "a")
    due_ns = clock.now_ns + offset * SECOND_NS + 999_999_999
    await seed.waiting(redis, queue, "scheduled", [(made, clock.unix)], aio_due_ns=due_ns)
    assert (await forward.forward(frozen, queue, TaskState.SCHEDULED, clock.now_ns)).moved == 1


async def test_a_retry_does_not_know_the_field(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Only scheduling writes it: what is left of it in `retry` says nothing."""
    made = seed.message(queue, "a")
    await seed.waiting(redis, queue, "retry", [(made, clock.unix)], aio_due_ns=clock.now_ns + 5, aio_group="g")
    assert (await forward.forward(frozen, queue, TaskState.RETRY, clock.now_ns)).moved == 1
    assert (await seed.look(redis, queue))["t:a"] == seed.fields(made, "pending", pending_since=clock.now_ns)


async def test_a_page_does_not_hide_a_due_task(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """250 tasks of the current second that are not due yet, and behind them some that are: those go, all of them."""
    waits = [seed.message(queue, f"a{number:03}") for number in range(250)]
    await seed.waiting(
        redis, queue, "scheduled", [(made, clock.unix) for made in waits], aio_due_ns=clock.now_ns + 700_000_000
    )
    due = [seed.message(queue, f"b{number:03}") for number in range(150)]
    await seed.waiting(
        redis, queue, "scheduled", [(made, clock.unix) for made in due], aio_due_ns=clock.now_ns + 300_000_000
    )
    now_ns = clock.now_ns + 400_000_000
    passes = await all_of(frozen, queue, TaskState.SCHEDULED, now_ns)
    assert [done.moved for done in passes] == [100, 50, 0]
    assert passes[-1].next_ns == clock.now_ns + 700_000_000
    found = await seed.look(redis, queue)
    assert (len(found["pending"]), len(found["scheduled"])) == (150, 250)
    assert {name[0] for name in found["pending"]} == {"b"}


# -- groups


async def test_a_scheduled_group_member_joins_its_group(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """F8: what was scheduled with a group is put into it when it is due, and the group is listed."""
    made = seed.message(queue, "a", group_key="g")
    await seed.waiting(redis, queue, "scheduled", [(made, clock.unix)], aio_group="g", aio_due_ns=clock.now_ns + 1)
    assert (await forward.forward(frozen, queue, TaskState.SCHEDULED, clock.now_ns + 1)).moved == 1
    assert await seed.look(redis, queue) == {
        "groups": ["g"],
        "g:g": {"a": clock.unix},
        "t:a": seed.fields(made, "aggregating", group="g"),
    }


async def test_a_go_client_s_scheduled_task_runs_alone(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """K15: without our field a scheduled task with a group in its message becomes pending, as with Go."""
    made = seed.message(queue, "a", group_key="g")
    await seed.waiting(redis, queue, "scheduled", [(made, clock.unix)])
    assert (await forward.forward(frozen, queue, TaskState.SCHEDULED, clock.now_ns)).moved == 1
    assert (await seed.look(redis, queue))["pending"] == ["a"]


@pytest.mark.parametrize("source", SOURCES)
async def test_a_returning_member_s_group_is_registered_again(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, source: forward.Source
) -> None:
    """F9: a task whose hash has a group goes back to it, and the group is in the list of groups again."""
    made = seed.message(queue, "a", group_key="g")
    await seed.waiting(redis, queue, source, [(made, clock.unix - 5)], group="g")
    assert (await forward.forward(frozen, queue, source, clock.now_ns)).moved == 1
    assert await seed.look(redis, queue) == {
        "groups": ["g"],
        "g:g": {"a": clock.unix},
        "t:a": seed.fields(made, "aggregating", group="g"),
    }


# -- damage


@pytest.mark.parametrize("source", SOURCES)
async def test_damaged_tasks_do_not_hold_up_the_others(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, source: forward.Source
) -> None:
    """An ID without a task is set aside, a group that is no set is left alone: the neighbours are forwarded."""
    names = ("gone", "broken", "a", "grouped", "b")
    await seed.waiting(redis, queue, source, [(seed.message(queue, name), clock.unix - 1) for name in names])
    await redis.delete(keys.task(queue, "gone"), keys.task(queue, "broken"))
    await redis.rpush(keys.task(queue, "broken"), "no hash")
    await redis.hset(keys.task(queue, "grouped"), "group", "bad")
    await redis.set(keys.group(queue, "bad"), "no set")
    assert await forward.forward(frozen, queue, source, clock.now_ns) == (5, 0, None)
    found = await seed.look(redis, queue)
    assert (sorted(found["pending"]), found["aio:ghost"].keys()) == (["a", "b", "grouped"], {"gone", "broken"})
    assert str(source) not in found


@pytest.mark.parametrize("container", ["pending", "groups"])
async def test_a_damaged_container_changes_nothing(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, container: str
) -> None:
    """Where a task would go into a container of a wrong type, the caller is told, and no task has left its place."""
    await seed.waiting(redis, queue, "retry", [(seed.message(queue, "a"), clock.unix)])
    await seed.waiting(redis, queue, "retry", [(seed.message(queue, "b"), clock.unix)], group="g")
    await redis.set(f"asynq:{{{queue}}}:{container}", "damaged")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        await forward.forward(frozen, queue, TaskState.RETRY, clock.now_ns)
    assert await redis.zcard(keys.retry(queue)) == 2
    states = [await redis.hget(keys.task(queue, name), "state") for name in "ab"]
    assert states == [b"retry", b"retry"]


async def test_a_task_that_is_put_off_for_ever(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """A score of infinity is never due, and no number that anything stumbles over."""
    await redis.zadd(keys.retry(queue), {"never": "inf"})
    assert await forward.first_due(frozen, queue, TaskState.RETRY) == 2**62
    assert await forward.forward(frozen, queue, TaskState.RETRY, clock.now_ns) == (0, 0, None)
    await redis.zadd(keys.retry(queue), {"now": "-inf"})
    assert await forward.first_due(frozen, queue, TaskState.RETRY) == -(2**62)
    assert await forward.forward(frozen, queue, TaskState.RETRY, clock.now_ns) == (1, 0, None)


# -- the duty, and a full Redis


async def test_a_pass_forwards_every_queue(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """One pass of the duty moves what is due in all its queues, paused ones too, until nothing is."""
    queues = [queue, f"{queue}-paused"]
    await redis.set(keys.paused(queues[1]), 1)
    for name in queues:
        for source in ("scheduled", "retry"):
            tasks = [(seed.message(name, f"{source}{number:03}"), clock.unix - 1) for number in range(120)]
            await seed.waiting(redis, name, source, tasks)
    assert await Forwarder(frozen, queues, 5.0).run_once() == 480
    assert [await redis.llen(keys.pending(name)) for name in queues] == [240, 240]


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_full_redis_forwards(version: servers.Version) -> None:
    """With memory full, due tasks become pending or join their group all the same."""
    async with servers.own_standalone(version) as server, Store(server.uri) as store:
        for name, group in (("a", ""), ("b", "g")):
            made = codec.encode_task(seed.message("q", name))
            server.execute("HSET", keys.task("q", name), "msg", made, "state", "scheduled", "aio_group", group)
        server.execute("ZADD", keys.scheduled("q"), 1, "a", 2, "b", 3, "ghost")
        server.execute("CONFIG", "SET", "maxmemory", "1")
        assert await forward.forward(store, "q", TaskState.SCHEDULED) == (3, 0, None)
        assert server.execute("LRANGE", keys.pending("q"), 0, -1) == ["a"]
        assert server.execute("ZRANGE", keys.group("q", "g"), 0, -1) == ["b"]
        assert server.execute("ZRANGE", keys.ghost("q"), 0, -1) == ["ghost"]
