"""Leases: who works on a task, and until when others must leave it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asynq_aio._broker.scripts import load
from asynq_aio._wire import keys
from asynq_aio.errors import BrokerFullError, BrokerUnavailableError, OutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.store import Store

__all__ = ["Lease", "extend", "lend", "regain", "without_lease"]

_REGAIN = load("regain")
_LEND = load("lend")


@dataclass(slots=True)
class Lease:
    """One task in `active`, as somebody knows it who wants to change it.

    Its holder knows the owner it wrote and the highest expiry it ever sent; a score above that means another has the
    task (Go's servers leave our owner in the hash when they take it). A recoverer knows the score it saw: `exact`.
    """

    queue: str
    task_id: str | bytes
    """bytes where it is not UTF-8: damage that can still be archived."""
    owner: str
    """`aio_owner` as its holder wrote it; "" = do not ask."""
    expires_unix: int
    """Unix seconds: the highest expiry that is known to be, or to have been, in Redis by its holder's doing."""
    exact: bool = False
    unheard: tuple[int, ...] = ()
    """What `regain` has sent without having heard of it: it is under way, or its reply was lost. One of these may stand
    in Redis; the next answer settles it."""

    @property
    def task_key(self) -> str | bytes:
        """The task's hash."""
        prefix = keys.task_prefix(self.queue)
        return prefix + self.task_id if isinstance(self.task_id, str) else prefix.encode() + self.task_id


async def extend(
    store: Store, queue: str, leases: Sequence[Lease], expires_unix: int, *, deadline: float | None = None
) -> None:
    """Raise the expiry of `leases`, all of `queue`; one that is gone stays gone.

    Only for leases whose last extension succeeded less than 10 s ago: nobody can have taken the task since. Else
    `regain`.

    Raises:
        BrokerUnavailableError: the leases may be as they were.
    Redis:
        asynq:{queue}:lease    ZSET    task ID -> Unix seconds    scores raised
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.ExtendLease
    """
    name = keys.lease(queue)
    for lease in leases:
        # Before it is sent: what Redis may have. So soon after the last success that is far below what a server would
        # write that has waited for the lease to end.
        lease.expires_unix = max(lease.expires_unix, expires_unix)
    for first in range(0, len(leases), 1000):
        part = leases[first : first + 1000]
        pairs = [value for lease in part for value in (expires_unix, lease.task_id)]
        try:
            await store.call("ZADD", name, "XX", "GT", *pairs, key=name, deadline=deadline, lane="lease")
        except BrokerFullError:  # ZADD is refused in a full Redis; the script is not
            await regain(store, queue, part, expires_unix, deadline=deadline)


async def regain(
    store: Store, queue: str, leases: Sequence[Lease], expires_unix: int, *, deadline: float | None = None
) -> list[Lease]:
    """After a silence: raise the expiry of the leases that their owner still holds.

    Returns:
        The leases that are lost: another server may own the task by now.
    Raises:
        BrokerUnavailableError: the leases may be as they were; nothing is known to be lost.
    Redis:
        asynq:{queue}:lease    ZSET    task ID -> Unix seconds    scores raised
    """
    lost: list[Lease] = []
    moving: list[Lease] = []
    waiting = list(leases)
    while waiting:
        part, waiting = waiting[:500], waiting[500:]
        names = [keys.lease(queue), *(lease.task_key for lease in part)]
        args: list[str | bytes | int] = [expires_unix]
        known = [(lease.expires_unix, lease.unheard) for lease in part]
        for lease in part:
            args += (lease.task_id, lease.owner, lease.expires_unix, " ".join(map(str, lease.unheard)))
            lease.unheard = (*lease.unheard, expires_unix)  # before it is sent: an outcome may be on its way meanwhile
        try:
            verdicts = await store.run(_REGAIN, names, args, repeatable=False, deadline=deadline, lane="lease")
        except OutcomeUnknownError as exc:
            raise BrokerUnavailableError(str(exc), sent=True) from exc
        except BrokerUnavailableError:  # nothing was sent
            for lease in part:
                lease.unheard = _without(lease.unheard, (expires_unix,))
            raise
        for lease, (highest_unix, unheard), verdict in zip(part, known, verdicts, strict=True):
            if verdict == 3:
                lease.unheard = _without(lease.unheard, (expires_unix,))
                moving.append(lease)
                continue
            lease.unheard = _without(lease.unheard, (*unheard, expires_unix))
            if verdict == 1:
                lease.expires_unix = max(lease.expires_unix, expires_unix, *unheard)
            elif lease.expires_unix <= highest_unix:  # else another call of ours has raised it meanwhile
                lost.append(lease)
    if moving:
        raise BrokerUnavailableError(f"the slot of queue {queue!r} is moving: {len(moving)} leases are out of reach")
    return lost


def _without(values: tuple[int, ...], settled: tuple[int, ...]) -> tuple[int, ...]:
    """Each of `settled` taken out once."""
    left = list(values)
    for value in settled:
        if value in left:
            left.remove(value)
    return tuple(left)


async def without_lease(store: Store, queue: str) -> set[bytes]:
    """IDs that stand in `active` and have no lease: damage, if a second look finds them again."""
    active = await store.call("LRANGE", keys.active(queue), 0, -1, key=keys.active(queue))
    if not active:
        return set()
    leased = await store.call("ZRANGE", keys.lease(queue), 0, -1, key=keys.lease(queue))
    return set(active).difference(leased)


async def lend(store: Store, queue: str, task_ids: Sequence[bytes], expires_unix: int) -> int:
    """Give a lease to what stands in `active` without one, so that the rule of expired leases reaches it.

    Returns:
        How many got one.
    """
    names = [keys.active(queue), keys.lease(queue)]
    return len(await store.run(_LEND, names, [expires_unix, *task_ids]))
