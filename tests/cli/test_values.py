"""Durations, moments, headers and queues on the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
import typer

from asynq_aio.cli.values import parse_duration, parse_headers, parse_moment, parse_queues


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", timedelta(0)),
        ("30s", timedelta(seconds=30)),
        ("1h30m", timedelta(hours=1, minutes=30)),
        ("1.5h", timedelta(minutes=90)),
        (".5s", timedelta(milliseconds=500)),
        ("300ms", timedelta(milliseconds=300)),
        ("2us", timedelta(microseconds=2)),
        ("2µs", timedelta(microseconds=2)),
        ("-2m", timedelta(minutes=-2)),
        ("+2m", timedelta(minutes=2)),
    ],
)
def test_durations_are_gos(text: str, expected: timedelta) -> None:
    """What Go's time.ParseDuration reads is read alike."""
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "30", "1d", "s", "1h 30m", "30 s", "--1s", "\uff11s"])
def test_other_durations_are_refused(text: str) -> None:
    """What Go refuses is refused, with what is expected."""
    with pytest.raises(typer.BadParameter, match="is no duration; expected a number with a unit, such as 30s, 1h30m"):
        parse_duration(text)


def test_a_number_without_unit_gets_a_hint() -> None:
    """Who forgets the unit is shown one."""
    with pytest.raises(typer.BadParameter, match=r"did you mean 30s\?$"):
        parse_duration("30")


def test_a_duration_beyond_all_is_refused() -> None:
    """More than a timedelta holds is an error, no crash."""
    with pytest.raises(typer.BadParameter, match="too long"):
        parse_duration("9999999999999h")


def test_moments() -> None:
    """RFC 3339, with any offset."""
    assert parse_moment("2030-01-31T08:00:00Z") == datetime(2030, 1, 31, 8, tzinfo=UTC)
    assert parse_moment("2030-01-31T08:00:00.5+02:00") == datetime(
        2030, 1, 31, 8, 0, 0, 500_000, tzinfo=timezone(timedelta(hours=2))
    )


@pytest.mark.parametrize(
    ("text", "reason"), [("tomorrow", "is no moment"), ("2030-01-31T08:00:00", "has no offset from UTC; expected 2030")]
)
def test_other_moments_are_refused(text: str, reason: str) -> None:
    """No moment, or one that says nothing about its offset."""
    with pytest.raises(typer.BadParameter, match=reason):
        parse_moment(text)


def test_headers() -> None:
    """The first equals sign ends the key."""
    assert parse_headers(["a=b", "c==d=", "e="]) == {"a": "b", "c": "=d=", "e": ""}


@pytest.mark.parametrize("text", ["a", "=b", ""])
def test_other_headers_are_refused(text: str) -> None:
    """A header has a key and an equals sign."""
    with pytest.raises(typer.BadParameter, match="is no header; expected key=value"):
        parse_headers([text])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("critical=6,default=3", {"critical": 6, "default": 3}),
        ("critical,default", {"critical": 1, "default": 1}),
        (" critical = 6 , default", {"critical": 6, "default": 1}),
        ("a=b=2", {"a=b": 2}),
    ],
)
def test_queues(text: str, expected: dict[str, int]) -> None:
    """Names, with weights or without."""
    assert parse_queues(text) == expected
    assert list(parse_queues(text)) == list(expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a queue without a name"),
        ("a,,b", "a queue without a name"),
        ("=3", "a queue without a name"),
        ("a=0", "the weight of queue 'a' is '0'; expected a whole number of at least 1"),
        ("a=x", "the weight of queue 'a' is 'x'"),
        ("a=", "the weight of queue 'a' is ''"),
        ("a,a=2", "has the queue 'a' twice"),
    ],
)
def test_other_queues_are_refused(text: str, reason: str) -> None:
    """Each mistake is named."""
    with pytest.raises(typer.BadParameter, match=reason):
        parse_queues(text)
