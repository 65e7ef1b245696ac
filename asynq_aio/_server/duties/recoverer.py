"""Takes up the tasks of servers that are gone: silent owners at once, everybody else by Go's rule of expired leases."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING

from asynq_aio._backoff import jittered
from asynq_aio._broker import finish, leases, recovery
from asynq_aio._broker.finish import Archive, Requeue, Verdict
from asynq_aio._broker.leases import Lease
from asynq_aio._server import outcome as outcomes
from asynq_aio._task import Task
from asynq_aio._wire import codec
from asynq_aio._wire.limits import LEASE_SECONDS, RECOVERY_GRACE_SECONDS
from asynq_aio.errors import BrokerError, LeaseExpiredError, MessageDecodeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.finish import Outcome
    from asynq_aio._broker.recovery import Held
    from asynq_aio._broker.store import Store
    from asynq_aio._server.config import ServerConfig
    from asynq_aio._server.execution import ServerStats
    from asynq_aio._server.lease import Holdings

__all__ = ["Recoverer"]

logger = logging.getLogger("asynq_aio.server")

# A live server raises its leases every 5 s. One that has not moved for longer than this is looked at each second.
_SUSPECT = 6.0
# ... and for this long, with no entry of its server, belongs to nobody: 5 s heartbeat + 4 s guard < 10 s entry < 12 s.
_SILENT = 12.0
# Redis must have answered for so long before a lease counts as expired: after an outage owners regain theirs first.
_STEADY = 15.0
# The lowest leases are looked at; those of the dead are among them, since the living raise theirs.
_MOST = 1000
# A look that took longer had to wait for Redis, seconds.
_SLOW = 1.0
_LOOK = 5.0
# How often the list of active tasks is compared with the leases, seconds.
_COMPARE = 60.0


class _Watch:
    """What one queue's leases looked like, and since when."""

    def __init__(self) -> None:
        self.steady_since: float | None = None
        """Monotonic seconds since when every look was answered."""
        self.unmoved: dict[bytes, tuple[int, float]] = {}
        """Task ID -> (score, monotonic seconds when it was first seen with it)."""
        self.looked_at: float | None = None
        self.compared_at: float | None = None
        self.without_lease: set[bytes] = set()

    def reset(self) -> None:
        """A look failed: nothing is known any more."""
        self.steady_since = None
        self.unmoved.clear()
        self.without_lease.clear()


