"""decide(): what becomes of a task whose attempt is over; pure but for the user's own functions."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from asynq_aio._backoff import default_retry_delay
from asynq_aio._broker.finish import Archive, Complete, Done, Retry
from asynq_aio._wire import codec
from asynq_aio.errors import RevokeTask, SkipRetry

if TYPE_CHECKING:
    from asynq_aio._broker.finish import Outcome
    from asynq_aio._broker.leases import Lease
    from asynq_aio._server.config import ServerConfig
    from asynq_aio._task import Task
    from asynq_aio._wire.messages import TaskMessage

__all__ = ["archived", "error_text", "failed", "is_verdict", "left_to_others", "succeeded"]

logger = logging.getLogger("asynq_aio.server")

# What Go's tools show of an error; a longer text would be carried by every later read of the task.
_LONGEST_TEXT = 32_768
# How long a task of a type that is not known here waits before the next server may try, seconds.
_FOR_OTHERS = 5


def succeeded(message: TaskMessage, lease: Lease, result: bytes | None, now_unix: int) -> Outcome:
    """Done, or completed where the task is to be kept; `result` is stored with a completed task only."""
    if message.retention <= 0:
        return Done(lease, message.unique_key)
    done = dataclasses.replace(message, completed_at=now_unix)
    return Complete(lease, message.unique_key, codec.encode_task(done), now_unix + message.retention, result)


def failed(
    message: TaskMessage, lease: Lease, exc: BaseException, task: Task, config: ServerConfig, now_ns: int
) -> Outcome:
    """Revoked, archived or to be retried, asked in this order; the table is wire.md 8.1.

    Source:
        hibiken/asynq 0.26, processor.go: handleFailedMessage
    """
    now_unix = now_ns // 1_000_000_000
    if is_verdict(exc, RevokeTask):
        return Done(lease, message.unique_key)
    text = error_text(exc)
    if message.retried >= message.retry or is_verdict(exc, SkipRetry):
        return archived(message, lease, text, now_unix)
    failure = _is_failure(config, exc)
    edited = dataclasses.replace(message, retried=message.retried + failure, error_msg=text, last_failed_at=now_unix)
    due_unix = (now_ns + _retry_delay_ns(config, message.retried, exc, task)) // 1_000_000_000  # cut off, as Go does
    return Retry(lease, codec.encode_task(edited), due_unix, failure)


def left_to_others(message: TaskMessage, lease: Lease, exc: BaseException, now_ns: int) -> Retry:
    """Nobody here knows this type: again in a few seconds, for another server; not counted as a failure.

    At the head of the queue this server would take it again at once.
    """
    now_unix = now_ns // 1_000_000_000
    edited = dataclasses.replace(message, error_msg=error_text(exc), last_failed_at=now_unix)
    return Retry(lease, codec.encode_task(edited), now_unix + _FOR_OTHERS, failure=False)


def archived(message: TaskMessage, lease: Lease, text: str, now_unix: int) -> Archive:
    """Into the archive, with the reason."""
    edited = dataclasses.replace(message, error_msg=text, last_failed_at=now_unix)
    return Archive(lease, codec.encode_task(edited))


def is_verdict(exc: BaseException, verdict: type[BaseException]) -> bool:
    """Is `exc` this verdict, or was it raised from one (`raise ... from SkipRetry()`)?"""
    seen: BaseException | None = exc
    for _ in range(32):  # a chain can be made into a ring
        if seen is None:
            return False
        if isinstance(seen, verdict):
            return True
        seen = seen.__cause__
    return False


def error_text(exc: BaseException) -> str:
    """What people see as the task's last error: the exception's text, or the name of its type where it has none.

    A bare `raise SkipRetry from exc` has the text of `exc`: the reason is worth more than the verdict.
    """
    if isinstance(exc, SkipRetry | RevokeTask) and not exc.args and exc.__cause__ is not None:
        return error_text(exc.__cause__)
    try:
        text = str(exc)
    except Exception as broken:  # noqa: BLE001  (a user's __str__ may raise anything)
        text = f"{type(exc).__name__} (its text cannot be made: {type(broken).__name__})"
    if not text:
        text = type(exc).__name__
    return codec.clean_text(text[:_LONGEST_TEXT])


def _is_failure(config: ServerConfig, exc: BaseException) -> bool:
    try:
        return bool(config.is_failure(exc))
    except Exception:
        logger.exception("is_failure raised; the error counts as a failure")
        return True


def _retry_delay_ns(config: ServerConfig, retried: int, exc: BaseException, task: Task) -> int:
    """Nanoseconds, never negative."""
    try:
        seconds = config.retry_delay(retried, exc, task).total_seconds()
    except Exception:
        logger.exception("retry_delay raised; the default delay is used")
        seconds = default_retry_delay(retried, exc, task).total_seconds()
    return max(0, int(seconds * 1e9))
