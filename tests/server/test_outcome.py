"""What becomes of a task whose attempt is over; pure: message and error in, outcome out."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynq_aio import RevokeTask, SkipRetry, Task
from asynq_aio._broker.finish import Archive, Complete, Done, Retry
from asynq_aio._broker.leases import Lease
from asynq_aio._server import outcome
from asynq_aio._server.config import ServerConfig
from asynq_aio._wire import codec
from asynq_aio.errors import HandlerNotFoundError, LeaseExpiredError
from tests import seed

if TYPE_CHECKING:
    from asynq_aio._broker.finish import Outcome
    from asynq_aio._wire.messages import TaskMessage

NOW_UNIX = 1_700_000_000
NOW_NS = NOW_UNIX * 10**9 + 999_999_999
LEASE = Lease("q", "a", "h:1:s/1", NOW_UNIX + 30)
TASK = Task("ty")
BOOM = ValueError("boom")


def made(**fields: Any) -> TaskMessage:
    """A task with a lock."""
    return seed.message("q", "a", unique=True, **fields)


def config(delay: timedelta = timedelta(seconds=60), **settings: Any) -> ServerConfig:
    """A server whose retry delay is known."""
    return ServerConfig(**{"retry_delay": lambda _retried, _exc, _task: delay, **settings})


def failed(message: TaskMessage, exc: BaseException, settings: ServerConfig | None = None) -> Outcome:
    """The outcome of a failure at NOW_NS."""
    return outcome.failed(message, LEASE, exc, TASK, settings or config(), NOW_NS)


# -- success


def test_success_without_retention() -> None:
    """The task is deleted, its lock with it; a result has nowhere to be."""
    message = made()
    assert outcome.succeeded(message, LEASE, b"result", NOW_UNIX) == Done(LEASE, message.unique_key)


@pytest.mark.parametrize("retention", [-1, 0])
def test_no_retention_below_one(retention: int) -> None:
    """A retention of zero, or a negative one by a Go client, keeps nothing."""
    assert isinstance(outcome.succeeded(made(retention=retention), LEASE, None, NOW_UNIX), Done)


def test_success_with_retention() -> None:
    """It is kept until now + retention; the message says when it was completed, and nothing else of it changes."""
    message = made(retention=3600, retried=2, error_msg="earlier", last_failed_at=5)
    kept = outcome.succeeded(message, LEASE, b"result", NOW_UNIX)
    completed = codec.encode_task(seed.edited(message, completed_at=NOW_UNIX))
    assert kept == Complete(LEASE, message.unique_key, completed, NOW_UNIX + 3600, b"result")


# -- failure


def test_an_error_is_retried() -> None:
    """One failure more, the text, the moment; the score is the moment of the retry, cut off to its second."""
    message = made(retried=3)
    edited = seed.edited(message, retried=4, error_msg="boom", last_failed_at=NOW_UNIX)
    assert failed(message, BOOM) == Retry(LEASE, codec.encode_task(edited), NOW_UNIX + 60, failure=True)


@pytest.mark.parametrize(("milliseconds", "seconds"), [(0, 0), (1, 1), (999, 1), (1_000, 1), (1_001, 2), (-5_000, 0)])
def test_the_score_is_cut_off(milliseconds: int, seconds: int) -> None:
    """Moment (which ends in .999999999) and delay are added, then cut off, as Go does; a negative delay is none."""
    retry = failed(made(), BOOM, config(timedelta(milliseconds=milliseconds)))
    assert isinstance(retry, Retry)
    assert retry.due_unix == NOW_UNIX + seconds


def test_no_failure() -> None:
    """Where `is_failure` says so, `retried` stays and nothing is counted; text and moment are written all the same."""
    message = made(retried=3)
    edited = seed.edited(message, error_msg="boom", last_failed_at=NOW_UNIX)
    retry = failed(message, BOOM, config(is_failure=lambda _exc: False))
    assert retry == Retry(LEASE, codec.encode_task(edited), NOW_UNIX + 60, failure=False)


@pytest.mark.parametrize(("retried", "retry"), [(25, 25), (0, 0), (26, 25)])
def test_no_retry_is_left(retried: int, retry: int) -> None:
    """K9: into the archive, `retried` unchanged, whatever `is_failure` says."""
    message = made(retried=retried, retry=retry)
    edited = seed.edited(message, error_msg="boom", last_failed_at=NOW_UNIX)
    for settings in (config(), config(is_failure=lambda _exc: False)):
        assert failed(message, BOOM, settings) == Archive(LEASE, codec.encode_task(edited))


def test_the_last_retry() -> None:
    """One below the limit is retried once more."""
    assert isinstance(failed(made(retried=24, retry=25), BOOM), Retry)


def chained(verdict: BaseException, links: int) -> BaseException:
    """An error that was raised from one that was raised from ... the verdict."""
    error = verdict
    for _ in range(links):
        outer = ValueError("outer")
        outer.__cause__ = error
        error = outer
    return error


@pytest.mark.parametrize("links", [0, 1, 5])
def test_skip_retry(links: int) -> None:
    """At once into the archive, be it anywhere in the chain of causes."""
    assert isinstance(failed(made(), chained(SkipRetry("no"), links)), Archive)


@pytest.mark.parametrize("links", [0, 1, 5])
@pytest.mark.parametrize("retried", [0, 25])
def test_revoke(links: int, retried: int) -> None:
    """Deleted, asked before anything else: with retention, without retries left."""
    message = made(retention=3600, retried=retried)
    assert failed(message, chained(RevokeTask(), links)) == Done(LEASE, message.unique_key)


def test_a_mere_context_is_no_chain() -> None:
    """An error that was raised while a verdict was handled is not that verdict."""
    error = ValueError("another")
    error.__context__ = SkipRetry()
    assert isinstance(failed(made(), error), Retry)


def test_a_chain_that_bites_its_tail() -> None:
    """A ring of causes ends."""
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert isinstance(failed(made(), one), Retry)


def test_left_to_others() -> None:
    """For a server that knows the type: in five seconds, not counted, with the reason."""
    message = made(retried=25)
    edited = seed.edited(message, error_msg='handler not found for task "ty"', last_failed_at=NOW_UNIX)
    retry = outcome.left_to_others(message, LEASE, HandlerNotFoundError("ty"), NOW_NS)
    assert retry == Retry(LEASE, codec.encode_task(edited), NOW_UNIX + 5, failure=False)


def test_what_users_functions_raise(caplog: pytest.LogCaptureFixture) -> None:
    """`is_failure` and `retry_delay` that raise are logged; the error counts, and waits for Go's default time."""

    def broken(*_args: object) -> Any:
        raise RuntimeError("broken")

    random.seed(1)
    retry = failed(made(retried=1), BOOM, ServerConfig(is_failure=broken, retry_delay=broken))
    assert isinstance(retry, Retry)
    assert retry.failure
    assert 16 <= retry.due_unix - NOW_UNIX <= 75
    assert [record.message.split(";")[0] for record in caplog.records] == ["is_failure raised", "retry_delay raised"]


