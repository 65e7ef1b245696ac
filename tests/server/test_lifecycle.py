"""A server from new to closed: who may start it, what it shows of itself, how it ends, and what it ends for."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from asynq_aio import (
    AsyncServer,
    BrokerAuthError,
    BrokerError,
    Client,
    ConfigError,
    EmbeddedRedis,
    RedisClientOpt,
    ServerClosedError,
    ServerStateError,
    Task,
)
from asynq_aio._wire import codec, keys
from tests import servers
from tests.server.look import Counts, counts, drained, stored, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from asynq_aio._wire.messages import ServerInfo

pytestmark = pytest.mark.timeout(120)

SECOND = timedelta(seconds=1)


async def nothing(_task: Task) -> None:
    """A handler."""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def shown(redis: Any, server: AsyncServer) -> ServerInfo | None:
    """The server's entry as others read it."""
    encoded = await redis.get(keys.server(server.host, server.pid, server.server_id))
    return None if encoded is None else codec.decode_server_info(encoded)


def why(server: AsyncServer) -> str:
    """Why it is not healthy."""
    return server.unhealthy_reason or ""


# --- states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", servers.TOPOLOGIES, indirect=True)
async def test_from_new_to_closed(uri: str, queue: str, redis: Any) -> None:
    """Its states, its entry in Redis, its health; closed it is in no list, and does not start again."""
    server = AsyncServer(uri, queues={queue: 2}, concurrency=3)
    assert (server.state, server.healthy) == ("new", False)
    assert "new" in why(server)
    async with server.running(nothing):
        assert server.state == "active"
        await until(lambda: server.healthy)
        assert why(server) == ""
        await server.ping()
        info = await shown(redis, server)
        assert info is not None
        assert (info.host, info.pid, info.server_id) == (server.host, server.pid, server.server_id)
        assert (info.status, info.concurrency, dict(info.queues)) == ("active", 3, {queue: 2})
        entry = keys.server(server.host, server.pid, server.server_id).encode()
        assert entry in await redis.zrange(keys.SERVERS, 0, -1)
        server.stop()
        assert "stopped" in why(server)
        server.stop()
    assert (server.state, server.healthy) == ("closed", False)
    assert "closed" in why(server)
    assert await shown(redis, server) is None
    assert entry not in await redis.zrange(keys.SERVERS, 0, -1)
    with pytest.raises(ServerClosedError, match="asynq: Server closed"):
        await server.run(nothing)
    with pytest.raises(ServerClosedError):
        async with server.running(nothing):
            pass
    with pytest.raises(ServerClosedError):
        await server.ping()
    server.stop()
    await server.shutdown()


async def test_one_run_at_a_time(uri: str, queue: str) -> None:
    """A second run of a server that works, or has stopped, is refused; the first goes on."""
    server = AsyncServer(uri, queues=[queue])
    async with server.running(nothing):
        with pytest.raises(ServerStateError, match="already running"):
            await server.run(nothing)
        with pytest.raises(ServerStateError, match="already running"):
            async with server.running(nothing):
                pytest.fail("it must not run")
        assert server.state == "active"
        server.stop()
        with pytest.raises(ServerStateError, match="stopped state"):
            await server.run(nothing)
        await server.ping()


async def test_a_handler_is_wanted(uri: str, queue: str) -> None:
    """No handler, or none of the forms: refused before anything starts; the server can still be run."""
    server = AsyncServer(uri, queues=[queue])
    with pytest.raises(ConfigError, match="asynq: server cannot run with nil handler"):
        await server.run(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no handler"):
        await server.run(42)  # type: ignore[arg-type]
    assert server.state == "new"
    async with server.running(nothing):
        pass


async def test_running_installs_no_signal_handlers(uri: str, queue: str) -> None:
    """They belong to the application; `run` puts its own back."""
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGTSTP)
    before = [signal.getsignal(signum) for signum in wanted]
    async with AsyncServer(uri, queues=[queue]).running(nothing):
        assert [signal.getsignal(signum) for signum in wanted] == before
    await AsyncServer(uri, queues=[queue]).run(nothing, burst=True)
    assert [signal.getsignal(signum) for signum in wanted] == before


