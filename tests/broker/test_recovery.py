"""Tasks whose server is gone run again: soon where it was one of ours, by Go's rule of expired leases where not."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio._broker import recovery
from asynq_aio._broker.store import Store
from asynq_aio._server.config import ServerConfig
from asynq_aio._server.duties.recoverer import Recoverer
from asynq_aio._server.execution import Attempt, ServerStats
from asynq_aio._server.lease import Holdings
from asynq_aio._wire import codec, keys
from tests import seed, servers
from tests.seed import SERVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.recovery import Held
    from tests.clock import FrozenClock

EXPIRED = "asynq: task lease expired"
FAILED = {"processed": 1, "failed": 1, "processed_on": 1, "failed_on": 1}


class Watcher:
    """A recoverer of one queue whose time is moved: it looks each five seconds."""

    def __init__(self, store: Store, queue: str, clock: FrozenClock, **settings: Any) -> None:
        config = ServerConfig(retry_delay=lambda _retried, _exc, _task: timedelta(seconds=60), **settings)
        self.holdings = Holdings()
        self.stats = ServerStats()
        self._recoverer = Recoverer(store, [queue], config, self.holdings, self.stats)
        self._clock = clock

    async def look(self, *pauses: float) -> int:
        """A pass now, and one after each pause; how many tasks were taken up."""
        taken = await self._recoverer.run_once()
        for seconds in pauses:
            self._clock.advance(seconds)
            taken += await self._recoverer.run_once()
        return taken


STEADY = (5, 5, 5)
"""After these pauses Redis has answered for 15 s."""
SILENT = (4, 4, 4)
"""After these, a lease has not moved for 12 s; Redis is not steady yet."""


# -- expired leases


async def test_an_expired_lease_is_retried(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Exactly as Go does it: the error text, one failure more, both counters, the retry delay, the lock kept."""
    made = seed.message(queue, "a", unique=True, retried=2)
    await seed.active(redis, queue, [made], expires_unix=clock.unix - 30, owner=None)
    watcher = Watcher(frozen, queue, clock)
    assert await watcher.look(*STEADY) == 1
    failed = seed.edited(made, retried=3, error_msg=EXPIRED, last_failed_at=clock.unix)
    assert await seed.look(redis, queue) == {
        "retry": {"a": clock.unix + 60},
        "t:a": seed.fields(failed, "retry"),
        **FAILED,
    }
    assert await seed.unique(redis, made) is not None
    assert watcher.stats.recovered == 1


