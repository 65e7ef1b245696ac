"""Servers and their running tasks, as people see them: there while the server says so, gone with it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio._broker.presence import Presence
from asynq_aio._broker.store import Store
from asynq_aio._wire import keys
from tests import servers

if TYPE_CHECKING:
    from tests.clock import FrozenClock


@pytest.fixture
def presence(frozen: Store) -> Presence:
    """The entry of a server that nobody else has."""
    return make(frozen)


def make(store: Store) -> Presence:
    """The entry of a new server."""
    server_id = str(uuid.uuid4())
    return Presence(store, keys.server("host", 1, server_id), keys.workers("host", 1, server_id))


async def state(redis: Any, presence: Presence) -> dict[str, Any]:
    """What people see of it."""
    return {
        "server": await redis.get(presence.server_key),
        "workers": await redis.hgetall(presence.workers_key),
        "server listed until": await redis.zscore(keys.SERVERS, presence.server_key),
        "workers listed until": await redis.zscore(keys.WORKERS, presence.workers_key),
    }


async def test_an_entry_lives_for_ten_seconds(redis: Any, presence: Presence, clock: FrozenClock) -> None:
    """Server and workers are written whole each time, with 10 s to live; both are listed until then."""
    await presence.write(b"info", {"a": b"1", "b": b"2"})
    assert await state(redis, presence) == {
        "server": b"info",
        "workers": {b"a": b"1", b"b": b"2"},
        "server listed until": clock.unix + 10,
        "workers listed until": clock.unix + 10,
    }
    for name in (presence.server_key, presence.workers_key):
        assert 8 <= await redis.ttl(name) <= 10
    clock.advance(5)
    await presence.write(b"later", {"b": b"2"})
    assert await state(redis, presence) == {
        "server": b"later",
        "workers": {b"b": b"2"},
        "server listed until": clock.unix + 10,
        "workers listed until": clock.unix + 10,
    }


async def test_an_idle_server_has_no_workers(frozen: Store, redis: Any, presence: Presence, clock: FrozenClock) -> None:
    """Without running tasks there is no workers key, though it is listed; idle on, an entry is three plain calls."""
    await presence.write(b"info", {"a": b"1"})
    await presence.write(b"idle", {})
    assert (await state(redis, presence))["workers"] == {}
    scripts: list[str] = []
    frozen.faults = lambda name, _keys: scripts.append(name)
    await presence.write(b"idle", {})
    assert sorted(scripts) == ["SET", "ZADD", "ZADD"]
    assert await state(redis, presence) == {
        "server": b"idle",
        "workers": {},
        "server listed until": clock.unix + 10,
        "workers listed until": clock.unix + 10,
    }
    assert 8 <= await redis.ttl(presence.server_key) <= 10
    await presence.write(b"busy", {"a": b"1"})
    assert (await state(redis, presence))["workers"] == {b"a": b"1"}


async def test_what_another_process_left_goes(redis: Any, presence: Presence) -> None:
    """The first entry is written whole: workers of a former server of that name are not kept."""
    await redis.hset(presence.workers_key, "old", "1")
    await presence.write(b"info", {})
    assert (await state(redis, presence))["workers"] == {}


async def test_many_workers(redis: Any, presence: Presence) -> None:
    """However many tasks run, all are shown."""
    workers = {f"{number}": b"w" for number in range(5_000)}
    await presence.write(b"info", workers)
    assert await redis.hlen(presence.workers_key) == 5_000


async def test_a_server_that_is_gone_leaves_nothing(redis: Any, presence: Presence) -> None:
    """Cleared, neither keys nor list entries are left; clearing twice is no error."""
    await presence.write(b"info", {"a": b"1"})
    for _ in range(2):
        await presence.clear()
        assert await state(redis, presence) == {
            "server": None,
            "workers": {},
            "server listed until": None,
            "workers listed until": None,
        }


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_full_redis_shows_its_servers(version: servers.Version) -> None:
    """With memory full, servers stay visible, idle or busy: silence would look like death."""
    async with servers.own_standalone(version) as server, Store(server.uri) as store:
        server.execute("CONFIG", "SET", "maxmemory", "1")
        presence = make(store)
        for workers in ({}, {}, {"a": b"1"}):
            await presence.write(b"info", workers)
            assert server.execute("GET", presence.server_key) == "info"
            assert server.execute("HLEN", presence.workers_key) == len(workers)
            assert server.execute("ZCARD", keys.SERVERS) == server.execute("ZCARD", keys.WORKERS) == 1
