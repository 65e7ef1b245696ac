"""Periodic passes that outlive an outage."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from asynq_aio._backoff import jittered
from asynq_aio.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["every"]

logger = logging.getLogger("asynq_aio.server")


async def every(seconds: float, run_once: Callable[[], Awaitable[object]], *, name: str, spread: float = 0.0) -> None:
    """Call `run_once` now and then each `seconds`, until cancelled; never twice at once.

    A pass that Redis fails is tried again at the next tick; its error is logged once until a pass succeeds.
    Anything else is a defect and ends the duty. `spread` lengthens each pause by a random share of up to this, so that
    the passes of a fleet drift apart.
    """
    failing: str | None = None
    while True:
        try:
            await run_once()
            failing = None
        except BrokerError as exc:
            if failing != str(exc):
                failing = str(exc)
                logger.warning("%s: %s; trying again each %g s", name, exc, seconds)
        longest = seconds * (1 + spread)
        await asyncio.sleep(jittered(longest, 1 - seconds / longest))
