"""active -> gone, completed, retry, archived, or back to pending."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING

from asynq_aio._broker.scripts import load
from asynq_aio._wire import keys
from asynq_aio._wire.limits import ARCHIVE_DAYS, ARCHIVE_SIZE, STATISTICS_SECONDS
from asynq_aio.errors import BrokerUnavailableError, OutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asynq_aio._broker.leases import Lease
    from asynq_aio._broker.store import Store

__all__ = ["Archive", "Complete", "Done", "Outcome", "Requeue", "Retry", "Verdict", "chunks", "finish"]

logger = logging.getLogger("asynq_aio.broker")

_FINISH = load("finish")


class Verdict(Enum):
    """What Redis says of one outcome; the first two are final."""

    WRITTEN = 1
    LOST = 0
    """The task is gone, or somebody else has it: nothing was changed, nothing was counted."""
    TRYAGAIN = 3
    """Untouched: its slot is moving, or its lease was raised while the call was under way."""


@dataclass(slots=True)
class _Outcome:
    lease: Lease
    sent: bool = field(default=False, kw_only=True)
    """It went out once and the reply was lost: finding the task as this outcome leaves it means that it was written."""


@dataclass(slots=True)
class Done(_Outcome):
    """Deleted; counted as processed; the unique lock is released ("" = none)."""

    unique_key: str = ""


@dataclass(slots=True)
class Complete(_Outcome):
    """Kept until `expires_unix`; counted as processed; the unique lock is released."""

    unique_key: str
    encoded: bytes
    expires_unix: int
    result: bytes | None = None


@dataclass(slots=True)
class Retry(_Outcome):
    """Again at `due_unix`; counted as processed and failed where it is a failure."""

    encoded: bytes
    due_unix: int
    failure: bool


@dataclass(slots=True)
class Archive(_Outcome):
    """Kept for people to look at; counted as processed and failed. `reason` only where the message cannot hold it."""

    encoded: bytes
    reason: str = ""


@dataclass(slots=True)
class Requeue(_Outcome):
    """Back to pending, next to be taken; not counted. `recovered`: from a silent owner, which is."""

    recovered: bool = False


Outcome = Done | Complete | Retry | Archive | Requeue


def chunks(outcomes: Sequence[Outcome]) -> Iterator[Sequence[Outcome]]:
    """`outcomes` cut into what one call may carry: 500 tasks or 1 MiB, order kept."""
    first = size = 0
    for at, outcome in enumerate(outcomes):
        own = _size(outcome)
        if at > first and (at - first == 500 or size + own > 1 << 20):
            yield outcomes[first:at]
            first, size = at, 0
        size += own
    if first < len(outcomes):
        yield outcomes[first:]


def _size(outcome: Outcome) -> int:
    match outcome:
        case Complete():
            return len(outcome.encoded) + len(outcome.result or b"")
        case Retry() | Archive():
            return len(outcome.encoded)
        case _:
            return 0


async def finish(store: Store, queue: str, outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Write `outcomes`, all of `queue` and at most one chunk; one verdict each, in order.

    Safe to repeat, as long as the same outcome objects are handed in: they remember that they were sent.

    Raises:
        BrokerUnavailableError: nobody can tell yet; hand the outcomes in again.
    Redis:
        asynq:{queue}:active, lease                          - ID
        asynq:{queue}:completed | retry | archived | pending + ID
        asynq:{queue}:t:<id>    HASH    deleted, or msg, state, result written
        asynq:{queue}:processed, failed, and those of the day    counted
        its unique lock         STRING  deleted where the task is done and the lock still holds its ID
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.Done, MarkAsComplete, Requeue, Retry, Archive
    """
    now_ns = store.now_ns()
    now_unix = now_ns // 1_000_000_000
    day, cutoff_unix = _day(now_unix // 86400)
    names: list[str | bytes] = [*_fixed_keys(queue, day)]
    guards = [outcome.lease.expires_unix for outcome in outcomes]
    args: list[str | bytes | int | float] = [
        now_unix + STATISTICS_SECONDS,
        now_unix,
        cutoff_unix + now_unix % 86400,
        ARCHIVE_SIZE,
        keys.task_prefix(queue),
        keys.DUE_CHANNEL,
        queue,
    ]
    for outcome in outcomes:
        lease = outcome.lease
        names.append(lease.task_key)
        guard = "is" if lease.exact else "max"
        match outcome:
            case Done(unique_key=unique_key):
                lock = _lock(queue, unique_key)
                args += ("d", lease.task_id, lease.owner, guard, lease.expires_unix, lock)
                if lock:
                    names.append(unique_key)
            case Complete(unique_key=unique_key, encoded=encoded, expires_unix=expires_unix, result=result):
                lock = _lock(queue, unique_key)
                args += ("c", lease.task_id, lease.owner, guard, lease.expires_unix, lock, encoded, expires_unix)
                args += (0, "") if result is None else (1, result)
                if lock:
                    names.append(unique_key)
            case Retry(encoded=encoded, due_unix=due_unix, failure=failure):
                args += ("r", lease.task_id, lease.owner, guard, lease.expires_unix, encoded, due_unix, int(failure))
            case Archive(encoded=encoded, reason=reason):
                args += ("a", lease.task_id, lease.owner, guard, lease.expires_unix, encoded, reason)
            case Requeue(recovered=recovered):
                args += ("q", lease.task_id, lease.owner, guard, lease.expires_unix, now_ns, int(recovered))
    try:
        reply = await store.run(_FINISH, names, args, repeatable=False)
    except OutcomeUnknownError as exc:
        for outcome in outcomes:
            outcome.sent = True
        raise BrokerUnavailableError(str(exc), sent=True) from exc
    except BrokerUnavailableError as exc:
        if exc.sent:
            for outcome in outcomes:
                outcome.sent = True
        raise
    return list(map(_verdict, outcomes, guards, reply))


def _verdict(outcome: Outcome, guard_unix: int, number: int) -> Verdict:
    if number == 2:
        number = 1 if outcome.sent else 0
    lease = outcome.lease
    if number == 0 and (lease.expires_unix > guard_unix or lease.unheard):
        # The call waited, for a slot that moved or a node that came back, and our own heartbeater has raised the lease
        # meanwhile: what looked like another's lease may be ours.
        return Verdict.TRYAGAIN
    return Verdict(number)


def _lock(queue: str, unique_key: str) -> int:
    """1 where the lock may be named in the call. A message can name any key: one elsewhere would fail the call."""
    if not unique_key:
        return 0
    if keys.slot(unique_key) == keys.queue_slot(queue):
        return 1
    logger.warning(
        "queue %r: a message names a unique lock outside of its queue, %r: it is left alone", queue, unique_key
    )
    return 0


@lru_cache(maxsize=1024)
def _fixed_keys(queue: str, day: str) -> tuple[str, ...]:
    return (
        keys.active(queue),
        keys.lease(queue),
        keys.pending(queue),
        keys.retry(queue),
        keys.archived(queue),
        keys.completed(queue),
        keys.processed(queue),
        keys.failed(queue),
        keys.processed_on(queue, day),
        keys.failed_on(queue, day),
    )


@lru_cache(maxsize=4)
def _day(days: int) -> tuple[str, int]:
    """(`YYYY-MM-DD` in UTC, the midnight 90 days before in Unix seconds) of a day counted from 1970."""
    midnight = datetime.fromtimestamp(days * 86400, UTC)
    return midnight.date().isoformat(), int((midnight - timedelta(days=ARCHIVE_DAYS)).timestamp())
