"""What the scenes share: many callers at once, each of whose replies is its own, and who counts what was done."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from typing import TYPE_CHECKING

from asynq_aio._broker.scripts import Script

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asynq_aio._broker.store import Store

__all__ = ["COUNT", "COUNT_MANY", "ONCE", "Crowd", "all_given_back", "lua", "until"]


def lua(name: str, source: str) -> Script:
    """A script of a test."""
    return Script(name, source.encode(), hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest().encode())


COUNT = lua("count", "return {ARGV[1], redis.call('HINCRBY', KEYS[1], ARGV[1], 1)}")
"""One key. Counts each token; a second execution of a call shows as 2."""

COUNT_MANY = lua(
    "count_many",
    """
    if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SET', KEYS[2], 0) end
    redis.call('INCR', KEYS[2])
    redis.call('DEL', KEYS[3])
    return {ARGV[1], redis.call('HINCRBY', KEYS[1], ARGV[1], 1)}
    """,
)
"""Three keys, the last of which is never there."""

ONCE = lua("once", "return {ARGV[1], redis.call('HSETNX', KEYS[1], ARGV[1], 1)}")
"""Recognises its repeat: for scenes in which replies are lost."""


class Crowd:
    """Callers, side by side, each with one call after another until it is told to stop.

    `call(caller, token)` makes one call and returns the token of its reply.
    """

    def __init__(self, size: int, call: Callable[[int, str], Awaitable[str]]) -> None:
        self.done: list[str] = []
        self.errors: list[BaseException] = []
        self.wrong: list[tuple[str, str]] = []
        self._call = call
        self._stop = False
        self._children = [asyncio.create_task(self._work(number)) for number in range(size)]

    async def _work(self, caller: int) -> None:
        turn = 0
        while not self._stop:
            token = f"{caller}-{turn}"
            turn += 1
            try:
                answer = await self._call(caller, token)
            except Exception as exc:  # noqa: BLE001  (they are what is counted)
                self.errors.append(exc)
                await asyncio.sleep(0.01)
            else:
                self.done.append(token)
                if answer != token:
                    self.wrong.append((token, answer))

    def assert_right(self) -> None:
        """Nobody saw an error, and each reply was its caller's own."""
        assert (self.errors, self.wrong) == ([], []), self.summary()

    async def more(self, calls: int) -> None:
        """Wait until so many more calls have succeeded."""
        goal = len(self.done) + calls
        await until(lambda: len(self.done) >= goal)

    async def stop(self) -> None:
        """Let everybody end the call that he is in."""
        self._stop = True
        await asyncio.gather(*self._children)

    def summary(self) -> str:
        """For people."""
        kinds = Counter(f"{type(exc).__name__}: {exc}"[:200] for exc in self.errors)
        return f"{len(self.done)} done, {len(self.wrong)} wrong replies, errors: {dict(kinds)}"


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def all_given_back(store: Store) -> None:
    """Every lane becomes empty: no call waits, and no reply is due. The store's own look at the clock may be in one."""
    await until(lambda: not any(lane.busy for lane in store.lanes))
    assert {lane.in_flight for lane in store.lanes} <= {(0, 0)}
