"""The door: what goes through it on every topology, and what it answers when asked wrongly."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from asynq_aio._broker import store as store_module
from asynq_aio._broker.store import Fault, Store
from asynq_aio._clock import SystemClock
from asynq_aio._config import RedisClientOpt
from asynq_aio.errors import BrokerError, BrokerUnavailableError, ConfigError, OutcomeUnknownError
from tests.broker.scenes import COUNT, ONCE, all_given_back, until
from tests.servers import own_standalone

if TYPE_CHECKING:
    from collections.abc import Sequence


async def test_scripts_and_commands(store: Store, queue: str) -> None:
    """Replies are what Redis sent: bytes, numbers, None, lists; str, bytes, int and float arguments go."""
    key = f"{{{queue}}}:k"
    assert await store.run(ONCE, [key], ["token"]) == [b"token", 1]
    assert await store.run(ONCE, [key.encode()], [b"token"]) == [b"token", 0]
    assert await store.call("HSET", key, "float", 1.5, "int", -7, key=key) == 2
    assert await store.call("HMGET", key, "float", "int", "no", key=key) == [b"1.5", b"-7", None]
    assert await store.call("DEL", key, key=key) == 1
    await store.ping()


async def test_what_the_server_says_of_itself(store: Store, topology: str) -> None:
    """Kind, version, role and memory policy."""
    facts = await store.check()
    kind, _, version = topology.partition("-")
    assert facts.is_cluster == store.is_cluster == (kind == "cluster")
    assert f"{facts.server}{facts.version.partition('.')[0]}" == version
    assert facts.role == "master"
    assert facts.maxmemory_policy == "noeviction"


async def test_many_callers_share_the_lanes(store: Store, queue: str) -> None:
    """A thousand calls at once to keys of many slots: a connection per node, each reply its caller's own."""
    calls = [store.run(ONCE, [f"{{{queue}{n}}}"], [str(n)]) for n in range(1000)]
    assert await asyncio.gather(*calls) == [[str(n).encode(), 1] for n in range(1000)]
    assert store.stats.dials <= 3
    await all_given_back(store)


async def test_large_calls_and_leases_have_their_own_lanes(store: Store, queue: str) -> None:
    """A call over 256 KiB does not stand in the way of small ones, nor do they stand in the way of a lease."""
    key = f"{{{queue}}}"
    await store.ready()
    await store.call("GET", key, key=key)
    dials = store.stats.dials
    value = bytes(1 << 20)
    await asyncio.gather(*(store.call("SET", f"{key}:{n}", value, key=key) for n in range(8)))
    assert store.stats.dials == dials + 1
    await store.call("ZADD", f"{key}:lease", 1, "x", key=key, lane="lease")
    assert store.stats.dials == dials + 2
    assert await store.call("GET", f"{key}:0", key=key, lane="large") == value
    assert store.stats.dials == dials + 2


# Faults that tests inject


async def test_faults(store: Store, queue: str) -> None:
    """Not sent: repeated. Reply lost: repeated if the script knows its repeat, else the caller is told."""
    key = f"{{{queue}}}"
    faults: list[Fault | None] = []
    seen: list[tuple[str, Sequence[str | bytes]]] = []

    def inject(name: str, keys: Sequence[str | bytes]) -> Fault | None:
        seen.append((name, keys))
        return faults.pop(0) if faults else None

    await store.ready()
    await store.run(COUNT, [key], ["known"])  # no NOSCRIPT from here on
    repeats = store.stats.repeats
    store.faults = inject
    faults[:] = [Fault.NOT_SENT, Fault.NOT_SENT]
    assert await store.run(COUNT, [key], ["a"], repeatable=False) == [b"a", 1]
    faults[:] = [Fault.REPLY_LOST]
    assert await store.run(COUNT, [key], ["b"]) == [b"b", 2]
    faults[:] = [Fault.REPLY_LOST]
    with pytest.raises(OutcomeUnknownError, match=r"count was sent to .* its reply was lost"):
        await store.run(COUNT, [key], ["c"], repeatable=False)
    assert await store.call("HGET", key, "c", key=key) == b"1"
    assert seen == [("count", [key])] * 6 + [("HGET", (key,))]
    assert (store.stats.repeats - repeats, store.stats.lost) == (3, 2)
    await all_given_back(store)


# Deadlines


async def test_a_deadline_of_the_call() -> None:
    """A server that does not answer: the error says how long was waited, for whom, and that something was sent."""
    async with own_standalone() as server, Store(server.uri) as store:
        await store.run(ONCE, ["k"], ["x"])
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(
                BrokerUnavailableError, match=rf"once within 0\.2 s: {server.addr} has not answered"
            ) as caught:
                await store.run(ONCE, ["k"], ["y"], deadline=0.2)
            assert caught.value.sent
            with pytest.raises(OutcomeUnknownError, match="it may have run, or not"):
                await store.run(COUNT, ["k"], ["y"], deadline=0.2, repeatable=False)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert await store.run(ONCE, ["k"], ["z"]) == [b"z", 1]
        await all_given_back(store)


