"""New tasks -> pending, scheduled or a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asynq_aio._broker.scripts import load
from asynq_aio._task import TaskState
from asynq_aio._wire import keys
from asynq_aio.errors import BrokerError, DuplicateTaskError, OutcomeUnknownError, TaskIDConflictError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asynq_aio._broker.store import Store
    from asynq_aio._options import NewTask
    from asynq_aio.errors import AsynqError

__all__ = ["CALL_BYTES", "CALL_TASKS", "Entry", "chunks", "enqueue", "register"]

_ENQUEUE = load("enqueue")

# One script call blocks Redis: 500 tasks are some 5 ms, and 1 MiB goes over a loopback connection in about one.
CALL_TASKS = 500
CALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One task on its way, and its message as bytes."""

    new: NewTask
    encoded: bytes


def chunks(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """`entries` cut into what one call may carry, order kept; a task larger than a call goes alone."""
    first = size = 0
    for at, entry in enumerate(entries):
        if at > first and (at - first == CALL_TASKS or size + len(entry.encoded) > CALL_BYTES):
            yield entries[first:at]
            first, size = at, 0
        size += len(entry.encoded)
    if first < len(entries):
        yield entries[first:]


async def register(store: Store, queue: str) -> None:
    """Make the queue known to every inspector; it lies in another slot than the queue, hence a call of its own.

    Redis:
        asynq:queues    SET    + queue
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.Enqueue
    """
    await store.call("SADD", keys.QUEUES, queue, key=keys.QUEUES)


async def enqueue(
    store: Store,
    queue: str,
    entries: Sequence[Entry],
    *,
    client_id: str,
    number: int,
    deadline: float | None = None,
) -> list[AsynqError | None]:
    """For each entry: None, it is enqueued, or the error of that one; the others are not touched by it.

    Safe to repeat: Redis keeps number and verdicts of this client's last call to this queue. So a client has one call
    in flight per queue, and the next one has a higher `number`.

    Raises:
        BrokerFullError, BrokerUnavailableError: none is enqueued, or (`sent`) nobody can tell.
    Redis:
        asynq:{queue}:pending | scheduled | g:<group>, groups    + ID
        asynq:{queue}:t:<id>    HASH    msg, state and, by state, pending_since, group, unique_key, aio_due_ns,
                                        aio_group
        its unique lock         STRING  ID, with a TTL
        asynq:{queue}:aio:enq:<client>    STRING    number and verdicts
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.Enqueue, EnqueueUnique, Schedule, ScheduleUnique,
        AddToGroup, AddToGroupUnique
    """
    now_ns = store.now_ns()
    names: list[str | bytes] = [
        keys.enqueue_ledger(queue, client_id),
        keys.pending(queue),
        keys.scheduled(queue),
        keys.groups(queue),
    ]
    ledger_ms = int(max(60.0, 2 * store.deadline) * 1000)
    args: list[str | bytes | int | float] = [
        number,
        ledger_ms,
        now_ns,
        now_ns // 1_000_000_000,
        keys.DUE_CHANNEL,
        queue,
    ]
    prefix = keys.task_prefix(queue)
    for entry in entries:
        new = entry.new
        message = new.message
        names.append(prefix + message.id)
        if new.state is TaskState.PENDING:
            if new.unique_ttl:
                args += ("u", message.id, entry.encoded, new.unique_ttl)
            else:
                args += ("p", message.id, entry.encoded)
        elif new.state is TaskState.SCHEDULED:
            due_unix, rest_ns = divmod(new.process_at_ns, 1_000_000_000)
            due_ns = new.process_at_ns if rest_ns else ""
            args += ("s", message.id, entry.encoded, new.unique_ttl, due_unix, due_ns, message.group_key)
        else:
            names.append(keys.group(queue, message.group_key))
            args += ("g", message.id, entry.encoded, new.unique_ttl, message.group_key)
        if new.unique_ttl:
            names.append(message.unique_key)
    verdicts = await store.run(_ENQUEUE, names, args, deadline=deadline)
    if len(verdicts) != len(entries):
        raise OutcomeUnknownError(f"enqueue call {number} to queue {queue!r} came after a later one of the same client")
    return [_error(queue, entry, verdict) for entry, verdict in zip(entries, verdicts, strict=True)]


def _error(queue: str, entry: Entry, verdict: object) -> AsynqError | None:
    match verdict:
        case 1:
            return None
        case 0:
            return TaskIDConflictError(queue, entry.new.message.id)
        case [bytes(holder)]:
            return DuplicateTaskError(entry.new.message.unique_key, holder.decode(errors="replace") or None)
        case _:
            text = verdict.decode(errors="replace") if isinstance(verdict, bytes) else str(verdict)
            return BrokerError(f"task {entry.new.message.id!r} of queue {queue!r}: {text}")
