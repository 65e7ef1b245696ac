"""Servers and their running tasks, as people see them; gone 10 s after the last sign of life."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asynq_aio._broker.scripts import load
from asynq_aio._wire import keys
from asynq_aio._wire.limits import PRESENCE_TTL
from asynq_aio.errors import BrokerFullError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asynq_aio._broker.store import Store

__all__ = ["Presence"]

_PRESENCE = load("presence")
_ANNOUNCE = load("announce")


@dataclass(slots=True)
class Presence:
    """The entry of one server.

    Redis:
        asynq:servers, asynq:workers    ZSET    key name -> Unix seconds
        asynq:servers:{<server>}        STRING  ServerInfo
        asynq:workers:{<server>}        HASH    task ID -> WorkerInfo
    Source:
        hibiken/asynq 0.26, internal/rdb/rdb.go: RDB.WriteServerState, ClearServerState
    """

    store: Store
    server_key: str
    workers_key: str
    _had_workers: bool = True  # an earlier process may have left some

    async def write(self, info: bytes, workers: Mapping[str, bytes], *, deadline: float | None = None) -> None:
        """Say that the server is there, and what it works on, for 10 s more; in a cluster by three nodes, side by side.

        Raises:
            BrokerUnavailableError: one of them could not be reached; the others have it.
        """
        expires_unix = int(self.store.now()) + PRESENCE_TTL
        await asyncio.gather(
            self._announce(keys.SERVERS, expires_unix, self.server_key, deadline),
            self._announce(keys.WORKERS, expires_unix, self.workers_key, deadline),
            self._state(info, workers, deadline),
        )

    async def clear(self) -> None:
        """The server is gone."""
        await asyncio.gather(
            self.store.call("ZREM", keys.SERVERS, self.server_key, key=keys.SERVERS),
            self.store.call("ZREM", keys.WORKERS, self.workers_key, key=keys.WORKERS),
            self.store.call("DEL", self.server_key, key=self.server_key),
            self.store.call("DEL", self.workers_key, key=self.workers_key),
        )

    async def _announce(self, index: str, expires_unix: int, member: str, deadline: float | None) -> None:
        try:
            await self.store.call("ZADD", index, expires_unix, member, key=index, deadline=deadline)
        except BrokerFullError:
            await self.store.run(_ANNOUNCE, [index], [expires_unix, member], deadline=deadline)

    async def _state(self, info: bytes, workers: Mapping[str, bytes], deadline: float | None) -> None:
        if not workers and not self._had_workers:  # idle: one plain command instead of a script's four
            try:
                key = self.server_key
                await self.store.call("SET", key, info, "EX", PRESENCE_TTL, key=key, deadline=deadline)
            except BrokerFullError:
                pass  # the script is not refused
            else:
                return
        args: list[str | bytes | int] = [PRESENCE_TTL, info]
        for task_id, worker in workers.items():
            args += (task_id, worker)
        await self.store.run(_PRESENCE, [self.server_key, self.workers_key], args, deadline=deadline)
        self._had_workers = bool(workers)