def test_the_delay_is_told_the_failures_before_this_one() -> None:
    """`retry_delay` sees `retried` before it is raised, the error and the task."""
    seen: list[object] = []

    def delay(retried: int, exc: BaseException, task: Task) -> timedelta:
        seen.extend([retried, exc, task])
        return timedelta(0)

    failed(made(retried=3), BOOM, ServerConfig(retry_delay=delay))
    assert seen == [3, BOOM, TASK]


# -- texts


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("boom"), "boom"),
        (ValueError(), "ValueError"),
        (KeyError("key"), "'key'"),
        (SkipRetry(), "skip retry for the task"),
        (SkipRetry("why"), "why"),
        (RevokeTask(), "revoke task"),
        (LeaseExpiredError(), "asynq: task lease expired"),
        (HandlerNotFoundError("a:b"), 'handler not found for task "a:b"'),
        (asyncio.CancelledError(), "CancelledError"),
        (UnprintableError(), "UnprintableError (its text cannot be made: ZeroDivisionError)"),
        (ValueError("\udcff"), "?"),
        (ValueError("Ошибка 🚀"), "Ошибка 🚀"),
    ],
)
def test_error_texts(error: BaseException, text: str) -> None:
    """The error's own text, or its name where it has none; never something that no message can carry."""
    assert outcome.error_text(error) == text


def test_a_bare_verdict_has_the_text_of_its_cause() -> None:
    """`raise SkipRetry from exc`: the reason is worth more than the verdict."""
    verdict = SkipRetry()
    verdict.__cause__ = BOOM
    assert outcome.error_text(verdict) == "boom"
    said = SkipRetry("said")
    said.__cause__ = BOOM
    assert outcome.error_text(said) == "said"


@given(st.text(alphabet=st.characters(), max_size=200))
def test_every_text_can_be_written(text: str) -> None:
    """Whatever an exception says, the message with it can be encoded and says the same, lone surrogates aside."""
    retry = failed(made(), ValueError(text))
    assert isinstance(retry, Retry)
    expected = text.encode(errors="replace").decode() or "ValueError"
    assert codec.decode_task(retry.encoded).error_msg == expected


def test_a_long_text_is_cut() -> None:
    """32,768 characters are enough for people, and are carried by every later read of the task."""
    retry = failed(made(), ValueError("x" * 10**6))
    assert isinstance(retry, Retry)
    assert codec.decode_task(retry.encoded).error_msg == "x" * 32_768