async def test_run_works_in_a_thread(uri: str, queue: str, client: Client) -> None:
    """Python gives signals to the main thread alone; elsewhere `run` does without."""
    await client.enqueue("x", queue=queue)
    server = await asyncio.to_thread(lambda: asyncio.run(_burst(uri, queue)))
    assert server.stats.succeeded == 1


async def _burst(uri: str, queue: str) -> AsyncServer:
    server = AsyncServer(uri, queues=[queue])
    await server.run(nothing, burst=True)
    return server


# --- burst, stop, shutdown, abort ----------------------------------------------------------------------------------


async def test_burst_ends_when_the_queues_are_empty(uri: str, queue: str, client: Client, redis: Any) -> None:
    """All that is pending is done, also what handlers add; what is due later, or paused, is not waited for."""
    other, paused = f"{queue}-other", f"{queue}-paused"
    await client.enqueue_many([Task("x", {"n": n}) for n in range(300)], queue=queue)
    await client.enqueue("child", {"depth": 5}, queue=other)
    await client.enqueue("x", queue=queue, process_in=timedelta(hours=1))
    await client.enqueue("x", queue=paused)
    await redis.set(keys.paused(paused), 1)

    async def handler(task: Task) -> None:
        if task.type == "child" and task.payload.get_int("depth"):
            await asyncio.sleep(0.01)
            await client.enqueue("child", {"depth": task.payload.get_int("depth") - 1}, queue=other)
        elif task.type == "child":
            raise ValueError("once")

    server = AsyncServer(uri, queues=[queue, other, paused], concurrency=10)
    await server.run(handler, burst=True)
    assert (server.state, server.stats.succeeded, server.stats.retried) == ("closed", 305, 1)
    assert await counts(redis, queue) == Counts(scheduled=1)
    assert await counts(redis, other) == Counts(retry=1)
    assert await counts(redis, paused) == Counts(pending=1)


async def test_burst_of_nothing_ends_at_once(uri: str, queue: str) -> None:
    """An empty queue is no reason to wait."""
    server = AsyncServer(uri, queues=[queue])
    async with asyncio.timeout(10):
        await server.run(nothing, burst=True)
    assert server.stats.processed == 0


async def test_shutdown_lets_running_handlers_end(uri: str, queue: str, client: Client, redis: Any) -> None:
    """No new task is taken, what runs ends and is written, then `shutdown` returns."""
    started, go = asyncio.Event(), asyncio.Event()

    async def handler(_task: Task) -> None:
        started.set()
        await go.wait()

    server = AsyncServer(uri, queues=[queue], concurrency=1)
    first = await client.enqueue("first", queue=queue)
    second = await client.enqueue("second", queue=queue)
    run = asyncio.create_task(server.run(handler))
    await started.wait()
    shutdown = asyncio.create_task(server.shutdown())
    await until(lambda: server.state == "closed")
    assert not shutdown.done()
    go.set()
    await shutdown
    await run
    assert await stored(redis, queue, first.id) is None
    assert await counts(redis, queue) == Counts(pending=1)
    assert (await redis.lrange(keys.pending(queue), 0, -1)) == [second.id.encode()]


