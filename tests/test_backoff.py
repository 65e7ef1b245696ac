"""How long to wait before trying again."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynq_aio._backoff import Backoff, default_retry_delay, jittered
from asynq_aio._task import Task
from asynq_aio.errors import ConfigError
from tests.wire import vectors

TASK = Task("t")
ERROR = ValueError("no")


@pytest.mark.parametrize("row", vectors.load("retry_delay.json")["rows"], ids=lambda row: str(row["retried"]))
def test_the_default_is_go_s(row: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the thirty draws gives Go's delay, from the least to the most, in Go's steps."""
    delays = []
    for draw in range(30):

        def randrange(stop: int, draw: int = draw) -> int:
            assert stop == 30
            return draw

        monkeypatch.setattr(random, "randrange", randrange)
        delays.append(default_retry_delay(row["retried"], ERROR, TASK).total_seconds())
    assert delays == list(range(row["min_s"], row["max_s"] + 1, row["step_s"]))


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=100, deadline=None)
def test_the_default_never_overflows(retried: int) -> None:
    """Any count that a message can carry gives a delay, at most a hundred years."""
    assert timedelta(seconds=15) <= default_retry_delay(retried, ERROR, TASK) <= timedelta(days=36_500)


@given(
    st.timedeltas(timedelta(milliseconds=1), timedelta(days=1)),
    st.floats(1, 100),
    st.timedeltas(timedelta(days=1), timedelta(days=36_500)),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=200, deadline=None)
def test_a_backoff_stays_in_its_bounds(
    first: timedelta, factor: float, longest: timedelta, jitter: float, retried: int
) -> None:
    """Whatever the count, the delay is no longer than the longest and no shorter than the share that is certain."""
    delay = Backoff(first, factor, longest, jitter)(retried, ERROR, TASK)
    least = min(first, longest).total_seconds() * (1 - jitter)
    assert least - 1e-6 <= delay.total_seconds() <= longest.total_seconds() + 1e-6


def test_a_backoff_without_jitter_is_a_series() -> None:
    """Each delay is the factor times the one before, until the longest."""
    backoff = Backoff(timedelta(seconds=1), 3, timedelta(seconds=20), jitter=0)
    assert [backoff(n, ERROR, TASK).total_seconds() for n in range(5)] == [1, 3, 9, 20, 20]
    constant = Backoff(timedelta(seconds=5), 1, timedelta(seconds=5), jitter=0)
    assert {constant(n, ERROR, TASK) for n in (0, 1, 1000)} == {timedelta(seconds=5)}


@pytest.mark.parametrize(
    ("settings_", "text"),
    [
        ({"first": timedelta(0)}, "Backoff: first must be longer than zero, not datetime.timedelta(0)"),
        ({"first": 5}, "Backoff: first must be a timedelta, such as timedelta(seconds=15), not 5"),
        ({"longest": timedelta(seconds=1)}, "Backoff: longest must be between first (0:00:15) and a hundred years"),
        ({"longest": timedelta.max}, "Backoff: longest must be between first (0:00:15) and a hundred years"),
        ({"factor": 0.5}, "Backoff: factor must be 1 or more, not 0.5"),
        ({"factor": float("inf")}, "Backoff: factor must be 1 or more, not inf"),
        ({"factor": float("nan")}, "Backoff: factor must be 1 or more, not nan"),
        ({"factor": "2"}, "Backoff: factor must be a number, not '2'"),
        ({"jitter": 1.5}, "Backoff: jitter must be between 0 and 1, not 1.5"),
        ({"jitter": None}, "Backoff: jitter must be a number, not None"),
    ],
)
def test_a_backoff_refuses(settings_: dict[str, Any], text: str) -> None:
    """A setting out of its bounds is refused at once, with its name, the bound and the value."""
    with pytest.raises(ConfigError) as caught:
        Backoff(**settings_)
    assert str(caught.value).startswith(text)


@given(st.floats(0, 1e9), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_jittered_keeps_its_share(seconds: float, share: float) -> None:
    """The rest is certain, the share is drawn."""
    assert seconds * (1 - share) <= jittered(seconds, share) <= seconds
