"""Messages and their timestamps."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynq_aio._wire.messages import TaskMessage, Timestamp


def test_never_is_the_year_one() -> None:
    """Go's zero time is no moment; 1970 is one."""
    assert Timestamp.NEVER == (-62_135_596_800, 0)
    assert Timestamp.NEVER.to_datetime() is None
    assert Timestamp().to_datetime() == datetime(1970, 1, 1, tzinfo=UTC)


@given(st.integers(-(10**18), 10**20))
@settings(max_examples=100, deadline=None)
def test_from_nanoseconds_is_exact(unix_ns: int) -> None:
    """Nanoseconds are kept, and never negative, before 1970 too."""
    moment = Timestamp.from_ns(unix_ns)
    assert moment.seconds * 10**9 + moment.nanos == unix_ns
    assert 0 <= moment.nanos < 10**9


@given(st.datetimes(min_value=datetime(1, 1, 1, 0, 0, 1), timezones=st.just(UTC)))  # noqa: DTZ001  (Hypothesis wants it naive)
@settings(max_examples=100, deadline=None)
def test_to_datetime_is_exact_to_the_microsecond(moment: datetime) -> None:
    """Every datetime in UTC comes back."""
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    timestamp = Timestamp(since.days * 86_400 + since.seconds, since.microseconds * 1000 + 999)
    assert timestamp.to_datetime() == moment


def test_out_of_range_is_an_overflow_error() -> None:
    """What other programs write may be beyond the year 9999."""
    with pytest.raises(OverflowError):
        Timestamp(2**62).to_datetime()


def test_messages_do_not_change() -> None:
    """A message is a value: frozen, equal by content, picklable."""
    message = TaskMessage(type="t", headers={"k": "v"})
    with pytest.raises(FrozenInstanceError):
        message.type = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(message)) == message
    assert TaskMessage().headers is not TaskMessage().headers
