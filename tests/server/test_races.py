"""Two things of one server at once: none of them may take the other's doing for somebody else's, or wait for ever.

Each race is held open by a hook of the door (`Store.faults`), never by a pause.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import AsyncServer, BrokerUnavailableError, Client, Context, Task
from asynq_aio._broker import dequeue, leases
from asynq_aio._broker.store import Fault
from asynq_aio._server.duties import heartbeater, processor
from asynq_aio._server.execution import End, Executor
from asynq_aio._wire import keys
from tests import servers
from tests.server.look import counted, drained, state_becomes, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.store import Store
    from asynq_aio._server.execution import Attempt
    from asynq_aio._server.lease import Holdings

pytestmark = pytest.mark.timeout(60)


class Gate:
    """Counts the attempts at these scripts, of one queue or any; none is sent as long as it is shut."""

    def __init__(self, store: Store, *names: str, queue: str = "") -> None:
        self.shut = True
        self.knocks = 0
        self._names = names
        self._prefix = f"asynq:{{{queue}}}:" if queue else ""
        store.faults = self._fault

    def _fault(self, name: str, keys: Sequence[str | bytes]) -> Fault | None:
        if name not in self._names or not str(keys[0]).startswith(self._prefix):
            return None
        self.knocks += 1
        return Fault.NOT_SENT if self.shut else None

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


async def test_sure_leases_do_not_wait_for_unsure_ones(
    uri: str, queue: str, client: Client, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What must be asked for by a script waits while the slot moves; what may simply be raised does not."""
    monkeypatch.setattr(heartbeater, "LIMIT_SECONDS", 0.1)
    work = Work()
    server = AsyncServer(uri, queues=[queue])
    async with server.running(work):
        await client.enqueue_many([Task("x")] * 2, queue=queue)
        await work.runs(2)
        unsure, sure = holdings_of(server)
        unsure.renewed -= 20
        lowered = {attempt.lease.task_id: attempt.lease.expires_unix - 9 for attempt in (unsure, sure)}
        await redis.zadd(keys.lease(queue), lowered)
        gate = Gate(server._store, "regain")
        assert server._heartbeater is not None
        await server._heartbeater.run_once()
        assert gate.knocks
        now = dict(await redis.zrange(keys.lease(queue), 0, -1, withscores=True))
        gained = {name: now[str(name).encode()] - score for name, score in lowered.items()}
        assert gained[unsure.lease.task_id] == 0
        assert gained[sure.lease.task_id] >= 9
        gate.shut = False
        work.release.set()
        await drained(redis, queue)
    assert (server.stats.succeeded, server.stats.lost) == (2, 0)


