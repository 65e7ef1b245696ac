"""What a handler may ask about its task, and where it writes its result."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from asynq_aio._task import encode_payload
from asynq_aio.errors import TaskCancelledError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping
    from contextvars import Token

    import anyio

    from asynq_aio._client import Client

__all__ = ["Context", "ResultWriter", "bind", "current_context", "unbind"]

_LOGGER: Final = logging.getLogger("asynq_aio.task")

_LAST_UNIX: Final = 253_402_300_799
"""The last second that a datetime holds; Go's programs may write later ones."""

_CURRENT: Final[ContextVar[Context]] = ContextVar("asynq_aio.context")


def current_context() -> Context:
    """The context of the task that this code works on, also in what a handler calls and in its thread.

    Raises:
        LookupError: this code was not called by a handler.
    """
    try:
        return _CURRENT.get()
    except LookupError:
        raise LookupError(
            "current_context() was called outside of a handler; there it is known to the handler, "
            "to what it calls and awaits, and to the thread of a sync handler"
        ) from None


def bind(context: Context) -> Token[Context]:
    """Make it the current context of the running child (or of this code, until `unbind`)."""
    return _CURRENT.set(context)


def unbind(token: Token[Context]) -> None:
    """Undo `bind`."""
    _CURRENT.reset(token)


class ResultWriter:
    """Writes the result of a task while it is worked on; each write replaces the last.

    It is seen as long as the task is: in retry, in the archive, and after success as long as the task's retention says.
    """

    __slots__ = ("_check", "_write", "task_id")

    def __init__(self, task_id: str, write: Callable[[bytes], Awaitable[None]], check: Callable[[], None]) -> None:
        self.task_id = task_id
        self._write = write
        self._check = check

    async def write(self, data: object) -> int:
        """Store bytes as they are, anything else as JSON; returns the number of bytes.

        Raises:
            TaskCancelledError: the attempt is over; nothing was sent.
            InvalidTaskError: something in it has no JSON form.
            BrokerError: Redis refused it, or was out of reach until the deadline.
        """
        self._check()
        encoded = bytes(encode_payload(data))
        await self._write(encoded)
        return len(encoded)


class _TaskLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds the facts of the task to each record; those given with a call win."""

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[object, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


class Context:
    """What a handler may ask about its task.

    The server makes one for each attempt. On its hot path: making one assigns fields, the rest is made when asked for.
    """

    __slots__ = (
        "_client",
        "_deadline_unix",
        "_enqueued_ns",
        "_lease_expires_unix",
        "_logger",
        "_now",
        "_result",
        "_write_result",
        "cancel_reason",
        "headers",
        "max_retry",
        "queue",
        "retried",
        "state",
        "sync_limiter",
        "task_id",
        "type",
    )

    def __init__(
        self,
        *,
        task_id: str,
        queue: str,
        type: str,
        retried: int,
        max_retry: int,
        headers: Mapping[str, str],
        deadline_unix: float,
        enqueued_ns: int | None = None,
        lease_expires_unix: Callable[[], float] | None = None,
        write_result: Callable[[bytes], Awaitable[None]] | None = None,
        client: Callable[[], Client] | None = None,
        state: Any = None,  # noqa: ANN401  (what the user's lifespan yields)
        sync_limiter: anyio.CapacityLimiter | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.task_id = task_id
        self.queue = queue
        self.type = type
        self.retried = retried
        """Failed attempts before this one."""
        self.max_retry = max_retry
        self.headers = headers
        self.state = state
        """What the server's `lifespan` yielded; None without one."""
        self.sync_limiter = sync_limiter
        """Bounds the threads of sync handlers; None: anyio's own limiter does."""
        self.cancel_reason: str | None = None
        """Why the attempt is over; None while it is not."""
        self._deadline_unix = deadline_unix
        self._enqueued_ns = enqueued_ns
        self._lease_expires_unix = lease_expires_unix
        self._write_result = write_result
        self._client = client
        self._now = now
        self._logger: logging.LoggerAdapter[logging.Logger] | None = None
        self._result: ResultWriter | None = None

    def __repr__(self) -> str:
        return f"<Context of task {self.task_id} ({self.type}) of queue {self.queue}>"

    # -- moments

    @property
    def deadline_at(self) -> datetime:
        """When this attempt must be over: the earlier of its timeout and the task's deadline; there always is one."""
        return datetime.fromtimestamp(min(self._deadline_unix, _LAST_UNIX), UTC)

    @property
    def remaining(self) -> timedelta:
        """How much time is left until the deadline; not below 0."""
        return timedelta(seconds=max(0.0, min(self._deadline_unix, _LAST_UNIX) - self._now()))

    @property
    def enqueued_at(self) -> datetime | None:
        """When the task last became pending; None where the program that enqueued it did not say."""
        return None if self._enqueued_ns is None else datetime.fromtimestamp(self._enqueued_ns / 1e9, UTC)

    @property
    def lease_expires_at(self) -> datetime | None:
        """Until when this server holds the task, if it dies now; pushed back as long as it lives."""
        return None if self._lease_expires_unix is None else datetime.fromtimestamp(self._lease_expires_unix(), UTC)

    # -- cancellation

    @property
    def cancelled(self) -> bool:
        """Whether the attempt is over: cancelled, past its deadline, or its lease lost. May be asked in any thread."""
        return self.cancel_reason is not None

    def raise_if_cancelled(self) -> None:
        """Give up where the attempt is over; for the loops of sync handlers, in any thread.

        Raises:
            TaskCancelledError: says why.
        """
        if self.cancel_reason is not None:
            raise TaskCancelledError(self.cancel_reason)

    def end(self, reason: str) -> None:
        """Mark the attempt as over; the first reason stays. The server calls this before it cancels the handler."""
        if self.cancel_reason is None:
            self.cancel_reason = reason

    # -- what is made when asked for

    @property
    def result(self) -> ResultWriter:
        """Where the result is written before the handler returns; a returned value is stored without it."""
        if self._result is None:
            if self._write_result is None:
                raise LookupError("this context has no place for results; testing.run takes one as on_result=")
            self._result = ResultWriter(self.task_id, self._write_result, self.raise_if_cancelled)
        return self._result

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """The logger `asynq_aio.task`; each record has task_id, task_type, queue and retried."""
        if self._logger is None:
            facts = {"task_id": self.task_id, "task_type": self.type, "queue": self.queue, "retried": self.retried}
            self._logger = _TaskLogger(_LOGGER, facts)
        return self._logger

    @property
    def client(self) -> Client:
        """A client on the server's Redis, to enqueue more tasks; the server closes it."""
        if self._client is None:
            raise LookupError("this context has no client; testing.run takes one as client=")
        return self._client()
