"""What texts on the command line stand for: Go durations, moments, headers, queues with weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import typer

__all__ = ["parse_duration", "parse_headers", "parse_moment", "parse_queues"]

_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_PART: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_WHOLE: Final = re.compile(rf"([+-]?)((?:{_PART.pattern})+)", re.ASCII)


def parse_duration(text: str) -> timedelta:
    """What Go's time.ParseDuration reads: `300ms`, `1.5h`, `-2m`, `1h30m10s`, `0`.

    Raises:
        BadParameter: it is none.
    """
    if text in {"0", "+0", "-0"}:
        return timedelta(0)
    if (whole := _WHOLE.fullmatch(text)) is None:
        hint = f"; did you mean {text}s?" if re.fullmatch(r"\d+(\.\d+)?", text) else ""
        raise typer.BadParameter(f"{text!r} is no duration; expected a number with a unit, such as 30s, 1h30m{hint}")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(whole[2]))
    try:
        return timedelta(seconds=-seconds if whole[1] == "-" else seconds)
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is too long for a duration") from None


def parse_moment(text: str) -> datetime:
    """An RFC 3339 moment, with its offset from UTC.

    Raises:
        BadParameter: it is none, or says no offset.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no moment; expected RFC 3339, such as 2030-01-31T08:00:00Z") from None
    if moment.tzinfo is None:
        raise typer.BadParameter(f"{text!r} has no offset from UTC; expected {text}Z, or one such as {text}+02:00")
    return moment


def parse_headers(texts: Sequence[str]) -> dict[str, str]:
    """`k=v` for each header; a value may have further equals signs.

    Raises:
        BadParameter: one has no equals sign, or no key.
    """
    headers = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{text!r} is no header; expected key=value")
        headers[key] = value
    return headers


def parse_queues(text: str) -> dict[str, int]:
    """`critical=6,default=3`, or `critical,default`; a queue without a weight has the weight 1.

    Raises:
        BadParameter: a name is blank or stands there twice, or a weight is no whole number of at least 1.
    """
    queues: dict[str, int] = {}
    for part in text.split(","):
        name, equals, weight = (
            (piece.strip() for piece in part.rpartition("=")) if "=" in part else (part.strip(), "", "")
        )
        if not name:
            raise typer.BadParameter(
                f"{text!r} has a queue without a name; expected critical=6,default=3 or critical,default"
            )
        if name in queues:
            raise typer.BadParameter(f"{text!r} has the queue {name!r} twice; give it once")
        if equals and not (weight.isascii() and weight.isdecimal() and int(weight) >= 1):
            raise typer.BadParameter(
                f"the weight of queue {name!r} is {weight!r}; expected a whole number of at least 1"
            )
        queues[name] = int(weight) if equals else 1
    return queues
