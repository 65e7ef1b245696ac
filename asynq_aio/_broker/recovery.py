"""Tasks whose server is gone: what a recoverer looks at. What it does then is `finish`, with an exact lease."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from asynq_aio._broker.scores import unix_of
from asynq_aio._wire import keys
from asynq_aio.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._broker.store import Store

__all__ = ["Held", "look", "lowest_leases", "server_is_present"]


class Held(NamedTuple):
    """A task in `active` as it stands in Redis; None and "" where the field is missing."""

    encoded: bytes | None
    owner: str
    recovered: int
    """How often it came back from a silent owner."""


async def lowest_leases(store: Store, queue: str, limit: int) -> list[tuple[bytes, int]]:
    """Up to `limit` (task ID, expiry in Unix seconds), lowest first: the ones that nobody extends are among them.

    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.ListLeaseExpired
    """
    name = keys.lease(queue)
    flat = await store.call("ZRANGE", name, 0, limit - 1, "WITHSCORES", key=name)
    return [(task_id, unix_of(score)) for task_id, score in zip(flat[::2], flat[1::2], strict=True)]


async def look(store: Store, queue: str, task_ids: Sequence[bytes]) -> list[Held]:
    """What the hashes of these tasks say."""
    prefix = keys.task_prefix(queue).encode()
    return list(await asyncio.gather(*(_look(store, prefix + task_id) for task_id in task_ids)))


async def _look(store: Store, name: bytes) -> Held:
    try:
        encoded, owner, recovered = await store.call("HMGET", name, "msg", "aio_owner", "aio_recovered", key=name)
    except BrokerError as exc:
        if "WRONGTYPE" not in str(exc):
            raise
        return Held(None, "", 0)  # no hash, no task: it must not hold up the recovery of the others
    return Held(
        encoded,
        owner.decode(errors="replace") if owner else "",
        int(recovered) if recovered and recovered.isdigit() else 0,
    )


async def server_is_present(store: Store, owner: str) -> bool:
    """Does the server that wrote this `aio_owner` still say that it is there?"""
    name = f"{keys.SERVERS}:{{{owner.rpartition('/')[0]}}}"
    return bool(await store.call("EXISTS", name, key=name))
