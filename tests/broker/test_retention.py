"""Completed tasks go at their time; IDs that lost their hash are looked after."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio._broker import retention
from asynq_aio._broker.store import Fault, Store
from asynq_aio._server.duties.janitor import Janitor
from asynq_aio._wire import keys
from tests import seed, servers
from tests.server.look import until

if TYPE_CHECKING:
    from tests.clock import FrozenClock


async def test_deletes_only_what_expired(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """A completed task goes at its expiry, not before, with its hash; its lock, if another's by now, stays."""
    tasks = [seed.message(queue, name, unique=True) for name in ("old", "now", "new")]
    await seed.waiting(
        redis, queue, "completed", [(made, clock.unix + at) for made, at in zip(tasks, (-99, 0, 1), strict=True)]
    )
    assert await retention.first_expiry(frozen, queue) == clock.unix - 99
    assert await retention.delete_expired(frozen, queue, 10, clock.unix) == (2, 0)
    assert await seed.look(redis, queue, ["old", "now"]) == {
        "completed": {"new": clock.unix + 1},
        "t:new": seed.fields(tasks[2], "completed"),
    }
    assert await seed.unique(redis, tasks[0]) is not None
    assert await retention.first_expiry(frozen, queue) == clock.unix + 1


async def test_nothing_to_delete(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """An empty queue is one call and no write."""
    assert await retention.first_expiry(frozen, queue) is None
    assert await retention.delete_expired(frozen, queue, 10, clock.unix) == (0, 0)
    assert await seed.look(redis, queue) == {}


@pytest.mark.parametrize("count", [1, 999, 10_000])
async def test_many_in_batches(frozen: Store, redis: Any, queue: str, clock: FrozenClock, count: int) -> None:
    """The duty deletes batch by batch until nothing is left that has expired, by Redis' own clock."""
    expired = [(seed.message(queue, f"{number:05}"), clock.unix - 5) for number in range(count)]
    await seed.waiting(redis, queue, "completed", [*expired, (seed.message(queue, "stays"), clock.unix + 3600)])
    calls = frozen.stats.calls
    assert await Janitor(frozen, [queue], interval=8.0, batch=100).run_once() == count
    assert frozen.stats.calls - calls == 1 + (count // 100 + 1) + 1  # a look, the batches, the sweep
    assert list(await seed.look(redis, queue, [made.id for made, _ in expired])) == ["completed", "t:stays"]


async def test_damage_goes_too(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """An ID without hash, or with a key that is no hash, goes as the others do."""
    await seed.waiting(redis, queue, "completed", [(seed.message(queue, name), 5) for name in ("a", "gone", "broken")])
    await redis.delete(keys.task(queue, "gone"), keys.task(queue, "broken"))
    await redis.rpush(keys.task(queue, "broken"), "no hash")
    assert await retention.delete_expired(frozen, queue, 10, clock.unix) == (3, 0)
    assert await seed.look(redis, queue, ["a", "gone", "broken"]) == {}


# -- IDs without a hash


async def test_a_ghost_with_a_hash_goes_back(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Once its hash is there again, as pending, an ID goes back; what is elsewhere by now is only forgotten."""
    back, retried, twice = (seed.message(queue, name) for name in ("back", "retried", "twice"))
    await seed.hashes(redis, queue, [back, twice], "pending")
    await seed.waiting(redis, queue, "retry", [(retried, clock.unix + 60)])
    await redis.lpush(keys.pending(queue), "twice")
    await redis.rpush(keys.task(queue, "broken"), "no hash")
    names = ("back", "retried", "twice", "broken", "gone")
    await redis.zadd(keys.ghost(queue), dict.fromkeys(names, clock.unix - 60))
    assert await retention.sweep(frozen, queue, batch=100, forget_unix=clock.unix - 86_400) == (1, 0)
    found = await seed.look(redis, queue)
    assert found["pending"] == ["back", "twice"]
    assert found["aio:ghost"].keys() == {"broken", "gone"}
    assert found["t:back"] == seed.fields(back, "pending")


@pytest.mark.parametrize("state", ["scheduled", "retry"])
async def test_a_ghost_that_was_due_runs(frozen: Store, redis: Any, queue: str, clock: FrozenClock, state: str) -> None:
    """A forwarder met it without a hash, and took it out of its place: it was due, so it goes to pending."""
    task = seed.message(queue, "due")
    await seed.hashes(redis, queue, [task], state, aio_due_ns=12)
    await redis.zadd(keys.ghost(queue), {"due": clock.unix - 60})
    before = time.time_ns()
    assert await retention.sweep(frozen, queue, batch=100, forget_unix=0) == (1, 0)
    found = await seed.look(redis, queue)
    assert before - 1_000 <= int(found["t:due"].pop("pending_since")) <= time.time_ns()
    assert found == {"pending": ["due"], "t:due": seed.fields(task, "pending")}


async def test_a_dead_node_holds_up_its_own_queues_alone(frozen: Store, redis: Any, queue: str) -> None:
    """The duty has a child per queue: what is over in one goes, whatever has become of the node of another."""
    away = f"{queue}-away"
    await seed.waiting(redis, queue, "completed", [(seed.message(queue, "a"), 1)])
    prefix = f"asynq:{{{away}}}:"
    frozen.faults = lambda _name, names: Fault.NOT_SENT if str(names[0]).startswith(prefix) else None
    janitor = asyncio.create_task(Janitor(frozen, [away, queue], interval=8.0, batch=100).run())

    async def gone() -> bool:
        return not await redis.exists(keys.completed(queue))

    await until(gone)
    janitor.cancel()
    await asyncio.wait([janitor])


async def test_ghosts_are_forgotten_after_a_day(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """What has had no hash for a day never will."""
    await redis.zadd(keys.ghost(queue), {"old": clock.unix - 86_400, "young": clock.unix - 86_399})
    janitor = Janitor(frozen, [queue], interval=8.0, batch=100)
    assert await janitor.sweep() == 0
    assert (await seed.look(redis, queue))["aio:ghost"] == {"young": clock.unix - 86_399}


async def test_the_sweep_is_rare(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """The duty sweeps with its first pass, then every five minutes."""
    janitor = Janitor(frozen, [queue], interval=8.0, batch=100)
    swept = []
    for seconds in (0, 8, 300, 8):
        clock.advance(seconds)
        await redis.zadd(keys.ghost(queue), {"old": 1})
        await janitor.run_once()
        swept.append(not await redis.exists(keys.ghost(queue)))
    assert swept == [True, False, True, False]


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_full_redis_is_cleaned(version: servers.Version) -> None:
    """With memory full, expired tasks go and ghosts come back."""
    async with servers.own_standalone(version) as server, Store(server.uri) as store:
        for name, state in (("a", "completed"), ("b", "pending")):
            server.execute("HSET", keys.task("q", name), "msg", "m", "state", state)
        server.execute("ZADD", keys.completed("q"), 1, "a")
        server.execute("ZADD", keys.ghost("q"), 1, "b")
        server.execute("CONFIG", "SET", "maxmemory", "1")
        assert await retention.delete_expired(store, "q", 10) == (1, 0)
        assert await retention.sweep(store, "q", batch=10, forget_unix=0) == (1, 0)
        assert server.execute("LRANGE", keys.pending("q"), 0, -1) == ["b"]
        assert server.execute("EXISTS", keys.task("q", "a"), keys.ghost("q")) == 0
