"""Puts a queue into a state by plain commands, as Go's programs would have left it, and reads what stands there.

task = seed.message(queue, "a")
await seed.active(redis, queue, [task], owner="h:1:s/1", expires_unix=clock.unix + 30)
...
assert await seed.look(redis, queue) == {"retry": {"a": clock.unix + 60}, "t:a": seed.fields(task, "retry")}
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from asynq_aio._broker.enqueue import Entry
from asynq_aio._broker.leases import Lease
from asynq_aio._options import NewTask
from asynq_aio._task import TaskState
from asynq_aio._wire import codec, keys
from asynq_aio._wire.messages import TaskMessage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "SERVER",
    "active",
    "counters",
    "edited",
    "entry",
    "fields",
    "hashes",
    "lease",
    "look",
    "message",
    "pending",
    "unique",
    "waiting",
]

SERVER = "host:1:server"
"""`<host>:<pid>:<server id>` of who claims in these tests."""

_ZSETS = ("lease", "scheduled", "retry", "archived", "completed", "aio:ghost")
_COUNTERS = ("processed", "failed")
_MANY = 1_000


# -- what to write


def message(queue: str, task_id: str, *, payload: bytes = b"", unique: bool = False, **given: Any) -> TaskMessage:
    """A task's message; with a lock, each ID has its own."""
    task_type = given.pop("type", "ty")
    if unique:
        payload = payload or task_id.encode()
        given["unique_key"] = keys.unique(queue, task_type, payload)
    return TaskMessage(
        type=task_type, payload=payload, id=task_id, queue=queue, **{"retry": 25, "timeout": 1800, **given}
    )


def entry(
    queue: str, task_id: str, *, due_ns: int = 0, group: str = "", unique_ttl: int = 0, payload: bytes = b""
) -> Entry:
    """A task on its way into the queue: scheduled if it has a due time, else into its group, else pending."""
    made = message(queue, task_id, payload=payload, unique=bool(unique_ttl), group_key=group)
    state = TaskState.SCHEDULED if due_ns else TaskState.AGGREGATING if group else TaskState.PENDING
    return Entry(NewTask(made, state, due_ns, unique_ttl), codec.encode_task(made))


def lease(queue: str, task_id: str, expires_unix: int, *, owner: str = f"{SERVER}/1", exact: bool = False) -> Lease:
    """What the holder of a task knows of it."""
    return Lease(queue, task_id, owner, expires_unix, exact=exact)


# -- into Redis


async def pending(redis: Any, queue: str, messages: Sequence[TaskMessage], *, since_ns: int | None = None) -> None:
    """Tasks that wait; the first one is the oldest."""
    extra = {} if since_ns is None else {"pending_since": since_ns}
    await hashes(redis, queue, messages, "pending", **extra)
    await _many(redis.lpush, keys.pending(queue), [made.id for made in messages])


async def active(
    redis: Any, queue: str, messages: Sequence[TaskMessage], *, expires_unix: int, owner: str | None = f"{SERVER}/1"
) -> None:
    """Tasks that somebody works on; `owner` None: a Go server."""
    await hashes(redis, queue, messages, "active", **({} if owner is None else {"aio_owner": owner}))
    await _many(redis.lpush, keys.active(queue), [made.id for made in messages])
    await _scores(redis, keys.lease(queue), {made.id: expires_unix for made in messages})


async def waiting(redis: Any, queue: str, state: str, tasks: Iterable[tuple[TaskMessage, int]], **extra: Any) -> None:
    """Tasks in scheduled, retry, archived or completed, each with its score in Unix seconds."""
    listed = list(tasks)
    await hashes(redis, queue, [made for made, _ in listed], state, **extra)
    await _scores(redis, keys.of_state(queue, TaskState(state)), {made.id: score for made, score in listed})


