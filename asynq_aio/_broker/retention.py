"""Completed tasks go when their time is over; IDs that lost their hash, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asynq_aio._broker.scores import unix_of
from asynq_aio._broker.scripts import load
from asynq_aio._wire import keys

if TYPE_CHECKING:
    from asynq_aio._broker.store import Store

__all__ = ["delete_expired", "first_expiry", "sweep"]

_RETENTION = load("retention")
_SWEEP = load("sweep")


async def first_expiry(store: Store, queue: str) -> int | None:
    """When the next completed task goes, Unix seconds; None: there is none."""
    name = keys.completed(queue)
    head = await store.call("ZRANGE", name, 0, 0, "WITHSCORES", key=name)
    return unix_of(head[1]) if head else None


async def delete_expired(store: Store, queue: str, batch: int, now_unix: int | None = None) -> tuple[int, int]:
    """Delete up to `batch` completed tasks whose time is over: how many went, and how many could not be reached.

    `now_unix` None = Redis' own clock.

    Redis:
        asynq:{queue}:completed    ZSET    - ID
        asynq:{queue}:t:<id>       HASH    deleted
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.DeleteExpiredCompletedTasks
    """
    names = [keys.completed(queue), keys.pending(queue)]
    gone, left = await store.run(
        _RETENTION, names, ["" if now_unix is None else now_unix, batch, keys.task_prefix(queue)]
    )
    return gone, left


async def sweep(store: Store, queue: str, *, batch: int, forget_unix: int) -> tuple[int, int]:
    """IDs that a claim found without a hash: back to pending where it is there again, else forgotten in the end.

    What was found before `forget_unix`, Unix seconds, is forgotten.

    Returns:
        How many were put back, how many forgotten.
    Redis:
        asynq:{queue}:aio:ghost    ZSET    - ID
        asynq:{queue}:pending      LIST    + ID
    """
    names = [keys.ghost(queue), keys.pending(queue), keys.retry(queue), keys.scheduled(queue)]
    back, forgotten = await store.run(_SWEEP, names, [forget_unix, batch, keys.task_prefix(queue)])
    return back, forgotten