@pytest.mark.parametrize("how", ["timeout", "abort"])
async def test_what_does_not_end_goes_back(uri: str, queue: str, client: Client, redis: Any, how: str) -> None:
    """At the shutdown timeout, or when aborted: cancelled, cleaned up, next in the queue in its order, uncounted."""
    cleaned: list[str] = []
    n = 5

    async def handler(task: Task) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(task.type)

    errors: list[BaseException] = []
    server = AsyncServer(
        uri,
        queues=[queue],
        concurrency=n,
        shutdown_timeout=timedelta(milliseconds=100) if how == "timeout" else timedelta(hours=1),
        on_error=lambda ctx, task, exc: errors.append(exc),
    )
    ids = [(await client.enqueue(f"t{at}", queue=queue, max_retry=0)).id for at in range(n + 2)]
    run = asyncio.create_task(server.run(handler))
    await until(lambda: server.running_tasks == n)
    if how == "timeout":
        await server.shutdown()
    else:
        server.abort()
    await run
    assert sorted(cleaned) == [f"t{at}" for at in range(n)]
    assert errors == [], "the task has not failed"
    assert await counts(redis, queue) == Counts(pending=n + 2)
    assert (await redis.lrange(keys.pending(queue), 0, -1))[::-1] == [task_id.encode() for task_id in ids]
    assert server.stats.requeued == n


async def test_stop_finishes_what_runs(uri: str, queue: str, client: Client, redis: Any) -> None:
    """After `stop` nothing new is taken, also nothing that comes later; what runs goes on."""
    started, go = asyncio.Event(), asyncio.Event()

    async def handler(_task: Task) -> None:
        started.set()
        await go.wait()

    server = AsyncServer(uri, queues=[queue])
    async with server.running(handler):
        running = await client.enqueue("running", queue=queue)
        await started.wait()
        server.stop()
        await client.enqueue("late", queue=queue)
        go.set()
        await until(lambda: server.stats.succeeded == 1)
        assert await stored(redis, queue, running.id) is None
    assert await counts(redis, queue) == Counts(pending=1)


# --- the host ------------------------------------------------------------------------------------------------------


async def test_the_lifespan_encloses_every_task(uri: str, queue: str, client: Client) -> None:
    """Entered before the first task, left after the last outcome; what it yields is the state."""
    order: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[str]:
        order.append("open")
        yield "state"
        order.append("closed")

    async def handler(_task: Task) -> None:
        order.append("start")
        await asyncio.sleep(0.1)
        order.append("end")

    server = AsyncServer(uri, queues=[queue], lifespan=lifespan)
    await client.enqueue("x", queue=queue)
    async with server.running(handler):
        await until(lambda: "start" in order)
    assert order == ["open", "start", "end", "closed"]


async def test_a_lifespan_that_fails_is_raised(uri: str, queue: str, redis: Any) -> None:
    """At its start: nothing runs. At its end: after the drain. Either way it is raised as it is."""

    @asynccontextmanager
    async def never() -> AsyncIterator[None]:
        raise LookupError("no database")
        yield

    @asynccontextmanager
    async def at_the_end() -> AsyncIterator[None]:
        yield
        raise LookupError("it is gone")

    server = AsyncServer(uri, queues=[queue], lifespan=never)
    with pytest.raises(LookupError, match="no database"):
        async with server.running(nothing):
            pytest.fail("it must not run")
    assert server.state == "closed"
    assert await shown(redis, server) is None
    with pytest.raises(LookupError, match="it is gone"):
        async with AsyncServer(uri, queues=[queue], lifespan=at_the_end).running(nothing):
            pass