async def test_an_expired_lease_without_retries_left(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """The task goes to the archive; `retried` is unchanged."""
    made = seed.message(queue, "a", retry=3, retried=3)
    await seed.active(redis, queue, [made], expires_unix=clock.unix - 30, owner=None)
    assert await Watcher(frozen, queue, clock).look(*STEADY) == 1
    failed = seed.edited(made, error_msg=EXPIRED, last_failed_at=clock.unix)
    assert await seed.look(redis, queue) == {
        "archived": {"a": clock.unix},
        "t:a": seed.fields(failed, "archived"),
        **FAILED,
    }


async def test_is_failure_is_asked(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Where a lost lease is no failure, nothing is counted and `retried` stays."""
    made = seed.message(queue, "a")
    await seed.active(redis, queue, [made], expires_unix=clock.unix - 30, owner=None)
    await Watcher(frozen, queue, clock, is_failure=lambda _exc: False).look(*STEADY)
    failed = seed.edited(made, error_msg=EXPIRED, last_failed_at=clock.unix)
    assert await seed.look(redis, queue) == {"retry": {"a": clock.unix + 60}, "t:a": seed.fields(failed, "retry")}


async def test_the_grace_is_30_seconds(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """K11: a lease that has run out is left alone for 30 s more: the clocks of a fleet differ."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix - 9, owner=None)
    watcher = Watcher(frozen, queue, clock)
    assert await watcher.look(5, 5, 5, 5) == 0
    assert await watcher.look(1) == 1


async def test_redis_must_be_steady(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """After an outage owners regain their leases first: none counts as expired before Redis has answered for 15 s."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix - 300, owner=None)
    watcher = Watcher(frozen, queue, clock)
    assert await watcher.look(5, 5, 4) == 0
    assert await watcher.look(60) == 0  # nothing was heard for a minute: it begins anew
    assert await watcher.look(5, 5, 4) == 0
    assert await watcher.look(1) == 1


async def test_an_owner_that_comes_back_in_time_keeps_its_task(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between look and act the owner has regained its lease: the script compares the score again, and leaves it."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix - 60)
    looked = recovery.look

    async def look_and_wait(store: Store, name: str, ids: Sequence[bytes]) -> list[Held]:
        found = await looked(store, name, ids)
        await redis.zadd(keys.lease(queue), {"a": clock.unix + 30})
        return found

    monkeypatch.setattr(recovery, "look", look_and_wait)
    assert await Watcher(frozen, queue, clock).look(*STEADY) == 0
    found = await seed.look(redis, queue)
    assert (found["active"], found["t:a"]["state"]) == (["a"], "active")


# -- silent owners


async def test_the_task_of_a_silent_owner_goes_back(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """F27: no entry, and no move of the lease for 12 s: its tasks are next, in their order, and no retry is lost."""
    waits = seed.message(queue, "waits")
    tasks = [seed.message(queue, name, unique=True) for name in "abc"]
    await seed.pending(redis, queue, [waits])
    for number, made in enumerate(tasks):
        await seed.active(redis, queue, [made], expires_unix=clock.unix + 20 + number)
    watcher = Watcher(frozen, queue, clock)
    assert await watcher.look(4, 4, 3) == 0
    assert await watcher.look(1) == 3
    expected = {
        f"t:{made.id}": seed.fields(made, "pending", pending_since=clock.now_ns, aio_recovered=1) for made in tasks
    }
    assert await seed.look(redis, queue) == {
        "pending": ["waits", "c", "b", "a"],
        "t:waits": seed.fields(waits, "pending"),
        **expected,
    }
    assert all([await seed.unique(redis, made) for made in tasks])


async def test_a_live_owner_keeps_its_tasks(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """An entry, a lease that moves, an owner that is Go's, a task of our own: each is a sign of life."""
    shown = "other:2:shown"
    await redis.set(f"asynq:servers:{{{shown}}}", "info")
    await seed.active(redis, queue, [seed.message(queue, "shown")], owner=f"{shown}/1", expires_unix=clock.unix + 30)
    await seed.active(redis, queue, [seed.message(queue, "moves")], expires_unix=clock.unix + 30)
    await seed.active(redis, queue, [seed.message(queue, "go")], owner=None, expires_unix=clock.unix + 30)
    await seed.active(redis, queue, [seed.message(queue, "own")], expires_unix=clock.unix + 30)
    watcher = Watcher(frozen, queue, clock)
    watcher.holdings.add(Attempt(seed.lease(queue, "own", clock.unix + 30), 0.0))
    for _ in range(4):
        assert await watcher.look(5) == 0
        await redis.zincrby(keys.lease(queue), 5, "moves")
    assert sorted((await seed.look(redis, queue))["active"]) == ["go", "moves", "own", "shown"]
    await redis.delete(f"asynq:servers:{{{shown}}}")
    assert await watcher.look() == 1


async def test_a_pause_of_the_observer_proves_nothing(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """Who has not looked for a while has not seen whether a lease moved: the 12 s begin anew."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix + 60)
    watcher = Watcher(frozen, queue, clock)
    assert await watcher.look(5, 11) == 0
    assert await watcher.look(5, 5) == 0
    assert await watcher.look(2) == 1


@pytest.mark.parametrize(
    ("before", "settings", "max_retry", "why"),
    [
        (3, {}, 25, "recovered 3 times before (max_recoveries=3, max_retry=25)"),
        (1, {"max_recoveries": 1}, 25, "recovered 1 times before (max_recoveries=1, max_retry=25)"),
        (0, {}, 0, "recovered 0 times before (max_recoveries=3, max_retry=0)"),
    ],
)
async def test_a_task_that_kills_its_servers_is_archived(
    frozen: Store,
    redis: Any,
    queue: str,
    clock: FrozenClock,
    before: int,
    settings: dict[str, int],
    max_retry: int,
    why: str,
) -> None:
    """After `max_recoveries`, or where it may not be retried at all: with the reason, counted, the lock kept."""
    made = seed.message(queue, "a", unique=True, retry=max_retry)
    await seed.active(redis, queue, [made], expires_unix=clock.unix + 60)
    if before:
        await redis.hset(keys.task(queue, "a"), "aio_recovered", before)
    assert await Watcher(frozen, queue, clock, **settings).look(*SILENT) == 1
    found = await seed.look(redis, queue)
    message = codec.decode_task(found.pop("t:a").pop("msg"))
    assert message == seed.edited(made, error_msg=message.error_msg, last_failed_at=clock.unix)
    assert message.error_msg == f"the server died while it ran this task; {why}"
    assert found == {"archived": {"a": clock.unix}, **FAILED}
    assert await seed.unique(redis, made) is not None


async def test_the_last_allowed_recovery(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Below the limit the task runs again."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix + 60)
    await redis.hset(keys.task(queue, "a"), "aio_recovered", 2)
    assert await Watcher(frozen, queue, clock).look(*SILENT) == 1
    assert (await seed.look(redis, queue))["t:a"]["aio_recovered"] == "3"


@pytest.mark.parametrize("count", [1, 999])
async def test_many(frozen: Store, redis: Any, queue: str, clock: FrozenClock, count: int) -> None:
    """All tasks of a server that is gone come back at once, in order."""
    tasks = [seed.message(queue, f"{number:05}") for number in range(count)]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 60)
    assert await Watcher(frozen, queue, clock).look(*SILENT) == count
    found = await seed.look(redis, queue)
    assert found["pending"] == [made.id for made in reversed(tasks)]
    assert not found.keys() & {"active", "lease"}


# -- damage


@pytest.mark.parametrize("pauses", [STEADY, SILENT])
async def test_damage_does_not_hold_up_the_others(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, pauses: tuple[int, ...]
) -> None:
    """What nobody can decode is archived as it is; with a hash that is gone or is none, the neighbours come back."""
    names = ("poison", "gone", "broken", "odd", "a")
    tasks = [seed.message(queue, name) for name in names]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix - (60 if pauses == STEADY else 0))
    if pauses == STEADY:
        for name in names:
            await redis.hdel(keys.task(queue, name), "aio_owner")
    await redis.hset(keys.task(queue, "poison"), "msg", b"\xff")
    await redis.hset(keys.task(queue, "odd"), "aio_recovered", "often")
    await redis.delete(keys.task(queue, "gone"), keys.task(queue, "broken"))
    await redis.rpush(keys.task(queue, "broken"), "no hash")
    assert await Watcher(frozen, queue, clock).look(*pauses) == 3
    found = await seed.look(redis, queue)
    assert found["archived"].keys() == {"poison"}
    assert (found["t:poison"]["msg"], "MessageDecode" in found["t:poison"]["aio_reason"]) == (b"\xff", False)
    assert sorted(found["pending"] if pauses == SILENT else found["retry"]) == ["a", "odd"]
    assert sorted(found["active"]) == ["broken", "gone"]


async def test_a_lease_without_end(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """An infinite score is nothing that the duty stumbles over; the neighbours come back."""
    await seed.active(redis, queue, [seed.message(queue, "a"), seed.message(queue, "b")], expires_unix=clock.unix)
    await redis.zadd(keys.lease(queue), {"a": "inf"})
    assert await Watcher(frozen, queue, clock).look(*SILENT) == 1
    assert await redis.lrange(keys.pending(queue), 0, -1) == [b"b"]


async def test_a_lease_of_nothing_goes(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """An expired lease of a task that is not active any more is removed: it would be looked at for ever."""
    made = seed.message(queue, "a")
    await seed.waiting(redis, queue, "retry", [(made, clock.unix + 600)])
    before = await seed.look(redis, queue)
    await redis.zadd(keys.lease(queue), {"a": clock.unix - 60})
    assert await Watcher(frozen, queue, clock).look(*STEADY) == 0
    assert await seed.look(redis, queue) == before


async def test_an_active_task_without_a_lease_gets_one(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """Found on two looks a minute apart, it is lent a lease, and runs again when that has run out."""
    made = seed.message(queue, "a")
    await seed.active(redis, queue, [made], expires_unix=1, owner=None)
    await redis.zrem(keys.lease(queue), "a")
    watcher = Watcher(frozen, queue, clock)
    await watcher.look(*[5] * 11)
    assert "lease" not in await seed.look(redis, queue)
    await watcher.look(5)
    assert (await seed.look(redis, queue))["lease"] == {"a": clock.unix + 30}
    assert await watcher.look(*[5] * 12) == 1
    assert (await seed.look(redis, queue))["retry"] == {"a": clock.unix + 60}


# -- a full Redis


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_full_redis_recovers(version: servers.Version, clock: FrozenClock) -> None:
    """With memory full, the tasks of servers that are gone run again all the same."""
    async with servers.own_standalone(version) as server, Store(server.uri, clock=clock) as store:
        for name, owner in (("go", ""), ("ours", f"{SERVER}/1")):
            made = codec.encode_task(seed.message("q", name))
            server.execute("HSET", keys.task("q", name), "msg", made, "state", "active", "aio_owner", owner)
            server.execute("LPUSH", keys.active("q"), name)
            server.execute("ZADD", keys.lease("q"), clock.unix - 60 if not owner else clock.unix + 60, name)
        server.execute("CONFIG", "SET", "maxmemory", "1")
        assert await Watcher(store, "q", clock).look(*STEADY) == 2
        assert server.execute("LRANGE", keys.pending("q"), 0, -1) == ["ours"]
        assert server.execute("ZRANGE", keys.retry("q"), 0, -1) == ["go"]
