"""What a handler may ask about its task."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from asynq_aio._context import Context, ResultWriter, bind, current_context, unbind
from asynq_aio.errors import InvalidTaskError, TaskCancelledError


def context(**fields: Any) -> Context:
    """A context as a server makes it."""
    facts = {"task_id": "1", "queue": "low", "type": "x", "retried": 2, "max_retry": 25, "headers": {"k": "v"}}
    return Context(**{**facts, "deadline_unix": 1_000.0, **fields})


def test_facts_of_the_task() -> None:
    """A context says what the message says."""
    ctx = context(state="db")
    assert (ctx.task_id, ctx.queue, ctx.type, ctx.retried, ctx.max_retry) == ("1", "low", "x", 2, 25)
    assert (ctx.headers, ctx.state) == ({"k": "v"}, "db")
    assert repr(ctx) == "<Context of task 1 (x) of queue low>"


def test_moments_are_aware_and_utc() -> None:
    """Moments are aware datetimes; the time that is left is counted by the server's clock."""
    lease = [990.0]
    ctx = context(now=lambda: 900.5, enqueued_ns=800_500_000_000, lease_expires_unix=lambda: lease[0])
    assert ctx.deadline_at == datetime(1970, 1, 1, 0, 16, 40, tzinfo=UTC)
    assert ctx.remaining == timedelta(seconds=99.5)
    assert ctx.enqueued_at == datetime.fromtimestamp(800.5, UTC)
    assert ctx.lease_expires_at == datetime.fromtimestamp(990, UTC)
    lease[0] = 995.0
    assert ctx.lease_expires_at == datetime.fromtimestamp(995, UTC)


def test_moments_at_their_limits() -> None:
    """No time is left after the deadline; one that no datetime holds is the last that it holds."""
    assert context(now=lambda: 2_000.0).remaining == timedelta(0)
    far = context(deadline_unix=float(2**63), now=lambda: 0.0)
    assert far.deadline_at.year == 9999
    assert far.remaining > timedelta(days=365 * 7_000)
    assert context().enqueued_at is None
    assert context().lease_expires_at is None


def test_end() -> None:
    """An attempt that is over says why, to every thread; the first reason stays."""
    ctx = context()
    ctx.raise_if_cancelled()
    assert not ctx.cancelled
    ctx.end("context deadline exceeded")
    ctx.end("context canceled")
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(ctx.cancelled))
    thread.start()
    thread.join()
    assert seen == [True]
    assert ctx.cancel_reason == "context deadline exceeded"
    with pytest.raises(TaskCancelledError, match=r"^context deadline exceeded$"):
        ctx.raise_if_cancelled()


async def test_current_context() -> None:
    """The current context is that of the own child and of what it starts, and of no other."""
    with pytest.raises(LookupError, match=r"current_context\(\) was called outside of a handler"):
        current_context()

    async def child(ctx: Context) -> bool:
        bind(ctx)
        await asyncio.sleep(0)
        inner = asyncio.ensure_future(asyncio.to_thread(current_context))
        return current_context() is await inner is ctx

    assert await asyncio.gather(*(child(context(task_id=str(n))) for n in range(3))) == [True] * 3
    ctx = context()
    token = bind(ctx)
    assert current_context() is ctx
    unbind(token)
    with pytest.raises(LookupError):
        current_context()


async def test_result_writer() -> None:
    """Bytes are written as they are, the rest as JSON; the length comes back."""
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    ctx = context(write_result=write)
    assert ctx.result is ctx.result
    assert ctx.result.task_id == "1"
    assert await ctx.result.write(b"\x00") == 1
    assert await ctx.result.write({"a": timedelta(seconds=1)}) == 9
    assert await ctx.result.write(None) == 0
    assert written == [b"\x00", b'{"a":1.0}', b""]
    assert {type(data) for data in written} == {bytes}
    with pytest.raises(InvalidTaskError, match="cannot be written as JSON"):
        await ctx.result.write(object())
    ctx.end("context canceled")
    with pytest.raises(TaskCancelledError, match="context canceled"):
        await ctx.result.write(b"late")
    assert len(written) == 3


async def test_result_writer_alone() -> None:
    """A ResultWriter asks before it writes, and lets the errors of Redis through."""

    async def write(data: bytes) -> None:
        raise ConnectionError(data)

    with pytest.raises(ConnectionError):
        await ResultWriter("1", write, lambda: None).write(b"x")


def test_logger(caplog: pytest.LogCaptureFixture) -> None:
    """Records carry the facts of the task beside those of the call."""
    ctx = context()
    assert ctx.logger is ctx.logger
    with caplog.at_level(logging.INFO, "asynq_aio.task"):
        ctx.logger.info("%d of %d", 1, 2, extra={"step": "upload"})
    record = caplog.records[0]
    assert record.getMessage() == "1 of 2"
    facts = {name: vars(record)[name] for name in ("task_id", "task_type", "queue", "retried", "step")}
    assert facts == {"task_id": "1", "task_type": "x", "queue": "low", "retried": 2, "step": "upload"}


def test_client_is_made_when_asked_for() -> None:
    """The client comes from the server when first wanted; a context without one says so."""
    clients = ["client"]
    ctx = context(client=clients.pop)
    assert clients == ["client"]
    client: object = ctx.client
    assert client == "client"
    with pytest.raises(LookupError, match="this context has no client"):
        _ = context().client
    with pytest.raises(LookupError, match="this context has no place for results"):
        _ = context().result
