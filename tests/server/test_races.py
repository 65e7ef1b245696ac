"""Two things of one server at once: none of them may take the other's doing for somebody else's, or wait for ever.

Each race is held open by a hook of the door (`Store.faults`), never by a pause.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import AsyncServer, Client, Task
from asynq_aio._broker import leases
from asynq_aio._broker.store import Fault
from asynq_aio._server.execution import End, Executor
from asynq_aio._wire import keys
from tests.server.look import counted, drained, state_becomes, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.store import Store
    from asynq_aio._server.execution import Attempt
    from asynq_aio._server.lease import Holdings

pytestmark = pytest.mark.timeout(60)


class Gate:
    """Calls of one script are not sent as long as it is shut; the door repeats them."""

    def __init__(self, store: Store, *names: str) -> None:
        self.shut = True
        self.knocks = 0
        self._names = names
        store.faults = self._fault

    def _fault(self, name: str, _keys: Sequence[str | bytes]) -> Fault | None:
        if not self.shut or name not in self._names:
            return None
        self.knocks += 1
        return Fault.NOT_SENT

    async def knocked(self, times: int = 1) -> None:
        """Wait until a call has met it so often."""
        await until(lambda: self.knocks >= times)


class Work:
    """A handler that tells how often it began, and ends when it is let go."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.release = asyncio.Event()

    async def __call__(self, task: Task) -> None:
        self.begun.append(task.type)
        await self.release.wait()

    async def runs(self, count: int = 1) -> None:
        """Wait until so many have begun."""
        await until(lambda: len(self.begun) >= count)


def holdings_of(server: AsyncServer) -> Holdings:
    """What it holds."""
    assert server._heartbeater is not None
    return server._heartbeater._holdings


def the_attempt(server: AsyncServer) -> Attempt:
    """The only one."""
    (attempt,) = holdings_of(server)
    return attempt


# --- leases and outcomes -------------------------------------------------------------------------------------------


async def test_an_outcome_that_waits_while_its_lease_is_raised(
    uri: str, queue: str, client: Client, redis: Any
) -> None:
    """It was made with the lease of that moment; a slot that moves for 8 s lets the lease rise before it arrives."""
    work = Work()
    server = AsyncServer(uri, queues=[queue])
    async with server.running(work):
        await client.enqueue("x", queue=queue)
        await work.runs()
        gate = Gate(server._store, "finish")
        work.release.set()
        await gate.knocked()
        lease = the_attempt(server).lease
        await leases.extend(server._store, queue, [lease], lease.expires_unix + 5)
        gate.shut = False
        await drained(redis, queue)
    assert (server.stats.succeeded, server.stats.lost) == (1, 0)
    assert await counted(redis, queue) == (1, 0)
    assert work.begun == ["x"]


async def test_an_outcome_that_overtakes_the_news_of_a_regain(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Leases and outcomes leave by two connections: after an outage, one arrives before the other's reply is read."""
    work = Work()
    server = AsyncServer(uri, queues=[queue])
    async with server.running(work):
        await client.enqueue("x", queue=queue)
        await work.runs()
        gate = Gate(server._store, "finish")
        work.release.set()
        await gate.knocked()
        lease = the_attempt(server).lease
        under_way, heard = hold_replies(server._store, "regain")
        regaining = asyncio.create_task(leases.regain(server._store, queue, [lease], lease.expires_unix + 5))
        await under_way.wait()
        gate.shut = False
        await drained(redis, queue)
        heard.set()
        await regaining
    assert (server.stats.succeeded, server.stats.lost) == (1, 0)
    assert await counted(redis, queue) == (1, 0)


def hold_replies(store: Store, name: str) -> tuple[asyncio.Event, asyncio.Event]:
    """The next call of this script runs, and its caller hears of it when the second event is set."""
    under_way, heard = asyncio.Event(), asyncio.Event()
    run = store.run

    async def held(script: Any, *args: Any, **options: Any) -> Any:
        reply = await run(script, *args, **options)
        if script.name == name and not under_way.is_set():
            under_way.set()
            await heard.wait()
        return reply

    store.run = held  # type: ignore[method-assign]
    return under_way, heard


async def test_two_regains_whose_replies_were_lost(uri: str, queue: str, client: Client, redis: Any) -> None:
    """The first has raised the lease, the second never arrived: the third still knows the expiry as its own."""
    work = Work()
    server = AsyncServer(uri, queues=[queue])
    async with server.running(work):
        await client.enqueue("x", queue=queue)
        await work.runs()
        store, attempt = server._store, the_attempt(server)
        lease = attempt.lease
        first_unix = lease.expires_unix + 5
        assert await leases.regain(store, queue, [lease], lease.expires_unix) == []  # the node knows the script now
        store.faults = lambda name, _keys: Fault.REPLY_LOST if name == "regain" else None
        with pytest.raises(Exception, match="regain"):
            await leases.regain(store, queue, [lease], first_unix, deadline=0.05)
        assert await redis.zscore(keys.lease(queue), str(lease.task_id)) == first_unix
        store.faults = None
        lease.unheard = (*lease.unheard, first_unix + 5)  # as one leaves it that was sent and is still on its way
        assert await leases.regain(store, queue, [lease], first_unix + 10) == []
        assert (lease.expires_unix, lease.unheard) == (first_unix + 10, ())
        work.release.set()
        await drained(redis, queue)
    assert (server.stats.succeeded, server.stats.lost) == (1, 0)


# --- slots ---------------------------------------------------------------------------------------------------------


async def test_a_cancellation_before_the_first_turn(
    uri: str, queue: str, client: Client, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is cancelled in the very turn of its claim is retried, and gives its slot back."""
    begin = Executor.start
    cancelled: list[str | bytes] = []

    def start(executor: Executor, *args: Any) -> None:
        begin(executor, *args)
        if not cancelled:
            for attempt in holdings_of(server):
                cancelled.append(attempt.lease.task_id)
                executor.end(attempt, End.CANCELLED)

    monkeypatch.setattr(Executor, "start", start)
    work = Work()
    work.release.set()
    server = AsyncServer(uri, queues=[queue], concurrency=1, retry_delay=lambda *_: timedelta(hours=1))
    async with server.running(work):
        first = await client.enqueue("x", queue=queue)
        await state_becomes(redis, queue, first.id, "retry")
        await client.enqueue("y", queue=queue)
        await work.runs()
        await drained(redis, queue)
        await until(lambda: server.running_tasks == 0)
    assert (cancelled, work.begun) == ([first.id], ["y"])
