"""active -> gone, completed, retry, archived or back to pending: many at once, one verdict each, counted once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import BrokerError, BrokerUnavailableError
from asynq_aio._broker import finish
from asynq_aio._broker.finish import Archive, Complete, Done, Requeue, Retry, Verdict
from asynq_aio._broker.store import Fault, Store
from asynq_aio._wire import codec, keys
from asynq_aio._wire.limits import ARCHIVE_DAYS, ARCHIVE_SIZE, COUNTER_MAX, STATISTICS_SECONDS
from tests import seed, servers
from tests.seed import SERVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.finish import Outcome
    from asynq_aio._broker.leases import Lease
    from asynq_aio._wire.messages import TaskMessage
    from tests.clock import FrozenClock

KINDS = ["done", "complete", "result", "retry", "not-a-failure", "archive", "requeue", "recovered"]
LOST, WRITTEN = Verdict.LOST, Verdict.WRITTEN
FAILED = {"processed": 1, "failed": 1, "processed_on": 1, "failed_on": 1}
SUCCEEDED = {"processed": 1, "processed_on": 1}


def edited(made: TaskMessage) -> TaskMessage:
    """The message as an outcome writes it."""
    return seed.edited(made, error_msg="boom", retried=1, last_failed_at=7)


def outcome(kind: str, lease: Lease, made: TaskMessage, now_unix: int) -> Outcome:
    """The outcome of this kind."""
    encoded = codec.encode_task(edited(made))
    match kind:
        case "done":
            return Done(lease, made.unique_key)
        case "complete":
            return Complete(lease, made.unique_key, encoded, now_unix + 100)
        case "result":
            return Complete(lease, made.unique_key, encoded, now_unix + 100, b"\x00result")
        case "retry" | "not-a-failure":
            return Retry(lease, encoded, now_unix + 60, kind == "retry")
        case "archive":
            return Archive(lease, encoded)
        case _:
            return Requeue(lease, recovered=kind == "recovered")


def after(kind: str, made: TaskMessage, clock: FrozenClock) -> dict[str, Any]:
    """The queue that had this one task, after its outcome of this kind."""
    name = made.id
    match kind:
        case "done":
            return dict(SUCCEEDED)
        case "complete" | "result":
            extra = {"result": b"\x00result"} if kind == "result" else {}
            stored = seed.fields(edited(made), "completed", **extra)
            return {"completed": {name: clock.unix + 100}, f"t:{name}": stored, **SUCCEEDED}
        case "retry" | "not-a-failure":
            stored = seed.fields(edited(made), "retry")
            return {"retry": {name: clock.unix + 60}, f"t:{name}": stored, **(FAILED if kind == "retry" else {})}
        case "archive":
            return {"archived": {name: clock.unix}, f"t:{name}": seed.fields(edited(made), "archived"), **FAILED}
        case _:
            recovered = {"aio_recovered": 1} if kind == "recovered" else {}
            stored = seed.fields(made, "pending", pending_since=clock.now_ns, **recovered)
            return {"pending": [name], f"t:{name}": stored}


async def write(store: Store, queue: str, outcomes: Sequence[Outcome]) -> list[Verdict]:
    """All of them, in as many calls as it takes."""
    return [verdict for part in finish.chunks(outcomes) for verdict in await finish.finish(store, queue, part)]


# -- each outcome


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_state_after(frozen: Store, redis: Any, queue: str, clock: FrozenClock, kind: str, locked: bool) -> None:
    """Containers, fields and counters after each outcome; the lock is released by success alone."""
    made = seed.message(queue, "a", unique=locked)
    await seed.active(redis, queue, [made], expires_unix=clock.unix + 30)
    lease = seed.lease(queue, "a", clock.unix + 30)
    assert await finish.finish(frozen, queue, [outcome(kind, lease, made, clock.unix)]) == [WRITTEN]
    assert await seed.look(redis, queue, ["a"]) == after(kind, made, clock)
    if locked:
        assert (await seed.unique(redis, made) is None) == (kind in ("done", "complete", "result"))


@pytest.mark.parametrize("count", [1, 3, 4, 999, 10_000])
async def test_many(frozen: Store, redis: Any, queue: str, clock: FrozenClock, count: int) -> None:
    """However many, of whatever kind, with and without lock: each ends as it would alone, and the sums are right."""
    names = [f"{number:05}" for number in range(count)]
    tasks = [seed.message(queue, name, unique=bool(number // len(KINDS) % 2)) for number, name in enumerate(names)]
    stays = seed.message(queue, "stays")
    await seed.active(redis, queue, [*tasks, stays], expires_unix=clock.unix + 30)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    outcomes = [
        outcome(kind, seed.lease(queue, made.id, clock.unix + 30), made, clock.unix)
        for kind, made in zip(kinds, tasks, strict=True)
    ]
    calls = frozen.stats.calls
    assert await write(frozen, queue, outcomes) == [WRITTEN] * count
    assert frozen.stats.calls - calls == -(-count // 500)
    found = await seed.look(redis, queue, names)
    assert found.pop("active") == ["stays"]
    assert found.pop("lease") == {"stays": clock.unix + 30}
    assert found.pop("t:stays") == seed.fields(stays, "active", aio_owner=f"{SERVER}/1")
    expected: dict[str, Any] = {}
    sums: Counter[str] = Counter()
    for kind, made in zip(kinds, tasks, strict=True):
        for name, value in after(kind, made, clock).items():
            if isinstance(value, int):
                sums[name] += value
            elif isinstance(value, list):
                expected.setdefault(name, []).extend(value)
            else:
                expected[name] = value if name.startswith("t:") else expected.get(name, {}) | value
    assert found == expected | dict(sums)
    free = [await redis.get(made.unique_key) is None for made in tasks[:64] if made.unique_key]
    assert free == [
        kind in ("done", "complete", "result")
        for kind, made in zip(kinds[:64], tasks[:64], strict=True)
        if made.unique_key
    ]


async def test_requeued_tasks_are_next(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """They enter where tasks are taken, each in front of the one before it."""
    await seed.pending(redis, queue, [seed.message(queue, "waits")])
    tasks = [seed.message(queue, name) for name in "ab"]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    await write(frozen, queue, [Requeue(seed.lease(queue, name, clock.unix + 30)) for name in "ab"])
    assert await redis.lrange(keys.pending(queue), 0, -1) == [b"waits", b"a", b"b"]


async def test_recoveries_are_counted(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Each return from a silent owner counts; a plain one does not."""
    made = seed.message(queue, "a")
    for turn in (1, 2):
        await redis.delete(keys.pending(queue))
        await seed.active(redis, queue, [made], expires_unix=clock.unix + 30)
        for recovered in (True, False):
            await redis.delete(keys.active(queue))
            await redis.lpush(keys.active(queue), "a")
            await redis.zadd(keys.lease(queue), {"a": clock.unix})
            await redis.hset(keys.task(queue, "a"), "aio_owner", f"{SERVER}/1")
            await write(frozen, queue, [Requeue(seed.lease(queue, "a", clock.unix + 30), recovered=recovered)])
        assert await redis.hget(keys.task(queue, "a"), "aio_recovered") == str(turn).encode()


