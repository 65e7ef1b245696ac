"""One task: from its claim to its outcome, whatever its handler does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import (
    AsyncServer,
    Client,
    Context,
    Inspector,
    LeaseExpiredError,
    RevokeTask,
    ServeMux,
    SkipRetry,
    Task,
    TaskCancelledError,
    current_context,
)
from asynq_aio._wire import codec, keys
from asynq_aio._wire.messages import TaskMessage
from tests import servers
from tests.server.look import Counts, counted, counts, drained, state_becomes, stored, there, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = pytest.mark.timeout(60)

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


def in_an_hour(_retried: int, _exc: BaseException, _task: Task) -> timedelta:
    """Retry so late that a test sees the task in `retry`."""
    return HOUR


def at_once(_retried: int, _exc: BaseException, _task: Task) -> timedelta:
    """Retry without a pause."""
    return timedelta(0)


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.fixture
def mux() -> ServeMux:
    """Handlers whose names say what they do."""
    mux = ServeMux()

    @mux.handler("ok")
    async def ok(_task: Task) -> dict[str, int]:
        return {"answer": 42}

    @mux.handler("fail")
    async def fail(_task: Task) -> None:
        raise ValueError("it went wrong")

    @mux.handler("skip")
    async def skip(_task: Task) -> None:
        raise SkipRetry("never again")

    @mux.handler("skip-from")
    async def skip_from(_task: Task) -> None:
        try:
            raise ValueError("the cause")
        except ValueError as exc:
            raise SkipRetry from exc

    @mux.handler("from-skip")
    async def from_skip(_task: Task) -> None:
        raise ValueError("wrapped") from SkipRetry()

    @mux.handler("revoke")
    async def revoke(_task: Task) -> None:
        raise RevokeTask

    @mux.handler("from-revoke")
    async def from_revoke(_task: Task) -> None:
        raise ValueError("wrapped") from RevokeTask()

    return mux


# --- outcomes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", servers.TOPOLOGIES, indirect=True)
async def test_each_outcome_leaves_what_go_leaves(
    uri: str, queue: str, client: Client, redis: Any, mux: ServeMux
) -> None:
    """Every row of the outcome table: where the task is, what its message says, what is counted, who has the lock."""
    keep = {"retention": HOUR}

    async def enqueue(type: str, **options: Any) -> str:
        return (await client.enqueue(type, {"type": type}, queue=queue, **options)).id

    done = await enqueue("ok", unique_for=HOUR)
    kept = await enqueue("ok", **keep)
    failed = await enqueue("fail", max_retry=3, unique_for=HOUR)
    last = await enqueue("fail", max_retry=0)
    skipped = await enqueue("skip", max_retry=3)
    skipped_from = await enqueue("skip-from", max_retry=3)
    from_skipped = await enqueue("from-skip", max_retry=3)
    revoked = await enqueue("revoke", unique_for=HOUR, **keep)
    from_revoked = await enqueue("from-revoke", max_retry=0, **keep)
    unknown = await enqueue("no-such-type", max_retry=3)
    before = int(time.time()) - 1

    server = AsyncServer(uri, queues=[queue], retry_delay=in_an_hour)
    async with server.running(mux):
        await drained(redis, queue)

    assert await stored(redis, queue, done) is None
    completed = await there(redis, queue, kept)
    assert completed.state == "completed"
    assert completed.fields["result"] == b'{"answer":42}'
    assert before <= completed.message.completed_at <= time.time() + 1
    assert await redis.zscore(keys.completed(queue), kept) == completed.message.completed_at + 3600

    again = await there(redis, queue, failed)
    assert (again.state, again.message.retried, again.error) == ("retry", 1, "it went wrong")
    assert before <= again.message.last_failed_at <= time.time() + 1
    assert abs(await redis.zscore(keys.retry(queue), failed) - time.time() - 3600) < 60

    for task_id, text in (
        (last, "it went wrong"),
        (skipped, "never again"),
        (skipped_from, "the cause"),
        (from_skipped, "wrapped"),
    ):
        archived = await there(redis, queue, task_id)
        assert (archived.state, archived.message.retried, archived.error) == ("archived", 0, text)
    assert await stored(redis, queue, revoked) is None
    assert await stored(redis, queue, from_revoked) is None
    lost = await there(redis, queue, unknown)
    assert (lost.state, lost.error) == ("retry", 'handler not found for task "no-such-type"')

    assert await counts(redis, queue) == Counts(retry=2, archived=4, completed=1)
    assert await counted(redis, queue) == (10, 6)
    locks = [key async for key in redis.scan_iter(match=f"asynq:{{{queue}}}:unique:*", count=1000)]
    assert [await redis.get(lock) for lock in locks] == [failed.encode()], "released on success and revocation alone"
    for found in (completed, again, lost):
        assert "aio_owner" not in found.fields
    stats = server.stats
    assert (stats.succeeded, stats.retried, stats.archived, stats.revoked, stats.lost) == (2, 2, 4, 2, 0)


async def test_no_failure_is_retried_without_counting(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Where `is_failure` says no, neither `retried` nor any counter moves; the error is seen all the same."""

    async def handler(_task: Task) -> None:
        raise ConnectionError("try later")

    info = await client.enqueue("x", queue=queue, max_retry=1)
    server = AsyncServer(
        uri, queues=[queue], retry_delay=in_an_hour, is_failure=lambda exc: not isinstance(exc, ConnectionError)
    )
    async with server.running(handler):
        found = await state_becomes(redis, queue, info.id, "retry")
    assert (found.message.retried, found.error) == (0, "try later")
    assert await counted(redis, queue) == (0, 0)