async def test_an_entry_is_written_though_another_node_is_away(
    uri: str, queue: str, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry lives for 10 s: a list of all servers that cannot be reached must not hold it up for 30."""
    monkeypatch.setattr(heartbeater, "LIMIT_SECONDS", 0.1)
    server = AsyncServer(uri, queues=[queue])
    server._store.deadline = 300.0
    async with server.running(Work()):
        await until(lambda: server.healthy)
        entry = keys.server(server.host, server.pid, server.server_id)
        await redis.delete(entry)
        server._store.faults = lambda name, names: Fault.NOT_SENT if names[:1] == (keys.WORKERS,) else None
        assert server._heartbeater is not None
        with pytest.raises(BrokerUnavailableError):
            await server._heartbeater.show()
        assert await redis.ttl(entry) > 0
        server._store.faults = None


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        (("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0")),
        (("ACL", "SETUSER", "default", "-evalsha", "-eval"), ("ACL", "SETUSER", "default", "+evalsha", "+eval")),
    ],
    ids=["too few replicas", "not permitted"],
)
@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_an_outcome_that_redis_refuses_for_now(
    version: servers.Version, refuse: Sequence[str], allow: Sequence[str]
) -> None:
    """A replica restarts, a password is changed: that says nothing about the task, so its outcome is kept."""
    work = Work()
    async with servers.own_standalone(version) as redis_server, Client(redis_server.uri) as client:
        server = AsyncServer(redis_server.uri, concurrency=2)
        async with server.running(work):
            await client.enqueue("x")
            await work.runs()
            redis_server.execute(*refuse)
            tries = Gate(server._store, "finish")
            tries.shut = False
            work.release.set()
            await tries.knocked(3)
            assert holdings_of(server)
            redis_server.execute(*allow)
            await client.enqueue("y")
            await work.runs(2)
            await until(lambda: not holdings_of(server))
    assert (work.begun, server.stats.succeeded, server.stats.lost) == (["x", "y"], 2, 0)


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


@pytest.mark.parametrize("strict", [False, True], ids=["weighted", "strict"])
async def test_a_queue_out_of_reach_does_not_hold_up_the_others(
    uri: str, queue: str, client: Client, redis: Any, strict: bool
) -> None:
    """A node that is away, a slot that moves: what is drawn for that queue goes to those that can be reached."""
    away, near = f"{queue}-away", f"{queue}-near"
    work = Work()
    work.release.set()
    server = AsyncServer(uri, queues={away: 9, near: 1}, concurrency=2, strict_priority=strict)
    server._store.deadline = 300.0
    gate = Gate(server._store, "claim", "reach", queue=away)
    async with server.running(work):
        await client.enqueue("away", queue=away)
        await gate.knocked()
        await client.enqueue_many([Task("near")] * 200, queue=near)
        await work.runs(200)
        assert set(work.begun) == {"near"}
        gate.shut = False
        await work.runs(201)
        await drained(redis, away)


async def test_a_lost_claim_does_not_hold_up_the_others(
    uri: str, queue: str, client: Client, redis: Any, store: Store
) -> None:
    """Nobody knows what it took: its slots are lent, and what is found in the end runs once, within the concurrency."""
    away, near = f"{queue}-away", f"{queue}-near"
    work = Work()
    server = AsyncServer(uri, queues={away: 9, near: 1}, concurrency=4, strict_priority=True)
    gate = Gate(server._store, "adopt")
    lost: list[int] = []

    def lose_the_first_claim(name: str, names: Sequence[str | bytes]) -> Fault | None:
        if name == "claim" and names[0] == keys.pending(away) and not lost:
            lost.append(1)
            return Fault.REPLY_LOST
        if name == "reach" and names[0] == keys.pending(away) and gate.shut:
            return Fault.NOT_SENT
        return gate._fault(name, names)

    # Each node knows the script, or the reply that is lost would be NOSCRIPT.
    assert await dequeue.claim(store, dequeue.new_claim(store, away, "h:1:s", 1), 1) == ("empty", [])
    await client.enqueue_many([Task("away")] * 4, queue=away)
    server._store.faults = lose_the_first_claim
    async with server.running(work):
        await gate.knocked()
        assert await redis.llen(keys.active(away)) == 4
        await client.enqueue_many([Task("near")] * 6, queue=near)
        await work.runs(4)
        assert (server.running_tasks, work.begun) == (4, ["near"] * 4)
        gate.shut = False
        await until(lambda: server.stats.requeued == 4)  # there is no room: they go back to the head of their queue
        assert server.running_tasks == 4
        work.release.set()
        await drained(redis, away)
        await drained(redis, near)
    assert sorted(work.begun) == ["away"] * 4 + ["near"] * 6
    assert server.stats.succeeded == 10


async def test_tasks_that_are_found_late_go_back_first(
    uri: str, queue: str, client: Client, redis: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease of a claim that was lost long ago runs out: its tasks are taken anew, not worked on as they are."""
    monkeypatch.setattr(processor, "FRESH_SECONDS", 0.0)
    assert await dequeue.claim(store, dequeue.new_claim(store, queue, "h:1:s", 1), 1) == ("empty", [])
    infos = await client.enqueue_many([Task("x", number) for number in range(3)], queue=queue)
    order: list[str] = []

    async def handle(ctx: Context, _task: Task) -> None:
        order.append(ctx.task_id)

    server = AsyncServer(uri, queues=[queue], concurrency=3)
    lost: list[str] = []

    def lose_one(name: str, _keys: Sequence[str | bytes]) -> Fault | None:
        if name != "claim" or lost:
            return None
        lost.append(name)
        return Fault.REPLY_LOST

    server._store.faults = lose_one
    async with server.running(handle):
        await until(lambda: len(order) == 3)
        await drained(redis, queue)
    assert order == [info.id for info in infos]
    assert (server.stats.requeued, server.stats.succeeded, server.stats.lost) == (3, 3, 0)


# --- the end -------------------------------------------------------------------------------------------------------


async def test_the_drain_does_not_wait_for_a_claim(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Handlers have their time from the first moment on, however long a claim is out."""
    work = Work()
    server = AsyncServer(uri, queues=[queue], concurrency=2, shutdown_timeout=timedelta(seconds=0.1))
    server._store.deadline = 300.0
    async with server.running(work):
        info = await client.enqueue("x", queue=queue)
        await work.runs()
        gate = Gate(server._store, "claim", "reach", "adopt")
        await client.enqueue("y", queue=queue)
        await gate.knocked()
        ending = asyncio.create_task(server.shutdown())
        await state_becomes(redis, queue, info.id, "pending")  # the claim is still out
        gate.shut = False
        await ending
    assert work.begun == ["x"]
    assert await redis.llen(keys.pending(queue)) == 2


@pytest.mark.parametrize("abort", [False, True])
async def test_the_end_leaves_no_child(uri: str, queue: str, client: Client, redis: Any, abort: bool) -> None:
    """A lost claim that cannot be adopted is left to its lease; nobody goes on looking for it in a closed server."""
    before = asyncio.all_tasks()
    server = AsyncServer(uri, queues=[queue])
    server._store.deadline = 30.0 if abort else 0.5
    adopting = asyncio.Event()

    def lose(name: str, _keys: Sequence[str | bytes]) -> Fault | None:
        if name == "adopt":
            adopting.set()
            return Fault.NOT_SENT
        return Fault.REPLY_LOST if name == "claim" else None

    server._store.faults = lose
    async with server.running(Work()):
        await client.enqueue("x", queue=queue)
        async with asyncio.timeout(30):
            await adopting.wait()
        if abort:
            server.abort()
        async with asyncio.timeout(20):
            await server.shutdown()
    # What the client of this test has is not the server's.
    left = [child for child in asyncio.all_tasks() - before if "Processor" in repr(child.get_coro())]
    assert left == []


async def test_an_aborted_drain_puts_the_oldest_first(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Tasks that go back stand in the queue as they stood before."""
    work = Work()
    server = AsyncServer(uri, queues=[queue], shutdown_timeout=timedelta(0))
    infos = await client.enqueue_many([Task("x", number) for number in range(10)], queue=queue)
    async with server.running(work):
        await work.runs(10)
    left = await redis.lrange(keys.pending(queue), 0, -1)
    assert [task_id.decode() for task_id in reversed(left)] == [info.id for info in infos]


async def test_an_entry_that_may_not_be_cleared_is_no_failure() -> None:
    """The work is done and written; the entry expires by itself."""
    async with servers.own_standalone() as redis_server:
        server = AsyncServer(redis_server.uri)
        async with server.running(Work()):
            redis_server.execute("ACL", "SETUSER", "default", "-zrem")
    assert server.state == "closed"
