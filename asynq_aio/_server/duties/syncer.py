"""Writes outcomes, many in a call, until Redis has said *written* or *lost*."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from asynq_aio._backoff import jittered
from asynq_aio._broker import finish, leases
from asynq_aio._broker.finish import Requeue, Verdict
from asynq_aio._wire.limits import LEASE_SECONDS
from asynq_aio.errors import BrokerAuthError, BrokerError, BrokerFullError, BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asynq_aio._broker.finish import Outcome
    from asynq_aio._broker.store import Store
    from asynq_aio._server.execution import Attempt, ServerStats
    from asynq_aio._server.lease import Holdings

__all__ = ["Syncer"]

logger = logging.getLogger("asynq_aio.server")

_Waiting = tuple["Attempt", "Outcome"]


class Syncer:
    """Group commit: what finishes while a call of its queue is in flight leaves with the next one.

    An outcome is kept, and its lease extended, however long Redis is away; meanwhile `room` holds the processor back.
    """

    def __init__(
        self, store: Store, holdings: Holdings, stats: ServerStats, *, most: int, written: Callable[[], None]
    ) -> None:
        self._store = store
        self._holdings = holdings
        self._stats = stats
        self._most = most
        self._written = written
        self._waiting: dict[str, list[_Waiting]] = {}
        self._writers: dict[str, asyncio.Task[None]] = {}
        self._failing: dict[str, str] = {}
        """Queue -> the error that was logged last, until it is written to again."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: BaseException | None = None
        self._failed = asyncio.Event()
        self.unwritten = 0
        """Outcomes of which Redis has not said what became of them."""

    @property
    def room(self) -> bool:
        """Whether more tasks may be taken: unwritten outcomes are bounded."""
        return self.unwritten < self._most

    def put(self, attempt: Attempt, outcome: Outcome) -> None:
        """Write this as soon as possible."""
        queue = outcome.lease.queue
        self.unwritten += 1
        self._idle.clear()
        waiting = self._waiting.get(queue)
        if waiting is None:
            waiting = self._waiting[queue] = []
        waiting.append((attempt, outcome))
        if queue not in self._writers:
            # It starts in the next turn of the loop, so that what finishes in this one goes together.
            writer = asyncio.get_running_loop().create_task(self._write_queue(queue))
            self._writers[queue] = writer
            writer.add_done_callback(self._writer_ended)

    async def run(self) -> None:
        """Until cancelled; raises what a writer died of: an outcome must not be lost in silence."""
        await self._failed.wait()
        if self._failure is not None:
            raise self._failure

    async def drain(self, seconds: float) -> int:
        """Wait until everything is written, at most so long.

        Returns:
            How many outcomes are not written: those tasks run again when their leases have run out.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        writers = list(self._writers.values())
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        return self.unwritten

    async def _write_queue(self, queue: str) -> None:
        pause = 0.0
        while waiting := self._waiting.pop(queue, None):
            again: list[_Waiting] = []
            first = 0
            for part in finish.chunks([outcome for _, outcome in waiting]):
                again += await self._write(queue, waiting[first : first + len(part)])
                first += len(part)
            if again:
                # The door has waited until its deadline, or the slot is moving.
                self._waiting[queue] = again + self._waiting.get(queue, [])
                pause = min(max(0.02, pause * 2), 0.5)
                await asyncio.sleep(jittered(pause))
            else:
                pause = 0.0
        del self._writers[queue]

    async def _write(self, queue: str, part: Sequence[_Waiting]) -> list[_Waiting]:
        """Write one chunk; returns what has to be written again."""
        await self._settle_leases(queue, [attempt for attempt, _ in part if attempt.lease.unheard])
        try:
            verdicts = await finish.finish(self._store, queue, [outcome for _, outcome in part])
        except (BrokerUnavailableError, BrokerAuthError, BrokerFullError) as exc:
            # None of these says anything about the tasks, and somebody will mend it.
            if self._failing.get(queue) != str(exc):
                self._failing[queue] = str(exc)
                logger.warning("queue %s: %d outcomes wait to be written: %s", queue, self.unwritten, exc)
            return list(part)
        except BrokerError as exc:
            if len(part) > 1:  # whatever is wrong with one of them must not hold up the others
                half = len(part) // 2
                return await self._write(queue, part[:half]) + await self._write(queue, part[half:])
            attempt, outcome = part[0]
            logger.error(  # noqa: TRY400  (the reason is in the text; the trace is ours, not theirs)
                "task %r of queue %s: Redis refuses its outcome (%s): %s; it is left to the lease",
                outcome.lease.task_id,
                queue,
                type(outcome).__name__,
                exc,
            )
            self._stats.lost += 1
            self._final(attempt)
            self._written()
            return []
        self._failing.pop(queue, None)
        again: list[_Waiting] = []
        for waiting, verdict in zip(part, verdicts, strict=True):
            if verdict is Verdict.TRYAGAIN:
                again.append(waiting)
                continue
            # What was given back, and taken again before the repeat of a lost reply, is not lost: it is not ours.
            if verdict is Verdict.LOST and not (waiting[1].sent and isinstance(waiting[1], Requeue)):
                self._stats.lost += 1
                logger.warning(
                    "task %r of queue %s: its outcome (%s) is too late and not counted: the task is another's, or gone",
                    waiting[1].lease.task_id,
                    queue,
                    type(waiting[1]).__name__,
                )
            self._final(waiting[0])
        self._written()
        return again

    async def _settle_leases(self, queue: str, unheard: Sequence[Attempt]) -> None:
        """Where a regain has not been heard of, nobody knows which expiry is ours: ask before anything is written."""
        if not unheard:
            return
        expires_unix = int(self._store.now()) + LEASE_SECONDS
        try:
            await leases.regain(self._store, queue, [attempt.lease for attempt in unheard], expires_unix)
        except BrokerError as exc:  # `finish` will say so, too
            logger.debug("queue %s: leases are not settled yet: %s", queue, exc)

    def _final(self, attempt: Attempt) -> None:
        self.unwritten -= 1
        self._holdings.discard(attempt)
        if self.unwritten == 0:
            self._idle.set()

    def _writer_ended(self, writer: asyncio.Task[None]) -> None:
        if not writer.cancelled() and writer.exception() is not None:
            self._failure = writer.exception()
            self._failed.set()
