"""A lane: one connection to one node, shared by all calls; replies are matched to calls by their order.

A writer task and a reader task. Calls wait in `unsent`; the writer moves them to `written` and sends what one turn of
the event loop has brought in one write; the reader gives each reply to the head of `written`. So a caller that is
cancelled only drops its future: the reader eats the reply all the same, and the connection stays good.

Invariants:
    Only the writer sends. On uvloop a cancelled sender closes the connection, and callers are cancelled at any time.
    A call is in `written` before its first byte is sent. What is not there has not been sent: `NotSent` is a promise.
    Calls and bytes in `written` are bounded; further calls wait in `unsent`. CPython 3.12's `writelines` never pushes
    back, so nothing else would. Room is made when a reply is read, not when a caller leaves.
    A lane ends once, and then every call in it is settled.

The connection is redis-py's, by names without underscore. It offers no way to its socket or streams, so a lane pays for
`read_response` (1.5 µs a reply) and for two task switches that an `asyncio.Protocol` around `hiredis.Reader` would
spare; that one would have to dial, authenticate and do TLS by itself, which is what redis-py is here for.

Facts of redis-py 8.1: `read_response(timeout=<seconds>)` returns None at the timeout and leaves the reply to the next
reader, so only ever `math.inf`. NOAUTH, LOADING and "max clients" replies close the connection unless
`disconnect_on_error=False`. They are ConnectionErrors like a lost connection, but have a `status_code`. uvloop raises
RuntimeError on a dead transport. `send_packed_command` makes a task for each write while `socket_timeout` is set.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import RedisError, ResponseError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from redis.asyncio.connection import AbstractConnection

    from asynq_aio._broker.connect import ConnectionSettings
    from asynq_aio._config import Address

__all__ = ["Call", "Lane", "NotSent", "ReplyLost", "Watch", "dial"]

MAX_CALLS: Final = 1024
"""Calls in flight on a lane."""

MAX_BYTES: Final = 4 << 20
"""Bytes of calls in flight on a lane; one call alone may be larger."""

TICK_SECONDS: Final = 0.25
"""How often `Watch` looks at the lanes that wait for something."""

STALL_SECONDS: Final = 1.0
"""A lane without any reply for so long, while one is due, is suspected."""

# ASKING and its command are adjacent bytes of one write, or another call could come between them.
_ASKING: Final = b"*1\r\n$6\r\nASKING\r\n"


class NotSent(Exception):  # noqa: N818  (an outcome, given as a reply, never raised)
    """The call has not been sent; args: the cause."""


class ReplyLost(Exception):  # noqa: N818  (an outcome, given as a reply, never raised)
    """The call has been sent, its reply will not come: it may have run; args: the cause."""


class Call:
    """One command on its way.

    `reply` is settled with what Redis answered, an error reply included, or with NotSent or ReplyLost: as a result,
    never as an exception, since nobody may be left to look at it.
    """

    __slots__ = ("data", "deadline", "preface", "reply", "size", "written")

    def __init__(self, data: bytes, deadline: float, reply: asyncio.Future[Any], *, asking: bool) -> None:
        self.data = data
        self.size = len(data)
        self.deadline = deadline
        self.reply = reply
        self.preface = asking
        """A reply, that to ASKING, comes before the one that counts."""
        self.written = False


async def dial(settings: ConnectionSettings, address: Address) -> AbstractConnection:
    """A connection that is ready for commands, within one connect timeout and one reply timeout.

    Raises:
        RedisError, OSError, TimeoutError: what was in the way; an AuthenticationError is a ConnectionError.
    """
    connection = settings.connection(*address)
    child = asyncio.current_task()
    cancelled = child.cancelling() if child is not None else 0
    try:
        async with asyncio.timeout(settings.connect_timeout + settings.reply_timeout):
            await connection.connect()  # type: ignore[no-untyped-call]
        if child is not None and child.cancelling() > cancelled:
            # redis-py awaits its handshake by asyncio.wait_for, which until Python 3.12 swallows a cancellation that
            # comes together with the result; the caller would then wait for ever.
            raise asyncio.CancelledError
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    connection.socket_timeout = None
    return connection


class Watch:
    """The one timer of all lanes; it runs while any of them has something to do.

    It counts its own ticks, not seconds: where the event loop stood still for a minute, the replies of that minute lie
    unread in the sockets, and the lanes are not to blame.
    """

    def __init__(self, reply_timeout: float, on_stall: Callable[[Lane], None]) -> None:
        self.lanes: set[Lane] = set()
        self.on_stall = on_stall
        self.stall_ticks = round(STALL_SECONDS / TICK_SECONDS)
        self.reply_ticks = max(self.stall_ticks + 1, math.ceil(reply_timeout / TICK_SECONDS))
        self.reply_timeout = reply_timeout
        self.timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look again a tick from now."""
        self.timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def stop(self) -> None:
        """Look no more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _tick(self) -> None:
        self.timer = None
        now = asyncio.get_running_loop().time()
        busy = [lane for lane in self.lanes if lane.busy]
        for lane in busy:
            lane.expire(now)
            ticks = lane.ticks_without_reply()
            if ticks == self.stall_ticks:
                self.on_stall(lane)
            if ticks >= lane.patience * self.reply_ticks and lane.connected:
                lane.end(TimeoutError(f"no reply for {lane.patience * self.reply_timeout:g} s"))
        if busy and self.timer is None:
            self.start()


class Lane:
    """One multiplexed connection. It dials by itself, once; when the connection is lost, the lane has ended."""

    def __init__(
        self,
        address: Address,
        connect: Callable[[], Awaitable[AbstractConnection]],
        watch: Watch,
        on_end: Callable[[Lane, Exception | None], None],
        *,
        max_bytes: int = MAX_BYTES,
        patience: int = 1,
    ) -> None:
        self.address = address
        self.patience = patience
        """How many reply timeouts it waits for a reply."""
        self.connected = False
        self.ended = False
        self._connect = connect
        self._watch = watch
        self._on_end = on_end
        self._max_bytes = max_bytes
        self._unsent: deque[Call] = deque()
        self._written: deque[Call] = deque()
        self._bytes = 0
        self._answers = 0
        self._answers_seen = 0
        self._idle_ticks = 0
        self._retiring = False
        self._wake: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._writer: asyncio.Task[None] | None = None
        self.closed = self._loop.create_task(self._live(), name=f"lane to {address[0]}:{address[1]}")
        """Done when the connection is closed and nothing is left."""
        watch.lanes.add(self)

    @property
    def busy(self) -> bool:
        """Whether anything waits for it."""
        return bool(self._written or self._unsent)

    @property
    def in_flight(self) -> tuple[int, int]:
        """Calls and bytes that have been sent and not been answered."""
        return len(self._written), self._bytes

    def send(self, data: bytes, deadline: float, *, asking: bool = False) -> Call:
        """Put a packed command on its way; it leaves at the end of this turn of the loop.

        Not for a lane that has ended. `deadline` is a time of the loop's clock; a tick after it, at the latest, the
        reply is settled.
        """
        call = Call(_ASKING + data if asking else data, deadline, self._loop.create_future(), asking=asking)
        self._unsent.append(call)
        wake = self._wake
        if wake is not None and not wake.done():
            wake.set_result(None)
        if self._watch.timer is None:
            self._watch.start()
        return call

    def retire(self) -> None:
        """Answer what is in it, then close. New calls belong on another lane."""
        self._retiring = True
        if not self.busy:
            self.end(None)

    def end(self, cause: Exception | None) -> None:
        """Settle every call and close. None: nothing is wrong, it is not needed any more."""
        if self.ended:
            return
        self.ended = True
        self._watch.lanes.discard(self)
        why = cause or ConnectionError("the connection was closed")
        for calls, outcome in ((self._written, ReplyLost), (self._unsent, NotSent)):
            while calls:
                reply = calls.popleft().reply
                if not reply.done():
                    reply.set_result(outcome(why))
        self._bytes = 0
        current = asyncio.current_task()
        for child in (self._writer, self.closed):
            if child is not None and child is not current:
                child.cancel()
        self._on_end(self, cause)

    def expire(self, now: float) -> None:
        """Settle the calls that are past their deadline. The reply to a written one is still eaten by the reader."""
        # Calls with a deadline of their own have a timer of their own (store.py), so those here are nearly in order.
        for calls, outcome in ((self._written, ReplyLost), (self._unsent, NotSent)):
            for call in calls:
                if call.deadline > now:
                    break
                if not call.reply.done():
                    call.reply.set_result(outcome(TimeoutError("no reply until the deadline")))

    def ticks_without_reply(self) -> int:
        """For how many looks in a row, this one included, nothing has come although something is due."""
        if self._answers != self._answers_seen:
            self._answers_seen = self._answers
            self._idle_ticks = 0
        self._idle_ticks += 1
        return self._idle_ticks

    async def _live(self) -> None:
        connection: AbstractConnection | None = None
        cause: Exception | None = None
        try:
            connection = await self._connect()
            self.connected = True
            self._answers += 1
            self._writer = self._loop.create_task(self._write(connection))
            await self._read(connection)
        except Exception as exc:  # noqa: BLE001  (whatever ends a lane, its callers hear of it)
            cause = exc.with_traceback(None)
        finally:
            self.end(cause)
            if self._writer is not None:
                await asyncio.wait([self._writer])
            if connection is not None:
                await _close(connection)

    async def _write(self, connection: AbstractConnection) -> None:
        send = connection.send_packed_command
        try:
            while True:
                batch = self._next_batch()
                if batch:
                    await send(batch[0] if len(batch) == 1 else b"".join(batch), check_health=False)
                    continue
                self._wake = self._loop.create_future()
                await self._wake
                self._wake = None
        except (RedisError, OSError, RuntimeError) as exc:
            self.end(exc.with_traceback(None))

    def _next_batch(self) -> list[bytes]:
        """The calls that there is room for, now written."""
        batch: list[bytes] = []
        unsent, written = self._unsent, self._written
        while unsent:
            call = unsent[0]
            if call.reply.done():  # cancelled, or past its deadline
                unsent.popleft()
                continue
            if written and (len(written) >= MAX_CALLS or self._bytes + call.size > self._max_bytes):
                break
            unsent.popleft()
            written.append(call)
            call.written = True
            self._bytes += call.size
            batch.append(call.data)
            call.data = b""  # a large payload need not live until its reply
        return batch

    async def _read(self, connection: AbstractConnection) -> None:
        read, written, unsent = connection.read_response, self._written, self._unsent
        reply: Any
        while True:
            try:
                reply = await read(timeout=math.inf, disconnect_on_error=False)
            except ResponseError as exc:
                reply = exc.with_traceback(None)
            except RedisError as exc:
                if exc.status_code is None:
                    raise
                reply = exc.with_traceback(None)
            if not written:
                msg = f"a reply that nobody asked for: {reply!r:.200}"
                raise ConnectionError(msg)
            self._answers += 1
            call = written[0]
            if call.preface:
                call.preface = False
                continue
            written.popleft()
            self._bytes -= call.size
            if not call.reply.done():
                call.reply.set_result(reply)
            if unsent:
                wake = self._wake
                if wake is not None and not wake.done():
                    wake.set_result(None)
            elif self._retiring and not written:
                return


async def _close(connection: AbstractConnection) -> None:
    """Close, and wait for it where the peer is polite: TLS says goodbye in a few turns of the loop."""
    try:
        async with asyncio.timeout(1.0):
            await connection.disconnect()
    except (RedisError, OSError, RuntimeError):
        await connection.disconnect(nowait=True)
