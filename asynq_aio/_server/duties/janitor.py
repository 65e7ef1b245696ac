"""Deletes completed tasks past their time, and looks after IDs that lost their hash."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from asynq_aio._broker import retention
from asynq_aio._server.ticker import every

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.store import Store

__all__ = ["Janitor"]

# How often, seconds, and for how long an ID without a hash is remembered.
_SWEEP = 300.0
_FORGET_SECONDS = 86_400


class Janitor:
    """A look at each queue every few seconds; it deletes in batches, so that Redis is never busy for long."""

    def __init__(self, store: Store, queues: Sequence[str], *, interval: float, batch: int) -> None:
        self._store = store
        self._queues = queues
        self._interval = interval
        self._batch = batch
        self._swept_at: dict[str, float] = {}

    async def run(self) -> None:
        """Until cancelled; a child per queue, so that a dead node holds up its own queues alone."""
        async with asyncio.TaskGroup() as group:
            for queue in self._queues:
                clean = functools.partial(self._clean, queue)
                group.create_task(every(self._interval, clean, name=f"janitor: queue {queue}", spread=0.1))

    async def run_once(self) -> int:
        """How many completed tasks went, over all queues."""
        return sum([await self._clean(queue) for queue in self._queues])

    async def _clean(self, queue: str) -> int:
        gone = 0
        first_unix = await retention.first_expiry(self._store, queue)
        while first_unix is not None and first_unix <= self._store.now():
            deleted, left = await retention.delete_expired(self._store, queue, self._batch)
            gone += deleted
            if deleted < self._batch or left:
                break
        now = self._store.clock.monotonic()
        swept_at = self._swept_at.get(queue)
        if swept_at is None or now - swept_at >= _SWEEP:
            self._swept_at[queue] = now
            await self._sweep(queue)
        return gone

    async def sweep(self) -> int:
        """How many IDs that once had no hash went back to pending."""
        return sum([await self._sweep(queue) for queue in self._queues])

    async def _sweep(self, queue: str) -> int:
        forget_unix = int(self._store.now()) - _FORGET_SECONDS
        back, _ = await retention.sweep(self._store, queue, batch=1000, forget_unix=forget_unix)
        return back
