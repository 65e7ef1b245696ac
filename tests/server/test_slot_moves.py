"""The whole engine while slots move and masters fail: clients enqueue, servers work, and each task is counted.

Two masters and the true sequence: SETSLOT IMPORTING and MIGRATING, MIGRATE for the keys, SETSLOT NODE; Valkey's atomic
migration too. No error reaches a caller, nothing is lost, nothing runs twice, nothing is stuck.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from redis import Redis
from redis.asyncio.cluster import RedisCluster

from asynq_aio import AsyncServer, Client, Context, DuplicateTaskError, Task
from asynq_aio._broker.embedded import EmbeddedCluster
from asynq_aio._wire import keys
from tests.server.look import Counts, counted, counts, until
from tests.servers import binary, own_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from asynq_aio._broker.embedded import EmbeddedRedis
    from tests.servers import Version

pytestmark = pytest.mark.timeout(120)

HOUR = timedelta(hours=1)
SOON = timedelta(seconds=0.25)


# --- the scene -----------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What is enqueued, and what has become of it in the end."""

    options: dict[str, Any]
    attempts: int
    failures: int
    ends: str
    """A state, or "" = gone."""


KINDS = {
    "done": Kind({}, 1, 0, ""),
    "locked": Kind({"unique_for": HOUR}, 1, 0, ""),
    "kept": Kind({"retention": HOUR}, 1, 0, "completed"),
    "later": Kind({"process_in": SOON, "unique_for": HOUR}, 1, 0, ""),
    "far": Kind({"process_in": HOUR, "unique_for": HOUR}, 0, 0, "scheduled"),
    "joins": Kind({"process_in": SOON, "group": "g"}, 0, 0, "aggregating"),
    "joined": Kind({"group": "g", "unique_for": HOUR}, 0, 0, "aggregating"),
    "again": Kind({"max_retry": 3}, 2, 1, ""),
    "waits": Kind({"max_retry": 3}, 1, 1, "retry"),
    "dead": Kind({"max_retry": 0, "unique_for": HOUR}, 1, 1, "archived"),
}
KEEP_THEIR_LOCK = {"far", "joined", "dead"}


