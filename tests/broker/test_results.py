"""The result of a task, written while it runs; a task that is gone does not come back by it."""

from __future__ import annotations

from typing import Any

import pytest

from asynq_aio import BrokerError, BrokerFullError, TaskNotFoundError
from asynq_aio._broker import results
from asynq_aio._broker.store import Store
from asynq_aio._wire import codec, keys
from tests import seed, servers


@pytest.mark.parametrize("data", [b"", b"half", b"\x00\xff", bytes(1 << 20)])
async def test_a_result_replaces_the_last(frozen: Store, redis: Any, queue: str, data: bytes) -> None:
    """Any bytes, empty ones too; nothing else of the task is touched."""
    made = seed.message(queue, "a")
    await seed.active(redis, queue, [made], expires_unix=9)
    before = await seed.look(redis, queue)
    await results.write(frozen, queue, "a", b"first")
    await results.write(frozen, queue, "a", data)
    assert await seed.look(redis, queue) == before | {"t:a": {**before["t:a"], "result": data}}


@pytest.mark.parametrize("stub", [False, True])
async def test_a_task_that_is_gone_stays_gone(frozen: Store, redis: Any, queue: str, stub: bool) -> None:
    """F28: no hash is made for it, and one without a message is no task."""
    if stub:
        await redis.hset(keys.task(queue, "a"), "state", "active")
    with pytest.raises(TaskNotFoundError) as raised:
        await results.write(frozen, queue, "a", b"late")
    assert (raised.value.queue, raised.value.task_id) == (queue, "a")
    assert await redis.hgetall(keys.task(queue, "a")) == ({b"state": b"active"} if stub else {})


async def test_damage_is_an_error(frozen: Store, redis: Any, queue: str) -> None:
    """A key of a wrong type is left as it is, and the caller is told."""
    await redis.rpush(keys.task(queue, "a"), "no hash")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        await results.write(frozen, queue, "a", b"data")


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_full_redis_refuses_results(version: servers.Version) -> None:
    """A result is what people add: with memory full they are told, and the task is as it was."""
    async with servers.own_standalone(version) as server, Store(server.uri) as store:
        server.execute("HSET", keys.task("q", "a"), "msg", codec.encode_task(seed.message("q", "a")))
        server.execute("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(BrokerFullError):
            await results.write(store, "q", "a", b"data")
        assert server.execute("HKEYS", keys.task("q", "a")) == ["msg"]
