"""Every script, while its slot is half moved: each key at the source or at the target, and nothing is lost or doubled.

Two masters and the true sequence: SETSLOT IMPORTING and MIGRATING, MIGRATE for some keys, the script, MIGRATE for the
rest, SETSLOT NODE. A script may wait, and be refused at its deadline, or do what it can reach; once the slot has moved
it is asked again, and the queue looks as if nothing had moved.
"""

from __future__ import annotations

import itertools
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio.cluster import RedisCluster

from asynq_aio import BrokerError, BrokerUnavailableError, OutcomeUnknownError, TaskState
from asynq_aio._broker import dequeue, enqueue, finish, forward, leases, results, retention
from asynq_aio._broker.dequeue import Claim
from asynq_aio._broker.embedded import EmbeddedCluster
from asynq_aio._broker.finish import Archive, Complete, Done, Requeue, Retry, Verdict
from asynq_aio._broker.presence import Presence
from asynq_aio._broker.store import Store
from asynq_aio._wire import codec, keys
from asynq_aio._wire.limits import ARCHIVE_DAYS
from tests import seed
from tests.clock import FrozenClock
from tests.seed import SERVER
from tests.servers import binary

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence

    from asynq_aio._broker.finish import Outcome

    Act = Callable[[], Awaitable[None]]

# How long a script waits for a slot in the middle of its move; a repeat comes after 4 to 25 ms.
PATIENCE = 0.05


class NotWholeError(Exception):
    """Something was out of reach: ask again."""


@pytest.fixture(scope="module", params=["valkey9", "redis7"])
def cluster(request: pytest.FixtureRequest) -> Iterator[EmbeddedCluster]:
    """Two masters, to move slots between."""
    made = EmbeddedCluster(masters=2, replicas=0, node_timeout_ms=15_000, binary=binary(request.param))
    made.start()
    yield made
    made.stop()


@pytest.fixture
async def looker(cluster: EmbeddedCluster) -> AsyncGenerator[Any]:
    """A plain client, to seed and to look."""
    client = RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port, protocol=2)
    yield client
    await client.aclose()


