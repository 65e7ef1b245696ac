"""Fixtures of the client's tests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import Client
from asynq_aio._broker import enqueue as broker
from asynq_aio._wire import keys
from asynq_aio._wire.codec import decode_task

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from asynq_aio._broker.enqueue import Entry
    from asynq_aio._wire.messages import TaskMessage


class Gate:
    """Holds the calls to Redis while it is shut, and remembers them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int]] = []
        """Queue and number of tasks of each call, in order."""
        self.numbers: list[int] = []
        self.only: str | None = None
        """The queue whose calls are held; None: all."""
        self._open = asyncio.Event()
        self._open.set()
        self._arrived = asyncio.Event()
        real = broker.enqueue

        async def held(store: Any, queue: str, entries: Sequence[Entry], **facts: Any) -> Any:
            self.calls.append((queue, len(entries)))
            self.numbers.append(facts["number"])
            self._arrived.set()
            if self.only in (None, queue):
                await self._open.wait()
            return await real(store, queue, entries, **facts)

        monkeypatch.setattr("asynq_aio._outbox.enqueue", held)

    def shut(self, only: str | None = None) -> None:
        """Hold every call from now on."""
        self.only = only
        self._open.clear()
        self._arrived.clear()

    def open(self) -> None:
        """Let them go."""
        self._open.set()

    async def arrived(self) -> None:
        """Wait until a call is held."""
        await self._arrived.wait()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Stands before every enqueue call of every client; open at first."""
    return Gate(monkeypatch)


@pytest.fixture
async def client(uri: str) -> AsyncGenerator[Client]:
    """A client of the topology's servers, closed after the test."""
    async with Client(uri) as opened:
        yield opened


async def turns(count: int = 5) -> None:
    """Let all that can run in the event loop come to a wait."""
    for _ in range(count):
        await asyncio.sleep(0)


async def message_of(redis: Any, queue: str, task_id: str) -> TaskMessage:
    """The message that stands in Redis."""
    return decode_task(await redis.hget(keys.task(queue, task_id), "msg"))


async def pending_ids(redis: Any, queue: str) -> list[str]:
    """The IDs in the order in which workers take them."""
    return [task_id.decode() for task_id in reversed(await redis.lrange(keys.pending(queue), 0, -1))]
