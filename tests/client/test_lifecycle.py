"""A client begins with its first use, belongs to one event loop and one process, and ends when it is closed."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
from datetime import timedelta
from typing import Any

import pytest
import redis.asyncio

from asynq_aio import (
    BrokerAuthError,
    BrokerUnavailableError,
    Client,
    ConfigError,
    Inspector,
    RedisClientOpt,
    SyncClient,
)
from tests.client.conftest import Gate, pending_ids, turns
from tests.servers import Servers, own_standalone

ONE = pytest.mark.parametrize("topology", ["standalone-valkey9"], indirect=True)


def run_script(script: str, *args: str) -> list[str]:
    """What a program of its own prints; it must end well, without an error or a warning on stderr."""
    quiet = "import logging; logging.disable(logging.WARNING)\n"  # a slow machine is no outage
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", quiet + textwrap.dedent(script), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_making_one_connects_nothing() -> None:
    """No I/O, no event loop, before the first use; closing what was never used is nothing."""
    client = Client("redis://:secret@127.0.0.1:1")
    assert repr(client) == "<Client of Redis at 127.0.0.1:1>"
    asyncio.run(client.aclose())
    with pytest.raises(ConfigError):
        Client("http://127.0.0.1")


@ONE
def test_where_redis_is(server: Servers, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument counts; without one `ASYNQ_URI`; `redis` is its name too."""
    monkeypatch.setenv("ASYNQ_URI", server.uri)

    async def main() -> None:
        async with Client() as client, Inspector() as inspector:
            await client.enqueue("t", queue=queue)
            assert queue in await inspector.queues()
        monkeypatch.setenv("ASYNQ_URI", "redis://127.0.0.1:1")
        async with Client(redis=server.uri) as client:
            await client.ping()

    asyncio.run(main())


async def test_ping(client: Client) -> None:
    """Answers on every topology."""
    await client.ping()


@ONE
async def test_a_client_that_is_handed_in_stays_open(server: Servers, queue: str) -> None:
    """Its settings are copied; `decode_responses` does not matter."""
    host, port = "127.0.0.1", server.ports[0]
    async with redis.asyncio.Redis(host=host, port=port, decode_responses=True, protocol=2) as shared:
        async with Client(shared) as client:
            info = await client.enqueue("t", queue=queue)
        assert await shared.lrange(f"asynq:{{{queue}}}:pending", 0, -1) == [info.id]


@ONE
async def test_a_closed_client_says_so(server: Servers) -> None:
    """Closing twice is fine; using it is not."""
    client = Client(server.uri)
    await client.ping()
    await client.aclose()
    await client.aclose()
    for use in (client.ping, lambda: client.enqueue("t"), lambda: client.enqueue_many([("t", 1)]), client.__aenter__):
        with pytest.raises(RuntimeError, match="this Client is closed; make a new one"):
            await use()


@ONE
async def test_closing_lets_calls_end(server: Servers, redis: Any, queue: str, gate: Gate) -> None:
    """What waits is sent, all waiters are answered; new calls are refused; nothing is left behind."""
    before = asyncio.all_tasks()
    client = Client(server.uri)
    gate.shut()
    calls = [asyncio.create_task(client.enqueue("t", queue=queue, task_id="first"))]
    await gate.arrived()
    calls += [asyncio.create_task(client.enqueue("t", queue=queue, task_id=str(n))) for n in range(3)]
    many = asyncio.create_task(client.enqueue_many([("t", n) for n in range(1200)], queue=queue))
    await turns()
    closing = asyncio.create_task(client.aclose())
    await turns()
    with pytest.raises(RuntimeError, match="closed"):
        await client.enqueue("t", queue=queue)
    closing.cancel()  # it goes on all the same
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.open()
    await asyncio.gather(*calls)
    assert len(await many) == 1200
    await client.aclose()
    assert len(await pending_ids(redis, queue)) == 1204
    assert asyncio.all_tasks() == before


@ONE
async def test_closing_without_redis_takes_no_longer_than_the_callers(server: Servers, queue: str) -> None:
    """Waiters get their error at their deadline, then it is closed."""
    address = server.uri.removeprefix("redis://")
    async with asyncio.timeout(20):
        client = Client(RedisClientOpt(address, deadline=timedelta(seconds=0.4)))
        from asynq_aio._broker.store import Fault

        client._door.store.faults = lambda *_: Fault.NOT_SENT
        call = asyncio.create_task(client.enqueue("t", queue=queue))
        await turns()
        await client.aclose()
        with pytest.raises(BrokerUnavailableError):
            await call