class Case:
    """One queue, prepared, and one script that is run on it until it has done everything."""

    def __init__(self, store: Store, redis: Any, queue: str, clock: FrozenClock) -> None:
        self.store = store
        self.redis = redis
        self.queue = queue
        self.clock = clock

    def message(self, name: str, **given: Any) -> Any:
        """A task of this queue."""
        return seed.message(self.queue, name, **given)

    async def fill(self) -> None:
        """Containers that are there have their keys: a script is not refused for keys that were never there."""
        now = self.clock.unix
        await seed.waiting(self.redis, self.queue, "scheduled", [(self.message("s0"), now + 900)])
        await seed.waiting(self.redis, self.queue, "retry", [(self.message("r0"), now + 900)])
        await seed.waiting(self.redis, self.queue, "archived", [(self.message("x0"), now - 5)])
        await seed.waiting(self.redis, self.queue, "completed", [(self.message("c0"), now + 900)])
        await seed.pending(self.redis, self.queue, [self.message("p0")])
        await seed.active(self.redis, self.queue, [self.message("a0")], expires_unix=now + 30, owner="o:1:o/1")
        await self.redis.zadd(keys.ghost(self.queue), {"ghost": now - 9})
        await self.redis.sadd(keys.groups(self.queue), "g0")
        await self.redis.zadd(keys.group(self.queue, "g0"), {"g0": now})
        await seed.hashes(self.redis, self.queue, [self.message("g0")], "aggregating", group="g0")
        today = datetime.now(UTC).date().isoformat()
        for key in (keys.processed(self.queue), keys.failed(self.queue)):
            await self.redis.mset_nonatomic({key: 5, f"{key}:{today}": 5})

    async def enqueue(self) -> Act:
        """Three kinds, with locks, one of them refused."""
        entries = [
            seed.entry(self.queue, "a", unique_ttl=600),
            seed.entry(self.queue, "b", due_ns=self.clock.now_ns + 60 * 10**9 + 5, unique_ttl=600),
            seed.entry(self.queue, "c", group="g0", unique_ttl=600),
            seed.entry(self.queue, "p0"),
        ]

        async def act() -> None:
            verdicts = await enqueue.enqueue(self.store, self.queue, entries, client_id="c", number=1)
            assert [verdict is None for verdict in verdicts] == [True, True, True, False]

        return act

    async def claim(self) -> Act:
        """All that is pending."""
        await seed.pending(self.redis, self.queue, [self.message("a"), self.message("b", unique=True)])
        taken: set[bytes] = set()
        lost: list[Claim] = []
        numbers = itertools.count(1)

        async def act() -> None:
            if lost:
                whole, tasks = await dequeue.adopt(self.store, lost[0])
                if not whole:
                    raise NotWholeError
                lost.clear()
            else:
                claim = dequeue.new_claim(self.store, self.queue, SERVER, next(numbers))
                try:
                    _, tasks = await dequeue.claim(self.store, claim, 10)
                except OutcomeUnknownError as exc:  # it was on its way at the deadline
                    lost.append(claim)
                    raise NotWholeError from exc
            taken.update(task.task_id for task in tasks)
            if len(taken) < 3:
                raise NotWholeError

        return act

    async def adopt(self) -> Act:
        """What a claim took."""
        lost = Claim(self.queue, SERVER, 5, self.clock.unix + 30)
        await self.redis.set(keys.fence(self.queue, "server"), 3)
        await seed.active(
            self.redis,
            self.queue,
            [self.message("a"), self.message("b")],
            owner=lost.owner,
            expires_unix=lost.expires_unix,
        )

        async def act() -> None:
            whole, tasks = await dequeue.adopt(self.store, lost)
            if not whole:
                raise NotWholeError
            assert {task.task_id for task in tasks} == {b"a", b"b"}

        return act

    async def finish(self) -> Act:
        """Every outcome, with locks; the archive drops a task that is too old, with its hash and lock."""
        names = ["d", "c", "r", "a", "q", "e"]
        tasks = {name: self.message(name, unique=True) for name in names}
        await seed.active(self.redis, self.queue, list(tasks.values()), expires_unix=self.clock.unix + 30)
        too_old = self.clock.unix - (ARCHIVE_DAYS + 1) * 86_400
        await seed.waiting(self.redis, self.queue, "archived", [(self.message("old", unique=True), too_old)])
        now = self.clock.unix

        def lease(name: str) -> Any:
            return seed.lease(self.queue, name, now + 30)

        def encoded(name: str) -> bytes:
            return codec.encode_task(seed.edited(tasks[name], error_msg="boom"))

        left: list[Outcome] = [
            Done(lease("d"), tasks["d"].unique_key),
            Complete(lease("c"), tasks["c"].unique_key, encoded("c"), now + 60, b"result"),
            Retry(lease("r"), encoded("r"), now + 60, failure=True),
            Archive(lease("a"), encoded("a")),
            Requeue(lease("q")),
            Done(lease("e"), tasks["e"].unique_key),
        ]

        async def act() -> None:
            verdicts = await finish.finish(self.store, self.queue, left)
            assert Verdict.LOST not in verdicts
            left[:] = [outcome for outcome, verdict in zip(left, verdicts, strict=True) if verdict is Verdict.TRYAGAIN]
            if left:
                raise NotWholeError

        return act

    async def settle(self) -> None:
        """What the archive could not drop, it drops with the next task that comes."""
        await seed.active(self.redis, self.queue, [self.message("z")], expires_unix=self.clock.unix + 30)
        last = Archive(seed.lease(self.queue, "z", self.clock.unix + 30), codec.encode_task(self.message("z")))
        assert await finish.finish(self.store, self.queue, [last]) == [Verdict.WRITTEN]

    async def forward(self) -> Act:
        """Due tasks, one of them into its group."""
        now = self.clock.unix
        await seed.waiting(
            self.redis, self.queue, "retry", [(self.message("a"), now - 2), (self.message("b"), now - 1)]
        )
        await seed.waiting(self.redis, self.queue, "retry", [(self.message("c"), now)], group="g0")

        async def act() -> None:
            done = await forward.forward(self.store, self.queue, TaskState.RETRY, self.clock.now_ns)
            if done.left or done.moved:
                raise NotWholeError

        return act

    async def retention(self) -> Act:
        """Completed tasks whose time is over."""
        now = self.clock.unix
        await seed.waiting(self.redis, self.queue, "completed", [(self.message(name), now - 1) for name in "ab"])

        async def act() -> None:
            gone, left = await retention.delete_expired(self.store, self.queue, 10, self.clock.unix)
            if gone or left:
                raise NotWholeError

        return act

    async def sweep(self) -> Act:
        """An ID whose hash is there again, though it is old enough to be forgotten."""
        await seed.hashes(self.redis, self.queue, [self.message("ghost")], "pending")
        back = 0

        async def act() -> None:
            nonlocal back
            back += (await retention.sweep(self.store, self.queue, batch=10, forget_unix=self.clock.unix))[0]
            if not back:
                raise NotWholeError

        return act

    async def regain(self) -> Act:
        """Leases that have run out."""
        await seed.active(
            self.redis, self.queue, [self.message("a"), self.message("b")], expires_unix=self.clock.unix - 9
        )
        mine = [seed.lease(self.queue, name, self.clock.unix - 9) for name in "ab"]

        async def act() -> None:
            assert (
                await leases.regain(self.store, self.queue, mine, self.clock.unix + 30, deadline=self.store.deadline)
                == []
            )

        return act

    async def extend(self) -> Act:
        """Leases go on while all else waits: this one is never refused."""
        await seed.active(self.redis, self.queue, [self.message("a")], expires_unix=self.clock.unix + 30)
        mine = [seed.lease(self.queue, "a", self.clock.unix + 30)]

        async def act() -> None:
            await leases.extend(self.store, self.queue, mine, self.clock.unix + 35, deadline=5)

        return act

    async def lend(self) -> Act:
        """An active task without a lease."""
        await seed.active(self.redis, self.queue, [self.message("a")], expires_unix=1)
        await self.redis.zrem(keys.lease(self.queue), "a")

        async def act() -> None:
            await leases.lend(self.store, self.queue, [b"a"], self.clock.unix + 30)

        return act

    async def result(self) -> Act:
        """A result is never refused either: an ASK says where the hash is."""
        await seed.active(self.redis, self.queue, [self.message("a")], expires_unix=self.clock.unix + 30)

        async def act() -> None:
            await results.write(self.store, self.queue, "a", b"data")

        return act


