"""Names of keys and channels, and the cluster slot that a key belongs to.

Every key of a queue carries the hash tag `{queue}`, so that all of them lie in one slot and one script may touch any of
them. Names are used verbatim. Nothing is cached but a queue's slot: an f-string is as fast as a look into a cache.

    asynq:{queue}:t:<id>                  HASH    msg, state, pending_since, unique_key, group, result; our own aio_*
    asynq:{queue}:pending, active         LIST    task IDs; pushed left, popped right
    asynq:{queue}:lease                   ZSET    task ID -> Unix seconds of the lease's expiry
    asynq:{queue}:scheduled, retry        ZSET    task ID -> Unix seconds at which it is due
    asynq:{queue}:archived                ZSET    task ID -> Unix seconds at which it was archived
    asynq:{queue}:completed               ZSET    task ID -> Unix seconds at which it may be deleted
    asynq:{queue}:paused                  STRING  Unix seconds; only its existence counts
    asynq:{queue}:groups                  SET     names of the groups that have members
    asynq:{queue}:g:<group>               ZSET    task ID -> Unix seconds at which it joined
    asynq:{queue}:g:<group>:<set id>      ZSET    the same, staged for aggregation
    asynq:{queue}:aggregation_sets        ZSET    key of a staged set -> Unix seconds of its deadline
    asynq:{queue}:unique:<type>:<md5>     STRING  ID of the task that holds the lock; TTL
    asynq:{queue}:processed, failed       STRING  counters; with :<YYYY-MM-DD> those of a day in UTC
    asynq:{queue}:aio:enq:<client>        STRING  our own: number and verdicts of the client's last enqueue call; TTL
    asynq:{queue}:aio:fence:<server>      STRING  our own: claims up to this number are void; TTL
    asynq:{queue}:aio:ghost               ZSET    our own: ID that was met without a hash -> Unix seconds

    asynq:queues                          SET     names of the queues
    asynq:servers, workers, schedulers    ZSET    key of an entry -> Unix seconds of its expiry
    asynq:servers:{<host>:<pid>:<id>}     STRING  ServerInfo; TTL
    asynq:workers:{<host>:<pid>:<id>}     HASH    task ID -> WorkerInfo; TTL
    asynq:schedulers:{<scheduler id>}     LIST    SchedulerEntry; TTL
    asynq:scheduler_history:<entry id>    ZSET    SchedulerEnqueueEvent -> Unix seconds
    asynq:sema:<scope>                    ZSET    task ID -> Unix seconds at which its token is void

Source:
    hibiken/asynq 0.26, internal/base/base.go
"""

from __future__ import annotations

import binascii
import hashlib
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from asynq_aio._wire.limits import SLOTS

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CANCEL_CHANNEL",
    "DUE_CHANNEL",
    "QUEUES",
    "SCHEDULERS",
    "SERVERS",
    "WORKERS",
    "active",
    "aggregation_set",
    "aggregation_sets",
    "archived",
    "completed",
    "day",
    "enqueue_ledger",
    "failed",
    "failed_on",
    "fence",
    "ghost",
    "group",
    "group_prefix",
    "groups",
    "lease",
    "of_state",
    "paused",
    "pending",
    "prefix",
    "processed",
    "processed_on",
    "queue_slot",
    "retry",
    "scheduled",
    "scheduler",
    "scheduler_history",
    "semaphore",
    "server",
    "slot",
    "task",
    "task_prefix",
    "tasks",
    "unique",
    "unique_prefix",
    "workers",
]

QUEUES: Final = "asynq:queues"
SERVERS: Final = "asynq:servers"
WORKERS: Final = "asynq:workers"
SCHEDULERS: Final = "asynq:schedulers"
CANCEL_CHANNEL: Final = "asynq:cancel"
"""Pub/sub; the message is the bare task ID."""
DUE_CHANNEL: Final = "asynq:aio:due"
"""Pub/sub, our own; the message is the name of a queue whose earliest due time has changed."""

_CONTAINERS: Final = frozenset({"pending", "active", "scheduled", "retry", "archived", "completed"})


# -- of a queue


def prefix(queue: str) -> str:
    """What every key of the queue begins with."""
    return f"asynq:{{{queue}}}:"


def task_prefix(queue: str) -> str:
    """The key of a task, without the ID."""
    return f"asynq:{{{queue}}}:t:"


def task(queue: str, task_id: str) -> str:
    """The hash of a task."""
    return f"asynq:{{{queue}}}:t:{task_id}"


def tasks(queue: str, task_ids: Iterable[str]) -> list[str]:
    """The hashes of several tasks, in order."""
    before = f"asynq:{{{queue}}}:t:"
    return [before + task_id for task_id in task_ids]


def pending(queue: str) -> str:
    """The list of tasks to be worked on."""
    return f"asynq:{{{queue}}}:pending"


def active(queue: str) -> str:
    """The list of tasks being worked on."""
    return f"asynq:{{{queue}}}:active"


def lease(queue: str) -> str:
    """Until when each active task belongs to its server."""
    return f"asynq:{{{queue}}}:lease"


