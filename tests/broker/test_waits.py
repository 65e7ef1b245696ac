"""Blocking peeks and subscriptions: what wakes them, and what becomes of them in an outage."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from asynq_aio._broker import waits
from asynq_aio._broker.store import Store
from asynq_aio._broker.waits import GAP
from asynq_aio._config import RedisClientOpt, RedisClusterClientOpt
from asynq_aio._wire.keys import slot
from asynq_aio.errors import BrokerAuthError, BrokerUnavailableError
from tests.broker.scenes import lua, until
from tests.servers import own_cluster, own_standalone

if TYPE_CHECKING:
    from asynq_aio._broker.embedded import EmbeddedRedis

PUSH = lua("push", "return redis.call('LPUSH', KEYS[1], ARGV[1])")


def blocked(server: EmbeddedRedis) -> int:
    """How many clients wait in a blocking command."""
    return int(server.execute("INFO", "clients").partition("blocked_clients:")[2].split()[0])


# Waiters, on every topology


async def test_a_push_wakes_every_waiter_and_stays(store: Store, queue: str) -> None:
    """One push, inside a script: all who wait hear of it, and the list is as it was."""
    key = f"{{{queue}}}:list"
    async with store.waiter(key) as first, store.waiter(key) as second:
        waiting = [asyncio.create_task(waiter.wait(10)) for waiter in (first, second)]
        await asyncio.sleep(0.1)  # not needed: a push before the peek is seen as well
        await store.run(PUSH, [key], ["x"])
        assert await asyncio.gather(*waiting) == [True, True]
        assert await first.wait(10)  # it is still there
    assert await store.call("LRANGE", key, 0, -1, key=key) == [b"x"]


async def test_nothing_comes(store: Store, queue: str) -> None:
    """False at the end of the wait; the next one starts anew."""
    key = f"{{{queue}}}:list"
    async with store.waiter(key) as waiter:
        assert not await waiter.wait(0.05)
        await store.call("RPUSH", key, "x", key=key)
        assert await waiter.wait(10)


async def test_a_wait_that_is_cancelled_leaves_no_reply_behind(store: Store, queue: str) -> None:
    """What it would have been told is not what the next wait is told."""
    key = f"{{{queue}}}:list"
    async with store.waiter(key) as waiter:
        assert not await waiter.wait(0.05)  # connected
        for _ in range(5):
            leaving = asyncio.create_task(waiter.wait(10))
            await asyncio.sleep(0.01)
            leaving.cancel()
            await store.call("LPUSH", key, "x", key=key)
            await store.call("DEL", key, key=key)
            assert not await waiter.wait(0.05)


# Waiters, in trouble


async def test_a_waiter_outlives_an_outage() -> None:
    """While nobody is there it says "look yourself"; when somebody is there again, it waits again."""
    async with own_standalone() as server, Store(server.uri) as store:
        await store.ping()
        async with store.waiter("list") as waiter:
            waiting = asyncio.create_task(waiter.wait(10))
            await until(lambda: blocked(server) == 1)
            server.kill()
            assert not await waiting
            assert not await waiter.wait(0.05)
            await asyncio.to_thread(server.restart)
            waiting = asyncio.create_task(waiter.wait(10))
            await store.call("LPUSH", "list", "x", key="list")
            assert await waiting or await waiter.wait(10)


async def test_a_waiter_on_a_server_that_stands_still() -> None:
    """No reply to BLMOVE in time: the wait ends by itself, and later ones work."""
    async with own_standalone() as server:
        options = RedisClientOpt(server.addr, read_timeout=timedelta(seconds=0.2))
        async with Store(options) as store, store.waiter("list") as waiter:
            assert not await waiter.wait(0.05)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                assert not await waiter.wait(0.05)
                assert not await waiter.wait(0.05)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await store.call("LPUSH", "list", "x", key="list")
            await until_true(waiter)


async def until_true(waiter: waits.Waiter) -> None:
    """As a duty does: wait again and again."""
    while not await waiter.wait(1):
        pass


async def test_a_key_of_another_kind() -> None:
    """WRONGTYPE is no reason to fail: whoever looks will be told."""
    async with own_standalone() as server, Store(server.uri) as store, store.waiter("list") as waiter:
        await store.call("SET", "list", "x", key="list")
        assert not await waiter.wait(10)


async def test_a_peek_that_redis_refuses() -> None:
    """BLMOVE is a write: out of memory, or not permitted, the waiter looks instead, so that workers go on."""
    async with own_standalone() as server:
        server.execute("ACL", "SETUSER", "shy", "on", ">pw", "~*", "+@all", "-blmove")
        options = RedisClientOpt(server.addr, username="shy", password="pw")
        store, other = Store(server.uri), Store(options)
        async with store, other, store.waiter("list") as full, other.waiter("list") as shy:
            assert not await shy.wait(10)
            server.execute("LPUSH", "list", "x")
            server.execute("CONFIG", "SET", "maxmemory", 1)
            assert await full.wait(10)
            assert await shy.wait(10)
            server.execute("DEL", "list")
            assert not await full.wait(0.05)
            assert not await shy.wait(0.05)
            server.execute("CONFIG", "SET", "maxmemory", 0)
            waiting = asyncio.create_task(full.wait(10))
            await until(lambda: blocked(server) == 1)
            server.execute("LPUSH", "list", "x")
            assert await waiting


async def test_a_waiter_follows_its_slot() -> None:
    """A slot that moves under a wait: pushes on the other side are heard of, without a new waiter."""
    own = own_cluster(masters=2, replicas=0)
    async with own as cluster, Store(cluster.uri) as store, store.waiter("{move}:list") as waiter:
        owner = cluster.owner(slot("{move}"))
        target = next(node for node in cluster.masters() if node is not owner)
        waiting = asyncio.create_task(waiter.wait(10))
        await until(lambda: blocked(owner) == 1)
        await cluster.move_slot(slot("{move}"), target)
        assert not await waiting  # by MOVED, at once
        waiting = asyncio.create_task(waiter.wait(10))
        await until(lambda: blocked(target) == 1)
        await store.call("LPUSH", "{move}:list", "x", key="{move}:list")
        assert await waiting


async def test_a_waiter_at_an_open_slot() -> None:
    """ASK: short waits, and after the move the next one finds what was pushed."""
    own = own_cluster(masters=2, replicas=0)
    async with own as cluster, Store(cluster.uri) as store, store.waiter("{move}:list") as waiter:
        target = next(node for node in cluster.masters() if node is not cluster.owner(slot("{move}")))
        source = cluster.begin_move(slot("{move}"), target)
        assert not await waiter.wait(10)
        assert waiter._moving
        await store.call("LPUSH", "{move}:list", "x", key="{move}:list")  # by ASKING: it is at the target
        assert target.execute("CLUSTER", "COUNTKEYSINSLOT", slot("{move}")) == 1
        cluster.finish_move(slot("{move}"), source, target)
        await until_true(waiter)
        assert not waiter._moving


async def test_a_store_that_closes_ends_waits() -> None:
    """A wait under way ends, and the next one says why."""
    async with own_standalone() as server:
        store = Store(server.uri)
        waiter = store.waiter("list")
        waiting = asyncio.create_task(waiter.wait(10))
        await until(lambda: blocked(server) == 1)
        await store.aclose()
        assert not await waiting
        with pytest.raises(BrokerUnavailableError, match="closed"):
            await waiter.wait(1)


# Subscriptions


async def test_messages_come_with_their_channel(store: Store, queue: str) -> None:
    """All of them; in order as far as Redis keeps one: in a cluster they come by way of several nodes."""
    async with await store.subscribe(f"{queue}:a", f"{queue}:b") as subscription:
        for n in range(10):
            await store.call("PUBLISH", f"{queue}:{'ab'[n % 2]}", n, key=None)
        heard = [await anext(subscription) for _ in range(10)]
    assert (sorted(heard) if store.is_cluster else heard) == sorted(
        ((f"{queue}:{'ab'[n % 2]}", str(n).encode()) for n in range(10)),
        key=lambda message: message if store.is_cluster else message[1],
    )


async def test_a_listener_that_is_cancelled_loses_nothing(store: Store, queue: str) -> None:
    """A listener with a timeout of its own may come back."""
    async with await store.subscribe(queue) as subscription:
        heard: list[tuple[str, bytes]] = []
        for n in range(100):
            await store.call("PUBLISH", queue, n, key=None)
            listening = asyncio.create_task(anext(subscription))
            for _ in range(n % 5):
                await asyncio.sleep(0)
            listening.cancel()
            (outcome,) = await asyncio.gather(listening, return_exceptions=True)
            if not isinstance(outcome, BaseException):
                heard.append(outcome)
        assert len(heard) < 100  # some were cancelled
        while len(heard) < 100:
            heard.append(await anext(subscription))
    assert sorted(heard) == sorted((queue, str(n).encode()) for n in range(100))


async def test_a_lost_subscription_comes_back_with_a_gap() -> None:
    """Its connection is killed: the listener is told that something may have been missed, and then goes on."""
    async with own_standalone() as server, Store(server.uri) as store:
        subscription = await store.subscribe("channel")
        for _ in range(3):
            server.execute("CLIENT", "KILL", "TYPE", "pubsub")
            assert await anext(subscription) == GAP
            await store.call("PUBLISH", "channel", "x", key=None)
            assert await anext(subscription) == ("channel", b"x")


async def test_a_silent_node_is_left_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """When idle it asks whether anybody is there; without an answer it subscribes elsewhere."""
    monkeypatch.setattr(waits, "IDLE_SECONDS", 0.1)
    async with own_cluster(masters=2, replicas=0) as cluster:
        options = RedisClusterClientOpt(addrs=cluster.addrs, read_timeout=timedelta(seconds=0.5))
        async with Store(options) as store:
            subscription = await store.subscribe("channel")
            assert subscription._address is not None
            still = cluster.node_at(subscription._address[1])
            other = next(node for node in cluster.nodes if node is not still)
            listening = asyncio.create_task(anext(subscription))
            await until(lambda: int(still.execute("INFO", "commandstats").count("cmdstat_ping")) == 1)
            assert not listening.done()  # an answer to the ping is no message
            os.kill(still.pid, signal.SIGSTOP)
            try:
                assert await listening == GAP
                other.execute("PUBLISH", "channel", "x")
                assert await anext(subscription) == ("channel", b"x")
            finally:
                os.kill(still.pid, signal.SIGCONT)


async def test_no_subscription_until_the_deadline() -> None:
    """An error that names the cause; a refusal is one at once."""
    async with own_standalone() as gone:
        pass
    async with Store(RedisClientOpt(gone.addr, deadline=timedelta(seconds=0.3))) as store:
        with pytest.raises(BrokerUnavailableError, match=r"no subscription within 0\.3 s: .*refused"):
            await store.subscribe("channel")
    async with own_standalone(settings={"requirepass": "right"}) as server, Store(server.uri) as store:
        with pytest.raises(BrokerAuthError, match="give a password"):
            await store.subscribe("channel")


async def test_a_store_that_closes_ends_subscriptions() -> None:
    """The iteration ends as one that has come to its end."""
    async with own_standalone() as server:
        store = Store(server.uri)
        subscription = await store.subscribe("channel")
        heard: list[tuple[str, bytes]] = []

        async def listen() -> None:
            heard.extend([message async for message in subscription])

        listening = asyncio.create_task(listen())
        await until(lambda: "channel" in server.execute("PUBSUB", "CHANNELS"))
        await store.aclose()
        await listening
        assert heard == []