@pytest.mark.parametrize("duty", ["heartbeater", "forwarder", "processor"])
async def test_a_dying_duty_is_raised_in_the_host(
    uri: str, queue: str, client: Client, redis: Any, duty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never alive but deaf: the host's block is cancelled, what runs is drained, and the error comes out as it is."""
    from asynq_aio._server.duties import forwarder, heartbeater, processor

    class DeathError(Exception):
        pass

    die = asyncio.Event()
    owner, method = {
        "heartbeater": (heartbeater.Heartbeater, "run"),
        "forwarder": (forwarder.Forwarder, "run"),
        "processor": (processor.Processor, "_watch"),
    }[duty]
    original: Any = getattr(owner, method)

    async def dying(*args: Any) -> None:
        alive = asyncio.ensure_future(original(*args))
        await die.wait()
        alive.cancel()
        await asyncio.gather(alive, return_exceptions=True)
        raise DeathError(duty)

    monkeypatch.setattr(owner, method, dying)
    done: list[str] = []

    async def handler(task: Task) -> None:
        await die.wait()
        await asyncio.sleep(0.05)
        done.append(task.type)

    server = AsyncServer(uri, queues=[queue])
    await client.enqueue("running", queue=queue)
    ended: list[str] = []

    async def host() -> None:
        async with server.running(handler):
            await until(lambda: server.running_tasks == 1)
            die.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("cancelled")

    with pytest.raises(DeathError, match=duty):
        await host()
    assert ended == ["cancelled"]
    assert done == ["running"]
    assert (server.state, server.healthy) == ("closed", False)
    assert await counts(redis, queue) == Counts()
    assert await shown(redis, server) is None


async def test_an_error_of_the_host_drains_the_server(uri: str, queue: str, client: Client, redis: Any) -> None:
    """The block's own error goes through; what runs is brought to its end first."""
    started = asyncio.Event()
    done: list[str] = []

    async def handler(task: Task) -> None:
        started.set()
        await asyncio.sleep(0.1)
        done.append(task.type)

    async def host() -> None:
        async with AsyncServer(uri, queues=[queue]).running(handler):
            await started.wait()
            raise ZeroDivisionError

    await client.enqueue("x", queue=queue)
    with pytest.raises(ZeroDivisionError):
        await host()
    assert done == ["x"]
    assert await counts(redis, queue) == Counts()


async def test_a_cancelled_host_drains_the_server(uri: str, queue: str, client: Client, redis: Any) -> None:
    """A host that is cancelled (a server that is stopped by its own framework) loses no task."""
    started = asyncio.Event()
    done: list[str] = []

    async def handler(task: Task) -> None:
        started.set()
        await asyncio.sleep(0.1)
        done.append(task.type)

    async def host() -> None:
        async with AsyncServer(uri, queues=[queue]).running(handler):
            await asyncio.Event().wait()

    await client.enqueue("x", queue=queue)
    child = asyncio.create_task(host())
    await started.wait()
    child.cancel()
    with pytest.raises(asyncio.CancelledError):
        await child
    assert done == ["x"]
    assert await counts(redis, queue) == Counts()


async def test_a_cancelled_run_drains_the_server(uri: str, queue: str, client: Client, redis: Any) -> None:
    """`run` as a child that is cancelled, as by a task group: the same."""
    started = asyncio.Event()
    done: list[str] = []

    async def handler(task: Task) -> None:
        started.set()
        await asyncio.sleep(0.1)
        done.append(task.type)

    await client.enqueue("x", queue=queue)
    server = AsyncServer(uri, queues=[queue])
    child = asyncio.create_task(server.run(handler))
    await started.wait()
    child.cancel()
    with pytest.raises(asyncio.CancelledError):
        await child
    assert done == ["x"]
    assert server.state == "closed"
    assert await counts(redis, queue) == Counts()


async def test_nothing_is_left_behind(uri: str, queue: str, client: Client) -> None:
    """After a run there is no child in the loop that was not there before, and no thread."""
    await client.enqueue_many([Task("x", {"n": n}) for n in range(50)], queue=queue)
    before, threads = asyncio.all_tasks(), threading.active_count()
    server = AsyncServer(uri, queues=[queue])
    async with server.running(nothing):
        await until(lambda: server.stats.succeeded == 50)
    await until(lambda: not asyncio.all_tasks() - before)
    assert threading.active_count() == threads


async def test_health_checks(uri: str, queue: str, caplog: pytest.LogCaptureFixture) -> None:
    """The callback hears None while Redis answers; one that raises is logged, and asked again."""
    heard: list[BaseException | None] = []

    async def on_health_check(error: BaseException | None) -> None:
        heard.append(error)
        if len(heard) == 1:
            raise RuntimeError("mine")

    server = AsyncServer(
        uri, queues=[queue], on_health_check=on_health_check, health_check_interval=timedelta(milliseconds=30)
    )
    async with server.running(nothing):
        await until(lambda: len(heard) >= 3)
    assert set(heard) == {None}
    assert any("on_health_check" in record.message for record in caplog.records)


# --- Redis at the start --------------------------------------------------------------------------------------------


async def test_waits_for_a_redis_that_is_absent(queue: str) -> None:
    """The server waits, says so, is not healthy; when Redis comes, it works, without a restart."""
    port = free_port()
    server = AsyncServer(f"redis://127.0.0.1:{port}/0", queues=[queue])
    done = asyncio.Event()

    async def handler(_task: Task) -> None:
        done.set()

    run = asyncio.create_task(server.run(handler))
    await until(lambda: server.state == "active")
    await asyncio.sleep(0.5)
    assert not server.healthy
    assert "has not answered" in why(server)
    async with EmbeddedRedis(port=port) as late, Client(late.uri) as client:
        await client.enqueue("x", queue=queue)
        async with asyncio.timeout(30):
            await done.wait()
        await until(lambda: server.healthy)
        await server.shutdown()
        await run


async def test_shutdown_while_redis_is_absent(queue: str) -> None:
    """Ends at once, in `run` and in an application."""
    uri = f"redis://127.0.0.1:{free_port()}/0"
    async with asyncio.timeout(20):
        server = AsyncServer(uri, queues=[queue])
        run = asyncio.create_task(server.run(nothing))
        await until(lambda: server.state == "active")
        await server.shutdown()
        await run
        async with AsyncServer(uri, queues=[queue]).running(nothing) as embedded:
            assert not embedded.healthy
    assert server.state == embedded.state == "closed"


async def test_what_waiting_does_not_mend_is_raised(queue: str) -> None:
    """Wrong password, a cluster where none is, none where one is: at once, and in words that tell what to do."""
    async with servers.own_standalone(settings={"requirepass": "secret"}) as locked, asyncio.timeout(60):
        for opt in (
            RedisClientOpt(addr=locked.addr),
            RedisClientOpt(addr=locked.addr, password="wrong"),
        ):
            server = AsyncServer(opt, queues=[queue])
            with pytest.raises(BrokerAuthError, match="password"):
                await server.run(nothing)
            assert server.state == "closed"
            with pytest.raises(BrokerAuthError):
                async with AsyncServer(opt, queues=[queue]).running(nothing):
                    pytest.fail("it must not run")
        async with AsyncServer(RedisClientOpt(addr=locked.addr, password="secret"), queues=[queue]).running(nothing):
            pass
    async with servers.own_standalone() as single, asyncio.timeout(60):
        with pytest.raises((ConfigError, BrokerError), match="cluster"):
            await AsyncServer(f"redis-cluster://{single.addr}", queues=[queue]).run(nothing)


async def test_a_single_address_of_a_cluster_is_raised(server: servers.Servers, queue: str) -> None:
    """redis:// at a node of a cluster says what to write instead."""
    async with asyncio.timeout(60):
        with pytest.raises((ConfigError, BrokerError), match="redis-cluster://"):
            await AsyncServer(f"redis://127.0.0.1:{server.ports[0]}/0", queues=[queue]).run(nothing)


async def test_an_existing_client_is_left_as_it_is(server: servers.Servers, queue: str) -> None:
    """A server takes the settings of a redis-py client; it neither closes nor changes it."""
    existing = redis.asyncio.RedisCluster(host="127.0.0.1", port=server.ports[0], decode_responses=True)
    try:
        await existing.set(f"{{{queue}}}:mine", "text")
        async with Client(existing) as client, AsyncServer(existing, queues=[queue]).running(nothing) as worker:
            await client.enqueue("x", queue=queue)
            await until(lambda: worker.stats.succeeded == 1)
            await drained(existing, queue)
        assert await existing.get(f"{{{queue}}}:mine") == "text"
        await existing.delete(f"{{{queue}}}:mine")
    finally:
        await existing.aclose()
