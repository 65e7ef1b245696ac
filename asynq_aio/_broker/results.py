"""The result of a task, written while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asynq_aio._broker.scripts import load
from asynq_aio._wire import keys
from asynq_aio.errors import TaskNotFoundError

if TYPE_CHECKING:
    from asynq_aio._broker.store import Store

__all__ = ["write"]

_RESULT = load("result")


async def write(store: Store, queue: str, task_id: str, data: bytes) -> None:
    """Store `data` as the task's result; each call replaces the last.

    Raises:
        TaskNotFoundError: the task is gone; nothing was written.
    Redis:
        asynq:{queue}:t:<id>    HASH    result
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.WriteResult
    """
    if not await store.run(_RESULT, [keys.task(queue, task_id)], [data]):
        raise TaskNotFoundError(queue, task_id)
