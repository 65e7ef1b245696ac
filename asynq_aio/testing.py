"""For the tests of programs that use asynq_aio: one task through a handler, without Redis and without a server."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import uuid4

from asynq_aio._context import Context, bind, unbind
from asynq_aio._handler import compile_handler
from asynq_aio._task import Task
from asynq_aio.errors import ConfigError, TaskCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asynq_aio._client import Client
    from asynq_aio._handler import TaskHandler
    from asynq_aio._task import TaskOptions

__all__ = ["run"]

_DEFAULT_TIMEOUT: Final = timedelta(minutes=30)  # a server's, where the task says nothing
_LEASE_SECONDS: Final = 30  # a server's, pushed back as long as it lives


async def run(
    handler: Callable[..., object] | TaskHandler,
    task: Task | str,
    payload: object = None,
    *,
    headers: Mapping[str, str] | None = None,
    queue: str | None = None,
    task_id: str | None = None,
    retried: int = 0,
    max_retry: int | None = None,
    timeout: timedelta | None = None,
    state: Any = None,  # noqa: ANN401  (what the user's lifespan would yield)
    client: Client | None = None,
    on_result: Callable[[bytes], object] | None = None,
) -> Any:  # noqa: ANN401  (what the handler returns)
    """What the handler, or the handler of a ServeMux, returns for one task; what it raises is raised.

    The handler is found, its payload decoded, its middleware and its thread are used as in a server. Queue, ID, limits
    and times come from the arguments, else from the options of the task, else they are a server's defaults. `state` is
    `ctx.state`, `client` is `ctx.client`, and `on_result` gets what the handler writes to `ctx.result`.

        assert await run(mux, "images:resize", {"src": "a.png"}) == Receipt(...)

    Raises:
        TaskCancelledError: the deadline passed; the handler was cancelled.
        HandlerNotFoundError: the mux has no handler for this type.
        SkipRetry: the payload does not fit a typed handler; its cause is the PayloadError.
        ConfigError: this is no handler, or the payload or headers are given twice.
    """
    call = compile_handler(handler)
    if isinstance(task, str):
        task = Task(task, payload, headers=headers)
    elif payload is not None or headers is not None:
        raise ConfigError("payload and headers are those of the task; give them to Task(...), or give a type instead")

    async def write(data: bytes) -> None:
        if on_result is not None:
            on_result(data)

    now = time.time()
    options = cast("TaskOptions", task.options)
    deadline_unix = now + (timeout or options.get("timeout") or _DEFAULT_TIMEOUT).total_seconds()
    if timeout is None and (deadline_at := options.get("deadline_at")):
        limit = deadline_at.timestamp()
        deadline_unix = min(deadline_unix, limit) if options.get("timeout") else limit
    context = Context(
        task_id=task_id or options.get("task_id") or str(uuid4()),
        queue=queue or options.get("queue", "default"),
        type=task.type,
        retried=retried,
        max_retry=options.get("max_retry", 25) if max_retry is None else max_retry,
        headers=task.headers,
        deadline_unix=deadline_unix,
        enqueued_ns=int(now * 1e9),
        lease_expires_unix=lambda: time.time() + _LEASE_SECONDS,
        write_result=write,
        client=None if client is None else lambda: client,
        state=state,
    )
    token = bind(context)
    left = deadline_unix - now
    over = asyncio.get_running_loop().call_later(left, context.end, "context deadline exceeded")
    try:
        async with asyncio.timeout(left) as limit_of_time:
            result = await call(context, task)
    except TimeoutError as exc:
        if limit_of_time.expired():
            raise TaskCancelledError("context deadline exceeded") from exc  # Go's text
        raise  # the handler's own
    finally:
        over.cancel()
        unbind(token)
    if limit_of_time.expired():  # it went on all the same, which comes too late in a server too
        raise TaskCancelledError("context deadline exceeded")
    return result
