"""How long to wait before trying again: a failed task, and a command that Redis could not take."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from asynq_aio.errors import ConfigError

if TYPE_CHECKING:
    from asynq_aio._task import Task

__all__ = ["Backoff", "default_retry_delay", "jittered"]

# A hundred years. Go's formula passes that at the 237th retry, overflows a timedelta at about the 3000th.
_LONGEST = timedelta(days=36_500)


def default_retry_delay(retried: int, exc: BaseException, task: Task) -> timedelta:  # noqa: ARG001  (a retry_delay's signature)
    """Go's delay: `retried**4 + 15` seconds and up to 29 steps of `retried + 1` seconds, drawn at random.

    15 to 44 s before the first retry, 16 to 74 s before the second, four days before the 25th; at most a hundred
    years. `retried` counts the failures before this one.

    Source:
        hibiken/asynq 0.26, server.go: DefaultRetryDelayFunc
    """
    seconds = retried**4 + 15 + random.randrange(30) * (retried + 1)
    return _LONGEST if seconds > _LONGEST.total_seconds() else timedelta(seconds=seconds)


def jittered(seconds: float, share: float = 0.5) -> float:
    """A random part of these seconds: between `seconds * (1 - share)` and `seconds`."""
    return seconds * (1 - share * random.random())


@dataclass(frozen=True, slots=True)
class Backoff:
    """A retry delay that grows by a factor from one retry to the next: `AsyncServer(..., retry_delay=Backoff(...))`.

    Raises:
        ConfigError: A value is out of its bounds.
    """

    first: timedelta = timedelta(seconds=15)
    """Before the first retry; above zero."""
    factor: float = 2.0
    """How many times longer each delay is than the one before; 1 for a constant delay."""
    longest: timedelta = timedelta(hours=6)
    """No delay is longer; not below `first`, at most a hundred years."""
    jitter: float = 0.5
    """Which share of the delay is left to chance, 0 to 1: it lies between `(1 - jitter)` of its length and all of it,
    so that tasks that failed together do not come back together."""

    def __post_init__(self) -> None:
        """Check types and bounds."""
        for name, value in (("first", self.first), ("longest", self.longest)):
            if not isinstance(value, timedelta):
                _refuse(name, value, "must be a timedelta, such as timedelta(seconds=15)")
        for name, number in (("factor", self.factor), ("jitter", self.jitter)):
            if not isinstance(number, int | float):
                _refuse(name, number, "must be a number")
        if self.first <= timedelta(0):
            _refuse("first", self.first, "must be longer than zero")
        if not 1 <= self.factor < math.inf:
            _refuse("factor", self.factor, "must be 1 or more")
        if not self.first <= self.longest <= _LONGEST:
            _refuse("longest", self.longest, f"must be between first ({self.first}) and a hundred years")
        if not 0 <= self.jitter <= 1:
            _refuse("jitter", self.jitter, "must be between 0 and 1")

    def __call__(self, retried: int, exc: BaseException, task: Task) -> timedelta:  # noqa: ARG002  (a retry_delay's signature)
        """The delay after this failure; `retried` counts the failures before it."""
        first, longest = self.first.total_seconds(), self.longest.total_seconds()
        # Compared as logarithms: `factor**retried` overflows a float where retried is large.
        grown = retried * math.log(self.factor) >= math.log(longest / first)
        seconds = longest if grown else min(longest, first * self.factor**retried)
        return timedelta(seconds=jittered(seconds, self.jitter))


def _refuse(name: str, value: object, bound: str) -> None:
    message = f"Backoff: {name} {bound}, not {value!r}"
    raise ConfigError(message)