async def test_an_empty_result_is_a_result(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """None leaves the field as the handler wrote it; an empty result overwrites it."""
    tasks = [seed.message(queue, name) for name in "ab"]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    for made in tasks:
        await redis.hset(keys.task(queue, made.id), "result", b"before")
    done = [
        Complete(seed.lease(queue, "a", clock.unix + 30), "", codec.encode_task(tasks[0]), clock.unix + 9, None),
        Complete(seed.lease(queue, "b", clock.unix + 30), "", codec.encode_task(tasks[1]), clock.unix + 9, b""),
    ]
    assert await write(frozen, queue, done) == [WRITTEN] * 2
    assert [await redis.hget(keys.task(queue, name), "result") for name in "ab"] == [b"before", b""]


async def test_the_reason_stands_beside_a_message_that_cannot_hold_it(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """An undecodable message is archived byte for byte, with the reason in a field of ours."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix + 30)
    await redis.hset(keys.task(queue, "a"), "msg", b"\xff")
    assert await write(frozen, queue, [Archive(seed.lease(queue, "a", clock.unix + 30), b"\xff", "why")]) == [WRITTEN]
    found = await seed.look(redis, queue)
    assert found["t:a"] == {"msg": b"\xff", "state": "archived", "aio_reason": "why"}
    assert found["archived"] == {"a": clock.unix}


# -- locks


@pytest.mark.parametrize("kind", ["done", "complete"])
async def test_another_tasks_lock_is_left(frozen: Store, redis: Any, queue: str, clock: FrozenClock, kind: str) -> None:
    """A lock that has expired and been taken by another task, or is no string at all, stays as it is."""
    tasks = [seed.message(queue, name, unique=True) for name in "ab"]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    await redis.set(tasks[0].unique_key, "another")
    await redis.delete(tasks[1].unique_key)
    await redis.rpush(tasks[1].unique_key, "no string")
    outcomes = [outcome(kind, seed.lease(queue, made.id, clock.unix + 30), made, clock.unix) for made in tasks]
    assert await write(frozen, queue, outcomes) == [WRITTEN] * 2
    assert await redis.get(tasks[0].unique_key) == b"another"
    assert await redis.llen(tasks[1].unique_key) == 1


async def test_a_lock_of_another_queue_is_left(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A message can name any key; one in another slot would fail the call for all, so it is left alone, and logged."""
    key = "asynq:{elsewhere}:unique:ty:"
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix + 30)
    assert await write(frozen, queue, [Done(seed.lease(queue, "a", clock.unix + 30), key)]) == [WRITTEN]
    assert key in caplog.text
    assert await seed.look(redis, queue, ["a"]) == SUCCEEDED


# -- whose task it is


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5])
async def test_what_is_not_ours_is_lost(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, kind: str, batch: int
) -> None:
    """A task with another owner, with a lease above ours, in another state, or gone: nothing changes, nothing counts.

    A lease above ours with our owner is a task that a Go server has taken over: its scripts leave our field behind.
    """
    ours = clock.unix + 30
    tasks = {name: seed.message(queue, name) for name in ("other", "go", "unleased", "listless", "gone", "broken")}
    await seed.active(redis, queue, [tasks["other"]], expires_unix=ours, owner=f"{SERVER}/2")
    await seed.active(redis, queue, [tasks["go"]], expires_unix=ours + 60)
    await seed.active(redis, queue, [tasks["unleased"], tasks["listless"], tasks["broken"]], expires_unix=ours)
    await redis.zrem(keys.lease(queue), "unleased")
    await redis.lrem(keys.active(queue), 0, "listless")
    await redis.delete(keys.task(queue, "broken"))
    await redis.rpush(keys.task(queue, "broken"), "no hash")
    await seed.active(redis, queue, [seed.message(queue, f"ok{number}") for number in range(batch)], expires_unix=ours)
    before = await seed.look(redis, queue)
    outcomes = [outcome(kind, seed.lease(queue, made.id, ours), made, clock.unix) for made in tasks.values()]
    assert await write(frozen, queue, outcomes) == [LOST] * len(tasks)
    assert await seed.look(redis, queue, tasks) == before
    # Their neighbours are written, in the same call.
    good = [Done(seed.lease(queue, f"ok{number}", ours)) for number in range(batch)]
    assert await write(frozen, queue, [*outcomes, *good]) == [LOST] * len(tasks) + [WRITTEN] * batch
    found = await seed.look(redis, queue, tasks)
    assert found.pop("processed") == found.pop("processed_on") == batch
    found["active"] = [name for name in before["active"] if not name.startswith("ok")]
    assert found == {name: value for name, value in before.items() if not name.startswith("t:ok")} | {
        "active": found["active"],
        "lease": {name: score for name, score in before["lease"].items() if not name.startswith("ok")},
    }


