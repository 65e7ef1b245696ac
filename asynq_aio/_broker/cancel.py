"""Cancellation: a task ID, heard by every server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asynq_aio._wire import keys

if TYPE_CHECKING:
    from asynq_aio._broker.store import Store

__all__ = ["publish"]


async def publish(store: Store, task_id: str) -> int:
    """Ask whichever server runs this task to stop it.

    Returns:
        How many listeners this Redis node had; in a cluster 0 proves nothing.
    Redis:
        asynq:cancel    channel    task ID
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.PublishCancelation
    """
    return int(await store.call("PUBLISH", keys.CANCEL_CHANNEL, task_id, key=None))