async def hashes(redis: Any, queue: str, messages: Iterable[TaskMessage], state: str, **extra: Any) -> None:
    """The hashes alone, and the locks of those that have one."""
    async with redis.pipeline(transaction=False) as batch:
        for made in messages:
            stored = {"msg": codec.encode_task(made), "state": state, **extra}
            if made.unique_key:
                stored["unique_key"] = made.unique_key
                batch.set(made.unique_key, made.id, ex=3600)
            batch.hset(keys.task(queue, made.id), mapping=stored)
        await batch.execute()


async def _many(command: Any, key: str, values: Sequence[str]) -> None:
    for first in range(0, len(values), _MANY):
        await command(key, *values[first : first + _MANY])


async def _scores(redis: Any, key: str, scores: Mapping[str, int]) -> None:
    items = list(scores.items())
    for first in range(0, len(items), _MANY):
        await redis.zadd(key, dict(items[first : first + _MANY]))


# -- out of Redis


def fields(made: TaskMessage, state: str, /, **extra: Any) -> dict[str, str | bytes]:
    """What the hash of this task holds in this state, as `look` gives it."""
    stored: dict[str, str | bytes] = {"msg": codec.encode_task(made), "state": state}
    if made.unique_key:
        stored["unique_key"] = made.unique_key
    return stored | {name: value if isinstance(value, bytes) else str(value) for name, value in extra.items()}


async def look(redis: Any, queue: str, task_ids: Iterable[str] = ()) -> dict[str, Any]:
    """What the queue consists of: its containers, groups and counters, and the hash of each of its tasks as `t:<id>`.

    `task_ids`: hashes to be read beside those of all IDs found. What is empty or absent is left out; scores and
    counters are int, `msg` and `result` bytes, all else is text.
    """
    found: dict[str, Any] = {}
    for name in ("pending", "active"):
        found[name] = _texts(await redis.lrange(f"asynq:{{{queue}}}:{name}", 0, -1))
    for name in _ZSETS:
        found[name] = await _members(redis, f"asynq:{{{queue}}}:{name}")
    found["groups"] = sorted(_texts(await redis.smembers(keys.groups(queue))))
    ids = {*task_ids, *(task_id for container in found.values() for task_id in container)} - set(found["groups"])
    for group in found["groups"]:
        found[f"g:{group}"] = await _members(redis, keys.group(queue, group))
        ids.update(found[f"g:{group}"])
    listed = sorted(ids)
    async with redis.pipeline(transaction=False) as batch:
        for task_id in listed:
            batch.hgetall(keys.task(queue, task_id))
        raw = await batch.execute(raise_on_error=False)
    for task_id, stored in zip(listed, raw, strict=True):
        if isinstance(stored, Exception):
            found[f"t:{task_id}"] = "no hash"
            continue
        found[f"t:{task_id}"] = {
            name.decode(): value if name in (b"msg", b"result") else value.decode() for name, value in stored.items()
        }
    found |= await counters(redis, queue)
    return {name: value for name, value in found.items() if value}


async def counters(redis: Any, queue: str) -> dict[str, int]:
    """`processed` and `failed`, of all time and, as `processed_on` and `failed_on`, of today; those that are there."""
    today = datetime.now(UTC).date().isoformat()
    found = {}
    for name in _COUNTERS:
        for shown, key in ((name, name), (f"{name}_on", f"{name}:{today}")):
            count = await redis.get(f"asynq:{{{queue}}}:{key}")
            if count is not None:
                found[shown] = int(count)
    return found


async def unique(redis: Any, made: TaskMessage) -> tuple[str, int] | None:
    """(holder, seconds left) of the task's lock; None: it is free."""
    holder = await redis.get(made.unique_key)
    return None if holder is None else (holder.decode(), await redis.ttl(made.unique_key))


def edited(made: TaskMessage, **changes: Any) -> TaskMessage:
    """The message with these fields changed."""
    return dataclasses.replace(made, **changes)


async def _members(redis: Any, key: str) -> dict[str, int]:
    return {
        member.decode(errors="surrogateescape"): int(score)
        for member, score in await redis.zrange(key, 0, -1, withscores=True)
    }


def _texts(raw: Iterable[bytes]) -> list[str]:
    return [text.decode(errors="surrogateescape") for text in raw]
