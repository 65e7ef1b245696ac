"""Leases are raised, never lowered, never given to who has lost them; after a silence they are asked for first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import BrokerError, BrokerUnavailableError
from asynq_aio._broker import leases
from asynq_aio._broker.store import Fault, Store
from asynq_aio._wire import codec, keys
from tests import seed, servers
from tests.seed import SERVER

if TYPE_CHECKING:
    from asynq_aio._broker.leases import Lease
    from tests.clock import FrozenClock


async def held(redis: Any, queue: str, expires_unix: int, *names: str) -> list[Lease]:
    """Tasks that this server works on, and what it knows of them."""
    await seed.active(redis, queue, [seed.message(queue, name) for name in names], expires_unix=expires_unix)
    return [seed.lease(queue, name, expires_unix) for name in names]


async def scores(redis: Any, queue: str) -> dict[str, int]:
    """ID -> expiry."""
    return dict((await seed.look(redis, queue)).get("lease", {}))


# -- extend


@pytest.mark.parametrize("count", [1, 999, 10_000])
async def test_extend(frozen: Store, redis: Any, queue: str, clock: FrozenClock, count: int) -> None:
    """However many: all are raised, a thousand in a call, and the holder knows; nothing else is written."""
    mine = await held(redis, queue, clock.unix + 30, *(f"{number:05}" for number in range(count)))
    others = await held(redis, queue, clock.unix + 30, "other")
    before = await seed.look(redis, queue)
    calls = frozen.stats.calls
    await leases.extend(frozen, queue, mine, clock.unix + 35)
    assert frozen.stats.calls - calls == -(-count // 1000)
    raised = before["lease"] | {str(lease.task_id): clock.unix + 35 for lease in mine}
    assert await seed.look(redis, queue) == before | {"lease": raised}
    assert {lease.expires_unix for lease in mine} == {clock.unix + 35}
    assert others[0].expires_unix == clock.unix + 30


async def test_extend_never_gives_back_what_is_gone(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """A task that somebody else has taken from us has no lease of ours; one with a later lease keeps it."""
    mine = await held(redis, queue, clock.unix + 30, "a", "gone", "later")
    await redis.zrem(keys.lease(queue), "gone")
    await redis.zadd(keys.lease(queue), {"later": clock.unix + 99})
    await leases.extend(frozen, queue, mine, clock.unix + 35)
    assert await scores(redis, queue) == {"a": clock.unix + 35, "later": clock.unix + 99}


async def test_what_was_sent_is_known_though_the_reply_is_lost(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """An outage in the middle: the holder counts with the expiry that it sent, so that its outcome is not lost."""
    mine = await held(redis, queue, clock.unix + 30, "a")
    frozen.faults = lambda name, _keys: Fault.REPLY_LOST if name == "ZADD" else None
    with pytest.raises(BrokerUnavailableError):
        await leases.extend(frozen, queue, mine, clock.unix + 35, deadline=0.1)
    assert mine[0].expires_unix == clock.unix + 35
    assert await scores(redis, queue) == {"a": clock.unix + 35}


# -- regain


@pytest.mark.parametrize("count", [1, 999, 10_000])
async def test_regain(frozen: Store, redis: Any, queue: str, clock: FrozenClock, count: int) -> None:
    """After a silence: what is still ours is raised, 500 in a call, even where the lease has run out."""
    mine = await held(redis, queue, clock.unix - 20, *(f"{number:05}" for number in range(count)))
    before = await seed.look(redis, queue)
    calls = frozen.stats.calls
    assert await leases.regain(frozen, queue, mine, clock.unix + 30) == []
    assert frozen.stats.calls - calls == -(-count // 500)
    assert await seed.look(redis, queue) == before | {"lease": dict.fromkeys(before["lease"], clock.unix + 30)}
    assert {lease.expires_unix for lease in mine} == {clock.unix + 30}


async def test_regain_tells_what_is_lost(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Another owner, no lease, another state, no hash, a later lease (a Go server has it): lost, and untouched."""
    ours = clock.unix - 20
    mine = await held(redis, queue, ours, "a", "other", "unleased", "retried", "gone", "broken", "go")
    await redis.hset(keys.task(queue, "other"), "aio_owner", f"{SERVER}/2")
    await redis.zrem(keys.lease(queue), "unleased")
    await redis.hset(keys.task(queue, "retried"), "state", "retry")
    await redis.delete(keys.task(queue, "gone"), keys.task(queue, "broken"))
    await redis.rpush(keys.task(queue, "broken"), "no hash")
    await redis.zadd(keys.lease(queue), {"go": ours + 60})
    before = await seed.look(redis, queue)
    lost = await leases.regain(frozen, queue, mine, clock.unix + 30)
    assert [lease.task_id for lease in lost] == ["other", "unleased", "retried", "gone", "broken", "go"]
    assert await seed.look(redis, queue) == before | {"lease": before["lease"] | {"a": clock.unix + 30}}
    assert {lease.expires_unix for lease in lost} == {ours}