def scheduled(queue: str) -> str:
    """Tasks that are not due yet."""
    return f"asynq:{{{queue}}}:scheduled"


def retry(queue: str) -> str:
    """Tasks that have failed and will be tried again."""
    return f"asynq:{{{queue}}}:retry"


def archived(queue: str) -> str:
    """Tasks that have failed for good."""
    return f"asynq:{{{queue}}}:archived"


def completed(queue: str) -> str:
    """Tasks that succeeded and are kept for a while."""
    return f"asynq:{{{queue}}}:completed"


def paused(queue: str) -> str:
    """Exists while the queue is paused."""
    return f"asynq:{{{queue}}}:paused"


def groups(queue: str) -> str:
    """The names of the groups that have members."""
    return f"asynq:{{{queue}}}:groups"


def group_prefix(queue: str) -> str:
    """The key of a group, without its name."""
    return f"asynq:{{{queue}}}:g:"


def group(queue: str, name: str) -> str:
    """The tasks that wait in a group."""
    return f"asynq:{{{queue}}}:g:{name}"


def aggregation_set(queue: str, name: str, set_id: str) -> str:
    """The tasks of a group that are being aggregated. A reader finds the group by cutting this at its last colon."""
    return f"asynq:{{{queue}}}:g:{name}:{set_id}"


def aggregation_sets(queue: str) -> str:
    """The staged sets of the queue; members are whole keys."""
    return f"asynq:{{{queue}}}:aggregation_sets"


def unique_prefix(queue: str) -> str:
    """What the keys of the queue's locks begin with."""
    return f"asynq:{{{queue}}}:unique:"


def unique(queue: str, task_type: str, payload: bytes | None) -> str:
    """The lock of tasks with this queue, type and payload; no payload and an empty one have different locks."""
    digest = "" if payload is None else hashlib.md5(payload, usedforsecurity=False).hexdigest()
    return f"asynq:{{{queue}}}:unique:{task_type}:{digest}"


def processed(queue: str) -> str:
    """How many attempts have ended, the failed ones included."""
    return f"asynq:{{{queue}}}:processed"


def failed(queue: str) -> str:
    """How many attempts have failed."""
    return f"asynq:{{{queue}}}:failed"


def processed_on(queue: str, date: str) -> str:
    """As `processed`, for one `day`."""
    return f"asynq:{{{queue}}}:processed:{date}"


def failed_on(queue: str, date: str) -> str:
    """As `failed`, for one `day`."""
    return f"asynq:{{{queue}}}:failed:{date}"


def day(unix_seconds: float) -> str:
    """The day in UTC, as the names of the daily counters have it: YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d", time.gmtime(unix_seconds))


def of_state(queue: str, state: str) -> str:
    """The container of the tasks in this state.

    Raises:
        ValueError: There is no one container: the state is `aggregating` (see `group`), or unknown.
    """
    if state not in _CONTAINERS:
        message = f"no container for state {str(state)!r}; expected one of {', '.join(sorted(_CONTAINERS))}"
        raise ValueError(message)
    return f"asynq:{{{queue}}}:{state}"


def enqueue_ledger(queue: str, client_id: str) -> str:
    """What the client's last enqueue call was answered, so that a repeat of it is recognised."""
    return f"asynq:{{{queue}}}:aio:enq:{client_id}"


def fence(queue: str, server_id: str) -> str:
    """The number up to which the server's claims are void."""
    return f"asynq:{{{queue}}}:aio:fence:{server_id}"


def ghost(queue: str) -> str:
    """IDs that a claim has met without their hash."""
    return f"asynq:{{{queue}}}:aio:ghost"


# -- of a process


def server(host: str, pid: int, server_id: str) -> str:
    """The presence of a server."""
    return f"asynq:servers:{{{host}:{pid}:{server_id}}}"


def workers(host: str, pid: int, server_id: str) -> str:
    """The tasks that a server works on; in the slot of its `server` key."""
    return f"asynq:workers:{{{host}:{pid}:{server_id}}}"


def scheduler(scheduler_id: str) -> str:
    """The entries of a scheduler."""
    return f"asynq:schedulers:{{{scheduler_id}}}"


def scheduler_history(entry_id: str) -> str:
    """When an entry has enqueued what."""
    return f"asynq:scheduler_history:{entry_id}"


def semaphore(scope: str) -> str:
    """Who holds a token of this semaphore."""
    return f"asynq:sema:{scope}"


# -- slots


def slot(key: str | bytes) -> int:
    """The cluster slot of a key: of what stands between its first `{` and the next `}`, if that is not empty."""
    data = key.encode() if isinstance(key, str) else key
    start = data.find(b"{") + 1
    if start:
        end = data.find(b"}", start)
        if end > start:
            data = data[start:end]
    return binascii.crc_hqx(data, 0) % SLOTS  # CRC-16/XMODEM, the one that Redis Cluster uses


@lru_cache(maxsize=4096)
def queue_slot(queue: str) -> int:
    """The slot of the queue's keys; where they are in several (the name begins with `}`), of its pending list."""
    return slot(pending(queue))
