"""Deletes completed tasks past their time, and looks after IDs that lost their hash."""

from __future__ import annotations

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
        self._swept_at: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        await every(self._interval, self.run_once, name="janitor", spread=0.1)

    async def run_once(self) -> int:
        """How many completed tasks went."""
        gone = 0
        for queue in self._queues:
            first_unix = await retention.first_expiry(self._store, queue)
            while first_unix is not None and first_unix <= self._store.now():
                deleted, left = await retention.delete_expired(self._store, queue, self._batch)
                gone += deleted
                if deleted < self._batch or left:
                    break
        now = self._store.clock.monotonic()
        if self._swept_at is None or now - self._swept_at >= _SWEEP:
            self._swept_at = now
            await self.sweep()
        return gone

    async def sweep(self) -> int:
        """How many IDs that once had no hash went back to pending."""
        forget_unix = int(self._store.now()) - _FORGET_SECONDS
        return sum(
            [
                (await retention.sweep(self._store, queue, batch=1000, forget_unix=forget_unix))[0]
                for queue in self._queues
            ]
        )
