"""Due tasks of scheduled and retry -> pending, at the moment they are due."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from asynq_aio._backoff import jittered
from asynq_aio._broker import forward
from asynq_aio._task import TaskState
from asynq_aio.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.store import Store

__all__ = ["Forwarder"]

logger = logging.getLogger("asynq_aio.server")

# Where all due tasks are out of reach because their slot is moving: this long until the next try, seconds.
_MOVING = 0.05


class Forwarder:
    """One child per queue; it sleeps until the next due moment.

    What our clients schedule earlier than all others is announced (`hint`); for Go's clients there is a look each
    `interval`. Queues that are paused are forwarded, too.
    """

    def __init__(self, store: Store, queues: Sequence[str], interval: float) -> None:
        self._store = store
        self._interval = interval
        self._hints = {queue: asyncio.Event() for queue in queues}

    def hint(self, queue: str | None = None) -> None:
        """Something may be due earlier than thought, in this queue or (None) in any."""
        for event in self._hints.values() if queue is None else filter(None, [self._hints.get(queue)]):
            event.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for queue in self._hints:
                group.create_task(self._forward_queue(queue))

    async def run_once(self) -> int:
        """Forward everything that is due now; how many tasks that were."""
        moved = 0
        for queue in self._hints:
            for source in (TaskState.SCHEDULED, TaskState.RETRY):
                while batch := (await forward.forward(self._store, queue, source)).moved:
                    moved += batch
        return moved

    async def _forward_queue(self, queue: str) -> None:
        hint = self._hints[queue]
        failing = ""
        while True:
            hint.clear()
            # A tenth longer at random, so that a fleet's looks drift apart.
            pause = jittered(self._interval * 1.1, 0.1 / 1.1)
            try:
                for source in (TaskState.SCHEDULED, TaskState.RETRY):
                    pause = min(pause, await self._pass(queue, source))
                failing = ""
            except BrokerError as exc:
                if failing != str(exc):
                    failing = str(exc)
                    logger.warning("forwarder: queue %s: %s; trying again", queue, exc)
            try:
                async with asyncio.timeout(pause):
                    await hint.wait()
            except TimeoutError:
                pass

    async def _pass(self, queue: str, source: forward.Source) -> float:
        """Move what is due; how long until there may be more, seconds."""
        first_unix = await forward.first_due(self._store, queue, source)
        if first_unix is None:
            return self._interval * 2
        if first_unix > self._store.now():
            return first_unix - self._store.now()
        clock = self._store.clock
        while True:
            began = clock.monotonic()
            moved, left, next_ns = await forward.forward(self._store, queue, source)
            if not moved:
                break
        if left:
            return _MOVING
        if next_ns is None:
            return self._interval * 2
        # Many ids of the current second are looked through at each call: never spend more than a fifth of Redis on it.
        took = clock.monotonic() - began
        return max(next_ns / 1e9 - self._store.now(), 4 * took, 0.001)