class Work:
    """Enqueues, handles and counts."""

    def __init__(self, client: Client, queue: str) -> None:
        self.client = client
        self.queue = queue
        self.enqueued: dict[str, str] = {}
        """Task ID -> kind."""
        self.attempts: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._number = 0
        self._stop = False
        self._producers: list[asyncio.Task[None]] = []

    async def handle(self, ctx: Context, task: Task) -> str | None:
        """Fails where its kind says so."""
        self.attempts[ctx.task_id] += 1
        if ctx.retried < KINDS[task.type].failures:
            raise ValueError(task.type)
        return "result" if task.type == "kept" else None

    def retry_delay(self, _retried: int, _exc: BaseException, task: Task) -> timedelta:
        """At once, or so late that it is still there in the end."""
        return timedelta(0) if task.type == "again" else HOUR

    async def one_of_each(self) -> None:
        """Enqueue one task of each kind, side by side; each has its own payload, and so its own lock."""
        self._number += 1
        number = self._number
        infos = await asyncio.gather(
            *(
                self.client.enqueue(name, number, queue=self.queue, task_id=f"{name}-{number}", **kind.options)
                for name, kind in KINDS.items()
            )
        )
        self.enqueued.update({info.id: info.type for info in infos})

    def produce(self, producers: int) -> None:
        """Go on enqueueing, so many side by side, until `stop`."""
        self._producers = [asyncio.create_task(self._produce()) for _ in range(producers)]

    async def _produce(self) -> None:
        while not self._stop:
            try:
                await self.one_of_each()
            except Exception as exc:  # noqa: BLE001  (they are what is counted)
                self.errors.append(exc)
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Enqueue no more."""
        self._stop = True
        await asyncio.gather(*self._producers)

    async def more(self, tasks: int) -> None:
        """Wait until so many more have been handled."""
        goal = len(self.attempts) + tasks
        await until(lambda: len(self.attempts) >= goal)

    def ids(self, *kinds: str) -> set[str]:
        """Of the tasks of these kinds."""
        return {task_id for task_id, kind in self.enqueued.items() if kind in kinds}

    def ending(self, state: str) -> set[str]:
        """IDs of the tasks that are in this state in the end."""
        return self.ids(*(name for name, kind in KINDS.items() if kind.ends == state))

    async def assert_all_done(self, redis: Any) -> None:
        """Wait until nothing is left to do; each task was handled as often as its kind says and is where it belongs."""
        queue = self.queue
        expected = {task_id: KINDS[kind].attempts for task_id, kind in self.enqueued.items() if KINDS[kind].attempts}
        group = keys.group(queue, "g")
        grouped, archived = self.ending("aggregating"), self.ending("archived")
        left = Counts(
            scheduled=len(self.ending("scheduled")),
            retry=len(self.ending("retry")),
            archived=len(archived),
            completed=len(self.ending("completed")),
        )

        async def settled() -> bool:
            # The attempts first: the containers are counted one after another, and a retry slips from one to the next.
            all_begun = self.attempts.total() >= sum(expected.values())
            return all_begun and await counts(redis, queue) == left and await redis.zcard(group) == len(grouped)

        try:
            await until(settled, seconds=20)
        except AssertionError:
            assert (self.errors, await counts(redis, queue)) == ([], left)
            raise
        assert self.errors == []
        assert dict(self.attempts) == expected
        for state in ("scheduled", "retry", "archived", "completed", "aggregating"):
            container = group if state == "aggregating" else f"asynq:{{{queue}}}:{state}"
            found = {member.decode() for member in await redis.zrange(container, 0, -1)}
            assert found == self.ending(state)
            for task_id in sorted(found):
                stored = await redis.hgetall(keys.task(queue, task_id))
                assert stored[b"state"] == state.encode()
                assert b"aio_owner" not in stored
        kept = {task_id: await redis.hget(keys.task(queue, task_id), "result") for task_id in self.ids("kept")}
        assert set(kept.values()) == {b'"result"'}
        assert await redis.smembers(keys.groups(queue)) == {b"g"}
        for kind, facts in KINDS.items():
            if "unique_for" in facts.options:
                locks = {
                    task_id: await redis.get(keys.unique(queue, kind, task_id.partition("-")[2].encode()))
                    for task_id in self.ids(kind)
                }
                kept_by = {task_id: task_id.encode() if kind in KEEP_THEIR_LOCK else None for task_id in locks}
                assert locks == kept_by
        gone = self.ending("")
        assert [task_id for task_id in sorted(gone) if await redis.exists(keys.task(queue, task_id))] == []
        failures = sum(KINDS[kind].failures for kind in self.enqueued.values())
        assert await counted(redis, queue) == (sum(expected.values()), failures)
        assert await redis.exists(keys.ghost(queue)) == 0


@pytest.fixture(scope="module", params=["valkey9", "redis7"])
def cluster(request: pytest.FixtureRequest) -> Iterator[EmbeddedCluster]:
    """Two masters, to move slots between."""
    made = EmbeddedCluster(masters=2, replicas=0, node_timeout_ms=15_000, binary=binary(request.param))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def uri(cluster: EmbeddedCluster) -> str:
    """Its address."""
    return cluster.uri


@pytest.fixture
async def redis(cluster: EmbeddedCluster) -> AsyncGenerator[Any]:
    """A plain client, to look."""
    async with looker(cluster) as client:
        yield client


@asynccontextmanager
async def looker(cluster: EmbeddedCluster) -> AsyncGenerator[Any]:
    """A plain client of this cluster."""
    node = next(node for node in cluster.nodes if node.running)
    client = RedisCluster(host="127.0.0.1", port=node.port, protocol=2)
    await client.initialize()
    yield client
    await client.aclose()


@pytest.fixture(autouse=True)
def no_alarm(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that happens here is an error to anybody."""
    yield
    records = [*caplog.get_records("call")]
    alarms = [record for record in records if record.levelno >= logging.ERROR and record.name.startswith("asynq_aio")]
    assert [record.getMessage() for record in alarms] == []


def other_than(cluster: EmbeddedCluster, node: EmbeddedRedis) -> EmbeddedRedis:
    """The other master."""
    return next(other for other in cluster.masters() if other is not node)