@ONE
def test_another_event_loop_is_refused(server: Servers, queue: str) -> None:
    """With what to do instead; an event loop that has ended counts too."""
    client, inspector = Client(server.uri), Inspector(server.uri)

    async def first() -> None:
        await client.enqueue("t", queue=queue)
        await inspector.queues()

    async def second() -> None:
        with pytest.raises(
            RuntimeError, match=r"another event loop.*one Client for each event loop, or use SyncClient"
        ):
            await client.enqueue("t", queue=queue)
        with pytest.raises(RuntimeError, match=r"another event loop.*one Inspector for each event loop"):
            await inspector.queues()
        with pytest.raises(RuntimeError, match="another event loop"):
            await client.aclose()

    async def main() -> None:
        await first()
        await asyncio.to_thread(asyncio.run, second())
        await client.aclose()
        await inspector.aclose()

    asyncio.run(main())


@ONE
def test_both_sides_of_a_fork_may_use_a_client(server: Servers, queue: str) -> None:
    """Each has a ledger of its own, so that no call is taken for the repeat of the other's; all tasks are there."""
    said = run_script(
        """
        import asyncio, os, sys
        from asynq_aio import Client

        uri, queue = sys.argv[1:]
        client = Client(uri)

        async def work(who):
            for n in range(20):
                await client.enqueue("t", queue=queue, task_id=f"{who}-{n}")
            print(client._outboxes.client_id, flush=True)

        async def in_child():
            await work("child")
            await client.aclose()

        loop = asyncio.new_event_loop()
        loop.run_until_complete(work("before"))
        child = os.fork()
        if not child:
            asyncio.run(in_child())
            os._exit(0)
        loop.run_until_complete(work("parent"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        loop.run_until_complete(client.aclose())
        loop.close()
        """,
        server.uri,
        queue,
    )
    assert len(said) == 3
    assert len(set(said)) == 2  # the parent's twice, the child's
    with redis.Redis(host="127.0.0.1", port=server.ports[0], protocol=2) as look:
        found = {task_id.decode() for task_id in look.lrange(f"asynq:{{{queue}}}:pending", 0, -1)}
    assert found == {f"{who}-{n}" for who in ("before", "parent", "child") for n in range(20)}


# -- where Redis cannot be reached, or not like this


async def test_nobody_there() -> None:
    """At the deadline, with the address and the reason."""
    async with Client(RedisClientOpt("127.0.0.1:1", deadline=timedelta(seconds=0.3))) as client:
        with pytest.raises(BrokerUnavailableError, match=r"127\.0\.0\.1:1.*nothing was sent") as caught:
            await client.enqueue("t")
        assert caught.value.sent is False
        with pytest.raises(BrokerUnavailableError):
            await client.ping()


async def test_a_wrong_password(caplog: pytest.LogCaptureFixture) -> None:
    """At once, and without showing it."""
    async with own_standalone(settings={"requirepass": "right"}) as server:
        with caplog.at_level(logging.DEBUG):
            async with Client(RedisClientOpt(server.addr, password="wrong-one")) as client:
                with pytest.raises(BrokerAuthError) as caught:
                    await client.enqueue("t")
        assert "wrong-one" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("topology", ["standalone-redis7"], indirect=True)
async def test_a_cluster_address_at_a_single_server(server: Servers) -> None:
    """The text names the right option."""
    async with Client(server.uri.replace("redis://", "redis-cluster://")) as client:
        with pytest.raises(ConfigError, match="RedisClientOpt"):
            await client.enqueue("t")


@pytest.mark.parametrize("topology", ["cluster-redis7"], indirect=True)
async def test_a_single_server_address_at_a_cluster(server: Servers) -> None:
    """The text names the right option."""
    async with Client(f"redis://127.0.0.1:{server.ports[0]}") as client:
        with pytest.raises(ConfigError, match="RedisClusterClientOpt"):
            await asyncio.gather(*(client.enqueue("t", queue=f"q{n}") for n in range(20)))


def test_the_sync_client_says_the_same() -> None:
    """It is the same client underneath."""
    nowhere = RedisClientOpt("127.0.0.1:1", deadline=timedelta(seconds=0.3))
    with SyncClient(nowhere) as client, pytest.raises(BrokerUnavailableError, match=r"127\.0\.0\.1:1"):
        client.enqueue("t")
