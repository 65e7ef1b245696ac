"""pending -> active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from asynq_aio._broker.scripts import load
from asynq_aio._wire import keys
from asynq_aio._wire.limits import LEASE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.store import Store

__all__ = ["REPLY_BYTES", "Claim", "Claimed", "Status", "adopt", "claim", "new_claim", "reach"]

_CLAIM = load("claim")
_REACH = load("reach")
_ADOPT = load("adopt")

# A reply this long keeps others on the same connection waiting for about a millisecond.
REPLY_BYTES = 1 << 20
_FENCE_SECONDS = 120

Status = Literal["tasks", "empty", "paused", "fenced", "tryagain"]


class Claimed(NamedTuple):
    """A task that this server has now."""

    task_id: bytes
    encoded: bytes
    pending_since_ns: bytes
    """Unix nanoseconds as decimal text; empty where nobody wrote it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim as it is sent: who asks, by which number, and until when the leases are to hold."""

    queue: str
    server: str
    """<host>:<pid>:<server id>"""
    number: int
    expires_unix: int

    @property
    def owner(self) -> str:
        """What the claim writes as `aio_owner`: `<server>/<number>`."""
        return f"{self.server}/{self.number}"


def new_claim(store: Store, queue: str, server: str, number: int) -> Claim:
    """A claim of now. Numbers rise per server, over all its queues."""
    return Claim(queue, server, number, int(store.now()) + LEASE_SECONDS)


async def reach(store: Store, queue: str, server: str) -> None:
    """Return when a claim of `server` would be answered: the node is there, the slot is not moving.

    Raises:
        BrokerUnavailableError: not so until the deadline.
    """
    await store.run(_REACH, _claim_keys(queue, server), [])


def _claim_keys(queue: str, server: str) -> list[str]:
    return [
        keys.pending(queue),
        keys.paused(queue),
        keys.active(queue),
        keys.lease(queue),
        keys.fence(queue, server.rpartition(":")[2]),
        keys.ghost(queue),
    ]


async def claim(store: Store, attempt: Claim, n: int, *, deadline: float | None = None) -> tuple[Status, list[Claimed]]:
    """Take up to `n` tasks, oldest first, with a lease until `attempt.expires_unix`.

    A queue that is empty or paused gives none, and so does one whose slot is moving ("tryagain").

    Raises:
        OutcomeUnknownError: the reply was lost; `adopt` tells what was taken.
        BrokerUnavailableError: nothing was taken, unless it says `sent`.
    Redis:
        asynq:{queue}:pending    LIST    IDs leave at the right
        asynq:{queue}:active     LIST    IDs enter at the left
        asynq:{queue}:lease      ZSET    ID -> Unix seconds
        asynq:{queue}:t:<id>     HASH    state, aio_owner; pending_since goes
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.Dequeue
    """
    queue = attempt.queue
    args: list[str | int] = [
        attempt.server,
        attempt.number,
        attempt.expires_unix,
        n,
        REPLY_BYTES,
        keys.task_prefix(queue),
    ]
    names = _claim_keys(queue, attempt.server)
    reply = await store.run(_CLAIM, names, args, repeatable=False, deadline=deadline)
    return reply[0].decode(), _tasks(reply)


async def adopt(store: Store, lost: Claim) -> tuple[bool, list[Claimed]]:
    """What a claim took whose reply was lost. It takes nothing more, should it still be on its way.

    Returns:
        Whether that is all (False: the slot is moving, ask again), and the tasks.
    Raises:
        BrokerUnavailableError: nobody can tell yet; ask again.
    Redis:
        asynq:{queue}:aio:fence:<server id>    STRING    at least `lost.number`, for 120 s
    """
    queue = lost.queue
    names = [keys.fence(queue, lost.server.rpartition(":")[2]), keys.active(queue), keys.lease(queue)]
    args: list[str | int] = [lost.owner, lost.number, lost.expires_unix, _FENCE_SECONDS, keys.task_prefix(queue)]
    reply = await store.run(_ADOPT, names, args)
    return reply[0] == b"whole", _tasks(reply)


def _tasks(reply: Sequence[bytes]) -> list[Claimed]:
    return list(map(Claimed, reply[1::3], reply[2::3], reply[3::3]))