async def test_the_limit_is_asked_before_is_failure(uri: str, queue: str, client: Client, redis: Any) -> None:
    """With no attempt left the task is archived, failure or not."""

    async def handler(_task: Task) -> None:
        raise ConnectionError("try later")

    info = await client.enqueue("x", queue=queue, max_retry=0)
    async with AsyncServer(uri, queues=[queue], is_failure=lambda exc: False).running(handler):
        found = await state_becomes(redis, queue, info.id, "archived")
    assert found.error == "try later"
    assert await counted(redis, queue) == (1, 1)


async def test_retries_until_the_limit(uri: str, queue: str, client: Client, redis: Any) -> None:
    """max_retry=3: four attempts, `ctx.retried` counts them, then the archive."""
    seen: list[tuple[int, int]] = []

    async def handler(ctx: Context, _task: Task) -> None:
        seen.append((ctx.retried, ctx.max_retry))
        raise ValueError(f"attempt {len(seen)}")

    info = await client.enqueue("x", queue=queue, max_retry=3)
    async with AsyncServer(uri, queues=[queue], retry_delay=at_once).running(handler):
        found = await state_becomes(redis, queue, info.id, "archived")
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert (found.message.retried, found.error) == (3, "attempt 4")
    assert await counted(redis, queue) == (4, 4)


