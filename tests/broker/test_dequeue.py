"""pending -> active: many at once, with a lease and an owner; and what becomes of a claim whose reply is lost."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import BrokerError, OutcomeUnknownError
from asynq_aio._broker import dequeue
from asynq_aio._broker.dequeue import Claim, Claimed
from asynq_aio._broker.store import Fault, Store
from asynq_aio._wire import codec, keys
from tests import seed, servers
from tests.seed import SERVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.clock import FrozenClock

_numbers = itertools.count(1)


def claim_of(store: Store, queue: str, number: int | None = None) -> Claim:
    """A claim of now, with the next number."""
    return dequeue.new_claim(store, queue, SERVER, next(_numbers) if number is None else number)


def ids(claimed: Sequence[Claimed]) -> list[str]:
    """The IDs that a claim has brought."""
    return [task.task_id.decode() for task in claimed]


# -- what is taken


@pytest.mark.parametrize("locked", [False, True])
async def test_the_oldest_goes_first(frozen: Store, redis: Any, queue: str, clock: FrozenClock, locked: bool) -> None:
    """As many as asked for leave at the right and enter active at the left, with lease and owner, message unchanged."""
    tasks = [seed.message(queue, name, unique=locked) for name in "abc"]
    await seed.pending(redis, queue, tasks, since_ns=clock.now_ns)
    claim = claim_of(frozen, queue)
    status, claimed = await dequeue.claim(frozen, claim, 2)
    assert (status, ids(claimed)) == ("tasks", ["a", "b"])
    assert [task.encoded for task in claimed] == [codec.encode_task(made) for made in tasks[:2]]
    assert [task.pending_since_ns for task in claimed] == [str(clock.now_ns).encode()] * 2
    assert await seed.look(redis, queue) == {
        "pending": ["c"],
        "active": ["b", "a"],
        "lease": dict.fromkeys("ab", clock.unix + 30),
        "t:a": seed.fields(tasks[0], "active", aio_owner=claim.owner),
        "t:b": seed.fields(tasks[1], "active", aio_owner=claim.owner),
        "t:c": seed.fields(tasks[2], "pending", pending_since=clock.now_ns),
    }
    if locked:
        assert [await seed.unique(redis, made) is None for made in tasks] == [False] * 3


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("count", [1, 999, 10_000])
async def test_many(frozen: Store, redis: Any, queue: str, clock: FrozenClock, count: int, locked: bool) -> None:
    """However many: all are taken, in order, in as many calls as their bytes need."""
    tasks = [seed.message(queue, f"{number:05}", unique=locked) for number in range(count)]
    await seed.pending(redis, queue, tasks)
    taken: list[str] = []
    calls = 0
    while len(taken) < count:
        status, claimed = await dequeue.claim(frozen, claim_of(frozen, queue), count)
        assert status == "tasks"
        taken += ids(claimed)
        calls += 1
    names = [made.id for made in tasks]
    assert taken == names
    assert calls == 1 + sum(len(codec.encode_task(made)) for made in tasks) // dequeue.REPLY_BYTES
    assert await redis.lrange(keys.active(queue), 0, -1) == [name.encode() for name in reversed(names)]
    assert await redis.zcount(keys.lease(queue), clock.unix + 30, clock.unix + 30) == count
    assert (await dequeue.claim(frozen, claim_of(frozen, queue), 1)) == ("empty", [])


async def test_a_reply_is_bounded_in_bytes(frozen: Store, redis: Any, queue: str) -> None:
    """What would make the reply longer than 1 MiB stays; one task is always taken, however large."""
    sizes = {"large": 2 << 20, "a": 600_000, "b": 600_000, "c": 1}
    await seed.pending(redis, queue, [seed.message(queue, name, payload=bytes(size)) for name, size in sizes.items()])
    taken = [ids((await dequeue.claim(frozen, claim_of(frozen, queue), 10))[1]) for _ in range(3)]
    assert taken == [["large"], ["a"], ["b", "c"]]


async def test_an_empty_queue(frozen: Store, redis: Any, queue: str) -> None:
    """Nothing there: nothing is written."""
    assert await dequeue.claim(frozen, claim_of(frozen, queue), 10) == ("empty", [])
    assert await seed.look(redis, queue) == {}


async def test_a_paused_queue(frozen: Store, redis: Any, queue: str) -> None:
    """Paused is not empty: the tasks are there and stay there, whoever has paused it."""
    await seed.pending(redis, queue, [seed.message(queue, "a")])
    await redis.set(keys.paused(queue), 1)
    before = await seed.look(redis, queue)
    assert await dequeue.claim(frozen, claim_of(frozen, queue), 10) == ("paused", [])
    assert await seed.look(redis, queue) == before


async def test_private_fields_of_scheduling_go(frozen: Store, redis: Any, queue: str) -> None:
    """A task that Go's forwarder has brought still carries what our schedule wrote; it goes when the task is taken."""
    await seed.pending(redis, queue, [], since_ns=1)
    task = seed.message(queue, "a", group_key="g")
    await seed.hashes(redis, queue, [task], "pending", aio_due_ns=12, aio_group="g", pending_since=1)
    await redis.lpush(keys.pending(queue), "a")
    claim = claim_of(frozen, queue)
    await dequeue.claim(frozen, claim, 1)
    assert (await seed.look(redis, queue))["t:a"] == seed.fields(task, "active", aio_owner=claim.owner)


