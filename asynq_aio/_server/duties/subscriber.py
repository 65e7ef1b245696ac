"""Hears what is published: cancellations, and due times that are earlier than all others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from asynq_aio._backoff import jittered
from asynq_aio._server.execution import End
from asynq_aio._wire import keys
from asynq_aio.errors import BrokerError

if TYPE_CHECKING:
    from asynq_aio._broker.store import Store
    from asynq_aio._broker.waits import Subscription
    from asynq_aio._server.duties.forwarder import Forwarder
    from asynq_aio._server.execution import Executor
    from asynq_aio._server.lease import Holdings

__all__ = ["Subscriber"]

logger = logging.getLogger("asynq_aio.server")

# After a subscription that Redis refused, seconds.
_PAUSE = 5.0


class Subscriber:
    """One connection, wherever in the cluster: both channels are broadcast to all nodes."""

    def __init__(self, store: Store, holdings: Holdings, executor: Executor, forwarder: Forwarder) -> None:
        self._store = store
        self._holdings = holdings
        self._executor = executor
        self._forwarder = forwarder
        self._listens = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        subscription = await self._open()
        self._listens.set()
        try:
            async for channel, data in subscription:
                if channel == keys.CANCEL_CHANNEL:
                    self._cancel(data.decode(errors="replace"))
                elif channel == keys.DUE_CHANNEL:
                    self._forwarder.hint(data.decode(errors="replace"))
                else:  # a gap: due times may have been missed
                    self._forwarder.hint()
        finally:
            await subscription.aclose()

    async def listens(self, seconds: float) -> None:
        """Wait until cancellations are heard, at most so long: what is published before is heard by nobody."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._listens.wait()

    async def _open(self) -> Subscription:
        refused: str | None = None
        while True:
            try:
                return await self._store.subscribe(keys.CANCEL_CHANNEL, keys.DUE_CHANNEL)
            except BrokerError as exc:
                if refused != str(exc):
                    refused = str(exc)
                    logger.warning("no subscription to cancellations and due times: %s; trying again", exc)
                await asyncio.sleep(jittered(_PAUSE))

    def _cancel(self, task_id: str) -> None:
        for attempt in self._holdings.find(task_id):
            logger.info("task %s of queue %s is cancelled", task_id, attempt.lease.queue)
            self._executor.end(attempt, End.CANCELLED)