async def test_the_deadline_of_the_connection() -> None:
    """Calls that give none are settled by the lane, without a timer each."""
    async with own_standalone() as server:
        options = RedisClientOpt(server.addr, deadline=timedelta(seconds=0.5))
        async with Store(options) as store:
            await store.run(ONCE, ["k"], ["x"])
            os.kill(server.pid, signal.SIGSTOP)
            try:
                calls = [store.run(ONCE, ["k"], [str(n)]) for n in range(100)]
                errors = await asyncio.gather(*calls, return_exceptions=True)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            assert {type(error) for error in errors} == {BrokerUnavailableError}
            assert all(isinstance(error, BrokerUnavailableError) and error.sent for error in errors)
            assert await store.run(ONCE, ["k"], ["z"]) == [b"z", 1]


# One loop, one life


def test_another_event_loop_is_refused() -> None:
    """With a text that says what to do; the loop that it belongs to goes on."""

    async def scene(uri: str) -> Store:
        store = Store(uri)
        await store.ping()
        outcome: list[BaseException] = []

        def elsewhere() -> None:
            try:
                asyncio.run(store.ping())
            except ConfigError as exc:
                outcome.append(exc)

        await asyncio.to_thread(elsewhere)
        assert "make one client for each event loop" in str(outcome[0])
        await store.ping()
        await store.aclose()
        return store

    async def whole() -> None:
        async with own_standalone() as server:
            await scene(server.uri)

    asyncio.run(whole())


async def test_close_settles_everything() -> None:
    """Calls under way end with an error that says so, nothing is left running, and a second close is none."""
    async with own_standalone() as server:
        store = Store(server.uri)
        await store.ready()
        before = asyncio.all_tasks()
        await store.waiter("k").wait(0.01)
        await store.subscribe("channel")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            calls = [asyncio.create_task(store.run(ONCE, ["k"], [str(n)])) for n in range(10)]
            calls += [asyncio.create_task(store.run(COUNT, ["k"], ["x"], repeatable=False))]
            await until(lambda: all(lane.in_flight[0] == 11 for lane in store.lanes))
            await store.aclose()
        finally:
            os.kill(server.pid, signal.SIGCONT)
        *ended, unknown = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in ended} == {BrokerUnavailableError}
        assert "was closed" in str(ended[0])
        assert isinstance(unknown, OutcomeUnknownError)
        assert asyncio.all_tasks() <= before
        await store.aclose()
        with pytest.raises(BrokerUnavailableError, match="was closed"):
            await store.ping()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gc.collect()


async def test_close_finds_calls_that_wait_to_repeat() -> None:
    """Calls that back off, and those that wait for the topology, end as well, and open nothing anew."""
    async with own_standalone() as gone:
        pass
    for uri in (gone.uri, f"redis-cluster://{gone.addr}", f"redis-sentinel://{gone.addr}/0?master=mymaster"):
        before = asyncio.all_tasks()
        store = Store(uri)
        calls = [asyncio.create_task(store.call("GET", "k", key="k")) for _ in range(5)]
        waiter = store.waiter("k")
        waiting = asyncio.create_task(waiter.wait(10))
        subscribing = asyncio.create_task(store.subscribe("channel"))
        await until(lambda store=store: store.stats.repeats > 10)  # type: ignore[misc]
        await store.aclose()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in errors} == {BrokerUnavailableError}
        assert not await waiting
        with pytest.raises(BrokerUnavailableError):
            await subscribing
        assert store.lanes == []
        assert asyncio.all_tasks() == before


async def test_a_store_that_was_never_used_closes() -> None:
    """No I/O before the first call: not even the address is looked at."""
    await Store("redis://nowhere.invalid:1").aclose()


# Checks and the clock


async def test_a_server_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with its version, and with the oldest that will do."""
    monkeypatch.setattr(store_module, "_OLDEST", {"redis": (99, 0), "valkey": (99, 1)})
    async with own_standalone() as server, Store(server.uri) as store:
        with pytest.raises(BrokerError, match=r"runs valkey 9\.\S+, which is too old: expected 99\.1 or later"):
            await store.check()


class _Ahead(SystemClock):
    """An hour ahead."""

    def time_ns(self) -> int:
        return time.time_ns() + 3600 * 10**9


class _Fixed:
    """A clock that a test moves."""

    def time_ns(self) -> int:
        return 100 * 10**9

    def monotonic(self) -> float:
        return 0.0


async def test_the_clock_is_that_of_redis(caplog: pytest.LogCaptureFixture) -> None:
    """A host whose clock is wrong writes right times, and is told once; a test's clock is believed."""
    async with own_standalone() as server:
        async with Store(server.uri, clock=_Ahead()) as store:
            await store.ready()
            assert abs(store.now() - time.time()) < 5
            assert abs(store.now_ns() - time.time_ns()) < 5e9
        async with Store(server.uri, clock=_Fixed()) as store:
            await store.ready()
            await store.ping()
            assert (store.now(), store.now_ns()) == (100.0, 100 * 10**9)
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "its clock is -3600.0 s off" in warned[0].getMessage()