# -- damage


async def test_ids_without_a_task_are_parked(frozen: Store, redis: Any, queue: str) -> None:
    """An ID without hash, with one that has no message, or with none at all: set aside; its neighbours are taken."""
    await seed.pending(redis, queue, [seed.message(queue, name) for name in ("a", "gone", "other", "bare", "b")])
    await redis.delete(keys.task(queue, "gone"), keys.task(queue, "other"))
    await redis.rpush(keys.task(queue, "other"), "no hash")
    await redis.hdel(keys.task(queue, "bare"), "msg")
    status, claimed = await dequeue.claim(frozen, claim_of(frozen, queue), 10)
    assert (status, ids(claimed)) == ("tasks", ["a", "b"])
    found = await seed.look(redis, queue)
    assert (found["active"], found["lease"].keys()) == (["b", "a"], {"a", "b"})
    assert found["aio:ghost"].keys() == {"gone", "other", "bare"}
    assert "pending" not in found
    assert (found.get("t:gone"), found["t:other"], found["t:bare"]) == (None, "no hash", {"state": "pending"})


async def test_ghosts_alone(frozen: Store, redis: Any, queue: str) -> None:
    """Where every ID is one without a task, the claim has brought none, and the queue is not called empty yet."""
    await redis.lpush(keys.pending(queue), "x", "y")
    assert await dequeue.claim(frozen, claim_of(frozen, queue), 10) == ("tasks", [])
    found = await seed.look(redis, queue)
    assert (list(found), found["aio:ghost"].keys()) == (["aio:ghost"], {"x", "y"})
    assert await dequeue.claim(frozen, claim_of(frozen, queue), 10) == ("empty", [])


async def test_undecodable_and_unreadable(frozen: Store, redis: Any, queue: str) -> None:
    """A message that nobody can decode, and an ID that is not UTF-8, are handed over as they are, to be archived."""
    name = b"\xff\xfe"
    prefix = keys.task_prefix(queue).encode()
    await redis.hset(prefix + name, mapping={"msg": b"\xff", "state": "pending"})
    await redis.lpush(keys.pending(queue), name)
    claim = claim_of(frozen, queue)
    assert await dequeue.claim(frozen, claim, 10) == ("tasks", [Claimed(name, b"\xff", b"")])
    assert await redis.lrange(keys.active(queue), 0, -1) == [name]
    assert await redis.hgetall(prefix + name) == {
        b"msg": b"\xff",
        b"state": b"active",
        b"aio_owner": claim.owner.encode(),
    }


@pytest.mark.parametrize("container", ["pending", "active", "lease"])
async def test_a_damaged_container_changes_nothing(frozen: Store, redis: Any, queue: str, container: str) -> None:
    """Where a container is of a wrong type the caller is told, and no task has left its place."""
    task = seed.message(queue, "a")
    await seed.pending(redis, queue, [task])
    damaged = f"asynq:{{{queue}}}:{container}"
    await redis.delete(damaged)
    await redis.set(damaged, "damaged")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        await dequeue.claim(frozen, claim_of(frozen, queue), 10)
    others = {keys.pending(queue), keys.active(queue), keys.lease(queue)} - {damaged, keys.pending(queue)}
    assert [name for name in others if await redis.exists(name)] == []
    if container != "pending":
        assert await redis.lrange(keys.pending(queue), 0, -1) == [b"a"]
    assert await redis.hget(keys.task(queue, "a"), "state") == b"pending"


# -- lost replies


