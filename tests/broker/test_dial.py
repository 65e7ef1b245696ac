"""dial(): a connection, or an error, and never a cancellation that nobody hears."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest

from asynq_aio._broker.connect import settings_of
from asynq_aio._broker.lanes import dial

if TYPE_CHECKING:
    from asynq_aio._broker.connect import ConnectionSettings


class _Swallowing:
    """A connection whose handshake ends in the moment of its cancellation: asyncio.wait_for of 3.11 does that."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.closed = False
        self.socket_timeout: float | None = 5.0

    async def connect(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async def disconnect(self, *, nowait: bool) -> None:
        self.closed = nowait


class _Settings:
    """As much of ConnectionSettings as dial() uses."""

    def __init__(self, connection: _Swallowing) -> None:
        real = settings_of("127.0.0.1:1")
        self.connect_timeout, self.reply_timeout = real.connect_timeout, real.reply_timeout
        self._connection = connection

    def connection(self, _host: str, _port: int) -> _Swallowing:
        return self._connection


async def test_hears_a_cancellation_that_the_handshake_swallows() -> None:
    """A child that is cancelled while it dials ends, and the connection is closed.

    A burst that ended in the moment when a queue's watcher connected waited for that watcher for ever.
    """
    connection = _Swallowing()
    child = asyncio.create_task(dial(cast("ConnectionSettings", _Settings(connection)), ("127.0.0.1", 1)))
    await connection.began.wait()
    child.cancel()
    with pytest.raises(asyncio.CancelledError):
        await child
    assert connection.closed