async def test_what_the_users_functions_raise_is_logged(
    uri: str, queue: str, client: Client, redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A `retry_delay` or `is_failure` that raises does not cost the task its retry: the default holds."""

    def broken(*_: object) -> Any:
        raise ZeroDivisionError("mine")

    async def handler(_task: Task) -> None:
        raise ValueError("it went wrong")

    info = await client.enqueue("x", queue=queue)
    server = AsyncServer(uri, queues=[queue], retry_delay=broken, is_failure=broken)
    async with server.running(handler):
        found = await state_becomes(redis, queue, info.id, "retry")
        assert server.healthy
    assert (found.message.retried, found.error) == (1, "it went wrong")
    assert 0 < await redis.zscore(keys.retry(queue), info.id) - time.time() < 60
    for name in ("retry_delay", "is_failure"):
        assert any(name in record.message and record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SystemExit(3), "3"),
        (SystemExit(), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (asyncio.CancelledError("of its own"), "context canceled"),
        (MemoryError(), "MemoryError"),
        (UnprintableError(), "UnprintableError (its text cannot be made: RuntimeError)"),
        (ValueError("a lone \udc80 surrogate"), "a lone ? surrogate"),
        (ValueError("nul \x00 and \U0001f600"), "nul \x00 and \U0001f600"),
        (BaseExceptionGroup("both", [SystemExit(), ValueError("a")]), "both (2 sub-exceptions)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("form", ["async", "sync"])
async def test_whatever_a_handler_raises_is_its_own_outcome(
    uri: str, queue: str, client: Client, redis: Any, error: BaseException, text: str, form: str
) -> None:
    """No exception of a handler reaches the server, from the loop or from a thread: the task fails, the next runs."""

    async def raises(task: Task) -> None:
        if task.type == "bad":
            raise error

    def raises_in_thread(task: Task) -> None:
        if task.type == "bad":
            raise error

    if form == "sync" and isinstance(error, asyncio.CancelledError):
        text = "context canceled"
    bad = await client.enqueue("bad", queue=queue)
    server = AsyncServer(uri, queues=[queue], concurrency=1, retry_delay=in_an_hour)
    async with server.running(raises if form == "async" else raises_in_thread):
        found = await state_becomes(redis, queue, bad.id, "retry")
        good = await client.enqueue("good", queue=queue)
        await until(lambda: server.stats.succeeded == 1)
        await drained(redis, queue)
        assert await stored(redis, queue, good.id) is None
        assert server.healthy
    replaced = found.error.replace("�", "?")
    assert replaced == text
    assert found.message.retried == 1


async def test_long_error_texts_are_cut(uri: str, queue: str, client: Client, redis: Any) -> None:
    """An error of a megabyte is not carried by every later read of the task."""

    async def handler(_task: Task) -> None:
        raise ValueError("x" * 1_000_000)

    info = await client.enqueue("x", queue=queue)
    async with AsyncServer(uri, queues=[queue], retry_delay=in_an_hour).running(handler):
        found = await state_becomes(redis, queue, info.id, "retry")
    assert 1000 < len(found.error) < 40_000


# --- results -------------------------------------------------------------------------------------------------------


async def test_results(uri: str, queue: str, client: Client, redis: Any) -> None:
    """A result is what was returned, else what was written last; it lives through retries; no retention, no result."""
    attempts = 0

    async def handler(ctx: Context, task: Task) -> object:
        nonlocal attempts
        match task.type:
            case "returns-bytes":
                return b"\x00\xff"
            case "writes":
                assert await ctx.result.write({"step": 1}) == 10
                assert await ctx.result.write(b"last") == 4
                return None
            case "writes-and-returns":
                await ctx.result.write(b"written")
                return "returned"
            case "returns-what-has-no-json":
                return object()
            case "writes-and-fails":
                attempts += 1
                await ctx.result.write(f"attempt {attempts}")
                raise ValueError("after it")
        return {"deleted": True}

    types = ["returns-bytes", "writes", "writes-and-returns", "returns-what-has-no-json"]
    kept = {type: (await client.enqueue(type, queue=queue, retention=HOUR)).id for type in types}
    failed = (await client.enqueue("writes-and-fails", queue=queue)).id
    gone = (await client.enqueue("no-retention", queue=queue)).id
    async with AsyncServer(uri, queues=[queue], retry_delay=in_an_hour).running(handler):
        await drained(redis, queue)
    results = {type: (await there(redis, queue, kept[type])).fields.get("result") for type in types}
    assert results == {
        "returns-bytes": b"\x00\xff",
        "writes": b"last",
        "writes-and-returns": b'"returned"',
        "returns-what-has-no-json": None,
    }
    assert {(await there(redis, queue, task_id)).state for task_id in kept.values()} == {"completed"}
    assert (await there(redis, queue, failed)).fields["result"] == b'"attempt 1"'
    assert await stored(redis, queue, gone) is None


async def test_a_result_never_recreates_a_task(uri: str, queue: str, client: Client, redis: Any) -> None:
    """A write for a task that is gone is an error, and leaves no hash behind."""
    error: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def handler(ctx: Context, _task: Task) -> None:
        await redis.delete(keys.task(queue, ctx.task_id))
        try:
            await ctx.result.write(b"late")
        except Exception as exc:  # noqa: BLE001  (it is what the test asks for)
            error.set_result(exc)

    info = await client.enqueue("x", queue=queue)
    async with AsyncServer(uri, queues=[queue]).running(handler):
        assert type(await error).__name__ == "TaskNotFoundError"
    assert await redis.exists(keys.task(queue, info.id)) == 0


# --- what a handler sees -------------------------------------------------------------------------------------------


async def test_a_handler_sees_its_task(uri: str, queue: str, client: Client) -> None:
    """Type, payload, headers, and all that the context says of the attempt."""
    seen: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[dict[str, str]]:
        yield {"db": "connected"}

    async def handler(ctx: Context, task: Task) -> None:
        seen.set_result(
            {
                "task": (task.type, task.payload.json(), dict(task.headers)),
                "facts": (ctx.task_id, ctx.queue, ctx.type, ctx.retried, ctx.max_retry, dict(ctx.headers)),
                "enqueued_at": ctx.enqueued_at,
                "deadline_at": ctx.deadline_at,
                "remaining": ctx.remaining,
                "lease_expires_at": ctx.lease_expires_at,
                "state": ctx.state,
                "current": current_context() is ctx,
                "cancelled": ctx.cancelled,
            }
        )

    before = datetime.now(UTC)
    info = await client.enqueue(
        "email:welcome", {"to": 7}, queue=queue, headers={"trace": "1"}, max_retry=4, timeout=timedelta(minutes=5)
    )
    server = AsyncServer(uri, queues=[queue], lifespan=lifespan)
    async with server.running(handler):
        facts = await seen
    assert facts["task"] == ("email:welcome", {"to": 7}, {"trace": "1"})
    assert facts["facts"] == (info.id, queue, "email:welcome", 0, 4, {"trace": "1"})
    assert before - SECOND <= facts["enqueued_at"] <= datetime.now(UTC) + SECOND
    assert timedelta(minutes=4) < facts["remaining"] <= timedelta(minutes=5)
    assert timedelta(minutes=4) < facts["deadline_at"] - before <= timedelta(minutes=6)
    assert timedelta(seconds=15) < facts["lease_expires_at"] - before <= timedelta(seconds=60)
    assert facts["state"] == {"db": "connected"}
    assert facts["current"]
    assert not facts["cancelled"]


async def test_a_handler_enqueues_more(uri: str, queue: str) -> None:
    """`ctx.client` is there for the tasks that follow; the server closes it."""
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def handler(ctx: Context, task: Task) -> None:
        if task.type == "first":
            await ctx.client.enqueue("second", queue=queue)
        seen.put_nowait(task.type)

    async with Client(uri) as client, AsyncServer(uri, queues=[queue]).running(handler):
        await client.enqueue("first", queue=queue)
        assert [await seen.get(), await seen.get()] == ["first", "second"]


# --- deadlines -----------------------------------------------------------------------------------------------------


async def test_a_timeout_stops_the_handler(uri: str, queue: str, client: Client, redis: Any) -> None:
    """At its timeout the handler gets a CancelledError, no result can be written any more, and the task is retried."""
    ended: asyncio.Future[tuple[bool, str | None, str]] = asyncio.get_running_loop().create_future()

    async def handler(ctx: Context, _task: Task) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            try:
                await ctx.result.write(b"late")
            except TaskCancelledError as exc:
                ended.set_result((ctx.cancelled, ctx.cancel_reason, str(exc)))
            raise

    info = await client.enqueue("x", queue=queue, timeout=SECOND)
    async with AsyncServer(uri, queues=[queue], retry_delay=in_an_hour).running(handler) as server:
        found = await state_becomes(redis, queue, info.id, "retry")
        assert server.running_tasks == 0
    text = "context deadline exceeded"
    assert await ended == (True, text, text)
    assert (found.error, found.message.retried) == (text, 1)
    assert "result" not in found.fields


async def test_the_earlier_of_timeout_and_deadline_holds(uri: str, queue: str, client: Client) -> None:
    """Both given: the earlier one; neither: 30 minutes."""
    remaining: dict[str, timedelta] = {}
    done = asyncio.Event()

    async def handler(ctx: Context, task: Task) -> None:
        remaining[task.type] = ctx.remaining
        if len(remaining) == 3:
            done.set()

    now = datetime.now(UTC)
    await client.enqueue("deadline", queue=queue, timeout=HOUR, deadline_at=now + timedelta(minutes=10))
    await client.enqueue("timeout", queue=queue, timeout=timedelta(minutes=1), deadline_at=now + HOUR)
    await client.enqueue("neither", queue=queue)
    async with AsyncServer(uri, queues=[queue]).running(handler):
        await done.wait()
    for type, minutes in (("deadline", 10), ("timeout", 1), ("neither", 30)):
        assert timedelta(minutes=minutes - 1) < remaining[type] <= timedelta(minutes=minutes)


async def test_a_deadline_in_the_past_is_not_worked_on(uri: str, queue: str, client: Client, redis: Any) -> None:
    """The attempt fails without a call of the handler; `on_error` hears of it."""
    called: list[str] = []
    errors: list[str] = []

    async def handler(task: Task) -> None:
        called.append(task.type)

    info = await client.enqueue("x", queue=queue, deadline_at=datetime.now(UTC) - HOUR, max_retry=0)
    server = AsyncServer(uri, queues=[queue], on_error=lambda ctx, task, exc: errors.append(str(exc)))
    async with server.running(handler):
        found = await state_becomes(redis, queue, info.id, "archived")
    assert found.error == "context deadline exceeded"
    assert called == []
    assert errors == ["context deadline exceeded"]


# --- cancellation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", servers.TOPOLOGIES, indirect=True)
async def test_a_cancelled_task_is_retried(uri: str, queue: str, client: Client, redis: Any) -> None:
    """`Inspector.cancel` reaches the handler wherever it runs; as in Go, the task is retried."""
    started = asyncio.Event()
    stopped = asyncio.Event()

    async def handler(_task: Task) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    info = await client.enqueue("x", queue=queue)
    async with AsyncServer(uri, queues=[queue], retry_delay=in_an_hour).running(handler), Inspector(uri) as inspector:
        await started.wait()
        await inspector.cancel(info.id)
        await stopped.wait()
        found = await state_becomes(redis, queue, info.id, "retry")
    assert (found.error, found.message.retried) == ("context canceled", 1)


async def test_a_cancellation_is_heard_from_the_first_task_on(uri: str, queue: str, client: Client, redis: Any) -> None:
    """A task that is taken as soon as the server runs can be cancelled: no task is taken before the server listens."""
    ids = {(await client.enqueue("x", queue=queue)).id for _ in range(5)}

    async def handler(ctx: Context, _task: Task) -> None:
        await inspector.cancel(ctx.task_id)
        await asyncio.Event().wait()

    async with Inspector(uri) as inspector:
        await inspector.ping()
        async with AsyncServer(uri, queues=[queue], retry_delay=in_an_hour).running(handler) as server:
            await until(lambda: server.stats.retried == len(ids))
    assert {(await there(redis, queue, task_id)).error for task_id in ids} == {"context canceled"}


async def test_a_cancellation_hits_its_own_task_only(uri: str, queue: str, client: Client) -> None:
    """Another running task goes on; a cancellation of nothing does nothing."""
    both = asyncio.Barrier(3)
    go = asyncio.Event()
    ended: dict[str, str] = {}

    async def handler(task: Task) -> None:
        await both.wait()
        try:
            await go.wait()
            ended[task.type] = "done"
        except asyncio.CancelledError:
            ended[task.type] = "cancelled"
            raise

    one = await client.enqueue("one", queue=queue)
    await client.enqueue("two", queue=queue)
    server = AsyncServer(uri, queues=[queue], retry_delay=in_an_hour)
    async with server.running(handler), Inspector(uri) as inspector:
        await both.wait()
        await inspector.cancel("no-such-task")
        await inspector.cancel(one.id)
        await until(lambda: "one" in ended)
        go.set()
        await until(lambda: server.stats.processed == 2)
    assert ended == {"one": "cancelled", "two": "done"}


async def test_a_handler_that_swallows_its_cancellation(
    uri: str, queue: str, client: Client, redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The task goes on without it; its slot stays taken, and this is said; on_error hears it; the exit is bounded."""
    deaf = asyncio.Event()
    stop = asyncio.Event()
    errors: list[str] = []

    async def handler(task: Task) -> None:
        if task.type == "deaf":
            while not stop.is_set():
                deaf.set()
                with contextlib.suppress(asyncio.CancelledError):
                    await stop.wait()

    server = AsyncServer(
        uri,
        queues=[queue],
        concurrency=1,
        retry_delay=in_an_hour,
        on_error=lambda ctx, task, exc: errors.append(f"{task.type}: {exc}"),
        shutdown_timeout=timedelta(milliseconds=100),
    )
    info = await client.enqueue("deaf", queue=queue, timeout=SECOND)
    try:
        async with server.running(handler):
            await deaf.wait()
            found = await state_becomes(redis, queue, info.id, "retry")
            assert (found.error, found.message.retried) == ("context deadline exceeded", 1)
            assert server.running_tasks == 1, "its slot is not reused: never more handlers than concurrency"
            await client.enqueue("next", queue=queue)
        assert (await counts(redis, queue)).pending == 1
        assert any("goes on" in record.message and "slot" in record.message for record in caplog.records)
        assert errors == ["deaf: context deadline exceeded"]
    finally:
        stop.set()
    assert await there(redis, queue, info.id) == found, "what it does later counts no more"


async def test_a_late_success_of_a_cancelled_handler(uri: str, queue: str, client: Client, redis: Any) -> None:
    """A handler that is cancelled, cleans up and returns: the attempt was cancelled, as in Go."""
    started = asyncio.Event()

    async def handler(_task: Task) -> str:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "fine"

    info = await client.enqueue("x", queue=queue, retention=HOUR)
    async with AsyncServer(uri, queues=[queue], retry_delay=in_an_hour).running(handler), Inspector(uri) as inspector:
        await started.wait()
        await inspector.cancel(info.id)
        found = await state_becomes(redis, queue, info.id, "retry")
    assert found.error == "context canceled"
    assert "result" not in found.fields


# --- on_error ------------------------------------------------------------------------------------------------------


async def test_on_error_is_called_before_the_task_changes(
    uri: str, queue: str, client: Client, redis: Any, mux: ServeMux
) -> None:
    """For every error, verdicts included, sync or async, with the error itself, while the task is active."""
    seen: dict[str, tuple[type[BaseException], str]] = {}

    async def on_error(ctx: Context, task: Task, exc: BaseException) -> None:
        assert current_context() is ctx
        seen[task.type] = (type(exc), (await there(redis, queue, ctx.task_id)).state)

    for name in ("ok", "fail", "skip", "from-skip", "revoke", "unknown"):
        await client.enqueue(name, queue=queue)
    async with AsyncServer(uri, queues=[queue], on_error=on_error, retry_delay=in_an_hour).running(mux):
        await drained(redis, queue)
    assert {name: kind.__name__ for name, (kind, _) in seen.items()} == {
        "fail": "ValueError",
        "skip": "SkipRetry",
        "from-skip": "ValueError",
        "revoke": "RevokeTask",
        "unknown": "HandlerNotFoundError",
    }
    assert {state for _, state in seen.values()} == {"active"}


@pytest.mark.parametrize("raised", [RuntimeError("mine"), SystemExit(1), asyncio.CancelledError()], ids=repr)
async def test_on_error_may_raise(
    uri: str,
    queue: str,
    client: Client,
    redis: Any,
    raised: BaseException,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its own errors are logged, and change nothing."""

    async def handler(_task: Task) -> None:
        raise ValueError("it went wrong")

    async def on_error(_ctx: Context, _task: Task, _exc: BaseException) -> None:
        raise raised

    info = await client.enqueue("x", queue=queue)
    server = AsyncServer(uri, queues=[queue], on_error=on_error, retry_delay=in_an_hour)
    async with server.running(handler):
        found = await state_becomes(redis, queue, info.id, "retry")
        assert server.healthy
        assert server.stats.lost == 0
    assert (found.error, found.message.retried) == ("it went wrong", 1)
    assert any("on_error" in record.message for record in caplog.records if record.levelno >= logging.ERROR)


async def test_a_cancellation_during_on_error_does_not_lose_the_outcome(
    uri: str, queue: str, client: Client, redis: Any
) -> None:
    """The handler is done when `on_error` runs: what cancels it then, a shutdown too, ends `on_error` alone."""
    in_on_error = asyncio.Event()

    async def handler(_task: Task) -> None:
        raise ValueError("it went wrong")

    async def on_error(_ctx: Context, _task: Task, _exc: BaseException) -> None:
        in_on_error.set()
        await asyncio.Event().wait()

    cancelled = await client.enqueue("x", queue=queue)
    server = AsyncServer(
        uri, queues=[queue], on_error=on_error, retry_delay=in_an_hour, shutdown_timeout=timedelta(milliseconds=50)
    )
    async with server.running(handler), Inspector(uri) as inspector:
        await in_on_error.wait()
        await inspector.cancel(cancelled.id)
        found = await state_becomes(redis, queue, cancelled.id, "retry")
        assert (found.error, found.message.retried) == ("it went wrong", 1)
        in_on_error.clear()
        drained_late = await client.enqueue("y", queue=queue)
        await in_on_error.wait()
    found = await there(redis, queue, drained_late.id)
    assert (found.state, found.error, found.message.retried) == ("retry", "it went wrong", 1)
    assert (await counts(redis, queue)).lease == 0


# --- slots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["async", "sync"])
async def test_concurrency_is_never_exceeded(uri: str, queue: str, client: Client, redis: Any, form: str) -> None:
    """Never more handlers at once than slots, and all slots are used; for threads the smaller of both limits counts."""
    lock = threading.Lock()
    running = most = done = 0

    def enter(step: int) -> None:
        nonlocal running, most, done
        with lock:
            running += step
            most = max(most, running)
            done += step < 0

    async def in_loop(_task: Task) -> None:
        enter(1)
        await asyncio.sleep(0.002)
        enter(-1)

    def in_thread(_task: Task) -> None:
        enter(1)
        time.sleep(0.005)
        enter(-1)

    n = 400
    await client.enqueue_many([Task("x", {"n": at}) for at in range(n)], queue=queue)
    server = AsyncServer(uri, queues=[queue], concurrency=17, sync_concurrency=5)
    async with server.running(in_loop if form == "async" else in_thread):
        await until(lambda: done == n)
        await drained(redis, queue)
    assert most == (17 if form == "async" else 5)
    assert server.stats.succeeded == n


async def test_a_sync_handler_keeps_its_slot_after_its_timeout(
    uri: str, queue: str, client: Client, redis: Any
) -> None:
    """A thread cannot be stopped: the task is retried, the thread's slot stays taken until the thread ends."""
    go_on = threading.Event()
    lock = threading.Lock()
    running = most = 0
    asked: list[bool] = []

    def handler(ctx: Context, task: Task) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if task.type == "slow":
            go_on.wait()
            asked.append(ctx.cancelled)
        with lock:
            running -= 1

    slow = await client.enqueue("slow", queue=queue, timeout=SECOND)
    await client.enqueue("next", queue=queue)
    server = AsyncServer(uri, queues=[queue], concurrency=1, retry_delay=in_an_hour)
    async with server.running(handler):
        found = await state_becomes(redis, queue, slow.id, "retry")
        assert found.error == "context deadline exceeded"
        assert (await counts(redis, queue)).pending == 1
        go_on.set()
        await drained(redis, queue)
    assert most == 1
    assert asked == [True]


async def test_sync_handlers_keep_context_variables(uri: str, queue: str, client: Client) -> None:
    """The thread of a sync handler knows the current context, and what the lifespan has made."""
    seen: asyncio.Future[tuple[str, int, bool]] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    variable: ContextVar[int] = ContextVar("variable")

    async def middleware(ctx: Context, task: Task, call_next: Any) -> object:
        variable.set(7)
        return await call_next(ctx, task)

    mux = ServeMux()
    mux.use(middleware)

    @mux.handler("x")
    def handler(_task: Task) -> None:
        facts = (current_context().task_id, variable.get(), threading.current_thread() is threading.main_thread())
        loop.call_soon_threadsafe(seen.set_result, facts)

    info = await client.enqueue("x", queue=queue)
    async with AsyncServer(uri, queues=[queue]).running(mux):
        assert await seen == (info.id, 7, False)


# --- queues --------------------------------------------------------------------------------------------------------


async def test_strict_priority(uri: str, queue: str, client: Client, redis: Any) -> None:
    """The highest first, always; equal ones as listed."""
    order: list[str] = []
    names = {f"{queue}-low": 1, f"{queue}-high": 9, f"{queue}-low-too": 1}
    for name in names:
        await client.enqueue_many([Task("x", {"n": at}) for at in range(30)], queue=name)

    async def handler(ctx: Context, _task: Task) -> None:
        order.append(ctx.queue)

    server = AsyncServer(uri, queues=names, strict_priority=True, concurrency=4)
    async with server.running(handler):
        await until(lambda: len(order) == 90)
    assert order == [f"{queue}-high"] * 30 + [f"{queue}-low"] * 30 + [f"{queue}-low-too"] * 30


async def test_weights_are_shares_over_batches(uri: str, queue: str, client: Client) -> None:
    """While all queues have tasks, each gets its share of the slots; what one cannot give, the others use."""
    names = {f"{queue}-a": 6, f"{queue}-b": 3, f"{queue}-c": 1}
    order: list[str] = []
    n = 1000
    for name in names:
        await client.enqueue_many([Task("x", {"n": at}) for at in range(n)], queue=name)

    async def handler(ctx: Context, _task: Task) -> None:
        order.append(ctx.queue.removeprefix(f"{queue}-"))
        await asyncio.sleep(0)

    server = AsyncServer(uri, queues=names, concurrency=20)
    async with server.running(handler):
        await until(lambda: len(order) == 3 * n)
    head = order[:1000]  # none of the queues is empty yet: 600 of 1,000
    shares = {name: head.count(name) / len(head) for name in "abc"}
    assert 0.5 < shares["a"] < 0.7
    assert 0.22 < shares["b"] < 0.38
    assert 0.04 < shares["c"] < 0.17


async def test_a_paused_queue_rests(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Nothing of it is started; others go on; when it is resumed it is worked on."""
    other = f"{queue}-other"
    done: list[str] = []
    await redis.set(keys.paused(queue), int(time.time()))
    await client.enqueue("paused", queue=queue)

    async def handler(task: Task) -> None:
        done.append(task.type)

    server = AsyncServer(uri, queues=[queue, other])
    async with server.running(handler):
        await client.enqueue("other", queue=other)
        await until(lambda: done == ["other"])
        assert (await counts(redis, queue)).pending == 1
        await redis.delete(keys.paused(queue))
        await until(lambda: done == ["other", "paused"])


async def test_more_queues_than_waiters(uri: str, queue: str, client: Client) -> None:
    """With 40 queues the last ones have no connection of their own; their tasks are found by polling."""
    names = [f"{queue}-{at}" for at in range(40)]
    done: set[str] = set()

    async def handler(ctx: Context, _task: Task) -> None:
        done.add(ctx.queue)

    server = AsyncServer(uri, queues=names, task_check_interval=timedelta(milliseconds=100))
    async with server.running(handler):
        await asyncio.sleep(0.3)  # all queues have been found empty, and are watched or polled
        for name in names:
            await client.enqueue("x", queue=name)
        await until(lambda: len(done) == 40)


# --- what may stand in Redis ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoded", [b"\xff\xff\xff not protobuf", b"\x0a\x02\xff\xfe"], ids=["garbage", "no-utf8"])
async def test_an_undecodable_message_is_archived(
    uri: str, queue: str, client: Client, redis: Any, encoded: bytes
) -> None:
    """With its bytes as they were and the reason beside them; the queue goes on."""
    await client.enqueue("x", {}, queue=queue, task_id="broken")
    await redis.hset(keys.task(queue, "broken"), "msg", encoded)
    done: list[str] = []

    async def handler(task: Task) -> None:
        done.append(task.type)

    async with AsyncServer(uri, queues=[queue], concurrency=1).running(handler) as server:
        await client.enqueue("good", queue=queue)
        await until(lambda: done[-1:] == ["good"])
        await drained(redis, queue)
        assert server.healthy
    fields = await redis.hgetall(keys.task(queue, "broken"))
    assert fields[b"state"] == b"archived"
    assert fields[b"msg"] == encoded
    assert b"cannot decode" in fields[b"aio_reason"]
    assert await redis.zcard(keys.archived(queue)) == 1


@pytest.mark.parametrize(
    "message",
    [
        TaskMessage(type="x", id="odd", queue="", deadline=2**63 - 1, retry=3),
        TaskMessage(type="x", id="odd", queue="", timeout=2**63 - 1, retention=2**62, retry=3),
        TaskMessage(type="x", id="odd", queue="", timeout=-5, deadline=-5, retry=-1, retried=-7, retention=-9),
        TaskMessage(type="x", id="odd", queue="elsewhere", unique_key="another-slot", retention=3600, retry=3),
        TaskMessage(type=" ", id="odd", queue="", retry=3),
        TaskMessage(type="x", id="other-id", queue="", retry=3),
    ],
    ids=["late-deadline", "long-timeout", "negative", "foreign", "blank-type", "other-id"],
)
async def test_odd_messages_do_no_harm(uri: str, queue: str, client: Client, redis: Any, message: TaskMessage) -> None:
    """A message that no client of ours would write is worked on, seen by others while it runs, and leaves `active`."""
    await client.enqueue("x", {}, queue=queue, task_id="odd")
    await redis.hset(keys.task(queue, "odd"), "msg", codec.encode_task(message))
    started, go = asyncio.Event(), asyncio.Event()

    async def handler(_task: Task) -> None:
        started.set()
        await go.wait()

    server = AsyncServer(uri, queues=[queue])
    async with server.running(handler):
        await started.wait()
        heartbeater = server._heartbeater
        assert heartbeater is not None
        await heartbeater.run_once()
        go.set()
        await drained(redis, queue)
        assert server.healthy
        assert server.stats.succeeded == 1


async def test_an_id_without_its_task_is_set_aside(uri: str, queue: str, client: Client, redis: Any) -> None:
    """It does not stop the queue, and does not stay in `active` for ever, as it does in Go."""
    await redis.lpush(keys.pending(queue), "ghost")
    done = asyncio.Event()

    async def handler(_task: Task) -> None:
        done.set()

    async with AsyncServer(uri, queues=[queue], concurrency=1).running(handler):
        await client.enqueue("x", queue=queue)
        await done.wait()
        await drained(redis, queue)
    assert await redis.zrange(keys.ghost(queue), 0, -1) == [b"ghost"]


@pytest.mark.parametrize("topology", ["standalone-valkey9", "cluster-valkey9"], indirect=True)
async def test_large_payloads(uri: str, queue: str, client: Client, redis: Any) -> None:
    """10 MB in, 10 MB out, with small tasks beside them."""
    large = bytes(range(256)) * 40_960
    sizes: list[int] = []

    async def handler(task: Task) -> bytes:
        sizes.append(len(task.payload))
        return bytes(task.payload)

    info = await client.enqueue("large", large, queue=queue, retention=HOUR)
    await client.enqueue("large", large, queue=queue)
    for at in range(20):
        await client.enqueue("small", b"%d" % at, queue=queue)
    async with AsyncServer(uri, queues=[queue], concurrency=10).running(handler):
        await until(lambda: len(sizes) == 22)
        await drained(redis, queue)
    assert sorted(sizes)[-2:] == [len(large), len(large)]
    found = await there(redis, queue, info.id)
    assert found.fields["result"] == large
    await redis.delete(keys.task(queue, info.id))


# --- leases --------------------------------------------------------------------------------------------------------


async def test_a_lost_lease_ends_the_attempt(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Somebody else has the task: the handler is stopped, `on_error` is told, and nothing is written."""
    started = asyncio.Event()
    errors: list[BaseException] = []

    async def handler(_task: Task) -> None:
        started.set()
        await asyncio.Event().wait()

    info = await client.enqueue("x", queue=queue)
    server = AsyncServer(uri, queues=[queue], on_error=lambda ctx, task, exc: errors.append(exc))
    async with server.running(handler):
        await started.wait()
        foreign = int(time.time()) + 500
        await redis.zadd(keys.lease(queue), {info.id: foreign})  # a Go server that took it leaves our owner in the hash
        heartbeater, holdings = server._heartbeater, server._executor
        assert heartbeater is not None
        assert holdings is not None
        for attempt in holdings._holdings:
            attempt.renewed -= 60.0  # as after a silence of a minute
        await heartbeater.run_once()
        await until(lambda: server.running_tasks == 0)
    assert [type(error) for error in errors] == [LeaseExpiredError]
    assert await redis.zscore(keys.lease(queue), info.id) == foreign
    found = await there(redis, queue, info.id)
    assert (found.state, found.message.retried, found.error) == ("active", 0, "")
    assert await counted(redis, queue) == (0, 0)
    assert server.stats.lost == 1


async def test_a_late_outcome_changes_nothing(uri: str, queue: str, client: Client, redis: Any) -> None:
    """Deleted under the handler's hands: its outcome is counted as lost, and nothing comes back to life."""
    started, go = asyncio.Event(), asyncio.Event()

    async def handler(_task: Task) -> str:
        started.set()
        await go.wait()
        return "result"

    info = await client.enqueue("x", queue=queue, retention=HOUR)
    server = AsyncServer(uri, queues=[queue])
    async with server.running(handler):
        await started.wait()
        await redis.lrem(keys.active(queue), 0, info.id)
        await redis.zrem(keys.lease(queue), info.id)
        await redis.delete(keys.task(queue, info.id))
        go.set()
        await until(lambda: server.stats.lost == 1)
    assert await counts(redis, queue) == Counts()
    assert await stored(redis, queue, info.id) is None