async def test_adopt_finds_what_a_lost_claim_took(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """The reply is lost; adopting tells the tasks, changes none of them, and does so as often as it is asked."""
    tasks = [seed.message(queue, name) for name in "abc"]
    assert await dequeue.claim(frozen, claim_of(frozen, queue), 1) == ("empty", [])  # the node knows the script now
    await seed.pending(redis, queue, tasks)
    claim = claim_of(frozen, queue)
    frozen.faults = lambda name, _keys: Fault.REPLY_LOST if name == "claim" else None
    with pytest.raises(OutcomeUnknownError):
        await dequeue.claim(frozen, claim, 2)
    before = await seed.look(redis, queue)
    for _ in range(2):
        whole, adopted = await dequeue.adopt(frozen, claim)
        assert (whole, sorted(ids(adopted))) == (True, ["a", "b"])
        assert {task.encoded for task in adopted} == {codec.encode_task(made) for made in tasks[:2]}
    assert await seed.look(redis, queue) == before
    assert before["lease"] == dict.fromkeys("ab", clock.unix + 30)


async def test_a_claim_that_comes_after_its_adoption_does_nothing(frozen: Store, redis: Any, queue: str) -> None:
    """The fence stops this claim and every earlier one of this server, not the next, and not other servers."""
    await seed.pending(redis, queue, [seed.message(queue, name) for name in "ab"])
    before = await seed.look(redis, queue)
    early, late = claim_of(frozen, queue), claim_of(frozen, queue)
    assert await dequeue.adopt(frozen, late) == (True, [])
    for claim in (late, early):
        assert await dequeue.claim(frozen, claim, 1) == ("fenced", [])
    assert await seed.look(redis, queue) == before
    assert 100 < await redis.ttl(keys.fence(queue, "server")) <= 120
    other = Claim(queue, "host:1:other", 1, early.expires_unix)
    assert ids((await dequeue.claim(frozen, other, 1))[1]) == ["a"]
    assert ids((await dequeue.claim(frozen, claim_of(frozen, queue), 1))[1]) == ["b"]


async def test_a_fence_is_never_lowered(frozen: Store, redis: Any, queue: str) -> None:
    """Adopting an earlier claim after a later one lets none of them through."""
    claims = [claim_of(frozen, queue) for _ in range(3)]
    for claim in (claims[2], claims[0]):
        await dequeue.adopt(frozen, claim)
    await seed.pending(redis, queue, [seed.message(queue, "a")])
    for claim in claims:
        assert await dequeue.claim(frozen, claim, 1) == ("fenced", [])


async def test_adopt_leaves_what_is_not_of_that_claim(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """Another claim's task, one that Go has taken over (its lease is later), one done: not found."""
    lost = claim_of(frozen, queue)
    score = lost.expires_unix
    await seed.active(redis, queue, [seed.message(queue, "mine")], owner=lost.owner, expires_unix=score)
    await seed.active(redis, queue, [seed.message(queue, "other")], owner=f"{SERVER}/0", expires_unix=score)
    await seed.active(redis, queue, [seed.message(queue, "prefix")], owner=lost.owner + "0", expires_unix=score)
    await seed.active(redis, queue, [seed.message(queue, "go")], owner=None, expires_unix=score)
    await seed.active(redis, queue, [seed.message(queue, "taken")], owner=lost.owner, expires_unix=score + 60)
    await seed.active(redis, queue, [seed.message(queue, "bare")], owner=lost.owner, expires_unix=score)
    await redis.zrem(keys.lease(queue), "bare")
    await redis.rpush(keys.active(queue), "gone")
    await redis.zadd(keys.lease(queue), {"gone": clock.unix})
    whole, adopted = await dequeue.adopt(frozen, lost)
    assert (whole, ids(adopted)) == (True, ["mine"])


# -- a full Redis


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_full_redis_gives_tasks(version: servers.Version) -> None:
    """Workers drain a full Redis: claiming, parking and adopting are not refused."""
    async with servers.own_standalone(version) as server, Store(server.uri) as store:
        server.execute(
            "HSET", keys.task("q", "a"), "msg", codec.encode_task(seed.message("q", "a")), "state", "pending"
        )
        server.execute("LPUSH", keys.pending("q"), "ghost", "a")
        server.execute("CONFIG", "SET", "maxmemory", "1")
        claim = claim_of(store, "q")
        status, claimed = await dequeue.claim(store, claim, 10)
        assert (status, ids(claimed)) == ("tasks", ["a"])
        assert server.execute("ZRANGE", keys.ghost("q"), 0, -1) == ["ghost"]
        assert ids((await dequeue.adopt(store, claim))[1]) == ["a"]
        assert server.execute("ZRANGE", keys.lease("q"), 0, -1) == ["a"]
