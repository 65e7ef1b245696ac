"""scheduled, retry -> pending, when they are due."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from asynq_aio._broker.scores import unix_of
from asynq_aio._broker.scripts import load
from asynq_aio._task import TaskState
from asynq_aio._wire import keys

if TYPE_CHECKING:
    from asynq_aio._broker.store import Store

__all__ = ["Forwarded", "first_due", "forward"]

_FORWARD = load("forward")
_BATCH = 100

Source = Literal[TaskState.SCHEDULED, TaskState.RETRY]


class Forwarded(NamedTuple):
    """What one call did."""

    moved: int
    left: int
    """Due, but out of reach: the slot is moving."""
    next_ns: int | None
    """The next due moment, Unix nanoseconds."""


async def first_due(store: Store, queue: str, source: Source) -> int | None:
    """The lowest score, Unix seconds: a task may be due from then on. None: there is no task."""
    name = keys.of_state(queue, source)
    head = await store.call("ZRANGE", name, 0, 0, "WITHSCORES", key=name)
    return unix_of(head[1]) if head else None


async def forward(store: Store, queue: str, source: Source, now_ns: int | None = None) -> Forwarded:
    """Move up to 100 due tasks to pending, or back into their group; call again while `moved` is not 0.

    `now_ns` None = Redis' own clock.

    Raises:
        BrokerUnavailableError: as many as fit may have been moved; calling again is safe.
    Redis:
        asynq:{queue}:scheduled | retry    ZSET    - ID
        asynq:{queue}:pending              LIST    + ID at the left
        asynq:{queue}:g:<group>, groups    ZSET, SET    + ID, + name where the task has a group
        asynq:{queue}:t:<id>               HASH    state, pending_since; aio_due_ns and aio_group go
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.ForwardIfReady
    """
    names = [keys.of_state(queue, source), keys.pending(queue), keys.groups(queue), keys.ghost(queue)]
    args = [
        "" if now_ns is None else now_ns,
        _BATCH,
        keys.task_prefix(queue),
        keys.group_prefix(queue),
        int(source is TaskState.SCHEDULED),
    ]
    moved, left, next_ns = await store.run(_FORWARD, names, args)
    return Forwarded(moved, left, int(next_ns) if next_ns else None)
