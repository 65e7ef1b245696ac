"""What stands in Redis, read by a plain client: tests of the server believe nothing that the server says of itself."""

from __future__ import annotations

import asyncio
import inspect
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asynq_aio._wire import codec, keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asynq_aio._wire.messages import TaskMessage

PATIENCE = 60.0
"""How long a test waits for what must happen, seconds; on a busy machine it takes as long as it takes."""


@dataclass(frozen=True)
class Stored:
    """A task's hash."""

    state: str
    message: TaskMessage
    fields: dict[str, bytes]

    @property
    def error(self) -> str:
        """Its last error."""
        return self.message.error_msg


@dataclass(frozen=True)
class Counts:
    """How many IDs are where."""

    pending: int = 0
    active: int = 0
    lease: int = 0
    scheduled: int = 0
    retry: int = 0
    archived: int = 0
    completed: int = 0


async def stored(redis: Any, queue: str, task_id: str) -> Stored | None:
    """The task, or None: it is gone."""
    fields = {name.decode(): value for name, value in (await redis.hgetall(keys.task(queue, task_id))).items()}
    if not fields:
        return None
    return Stored(fields["state"].decode(), codec.decode_task(fields["msg"]), fields)


async def there(redis: Any, queue: str, task_id: str) -> Stored:
    """The task; it must be there."""
    found = await stored(redis, queue, task_id)
    assert found is not None, f"task {task_id} is gone"
    return found


async def counts(redis: Any, queue: str) -> Counts:
    """The sizes of all containers of the queue but its groups."""
    return Counts(
        await redis.llen(keys.pending(queue)),
        await redis.llen(keys.active(queue)),
        await redis.zcard(keys.lease(queue)),
        await redis.zcard(f"asynq:{{{queue}}}:scheduled"),
        await redis.zcard(keys.retry(queue)),
        await redis.zcard(keys.archived(queue)),
        await redis.zcard(keys.completed(queue)),
    )


async def counted(redis: Any, queue: str) -> tuple[int, int]:
    """(processed, failed) of all time."""
    both = [await redis.get(keys.processed(queue)), await redis.get(keys.failed(queue))]
    return int(both[0] or 0), int(both[1] or 0)


async def until(holds: Callable[[], bool | Awaitable[bool]], *, seconds: float = PATIENCE, pause: float = 0.01) -> None:
    """Wait until it holds; what it waits for stands in Redis or in another process, where no event reaches us."""
    end = time.monotonic() + seconds
    while True:
        answer = holds()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return
        if time.monotonic() > end:
            raise AssertionError(f"not so after {seconds:g} s: {inspect.getsource(holds)}")
        await asyncio.sleep(pause)


async def state_becomes(redis: Any, queue: str, task_id: str, state: str, *, seconds: float = PATIENCE) -> Stored:
    """Wait until the task is in this state."""

    async def holds() -> bool:
        found = await stored(redis, queue, task_id)
        return found is not None and found.state == state

    await until(holds, seconds=seconds)
    return await there(redis, queue, task_id)


async def drained(redis: Any, queue: str, *, seconds: float = PATIENCE) -> None:
    """Wait until nothing is pending or active."""

    async def holds() -> bool:
        now = await counts(redis, queue)
        return not (now.pending or now.active or now.lease)

    await until(holds, seconds=seconds)