class Recoverer:
    """Looks at the leases of each queue every 5 s, each second where one has not moved.

    Invariant: the task of a live owner, Python or Go, is never taken. What is decided here on a look is compared again
    in the script that acts: the lease's score, and the owner.
    """

    def __init__(
        self, store: Store, queues: Sequence[str], config: ServerConfig, holdings: Holdings, stats: ServerStats
    ) -> None:
        self._store = store
        self._queues = {queue: _Watch() for queue in queues}
        self._config = config
        self._holdings = holdings
        self._stats = stats

    async def run(self) -> None:
        """Until cancelled; a child per queue, so that a dead node holds up its own queues alone."""
        async with asyncio.TaskGroup() as group:
            for queue, watch in self._queues.items():
                group.create_task(self._watch_queue(queue, watch))

    async def run_once(self) -> int:
        """One pass over every queue; how many tasks were taken up."""
        return sum([await self._pass(queue, watch) for queue, watch in self._queues.items()])

    async def _watch_queue(self, queue: str, watch: _Watch) -> None:
        failing = ""
        while True:
            try:
                await self._pass(queue, watch)
                failing = ""
            except BrokerError as exc:
                watch.reset()
                if failing != str(exc):
                    failing = str(exc)
                    logger.warning("recoverer: queue %s: %s; trying again", queue, exc)
            now = self._store.clock.monotonic()
            suspects = any(now - since >= _SUSPECT for _, since in watch.unmoved.values())
            pause = 1.0 if suspects else _LOOK
            await asyncio.sleep(jittered(pause * 1.1, 0.1 / 1.1))

    async def _pass(self, queue: str, watch: _Watch) -> int:
        clock = self._store.clock
        began = clock.monotonic()
        low = await recovery.lowest_leases(self._store, queue, _MOST)
        now = clock.monotonic()
        if now - began > _SLOW or (watch.looked_at is not None and began - watch.looked_at > 2 * _LOOK):
            # Redis, or this loop, stood still meanwhile: a lease that did not move then says nothing about its owner.
            watch.reset()
        watch.looked_at = now
        if watch.steady_since is None:
            watch.steady_since = now
        seen = watch.unmoved
        watch.unmoved = {}
        for task_id, score in low:
            before = seen.get(task_id)
            watch.unmoved[task_id] = before if before is not None and before[0] == score else (score, now)
        taken = 0
        if now - watch.steady_since >= _STEADY:
            taken += await self._expired(queue, watch)
        taken += await self._silent(queue, watch, now)
        await self._compare(queue, watch, now)
        self._stats.recovered += taken
        return taken

    # -- expired leases: Go's rule

    async def _expired(self, queue: str, watch: _Watch) -> int:
        cutoff_unix = int(self._store.now()) - RECOVERY_GRACE_SECONDS
        expired = [(task_id, score) for task_id, (score, _) in watch.unmoved.items() if score <= cutoff_unix]
        if not expired:
            return 0
        work: list[Outcome] = []
        for (task_id, score), held in zip(
            expired, await recovery.look(self._store, queue, [task_id for task_id, _ in expired]), strict=True
        ):
            if held.encoded is not None:  # no hash: not a task; the sweep of orphans is somebody else's
                work.append(self._of_expired(Lease(queue, _text(task_id), "", score, exact=True), held.encoded))
        return await self._write(queue, watch, work, "its lease expired")

    def _of_expired(self, lease: Lease, encoded: bytes) -> Outcome:
        try:
            message = codec.decode_task(encoded)
        except MessageDecodeError as exc:
            logger.error("task %r of queue %s is archived: %s", lease.task_id, lease.queue, exc)  # noqa: TRY400
            return Archive(lease, encoded, str(exc))
        task = Task.received(message.type, message.payload, message.headers)
        return outcomes.failed(message, lease, LeaseExpiredError(), task, self._config, self._store.now_ns())

    # -- silent owners

    async def _silent(self, queue: str, watch: _Watch, now: float) -> int:
        unmoved = [
            (task_id, score)
            for task_id, (score, since) in watch.unmoved.items()
            if now - since >= _SILENT and self._holdings.get(queue, _text(task_id)) is None
        ]
        if not unmoved:
            return 0
        work: list[Outcome] = []
        present: dict[str, bool] = {}
        looks = await recovery.look(self._store, queue, [task_id for task_id, _ in unmoved])
        for (task_id, score), held in zip(unmoved, looks, strict=True):
            if not held.owner or held.encoded is None:
                continue
            server = held.owner.rpartition("/")[0]
            if server not in present:
                present[server] = await recovery.server_is_present(self._store, held.owner)
            if not present[server]:
                work.append(self._of_silent(Lease(queue, _text(task_id), held.owner, score, exact=True), held))
        work.reverse()  # each is pushed to the head: the oldest last, so that it is taken first
        return await self._write(queue, watch, work, "its server is gone")

    def _of_silent(self, lease: Lease, held: Held) -> Outcome:
        encoded = held.encoded or b""
        try:
            message = codec.decode_task(encoded)
        except MessageDecodeError as exc:
            return Archive(lease, encoded, str(exc))
        if message.retry == 0 or held.recovered >= self._config.max_recoveries:
            text = (
                f"the server died while it ran this task; recovered {held.recovered} times before "
                f"(max_recoveries={self._config.max_recoveries}, max_retry={message.retry})"
            )
            edited = dataclasses.replace(message, error_msg=text, last_failed_at=int(self._store.now()))
            return Archive(lease, codec.encode_task(edited))
        return Requeue(lease, recovered=True)

    # -- both

    async def _write(self, queue: str, watch: _Watch, work: list[Outcome], why: str) -> int:
        taken = 0
        for part in finish.chunks(work):
            for outcome, verdict in zip(part, await finish.finish(self._store, queue, part), strict=True):
                if verdict is Verdict.WRITTEN:
                    taken += 1
                    watch.unmoved.pop(_bytes(outcome.lease.task_id), None)
                    becomes = {"Requeue": "goes back to the queue", "Archive": "is archived"}.get(
                        type(outcome).__name__, "is retried"
                    )
                    logger.warning("task %s of queue %s %s: %s", outcome.lease.task_id, queue, becomes, why)
        return taken

    # -- active without a lease

    async def _compare(self, queue: str, watch: _Watch, now: float) -> None:
        if watch.compared_at is not None and now - watch.compared_at < _COMPARE:
            return
        watch.compared_at = now
        bare = await leases.without_lease(self._store, queue)
        both = bare & watch.without_lease
        watch.without_lease = bare
        if both:
            given = await leases.lend(self._store, queue, sorted(both), int(self._store.now()) + LEASE_SECONDS)
            if given:
                logger.warning(
                    "queue %s: %d active tasks had no lease; they get one, and run again when it expires", queue, given
                )


def _text(task_id: bytes) -> str | bytes:
    try:
        return task_id.decode()
    except UnicodeDecodeError:
        return task_id


def _bytes(task_id: str | bytes) -> bytes:
    return task_id.encode() if isinstance(task_id, str) else task_id