SCRIPTS = [
    "enqueue", "claim", "adopt", "finish", "forward", "retention", "sweep", "regain", "extend", "lend", "result",
]  # fmt: skip
NEVER_WAIT = {"extend", "result"}
LOCKED = ["a", "b", "c", "d", "e", "q", "r", "old"]


async def play(
    store: Store,
    redis: Any,
    clock: FrozenClock,
    script: str,
    halfway: Callable[[str], tuple[Move, str]] | None,
    expected: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Prepare a queue, run the script `halfway` into a move of its slot, and again after it; how the queue looks."""
    queue = f"q{uuid.uuid4().hex[:12]}"
    case = Case(store, redis, queue, clock)
    await case.fill()
    act: Act = await getattr(case, script)()
    again, words = True, ""
    if halfway is not None:
        move, words = halfway(queue)
        store.deadline = PATIENCE
        try:
            await act()
        except (BrokerUnavailableError, NotWholeError):
            assert script not in NEVER_WAIT, words
        except BrokerError as exc:
            raise AssertionError(f"{words}: {exc}") from exc
        else:
            again = False
        finally:
            store.deadline = 20.0
            move.rest()
    while again:
        try:
            await act()
        except NotWholeError:
            continue
        again = False
    if script == "finish":
        await case.settle()
    found = await seed.look(redis, queue, ["a", "b", "c", "d", "e", "old", "ghost"])
    for container in ("pending", "active"):
        found[container] = sorted(found.get(container, []))
    for task in (value for name, value in found.items() if name.startswith("t:")):
        task.pop("aio_owner", None)  # a claim more, another number
    found["locks"] = [name for name in LOCKED if await redis.get(seed.message(queue, name, unique=True).unique_key)]
    found = {name: _without_queue(value, queue) for name, value in found.items()}
    if expected is not None:
        assert found == expected, words.replace(queue, "<queue>")
    return found


def _without_queue(value: Any, queue: str) -> Any:
    match value:
        case bytes():
            return value.replace(queue.encode(), b"<queue>")
        case str():
            return value.replace(queue, "<queue>")
        case dict():
            return {name: _without_queue(item, queue) for name, item in value.items()}
        case _:
            return value


class Move:
    """Moves the slot of a queue in two steps: first some of its keys, then the rest."""

    def __init__(self, cluster: EmbeddedCluster, queue: str) -> None:
        self._cluster = cluster
        self._slot = keys.queue_slot(queue)
        self._target = next(node for node in cluster.masters() if node is not cluster.owner(self._slot))
        self._source = cluster.begin_move(self._slot, self._target)
        there = cluster.keys_in(self._source, self._slot, 1_000)
        self.keys = sorted(name for name in there if f"{{{queue}}}" in name)  # another queue may have the same slot

    def first(self, names: Sequence[str]) -> None:
        """These go now."""
        if names:
            self._cluster.move_keys(self._source, self._target, names)

    def rest(self) -> None:
        """Everything goes, and the slot is closed; BUSYKEY, if a script has made a key anew that had moved."""
        while left := self._cluster.keys_in(self._source, self._slot, 1_000):
            self._cluster.move_keys(self._source, self._target, left)
        self._cluster.finish_move(self._slot, self._source, self._target)


def halves(names: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """(what has moved in words, which keys): none, all, each alone, all but each."""
    yield "no key has moved", ()
    yield "all keys have moved", names
    for name in names:
        yield f"{name} alone has moved", (name,)
        yield f"all but {name} have moved", [other for other in names if other != name]


@pytest.mark.parametrize("script", SCRIPTS)
async def test_every_script_with_each_key_on_either_side(cluster: EmbeddedCluster, looker: Any, script: str) -> None:
    """Whichever keys have moved first, or none: in the end the queue looks as without any move."""
    clock = FrozenClock()
    async with Store(cluster.uri, clock=clock) as store:
        expected = await play(store, looker, clock, script, None)
        number, count = 0, 1
        while number < count:

            def halfway(queue: str, *, number: int = number) -> tuple[Move, str]:
                nonlocal count
                move = Move(cluster, queue)
                words = list(halves(move.keys))
                count = len(words)
                move.first(words[number][1])
                return move, words[number][0]

            await play(store, looker, clock, script, halfway, expected)
            number += 1
    assert count > 20


async def test_presence_in_an_open_slot(cluster: EmbeddedCluster, looker: Any) -> None:
    """A busy server's entry is replaced whole while its slot is open: its workers do not vanish in between."""
    server_id = str(uuid.uuid4())
    names = keys.server("host", 1, server_id), keys.workers("host", 1, server_id)
    slot = keys.slot(names[0])
    async with Store(cluster.uri) as store:
        presence = Presence(store, *names)
        await presence.write(b"first", {"a": b"1", "b": b"1"})
        target = next(node for node in cluster.masters() if node is not cluster.owner(slot))
        source = cluster.begin_move(slot, target)
        await presence.write(b"second", {"c": b"2"})
        cluster.move_keys(source, target, names)
        cluster.finish_move(slot, source, target)
        assert (await looker.get(names[0]), await looker.hgetall(names[1])) == (b"second", {b"c": b"2"})
        await presence.clear()
