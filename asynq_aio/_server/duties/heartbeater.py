"""Says that the server is there, and keeps its leases; each by a child of its own, so that none waits for another."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING

from asynq_aio._broker import leases
from asynq_aio._server.ticker import every
from asynq_aio._wire import codec
from asynq_aio._wire.limits import HEARTBEAT_SECONDS, LEASE_SECONDS
from asynq_aio._wire.messages import Timestamp, WorkerInfo
from asynq_aio.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynq_aio._broker.presence import Presence
    from asynq_aio._broker.store import Store
    from asynq_aio._server.execution import Attempt, Executor
    from asynq_aio._server.lease import Holdings
    from asynq_aio._wire.messages import ServerInfo

__all__ = ["Heartbeater"]

logger = logging.getLogger("asynq_aio.server")

# A plain extension is safe while nobody can have taken the task: its last sign of life is younger than this, seconds.
_SURE = 10.0
# The next pass comes after 5 s; a call that takes longer than this is given up, or an entry of 10 s would run out.
LIMIT_SECONDS = 3.0


class Heartbeater:
    """Every 5 s: the server's entry, with its running tasks, and the expiry of every lease that it holds."""

    def __init__(
        self, store: Store, presence: Presence, info: Callable[[], ServerInfo], holdings: Holdings, executor: Executor
    ) -> None:
        self._store = store
        self._presence = presence
        self._info = info
        self._holdings = holdings
        self._executor = executor
        self._extending: dict[str, asyncio.Task[None]] = {}
        self.seen_at: float | None = None
        """Monotonic seconds when Redis last took the server's entry."""

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(every(HEARTBEAT_SECONDS, self.show, name="heartbeater"))
                group.create_task(every(HEARTBEAT_SECONDS, self._start_extending, name="leases"))
        finally:
            for child in self._extending.values():
                child.cancel()

    async def run_once(self) -> None:
        """One pass of both, for tests and for the start."""
        await self.show()
        await asyncio.gather(*(self._extend(queue, attempts) for queue, attempts in self._holdings.by_queue()))

    # -- presence

    async def show(self) -> None:
        """Write the server's entry."""
        workers: dict[str, bytes] = {}
        info = self._info()
        for attempt in self._holdings:
            message = attempt.message
            if attempt.child is not None and message is not None:
                workers[message.id] = codec.encode_worker_info(
                    WorkerInfo(
                        host=info.host,
                        pid=info.pid,
                        server_id=info.server_id,
                        task_id=message.id,
                        task_type=message.type,
                        task_payload=message.payload,
                        queue=message.queue,
                        start_time=Timestamp.from_ns(attempt.started_ns),
                        deadline=Timestamp.from_ns(int(attempt.deadline_unix * 1e9)),
                    )
                )
        await self._presence.write(codec.encode_server_info(info), workers, deadline=LIMIT_SECONDS)
        self.seen_at = self._store.clock.monotonic()

    # -- leases

    async def _start_extending(self) -> None:
        """A child per queue: a queue whose node is dead must not cost another its leases."""
        for queue, attempts in self._holdings.by_queue():
            if queue not in self._extending:
                child = asyncio.get_running_loop().create_task(self._extend(queue, attempts))
                self._extending[queue] = child
                child.add_done_callback(functools.partial(self._extended, queue))

    def _extended(self, queue: str, child: asyncio.Task[None]) -> None:
        del self._extending[queue]
        if not child.cancelled() and child.exception() is not None:
            logger.error("queue %s: extending its leases failed", queue, exc_info=child.exception())

    async def _extend(self, queue: str, attempts: list[Attempt]) -> None:
        now = self._store.clock.monotonic()
        expires_unix = int(self._store.now()) + LEASE_SECONDS
        sure = [attempt for attempt in attempts if now - attempt.renewed < _SURE]
        unsure = [attempt for attempt in attempts if now - attempt.renewed >= _SURE]
        # The sure ones first: a slot that moves holds up the script that asks for the others; it would make all unsure.
        for part, raise_them in ((sure, self._raise), (unsure, self._regain)):
            if not part:
                continue
            try:
                await raise_them(queue, part, expires_unix)
            except BrokerError as exc:
                logger.warning("queue %s: the leases of %d tasks could not be extended: %s", queue, len(part), exc)

    async def _raise(self, queue: str, attempts: list[Attempt], expires_unix: int) -> None:
        now = self._store.clock.monotonic()
        await leases.extend(
            self._store, queue, [attempt.lease for attempt in attempts], expires_unix, deadline=LIMIT_SECONDS
        )
        for attempt in attempts:
            attempt.renewed = now

    async def _regain(self, queue: str, attempts: list[Attempt], expires_unix: int) -> None:
        """Others may have taken them: ask before anything else is written."""
        now = self._store.clock.monotonic()
        by_lease = {id(attempt.lease): attempt for attempt in attempts}
        lost = await leases.regain(
            self._store, queue, [attempt.lease for attempt in attempts], expires_unix, deadline=LIMIT_SECONDS
        )
        for lease in lost:
            attempt = by_lease.pop(id(lease))
            logger.warning("task %r of queue %s: its lease is lost", lease.task_id, queue)
            self._executor.lose(attempt)
        for attempt in by_lease.values():
            attempt.renewed = now
