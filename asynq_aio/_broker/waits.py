"""What waits for Redis to speak first: blocking peeks and subscriptions, each on a connection of its own.

Redis answers the calls of a connection one after another, so a call that blocks there would hold up all the others of a
lane.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import AskError, ClusterDownError, MovedError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from asynq_aio._broker.lanes import dial
from asynq_aio._broker.topology import auth_error, cause_text, is_refusal, node_name
from asynq_aio.errors import AsynqError, BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from redis.asyncio.connection import AbstractConnection

    from asynq_aio._broker.connect import ConnectionSettings
    from asynq_aio._broker.topology import Topology
    from asynq_aio._config import Address

__all__ = ["GAP", "Subscription", "Waiter"]

_log = logging.getLogger("asynq_aio.broker")

LONGEST_WAIT_SECONDS: Final = 10.0
"""The bound on one BLMOVE: a connection that dies without a word is found out that much later."""

SLICE_SECONDS: Final = 0.5
"""The bound while the slot is moving: pushes go to the other side, and nothing there wakes a wait here."""

IDLE_SECONDS: Final = 15.0
"""A subscription that has heard nothing for so long asks whether anybody is there."""

GAP: Final = ("", b"")
"""Given by a subscription after a reconnect: messages may have been missed."""


class _Backoff:
    """50 ms, doubling, with jitter."""

    __slots__ = ("_longest", "_next")

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._next = 0.05

    def reset(self) -> None:
        self._next = 0.05

    def seconds(self) -> float:
        pause = random.uniform(0.5, 1.0) * self._next
        self._next = min(self._longest, 2 * self._next)
        return pause


class Waiter:
    """Waits until a list has an element: `BLMOVE key key RIGHT RIGHT`, which leaves the list as it was.

    A push by any program wakes it, one inside a script too. One wait at a time.
    """

    def __init__(
        self, settings: ConnectionSettings, topology: Topology, key: str, on_close: Callable[[Waiter], None]
    ) -> None:
        self.key = key
        self._settings = settings
        self._topology = topology
        self._on_close = on_close
        self._connection: AbstractConnection | None = None
        self._address: Address | None = None
        self._backoff = _Backoff(SLICE_SECONDS)
        self._moving = False
        self._refused = False
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def wait(self, timeout_seconds: float) -> bool:
        """Whether the list has an element, waiting for one at most so long, and 10 s at most.

        False says that nothing came, or that nobody can tell: wait again, an element that is there is never missed. An
        outage is no error here; it makes a wait short, 50 to 500 ms. The peek is a write; where Redis refuses it (out
        of memory, not permitted), this looks each half second instead.

        Raises:
            BrokerUnavailableError: the waiter is closed.
        """
        if self._closed:
            raise BrokerUnavailableError("this waiter is closed")
        seconds = min(timeout_seconds, SLICE_SECONDS if self._moving else LONGEST_WAIT_SECONDS)
        self._refused = False
        try:
            reply = await self._peek(seconds)
        except (RedisError, OSError, RuntimeError, AsynqError) as exc:
            pause = await self._after(exc)
        except BaseException:
            await self._drop()  # the reply may still come; the next wait must not take it for its own
            raise
        else:
            self._moving = False
            self._backoff.reset()
            return reply is not None
        await asyncio.sleep(min(pause, timeout_seconds))
        return self._refused and await self._look()

    async def aclose(self) -> None:
        """Close the connection. A wait in another task ends with False."""
        self._closed = True
        self._on_close(self)
        await self._drop()

    async def _peek(self, seconds: float) -> Any:
        address = self._topology.owner(self.key)
        if address is None:
            async with asyncio.timeout(seconds):
                await self._topology.refreshed()
            address = self._topology.owner(self.key)
        if address is None:
            raise self._topology.trouble
        if address != self._address:
            await self._drop()
        if self._connection is None:
            self._connection, self._address = await dial(self._settings, address), address
            if self._closed:  # meanwhile
                await self._drop()
        # Zero would wait for ever.
        return await self._ask(seconds, "BLMOVE", self.key, self.key, "RIGHT", "RIGHT", f"{max(seconds, 0.01):.3f}")

    async def _ask(self, seconds: float, *command: str) -> Any:
        connection = self._connection
        if connection is None:
            raise RedisConnectionError("this waiter is closed")
        async with asyncio.timeout(seconds + self._settings.reply_timeout):
            await connection.send_packed_command(connection.pack_command(*command), check_health=False)
            return await connection.read_response(timeout=math.inf, disconnect_on_error=False)

    async def _look(self) -> bool:
        """Whether the list has an element now."""
        try:
            return bool(await self._ask(0.0, "LLEN", self.key))
        except (RedisError, OSError, RuntimeError) as exc:
            await self._after(exc)
            return False
        except BaseException:
            await self._drop()
            raise

    async def _after(self, exc: Exception) -> float:
        """Learn from an error; how long to wait now."""
        pause = self._backoff.seconds()
        address = self._address
        match exc:
            case MovedError() if address is not None and self._topology.is_cluster:
                self._topology.moved(exc, address)
            case AskError():
                # Nothing can be claimed from a queue whose slot is moving, so there is nothing to hurry for.
                self._moving = True
                return SLICE_SECONDS
            case ResponseError() if not isinstance(exc, (ReadOnlyError, ClusterDownError)):
                self._refused = True
            case _:
                # No reply, or one (READONLY, NOAUTH) after which another connection does better.
                await self._drop()
                if address is not None:
                    self._topology.suspect(address)
                self._topology.refresh()
        return pause

    async def _drop(self) -> None:
        connection, self._connection, self._address = self._connection, None, None
        if connection is not None:
            await connection.disconnect(nowait=True)


class Subscription:
    """Messages of some channels, for as long as they are asked for: `async for channel, data in subscription`.

    It reconnects by itself, to another node where there is one, and then gives `GAP`: who must not miss a message looks
    for what it may have said.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        topology: Topology,
        channels: Sequence[str],
        on_close: Callable[[Subscription], None],
    ) -> None:
        self.channels = tuple(channels)
        self._settings = settings
        self._topology = topology
        self._on_close = on_close
        self._connection: AbstractConnection | None = None
        self._address: Address | None = None
        self._last: Address | None = None
        self._pinged = False
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, bytes]:
        """The next (channel, data), or GAP. A caller that is cancelled here loses nothing."""
        while not self._closed:
            if self._connection is None:
                await self._reconnect()
                return GAP
            try:
                reply = await self._read(self._connection)
            except (RedisError, OSError, RuntimeError) as exc:
                if not self._closed:
                    _log.info("subscription lost at %s: %s", node_name(self._address or ("?", 0)), exc)
                await self._drop()
                continue
            if reply is not None:
                return reply
        raise StopAsyncIteration

    async def open(self, deadline_seconds: float) -> None:
        """Connect for the first time, with patience.

        Raises:
            BrokerUnavailableError: out of reach until the deadline; names the last cause.
            BrokerAuthError, ConfigError: at once.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_seconds
        backoff = _Backoff(0.5)
        while True:
            if self._closed:
                raise BrokerUnavailableError("this subscription is closed")
            try:
                await self.connect()
            except (RedisError, OSError, RuntimeError) as exc:
                if is_refusal(exc):
                    raise auth_error(exc, self._last or ("?", 0)) from exc
                pause = backoff.seconds()
                if loop.time() + pause >= end:
                    text = f"no subscription within {deadline_seconds:g} s: {cause_text(exc, self._last)}"
                    raise BrokerUnavailableError(text) from exc
                self._shun()
                await asyncio.sleep(pause)
            else:
                return

    async def connect(self) -> None:
        """Subscribe, by one attempt.

        Raises:
            RedisError, OSError, RuntimeError: what was in the way.
            AsynqError: what will stay in the way.
        """
        address = self._topology.any_master(avoid=self._last)
        if address is None:
            await self._topology.refreshed()
            address = self._topology.any_master()
        if address is None:
            raise self._topology.trouble
        self._last = address
        connection = await dial(self._settings, address)
        try:
            async with asyncio.timeout(self._settings.reply_timeout):
                await connection.send_packed_command(
                    connection.pack_command("SUBSCRIBE", *self.channels), check_health=False
                )
                for _ in self.channels:
                    await connection.read_response(timeout=math.inf, disconnect_on_error=False)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection, self._address, self._pinged = connection, address, False
        if self._closed:  # meanwhile
            await self._drop()

    async def aclose(self) -> None:
        """Close the connection; the iteration ends."""
        self._closed = True
        self._on_close(self)
        await self._drop()

    async def _read(self, connection: AbstractConnection) -> tuple[str, bytes] | None:
        """One message, or None where something else has come, or nothing."""
        try:
            async with asyncio.timeout(self._settings.reply_timeout if self._pinged else IDLE_SECONDS):
                reply = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
        except TimeoutError:
            if self._pinged:
                raise
            self._pinged = True
            async with asyncio.timeout(self._settings.reply_timeout):
                await connection.send_packed_command(connection.pack_command("PING"), check_health=False)
            return None
        self._pinged = False
        kind, channel, data = reply if len(reply) == 3 else (*reply, b"", b"")[:3]  # [b"pong", b""] has two
        return (channel.decode(), data) if kind == b"message" else None

    async def _reconnect(self) -> None:
        backoff = _Backoff(5.0)
        while not self._closed:
            try:
                await self.connect()
            except (RedisError, OSError, RuntimeError, AsynqError) as exc:
                _log.debug("no subscription yet: %s", exc)
                self._shun()
                await asyncio.sleep(backoff.seconds())
            else:
                return

    def _shun(self) -> None:
        """Ask another node the next time."""
        if self._last is not None:
            self._topology.suspect(self._last)
        self._topology.refresh()

    async def _drop(self) -> None:
        connection, self._connection, self._address = self._connection, None, None
        if connection is not None:
            await connection.disconnect(nowait=True)
