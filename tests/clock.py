"""Clocks that tests move."""

from __future__ import annotations

import time

__all__ = ["FrozenClock", "MovedClock"]


class MovedClock:
    """The system's clock, so many seconds behind; bringing it nearer is time that passes.

    What is done by a clock that is behind was done long ago as soon as the clock is right again. Redis itself keeps the
    true time, so that what is written in the end stands there as if it had just been written.
    """

    def __init__(self, behind: float = 0.0) -> None:
        self.behind = behind
        self._first = behind

    def time_ns(self) -> int:
        """Unix nanoseconds."""
        return time.time_ns() - int(self.behind * 1e9)

    def monotonic(self) -> float:
        """Seconds."""
        return time.monotonic() + self._first - self.behind


class FrozenClock:
    """Stands still until it is moved; begins at a whole second of the present, so that nothing is long expired."""

    def __init__(self) -> None:
        self.now_ns = int(time.time()) * 1_000_000_000
        self._monotonic = 1_000.0

    @property
    def unix(self) -> int:
        """The whole seconds."""
        return self.now_ns // 1_000_000_000

    def advance(self, seconds: float) -> None:
        """Let time pass, by both clocks."""
        self.now_ns += int(seconds * 1e9)
        self._monotonic += seconds

    def time_ns(self) -> int:
        """Unix nanoseconds."""
        return self.now_ns

    def monotonic(self) -> float:
        """Seconds."""
        return self._monotonic