class OpenSlot:
    """The slot of a queue, between the first and the last step of its move."""

    def __init__(self, cluster: EmbeddedCluster, queue: str) -> None:
        self.cluster = cluster
        self.slot = keys.queue_slot(queue)
        self.target = other_than(cluster, cluster.owner(self.slot))
        self.source = cluster.begin_move(self.slot, self.target)

    def move(self, *names: str) -> None:
        """These keys go now."""
        self.cluster.move_keys(self.source, self.target, names)

    def move_half(self) -> None:
        """Every second key goes now."""
        self.move(*sorted(self.cluster.keys_in(self.source, self.slot, 10_000))[::2])

    def finish(self) -> None:
        """The rest goes, and the slot is closed."""
        while names := self.cluster.keys_in(self.source, self.slot, 1_000):
            self.move(*names)
        self.cluster.finish_move(self.slot, self.source, self.target)


async def move_atomically(cluster: EmbeddedCluster, slot: int) -> None:
    """Valkey 9: the slot goes as a whole."""
    source = cluster.owner(slot)
    target = other_than(cluster, source)
    source.execute("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", cluster.node_id(target))
    await until(lambda: cluster.owner(slot) is target)


def assert_clean(*servers: AsyncServer) -> None:
    """No outcome came too late, nobody had to take over from another, nothing went back."""
    for server in servers:
        assert (server.stats.lost, server.stats.recovered, server.stats.requeued) == (0, 0, 0)


# --- moves ---------------------------------------------------------------------------------------------------------


async def test_a_slot_moves_to_and_fro(cluster: EmbeddedCluster, uri: str, queue: str, redis: Any) -> None:
    """Six moves, key by key, with tasks of every state in the slot, under four producers and two servers."""
    slot = keys.queue_slot(queue)
    moved = 0
    async with Client(uri) as client:
        work = Work(client, queue)
        one, two = (AsyncServer(uri, queues=[queue], concurrency=10, retry_delay=work.retry_delay) for _ in range(2))
        async with one.running(work.handle), two.running(work.handle):
            work.produce(4)
            for _ in range(6):
                await work.more(100)
                moved += await cluster.move_slot(slot, other_than(cluster, cluster.owner(slot)), batch=10)
            await work.more(100)
            await work.stop()
            await work.assert_all_done(redis)
        assert min(server._store.stats.moved for server in (one, two)) > 0
        assert moved > 600
        assert_clean(one, two)


async def test_a_slot_migrates_atomically(queue: str) -> None:
    """The same by Valkey's own migration, four times."""
    async with own_cluster(masters=2, replicas=0, version="valkey9") as cluster, looker(cluster) as redis:
        uri, slot = cluster.uri, keys.queue_slot(queue)
        client = Client(uri)
        work = Work(client, queue)
        server = AsyncServer(uri, queues=[queue], concurrency=10, retry_delay=work.retry_delay)
        async with server.running(work.handle):
            work.produce(4)
            for _ in range(4):
                await work.more(100)
                await move_atomically(cluster, slot)
            await work.more(100)
            await work.stop()
            await work.assert_all_done(redis)
        await client.aclose()
        assert server._store.stats.moved
        assert_clean(server)