async def test_a_task_that_go_works_on_is_lost(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Go's server keeps its lease at now + 25 to 30 s, our owner still in the hash: none of those scores is ours."""
    names = [str(seconds) for seconds in range(25, 31)]
    mine = await held(redis, queue, clock.unix - 90, *names)
    await redis.zadd(keys.lease(queue), {name: clock.unix + int(name) for name in names})
    before = await seed.look(redis, queue)
    lost = await leases.regain(frozen, queue, mine, clock.unix + 30)
    assert [lease.task_id for lease in lost] == names
    assert await seed.look(redis, queue) == before


async def test_a_regain_whose_reply_was_lost(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """It has raised the lease above what its holder knows; the next one finds that it was its own doing."""
    mine = await held(redis, queue, clock.unix - 20, "a")
    assert await leases.regain(frozen, queue, [seed.lease(queue, "nobody", 0)], 0)  # the node knows the script now
    frozen.faults = lambda name, _keys: Fault.REPLY_LOST if name == "regain" else None
    with pytest.raises(BrokerUnavailableError):
        await leases.regain(frozen, queue, mine, clock.unix + 30, deadline=0.1)
    assert await scores(redis, queue) == {"a": clock.unix + 30}
    frozen.faults = None
    assert await leases.regain(frozen, queue, mine, clock.unix + 35) == []
    assert await scores(redis, queue) == {"a": clock.unix + 35}


async def test_regain_never_lowers(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """A clock that went back does not shorten a lease."""
    mine = await held(redis, queue, clock.unix + 30, "a")
    assert await leases.regain(frozen, queue, mine, clock.unix + 20) == []
    assert await scores(redis, queue) == {"a": clock.unix + 30}
    assert mine[0].expires_unix == clock.unix + 30


# -- active without a lease


async def test_tasks_without_a_lease_get_one(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """What stands in active without a lease is found and lent one; what has one, or has left active, is untouched."""
    await held(redis, queue, clock.unix + 20, "leased", "bare")
    await redis.zrem(keys.lease(queue), "bare")
    assert await leases.without_lease(frozen, queue) == {b"bare"}
    given = await leases.lend(frozen, queue, [b"bare", b"leased", b"finished"], clock.unix + 30)
    assert given == 1
    assert await scores(redis, queue) == {"leased": clock.unix + 20, "bare": clock.unix + 30}
    assert await leases.without_lease(frozen, queue) == set()


async def test_an_idle_queue_has_no_tasks_without_a_lease(frozen: Store, redis: Any, queue: str) -> None:
    """Nothing active: one call, nothing found."""
    calls = frozen.stats.calls
    assert await leases.without_lease(frozen, queue) == set()
    assert frozen.stats.calls - calls == 1
    assert await seed.look(redis, queue) == {}


# -- damage, and a full Redis


async def test_damage_is_an_error(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Where `lease` is of a wrong type the caller is told."""
    await redis.set(keys.lease(queue), "damaged")
    mine = [seed.lease(queue, "a", clock.unix)]
    for work in (leases.extend, leases.regain):
        with pytest.raises(BrokerError, match="WRONGTYPE"):
            await work(frozen, queue, mine, clock.unix + 30)


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_full_redis_loses_no_lease(version: servers.Version) -> None:
    """Extending goes over to a script that a full Redis takes; regaining and lending are such scripts anyway."""
    async with servers.own_standalone(version) as server, Store(server.uri) as store:
        now = int(store.now())
        for name in "ab":
            made = codec.encode_task(seed.message("q", name))
            server.execute("HSET", keys.task("q", name), "msg", made, "state", "active", "aio_owner", f"{SERVER}/1")
            server.execute("LPUSH", keys.active("q"), name)
        server.execute("ZADD", keys.lease("q"), now + 30, "a")
        server.execute("CONFIG", "SET", "maxmemory", "1")
        mine = [seed.lease("q", "a", now + 30)]
        await leases.extend(store, "q", mine, now + 35)
        assert server.execute("ZSCORE", keys.lease("q"), "a") == str(now + 35)
        assert await leases.regain(store, "q", mine, now + 40) == []
        assert server.execute("ZSCORE", keys.lease("q"), "a") == str(now + 40)
        assert await leases.lend(store, "q", [b"b"], now + 30) == 1