async def test_a_lower_lease_is_still_ours(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """An extension whose reply was lost need not have arrived: what is not above our highest is ours."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix + 30)
    assert await write(frozen, queue, [Done(seed.lease(queue, "a", clock.unix + 35))]) == [WRITTEN]


@pytest.mark.parametrize("owner", ["", f"{SERVER}/1"])
async def test_a_recoverer_names_the_very_lease(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, owner: str
) -> None:
    """An exact lease wants the score that was seen: one second more, or less, and the task is somebody's."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix)
    before = await seed.look(redis, queue)
    for score in (clock.unix - 1, clock.unix + 1):
        lease = seed.lease(queue, "a", score, owner=owner, exact=True)
        assert await write(frozen, queue, [Requeue(lease)]) == [LOST]
    assert await seed.look(redis, queue) == before
    lease = seed.lease(queue, "a", clock.unix, owner=owner, exact=True)
    assert await write(frozen, queue, [Requeue(lease)]) == [WRITTEN]


async def test_two_recoverers_race_safely(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Both saw the same lease; one writes, the other has lost, and the task is counted once."""
    made = seed.message(queue, "a")
    await seed.active(redis, queue, [made], expires_unix=clock.unix, owner=None)
    leases = [seed.lease(queue, "a", clock.unix, owner="", exact=True) for _ in range(2)]
    verdicts = await asyncio.gather(
        *(write(frozen, queue, [Retry(lease, codec.encode_task(made), clock.unix, failure=True)]) for lease in leases)
    )
    assert sorted(verdict.name for [verdict] in verdicts) == ["LOST", "WRITTEN"]
    assert await seed.counters(redis, queue) == FAILED


@pytest.mark.parametrize("count", [2, 6])
async def test_one_task_twice_in_a_call(frozen: Store, redis: Any, queue: str, clock: FrozenClock, count: int) -> None:
    """The second outcome of one task is lost, in whatever company, and counted once."""
    tasks = [seed.message(queue, str(number)) for number in range(count)]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    outcomes = [Done(seed.lease(queue, made.id, clock.unix + 30)) for made in [*tasks, tasks[0]]]
    assert await finish.finish(frozen, queue, outcomes) == [WRITTEN] * count + [LOST]
    assert await seed.look(redis, queue) == {"processed": count, "processed_on": count}


# -- repeats


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 5])
async def test_a_lost_reply_is_written_once(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, kind: str, count: int
) -> None:
    """The reply is lost; handed in again, the same outcomes are *written*, and nothing is counted twice."""
    tasks = [seed.message(queue, str(number), unique=True) for number in range(count)]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    outcomes = [outcome(kind, seed.lease(queue, made.id, clock.unix + 30), made, clock.unix) for made in tasks]
    await finish.finish(frozen, queue, [Done(seed.lease(queue, "nobody", 0))])  # the node knows the script: no NOSCRIPT
    frozen.faults = lambda name, _keys: Fault.REPLY_LOST if name == "finish" else None
    with pytest.raises(BrokerUnavailableError) as raised:
        await finish.finish(frozen, queue, outcomes)
    assert raised.value.sent
    frozen.faults = None
    before = await seed.look(redis, queue, [made.id for made in tasks])
    clock.advance(1)
    assert await finish.finish(frozen, queue, outcomes) == [WRITTEN] * count
    assert await seed.look(redis, queue, [made.id for made in tasks]) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_that_was_not_sent_is_written_by_the_next(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, kind: str
) -> None:
    """Nothing was sent: nothing is believed to have been written; the next call writes it."""
    made = seed.message(queue, "a")
    await seed.active(redis, queue, [made], expires_unix=clock.unix + 30)
    mine = outcome(kind, seed.lease(queue, "a", clock.unix + 30), made, clock.unix)
    frozen.deadline = 0.5
    frozen.faults = lambda name, _keys: Fault.NOT_SENT if name == "finish" else None
    with pytest.raises(BrokerUnavailableError) as raised:
        await finish.finish(frozen, queue, [mine])
    assert (raised.value.sent, mine.sent) == (False, False)
    frozen.faults = None
    assert await finish.finish(frozen, queue, [mine]) == [WRITTEN]
    assert await finish.finish(frozen, queue, [dataclasses.replace(mine)]) == [LOST]


@pytest.mark.parametrize("kind", ["complete", "retry", "archive", "requeue"])
async def test_a_repeat_that_comes_too_late_is_lost(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, kind: str
) -> None:
    """The first copy never arrived, a Go server has taken the task and written another outcome: ours is lost."""
    made = seed.message(queue, "a")
    other = seed.edited(made, error_msg="asynq: task lease expired", retried=1, last_failed_at=8)
    await seed.waiting(redis, queue, "retry", [(other, clock.unix + 60)], aio_owner=f"{SERVER}/1")
    before = await seed.look(redis, queue)
    mine = outcome(kind, seed.lease(queue, "a", clock.unix + 30), made, clock.unix)
    mine.sent = True
    assert await finish.finish(frozen, queue, [mine]) == [LOST]
    assert await seed.look(redis, queue) == before


# -- counters


async def test_the_days_counters_expire_after_90_days(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """The first count of a day gives the expiry, later ones leave it; the totals never expire."""
    names = [keys.processed(queue), keys.failed(queue)]
    today = [name async for name in redis.scan_iter(match=f"asynq:{{{queue}}}:*", count=10_000)]
    assert today == []
    for turn in range(2):
        await seed.active(redis, queue, [seed.message(queue, str(turn))], expires_unix=clock.unix + 30)
        lease = seed.lease(queue, str(turn), clock.unix + 30)
        await write(frozen, queue, [Archive(lease, codec.encode_task(seed.message(queue, str(turn))))])
        if not turn:
            first = clock.unix + STATISTICS_SECONDS
            clock.advance(5)
    daily = sorted([name async for name in redis.scan_iter(match=f"asynq:{{{queue}}}:*ed:2*", count=10_000)])
    assert len(daily) == 2
    assert [await redis.execute_command("EXPIRETIME", name) for name in daily] == [first, first]
    assert [await redis.ttl(name) for name in names] == [-1, -1]
    assert [int(await redis.get(name)) for name in (*names, *daily)] == [2, 2, 2, 2]


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("total", [COUNTER_MAX, COUNTER_MAX - 511])
async def test_totals_begin_again_at_the_top(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, total: int, count: int
) -> None:
    """At 2^63-1, compared as Go's scripts do in double precision, both totals go back to 1, not 0; the days go on."""
    tasks = [seed.message(queue, str(number)) for number in range(count)]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    await redis.set(keys.processed(queue), total)
    await redis.set(keys.failed(queue), 41)
    outcomes = [Archive(seed.lease(queue, made.id, clock.unix + 30), codec.encode_task(made)) for made in tasks]
    assert await finish.finish(frozen, queue, outcomes) == [WRITTEN] * count
    assert await seed.counters(redis, queue) == dict.fromkeys(
        ("processed", "failed", "processed_on", "failed_on"), count
    )


async def test_a_success_at_the_top(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """From 9223372036854775296 a success leads to 1; `failed` is not touched by it."""
    await seed.active(redis, queue, [seed.message(queue, "a")], expires_unix=clock.unix + 30)
    await redis.set(keys.processed(queue), 9223372036854775296)
    await redis.set(keys.failed(queue), 41)
    assert await write(frozen, queue, [Done(seed.lease(queue, "a", clock.unix + 30))]) == [WRITTEN]
    assert await seed.counters(redis, queue) == {"processed": 1, "failed": 41, "processed_on": 1}


async def test_below_the_top(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """A total that double precision tells from the top is counted up, exactly."""
    tasks = [seed.message(queue, str(number)) for number in range(5)]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    await redis.set(keys.processed(queue), COUNTER_MAX - 4096)
    await write(frozen, queue, [Done(seed.lease(queue, made.id, clock.unix + 30)) for made in tasks])
    assert (await seed.counters(redis, queue))["processed"] == COUNTER_MAX - 4091


# -- the archive


async def test_the_archive_keeps_9999(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """9,998 archived and three more: 9,999 each time; what falls out goes with its hash and the lock it still holds."""
    count = ARCHIVE_SIZE - 2
    old = [seed.message(queue, f"{number:05}", unique=number < 3) for number in range(count)]
    await seed.waiting(redis, queue, "archived", [(made, clock.unix - count + at) for at, made in enumerate(old)])
    await redis.set(old[1].unique_key, "another")
    new = [seed.message(queue, name) for name in "abc"]
    await seed.active(redis, queue, new, expires_unix=clock.unix + 30)
    for number, made in enumerate(new):
        outcome = Archive(seed.lease(queue, made.id, clock.unix + 30), codec.encode_task(made))
        assert await write(frozen, queue, [outcome]) == [WRITTEN]
        assert await redis.zcard(keys.archived(queue)) == ARCHIVE_SIZE - 1
        gone = [not await redis.exists(keys.task(queue, made.id)) for made in old[:3]]
        assert gone == [at < number for at in range(3)]
    assert [await redis.get(made.unique_key) for made in old[:3]] == [None, b"another", old[2].id.encode()]
    assert await redis.zrange(keys.archived(queue), -3, -1) == [b"a", b"b", b"c"]


async def test_many_that_expire_at_once(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """What is older than 90 days goes when the next ones are archived, hashes and all, a thousand a time."""
    cutoff = clock.unix - ARCHIVE_DAYS * 86_400
    old = [seed.message(queue, f"{number:05}") for number in range(9_000)]
    await seed.waiting(redis, queue, "archived", [(made, cutoff - 10) for made in old])
    await seed.waiting(
        redis, queue, "archived", [(seed.message(queue, "at"), cutoff), (seed.message(queue, "young"), cutoff + 1)]
    )
    new = [seed.message(queue, f"n{number}") for number in range(10)]
    await seed.active(redis, queue, new, expires_unix=clock.unix + 30)
    left = []
    for made in new:
        outcome = Archive(seed.lease(queue, made.id, clock.unix + 30), codec.encode_task(made))
        assert await write(frozen, queue, [outcome]) == [WRITTEN]
        left.append(await redis.zcount(keys.archived(queue), "-inf", cutoff))
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    found = await seed.look(redis, queue, [made.id for made in old])
    assert found["archived"].keys() == {"young", *(made.id for made in new)}
    assert not any(f"t:{made.id}" in found for made in old)


async def test_a_batch_larger_than_the_archive_has_room_for(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock
) -> None:
    """500 archived at once onto 9,999: the oldest 500 go."""
    old = [seed.message(queue, f"o{number:05}") for number in range(ARCHIVE_SIZE - 1)]
    await seed.waiting(redis, queue, "archived", [(made, clock.unix - 20_000 + at) for at, made in enumerate(old)])
    new = [seed.message(queue, f"n{number:05}") for number in range(500)]
    await seed.active(redis, queue, new, expires_unix=clock.unix + 30)
    outcomes = [Archive(seed.lease(queue, made.id, clock.unix + 30), codec.encode_task(made)) for made in new]
    assert await finish.finish(frozen, queue, outcomes) == [WRITTEN] * 500
    assert await redis.zcard(keys.archived(queue)) == ARCHIVE_SIZE - 1
    assert await redis.zrange(keys.archived(queue), 0, 0) == [b"o00500"]
    assert await redis.exists(keys.task(queue, "o00499"), keys.task(queue, "o00500")) == 1


# -- damage


@pytest.mark.parametrize(
    ("container", "kind"),
    [
        ("completed", "complete"),
        ("retry", "retry"),
        ("archived", "archive"),
        ("pending", "requeue"),
        ("active", "done"),
    ],
)
async def test_a_damaged_container_changes_nothing(
    frozen: Store, redis: Any, queue: str, clock: FrozenClock, container: str, kind: str
) -> None:
    """Where the container that a task goes to is of a wrong type, the call is refused whole: nobody is half-way."""
    tasks = [seed.message(queue, str(number), unique=True) for number in range(5)]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    key = f"asynq:{{{queue}}}:{container}"
    await redis.delete(key)
    await redis.set(key, "damaged")
    hashes = [await redis.hgetall(keys.task(queue, made.id)) for made in tasks]
    leases = [seed.lease(queue, made.id, clock.unix + 30) for made in tasks]
    outcomes = [outcome("done", lease, made, clock.unix) for lease, made in zip(leases, tasks, strict=True)]
    outcomes[3] = outcome(kind, leases[3], tasks[3], clock.unix)
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        await finish.finish(frozen, queue, outcomes)
    assert [await redis.hgetall(keys.task(queue, made.id)) for made in tasks] == hashes
    assert await redis.zcard(keys.lease(queue)) == 5
    if container != "active":
        assert await redis.llen(keys.active(queue)) == 5


async def test_damaged_counters_do_not_keep_a_task(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """Statistics that cannot be counted up are left as they are; the tasks end all the same."""
    tasks = [seed.message(queue, str(number)) for number in range(2)]
    await seed.active(redis, queue, tasks, expires_unix=clock.unix + 30)
    await redis.set(keys.processed(queue), "many")
    await redis.rpush(keys.failed(queue), "no string")
    outcomes: list[Outcome] = [
        Done(seed.lease(queue, "0", clock.unix + 30)),
        Archive(seed.lease(queue, "1", clock.unix + 30), codec.encode_task(tasks[1])),
    ]
    assert await finish.finish(frozen, queue, outcomes) == [WRITTEN] * 2
    assert not await redis.exists(keys.active(queue), keys.lease(queue), keys.task(queue, "0"))
    assert await redis.get(keys.processed(queue)) == b"many"


# -- hints, chunks, a full Redis


async def test_the_earliest_retry_is_announced(frozen: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
    """A retry that is not later than all others is published, so that forwarders need not look; others are not."""
    heard = 0
    async with asyncio.timeout(20), await frozen.subscribe(keys.DUE_CHANNEL) as subscription:
        for number, seconds in enumerate((90, 100, 80)):
            made = seed.message(queue, str(number))
            await seed.active(redis, queue, [made], expires_unix=clock.unix + 30)
            lease = seed.lease(queue, made.id, clock.unix + 30)
            await write(frozen, queue, [Retry(lease, codec.encode_task(made), clock.unix + seconds, failure=True)])
        # By the node of the queue: the messages of one node keep their order.
        await frozen.call("PUBLISH", keys.DUE_CHANNEL, f"{queue} end", key=keys.pending(queue))
        async for channel, data in subscription:
            if channel == keys.DUE_CHANNEL and data.decode() == queue:
                heard += 1
            elif data.decode() == f"{queue} end":
                break
    assert heard == 2


def test_calls_are_cut_by_number_and_size(queue: str) -> None:
    """500 outcomes or 1 MiB go in a call; what is larger goes alone; order is kept."""
    lease = seed.lease(queue, "a", 1)
    assert [len(part) for part in finish.chunks([Done(lease)] * 1_001)] == [500, 500, 1]
    large = Complete(lease, "", bytes(300_000), 1, bytes(300_000))
    assert [
        len(part) for part in finish.chunks([large, Done(lease), large, Retry(lease, bytes(2 << 20), 1, failure=True)])
    ] == [2, 1, 1]
    assert list(finish.chunks([])) == []


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_full_redis_takes_outcomes(version: servers.Version, kind: str) -> None:
    """Workers drain a full Redis: no outcome is refused, of one task or of many."""
    async with servers.own_standalone(version) as server, Store(server.uri) as store:
        now = int(store.now())
        tasks = [seed.message("q", str(number)) for number in range(6)]
        for made in tasks:
            server.execute("HSET", keys.task("q", made.id), "msg", codec.encode_task(made), "aio_owner", f"{SERVER}/1")
            server.execute("LPUSH", keys.active("q"), made.id)
            server.execute("ZADD", keys.lease("q"), now + 30, made.id)
        server.execute("CONFIG", "SET", "maxmemory", "1")
        outcomes = [outcome(kind, seed.lease("q", made.id, now + 30), made, now) for made in tasks]
        assert await finish.finish(store, "q", outcomes[:1]) == [WRITTEN]
        assert await finish.finish(store, "q", outcomes[1:]) == [WRITTEN] * 5
        assert server.execute("LLEN", keys.active("q")) == server.execute("ZCARD", keys.lease("q")) == 0
