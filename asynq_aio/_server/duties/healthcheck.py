"""Tells the user's callback whether Redis answers."""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import TYPE_CHECKING

from asynq_aio.errors import BrokerError

if TYPE_CHECKING:
    from asynq_aio._broker.store import Store
    from asynq_aio._server.config import HealthCheck

__all__ = ["HealthChecker"]

logger = logging.getLogger("asynq_aio.server")


class HealthChecker:
    """One ping per interval, the first after one interval."""

    def __init__(self, store: Store, callback: HealthCheck, interval: float) -> None:
        self._store = store
        self._callback = callback
        self._interval = interval

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            await self.run_once()

    async def run_once(self) -> BrokerError | None:
        """Ping, and hand the error, or None, to the callback."""
        error: BrokerError | None = None
        try:
            await self._store.ping()
        except BrokerError as exc:
            error = exc
        try:
            answer = self._callback(error)
            if inspect.isawaitable(answer):
                await answer
        except Exception:
            logger.exception("on_health_check raised")
        return error
