"""The helper for users' own tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from asynq_aio import testing
from asynq_aio._client import Client
from asynq_aio._context import Context, current_context
from asynq_aio._handler import Handler, ServeMux
from asynq_aio._task import Task
from asynq_aio.errors import ConfigError, HandlerNotFoundError, SkipRetry, TaskCancelledError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@dataclass
class Image:
    src: str


async def test_run_returns_what_the_handler_returns() -> None:
    """A task goes through middleware, payload and handler as in a server, and its result comes back."""
    mux = ServeMux()
    seen: list[str] = []

    @mux.middleware
    async def note(ctx: Context, task: Task, call_next: Handler) -> object:
        seen.append(task.type)
        return await call_next(ctx, task)

    @mux.handler("images:resize")
    async def resize(ctx: Context, image: Image) -> str:
        assert current_context() is ctx
        return image.src.upper()

    assert await testing.run(mux, "images:resize", {"src": "a"}) == "A"
    assert await testing.run(mux, resize.task(Image("b"))) == "B"
    assert await testing.run(resize, "any", Image("c")) == "C"
    assert seen == ["images:resize"] * 2
    with pytest.raises(LookupError):
        current_context()


async def test_run_raises_what_the_handler_raises() -> None:
    """Errors and verdicts come through as they are, also the handler's own TimeoutError."""

    async def handler(task: Task) -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await testing.run(handler, "x")
    with pytest.raises(HandlerNotFoundError):
        await testing.run(ServeMux(), "x")

    async def typed(image: Image) -> None: ...

    with pytest.raises(SkipRetry, match="payload key 'src': wanted a text, found the number 5"):
        await testing.run(typed, "x", {"src": 5})


async def test_context_is_what_the_test_says() -> None:
    """What the test gives stands in the context."""
    client = Client("127.0.0.1:1")
    results: list[bytes] = []

    async def handler(ctx: Context) -> None:
        assert (ctx.task_id, ctx.queue, ctx.retried, ctx.max_retry) == ("7", "low", 2, 3)
        assert (ctx.headers, ctx.state, ctx.client) == ({"k": "v"}, "db", client)
        assert timedelta(minutes=4) < ctx.remaining <= timedelta(minutes=5)
        assert ctx.enqueued_at is not None
        assert ctx.lease_expires_at is not None
        assert ctx.lease_expires_at > ctx.enqueued_at
        await ctx.result.write({"half": True})

    await testing.run(
        handler,
        "x",
        headers={"k": "v"},
        queue="low",
        task_id="7",
        retried=2,
        max_retry=3,
        timeout=timedelta(minutes=5),
        state="db",
        client=client,
        on_result=results.append,
    )
    assert results == [b'{"half":true}']


async def test_context_is_else_what_the_task_says() -> None:
    """Where the test says nothing, the options of the task hold; where it has none, a server's defaults."""

    async def handler(ctx: Context) -> Context:
        return ctx

    ctx = await testing.run(handler, Task("x", queue="low", task_id="7", max_retry=0, timeout=timedelta(minutes=5)))
    assert (ctx.task_id, ctx.queue, ctx.max_retry) == ("7", "low", 0)
    assert ctx.remaining <= timedelta(minutes=5)
    moment = datetime(2100, 1, 1, tzinfo=UTC)
    assert (await testing.run(handler, Task("x", deadline_at=moment))).deadline_at == moment
    both = await testing.run(handler, Task("x", deadline_at=moment, timeout=timedelta(minutes=5)))
    assert both.remaining <= timedelta(minutes=5)
    plain = await testing.run(handler, Task("x"))
    assert (plain.queue, plain.max_retry, len(plain.task_id)) == ("default", 25, 36)
    assert timedelta(minutes=29) < plain.remaining <= timedelta(minutes=30)


@pytest.mark.parametrize("thread", [False, True])
async def test_timeout(thread: bool) -> None:
    """At the deadline a coroutine is cancelled, and a thread is told."""
    entered, told = threading.Event(), threading.Event()

    async def waits(ctx: Context) -> None:
        entered.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            assert ctx.cancelled
            told.set()

    def waits_in_thread(ctx: Context) -> None:
        entered.set()
        while not ctx.cancelled:
            told.wait(0.001)
        told.set()
        ctx.raise_if_cancelled()

    handler: Callable[[Context], Awaitable[None] | None] = waits_in_thread if thread else waits
    with pytest.raises(TaskCancelledError, match="context deadline exceeded"):
        await testing.run(handler, "x", timeout=timedelta(milliseconds=20))
    assert told.is_set() is entered.is_set()  # on a busy machine the deadline may pass before the thread starts


async def test_timeout_that_the_handler_ignores() -> None:
    """What comes after the deadline comes too late, though the handler swallowed its cancellation."""

    async def stubborn(task: Task) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        return "done"

    with pytest.raises(TaskCancelledError, match="context deadline exceeded"):
        await testing.run(stubborn, "x", timeout=timedelta(milliseconds=20))


async def test_result_without_a_place() -> None:
    """A handler may write its result though the test does not look at it."""

    async def handler(ctx: Context) -> int:
        return await ctx.result.write(b"abc")

    assert await testing.run(handler, "x") == 3


async def test_payload_given_twice() -> None:
    """A task has its payload and headers; giving others beside it is refused."""

    async def handler(task: Task) -> None: ...

    with pytest.raises(ConfigError, match="payload and headers are those of the task"):
        await testing.run(handler, Task("x", 1), 2)
    with pytest.raises(ConfigError, match="payload and headers are those of the task"):
        await testing.run(handler, Task("x", 1), headers={"k": "v"})
