"""The store of a client or an inspector: of one event loop, made anew after a fork, closed once."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from asynq_aio._broker.connect import settings_of
from asynq_aio._broker.store import Store
from asynq_aio._defaults import default_redis

if TYPE_CHECKING:
    from asynq_aio._broker.connect import RedisClient
    from asynq_aio._config import RedisConnOpt

__all__ = ["Door"]


class Door:
    """Gives its owner the store, or says why the owner cannot be used here.

    Connections belong to an event loop and to a process. So the first use binds the door to the running loop, and a use
    after a fork begins anew: the parent's connections are left alone, since they are still the parent's.
    """

    __slots__ = ("_closed", "_left_behind", "_loop", "_name", "_pid", "_settings", "store")

    def __init__(self, redis: RedisConnOpt | str | RedisClient | None, name: str, /) -> None:
        self._name = name
        self._settings = settings_of(default_redis(os.environ) if redis is None else redis)
        self._closed = False
        self._left_behind: list[object] = []  # kept, so that no finalizer touches sockets that the parent shares
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self.store = Store(self._settings)

    @property
    def description(self) -> str:
        """Where it leads; says nothing secret."""
        return self._settings.description

    def enter(self) -> Store:
        """The store, for use in the running event loop.

        Raises:
            RuntimeError: it is closed, or belongs to another event loop.
        """
        if self._closed:
            raise RuntimeError(f"this {self._name} is closed; make a new one")
        loop = asyncio.get_running_loop()
        if loop is not self._loop or self._pid != os.getpid():
            self._bind(loop)
        return self.store

    def close(self) -> Store | None:
        """Let nobody in any more; what is still to be closed, None where it was never used or is closed already.

        Raises:
            RuntimeError: it belongs to another event loop.
        """
        if self._closed:
            return None
        if self._loop is None or self._pid != os.getpid():
            self._closed = True
            return None
        self._bind(asyncio.get_running_loop())
        self._closed = True
        return self.store

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._pid != os.getpid():
            self._left_behind.append((self.store, self._loop))
            self._pid = os.getpid()
            self._loop = None
            self.store = Store(self._settings)
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError(
                f"this {self._name} belongs to another event loop, the one that used it first: make one {self._name}"
                " for each event loop, or use SyncClient, which may be shared by threads"
            )