async def test_a_slot_stays_open(cluster: EmbeddedCluster, uri: str, queue: str, redis: Any) -> None:
    """Half moved, for two heartbeats: leases rise, claims and enqueues wait, other queues do not; then all goes on.

    Handlers that end meanwhile have written results, and their outcomes wait, with leases that have risen since.
    """
    other = f"{queue}-other"
    while keys.queue_slot(other) == keys.queue_slot(queue):
        other += "-"
    go_on, end = asyncio.Event(), asyncio.Event()
    attempts: Counter[str] = Counter()
    ended: list[str] = []

    async def handle(ctx: Context, task: Task) -> None:
        attempts[ctx.task_id] += 1
        if ctx.queue == other or task.type == "late":
            return
        await go_on.wait()
        await ctx.result.write(ctx.task_id.encode())
        if task.type == "long":
            await end.wait()
        ended.append(ctx.task_id)

    keep: dict[str, Any] = {"queue": queue, "retention": HOUR}
    async with Client(uri) as client:
        server = AsyncServer(uri, queues={queue: 9, other: 1}, concurrency=16)
        async with server.running(handle):
            running = await client.enqueue_many([Task("short")] * 4 + [Task("long")] * 4, **keep)
            await until(lambda: len(attempts) == 8)
            due = await client.enqueue("late", process_in=timedelta(seconds=0.3), unique_for=HOUR, **keep)
            pending_while_open = OpenSlot(cluster, queue)
            pending_while_open.move_half()
            first = await lease_scores(redis, queue)
            assert len(first) == 8
            waiting = [asyncio.create_task(client.enqueue("late", **keep)) for _ in range(8)]
            near = await client.enqueue_many([Task("near")] * 100, queue=other)
            go_on.set()
            await until(lambda: len(ended) == 4)
            await until(lambda: all(attempts[info.id] for info in near))

            async def risen_twice() -> bool:
                now = await lease_scores(redis, queue)
                return min(now[name] - score for name, score in first.items()) >= 8

            await until(risen_twice, pause=0.2)
            assert not any(enqueueing.done() for enqueueing in waiting)
            assert set(attempts) == {info.id for info in [*running, *near]}
            pending_while_open.finish()
            infos = await asyncio.gather(*waiting)
            end.set()
            everything = {info.id for info in [*running, *near, *infos, due]}
            await until(lambda: len(attempts) == len(everything))
            expected = Counts(completed=17)
            await until(lambda: is_now(redis, queue, expected))
        assert attempts == Counter(everything)
        assert_clean(server)
        for info in running:
            assert await redis.hget(keys.task(queue, info.id), "result") == info.id.encode()
        assert await counted(redis, queue) == (17, 0)


async def is_now(redis: Any, queue: str, expected: Counts) -> bool:
    """Whether so many are where."""
    return await counts(redis, queue) == expected


async def lease_scores(redis: Any, queue: str) -> dict[bytes, float]:
    """Task ID -> expiry."""
    return dict(await redis.zrange(keys.lease(queue), 0, -1, withscores=True))


async def test_a_paused_queue_moves(cluster: EmbeddedCluster, uri: str, queue: str, redis: Any) -> None:
    """Paused, with tasks: none begins, on either side; resumed in the middle of the next move, each runs once."""
    async with Client(uri) as client:
        work = Work(client, queue)
        server = AsyncServer(uri, queues=[queue], retry_delay=work.retry_delay)
        await redis.set(keys.paused(queue), 1)
        for _ in range(10):
            await work.one_of_each()
        slot = keys.queue_slot(queue)
        async with server.running(work.handle):
            await cluster.move_slot(slot, other_than(cluster, cluster.owner(slot)), batch=10)
            processor = server._processor
            assert processor is not None
            await until(lambda: all(state.paused for state in processor._queues.values()))
            assert work.attempts == {}
            move = OpenSlot(cluster, queue)
            move.move(keys.paused(queue), keys.pending(queue), keys.active(queue))
            assert await redis.delete(keys.paused(queue)) == 1
            asking = server._store.stats.repeats
            await until(lambda: server._store.stats.repeats > asking + 3)  # claims have met the open slot
            assert work.attempts == {}
            move.finish()
            await work.assert_all_done(redis)
        assert_clean(server)


async def test_locks_hold_while_a_slot_moves(cluster: EmbeddedCluster, uri: str, queue: str, redis: Any) -> None:
    """However the slot lies, one of many equal tasks is enqueued, and the others are told who holds the lock."""
    slot = keys.queue_slot(queue)
    verdicts: list[str] = []
    moved = asyncio.Event()

    async def one(client: Client, payload: int) -> None:
        try:
            info = await client.enqueue("x", payload, queue=queue, unique_for=HOUR)
            verdicts.append(f"{payload} {info.id}")
        except DuplicateTaskError as exc:
            verdicts.append(f"{payload} {exc.holder_id}")

    async def many(client: Client) -> None:
        payload = 0
        while not moved.is_set():
            payload += 1
            await asyncio.gather(*(one(client, payload) for _ in range(4)))

    async with Client(uri) as first, Client(uri) as second:
        crowd = [asyncio.create_task(many(client)) for client in (first, second)]
        for _ in range(3):
            goal = len(verdicts) + 80
            await until(lambda goal=goal: len(verdicts) >= goal)  # type: ignore[misc]
            await cluster.move_slot(slot, other_than(cluster, cluster.owner(slot)), batch=10)
        moved.set()
        await asyncio.gather(*crowd)
    holders = {verdict.partition(" ")[0]: verdict for verdict in verdicts}
    assert set(verdicts) == set(holders.values()), "one holder for each payload, whoever asks"
    assert await redis.llen(keys.pending(queue)) == len(holders)


