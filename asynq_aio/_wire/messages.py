"""What asynq programs write into Redis, as frozen dataclasses; field names and meanings are those of asynq.proto."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["SchedulerEnqueueEvent", "SchedulerEntry", "ServerInfo", "TaskMessage", "Timestamp", "WorkerInfo"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Moment(NamedTuple):
    seconds: int = 0
    """Unix seconds."""
    nanos: int = 0
    """Nanoseconds after them, 0 to 999,999,999."""


class Timestamp(_Moment):  # of its own, since a NamedTuple takes no class attributes
    """A moment with nanoseconds, which a `datetime` cannot hold: (seconds, nanos)."""

    __slots__ = ()
    NEVER: ClassVar[Timestamp]
    """Go's zero time, the beginning of the year 1. A field that was left out reads as 1970, not as this."""

    @classmethod
    def from_ns(cls, unix_ns: int) -> Timestamp:
        """The moment that many nanoseconds after 1970."""
        return cls(*divmod(unix_ns, 1_000_000_000))

    def to_datetime(self) -> datetime | None:
        """The moment in UTC, cut to microseconds; None for "never".

        Raises:
            OverflowError: It is outside the years 1 to 9999.
        """
        if self == Timestamp.NEVER:
            return None
        return _EPOCH + timedelta(seconds=self.seconds, microseconds=self.nanos // 1000)


Timestamp.NEVER = Timestamp(-62_135_596_800, 0)


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """A task: field `msg` of its hash. Zero and "" mean that something does not apply."""

    type: str = ""
    payload: bytes = b""
    """On the wire no payload and an empty one look the same."""
    id: str = ""
    queue: str = ""
    retry: int = 0
    """How many retries at most; with 0 the first failure archives the task."""
    retried: int = 0
    """How many failures have been counted."""
    error_msg: str = ""
    """Text of the last failure."""
    timeout: int = 0
    """Seconds for one attempt."""
    deadline: int = 0
    """Unix seconds."""
    unique_key: str = ""
    """The whole Redis key of the lock."""
    last_failed_at: int = 0
    """Unix seconds."""
    retention: int = 0
    """Seconds to keep the task after success."""
    completed_at: int = 0
    """Unix seconds."""
    group_key: str = ""
    """Name of the group."""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The presence of a server."""

    host: str = ""
    pid: int = 0
    server_id: str = ""
    concurrency: int = 0
    queues: Mapping[str, int] = field(default_factory=dict)
    """Name -> priority, as configured."""
    strict_priority: bool = False
    status: str = ""
    """`new`, `active`, `stopped` or `closed`."""
    start_time: Timestamp = Timestamp.NEVER
    active_worker_count: int = 0
    """Number of tasks in flight."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A task that a server works on."""

    host: str = ""
    pid: int = 0
    server_id: str = ""
    task_id: str = ""
    task_type: str = ""
    task_payload: bytes = b""
    queue: str = ""
    start_time: Timestamp = Timestamp.NEVER
    """Of the attempt."""
    deadline: Timestamp = Timestamp.NEVER
    """Of the attempt."""


@dataclass(frozen=True, slots=True)
class SchedulerEntry:
    """What a scheduler enqueues, and when."""

    id: str = ""
    spec: str = ""
    """The cron spec as registered."""
    task_type: str = ""
    task_payload: bytes = b""
    enqueue_options: Sequence[str] = ()
    """Texts such as `MaxRetry(3)`. Each has a `(`: Go's reader panics at one without."""
    next_enqueue_time: Timestamp = Timestamp.NEVER
    prev_enqueue_time: Timestamp = Timestamp.NEVER


@dataclass(frozen=True, slots=True)
class SchedulerEnqueueEvent:
    """A scheduler entry has enqueued a task."""

    task_id: str = ""
    enqueue_time: Timestamp = Timestamp.NEVER