@pytest.mark.parametrize("moved", [False, True], ids=["before the first key", "after some keys"])
async def test_a_move_is_given_up(cluster: EmbeddedCluster, uri: str, queue: str, redis: Any, moved: bool) -> None:
    """SETSLOT STABLE, and keys that had gone come back: all goes on where it was."""
    end = asyncio.Event()
    attempts: Counter[str] = Counter()

    async def handle(ctx: Context, task: Task) -> None:
        attempts[ctx.task_id] += 1
        await end.wait()

    async with Client(uri) as client:
        server = AsyncServer(uri, queues=[queue], concurrency=4)
        async with server.running(handle):
            infos = await client.enqueue_many([Task("x")] * 12, queue=queue)
            await until(lambda: len(attempts) == 4)
            move = OpenSlot(cluster, queue)
            if moved:
                move.move_half()
            end.set()
            waiting = [asyncio.create_task(client.enqueue("x", queue=queue)) for _ in range(4)]
            stores = (server._store, client._door.store)
            for store in stores:
                met = store.stats.repeats
                await until(lambda store=store, met=met: store.stats.repeats > met + 2)  # type: ignore[misc]
            # Between STABLE and the return of the keys the source believes that they do not exist: whoever gives up a
            # move has to stop the traffic. Here nothing is on its way, and nobody sends while this loop stands still.
            await until(lambda: all(lane.in_flight == (0, 0) for store in stores for lane in store.lanes), pause=0)
            cluster.abort_move(move.slot, move.source, move.target)
            infos += await asyncio.gather(*waiting)
            await until(lambda: len(attempts) == 16)
            await until(lambda: is_now(redis, queue, Counts()))
        assert attempts == Counter({info.id: 1 for info in infos})
        assert_clean(server)
        assert await counted(redis, queue) == (16, 0)
        assert await redis.exists(keys.ghost(queue)) == 0


# --- a master fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["valkey9", "redis7"])
async def test_a_master_is_killed(version: Version, queue: str) -> None:
    """Its replica takes over: handlers that ran, tasks that waited and calls that came meanwhile are each counted once.

    What the master acknowledged and had not replicated is Redis' loss; so nothing is on its way at that moment.
    """
    end = asyncio.Event()
    attempts: Counter[str] = Counter()

    async def handle(ctx: Context, task: Task) -> None:
        attempts[ctx.task_id] += 1
        await end.wait()

    async with own_cluster(masters=3, replicas=1, version=version, node_timeout_ms=1_000) as cluster:
        slot = keys.queue_slot(queue)
        master = cluster.owner(slot)
        async with Client(cluster.uri) as client:
            server = AsyncServer(cluster.uri, queues=[queue], concurrency=10)
            async with server.running(handle):
                infos = await client.enqueue_many([Task("x")] * 100, queue=queue)
                await until(lambda: len(attempts) == 10)
                wait_until_replicated(master, queue)
                master.kill()
                end.set()
                infos += await asyncio.gather(*(client.enqueue("x", queue=queue) for _ in range(50)))
                await until(lambda: len(attempts) == 150)
                async with looker(cluster) as redis:
                    await until(lambda: is_now(redis, queue, Counts()))
                    assert await counted(redis, queue) == (150, 0)
            assert attempts == Counter({info.id: 1 for info in infos})
            assert_clean(server)
        assert cluster.owner(slot) is not master


def wait_until_replicated(master: EmbeddedRedis, queue: str) -> None:
    """Return when a replica has all that stands in this master: it gets what is written in order."""
    with Redis(host=master.host, port=master.port, single_connection_client=True) as connection:
        connection.set(f"asynq:{{{queue}}}:replicated", "", px=1)
        assert connection.wait(1, 10_000) == 1
