"""The one door to Redis: every script and command of the package goes through `Store.run` and `Store.call`.

One retry policy, this one: redis-py's are off, and its cluster client is never asked to run anything. What becomes of a
call that Redis has not answered with a value:

    outcome                                what happens                                     until
    not sent                               repeated after a refresh of the topology         the deadline
    sent, reply lost                       the same if repeatable; else OutcomeUnknownError
    MOVED                                  repeated there at once
    ASK, one key                           repeated there at once, with ASKING
    ASK, several keys; TRYAGAIN            repeated after 4 to 25 ms: the slot is moving
    CLUSTERDOWN LOADING READONLY           repeated after a refresh and up to 0.5 s
    MASTERDOWN BUSY, "max clients"
    NOREPLICAS MISCONF: takes no writes
    NOSCRIPT                               EVAL on that node
    NOAUTH WRONGPASS NOPERM                BrokerAuthError                                  at once
    OOM                                    BrokerFullError                                  at once
    any other error                        BrokerError                                      at once

A script with several keys is never sent with ASKING: on the node that a slot moves to, a key that has not arrived yet
looks like one that does not exist (measured on Redis 7.0 and Valkey 9.1). At the deadline the error is
BrokerUnavailableError, which names the last cause and tells whether anything was sent.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import hiredis
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from asynq_aio._broker.connect import ConnectionSettings, settings_of
from asynq_aio._broker.lanes import MAX_BYTES, STALL_SECONDS, Call, Lane, NotSent, ReplyLost, Watch, dial
from asynq_aio._broker.topology import Topology, auth_error, cause_text, is_refusal, node_name
from asynq_aio._broker.waits import Subscription, Waiter
from asynq_aio._clock import SystemClock
from asynq_aio.errors import (
    AsynqError,
    BrokerError,
    BrokerFullError,
    BrokerUnavailableError,
    ConfigError,
    OutcomeUnknownError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from asynq_aio._broker.connect import RedisClient
    from asynq_aio._broker.scripts import Script
    from asynq_aio._clock import Clock
    from asynq_aio._config import Address, RedisConnOpt

__all__ = ["Fault", "LaneKind", "ServerFacts", "Stats", "Store"]

_log = logging.getLogger("asynq_aio.broker")

LaneKind: TypeAlias = Literal["main", "lease", "large"]
"""Leases have a lane of their own; large calls too, so that small ones do not queue up behind them."""

Argument: TypeAlias = str | bytes | int | float

LARGE_BYTES: Final = 256 << 10
"""A call on the main lane that is larger goes by the large one."""

_LARGE_IN_FLIGHT_BYTES: Final = 16 * MAX_BYTES
_LARGE_PATIENCE: Final = 6  # reply timeouts: 64 MiB take 5 s at 100 Mbit/s

# For a script with six arguments 0.9 µs; a plain Python packer takes three times that, redis-py's four times. Its stub
# knows tuples of one element only.
pack_command: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]

_CLOCK_SECONDS: Final = 60.0
_CLOCK_WARNING_NS: Final = 5_000_000_000

# A script that does not end; too few replicas, or no room on the disk: no writes until that is mended, none half done.
_PASSING: Final = ("BUSY ", "NOREPLICAS ", "MISCONF ")

_OLDEST: Final = {"redis": (7, 0), "valkey": (7, 2)}


class Fault(Enum):
    """What a test's hook may do to a call."""

    NOT_SENT = "it is not sent"
    REPLY_LOST = "it is sent and its reply is thrown away"


@dataclass(slots=True)
class Stats:
    """Counters since the store was made."""

    calls: int = 0
    """Calls of `run` and `call`."""
    repeats: int = 0
    """Attempts after the first, whatever the cause."""
    moved: int = 0
    asked: int = 0
    """ASK replies that were followed."""
    lost: int = 0
    """Replies lost."""
    dials: int = 0
    """Lanes opened."""
    refreshes: int = 0
    """Times that a node was asked for the topology."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself."""

    server: str
    """`redis` or `valkey`."""
    version: str
    is_cluster: bool
    role: str
    """`master` or `slave`."""
    maxmemory: int
    """Bytes; 0 is no limit."""
    maxmemory_policy: str


class _Attempts:
    """One call of a caller, through all its attempts."""

    __slots__ = (
        "address",
        "asking",
        "call",
        "cause",
        "data",
        "deadline",
        "failures",
        "key",
        "keys",
        "kind",
        "name",
        "outages",
        "reason",
        "refresh",
        "repeatable",
        "rerun",
        "sent",
        "single",
        "target",
    )

    def __init__(
        self,
        name: str,
        data: bytes,
        key: str | bytes | None,
        keys: Sequence[str | bytes],
        kind: LaneKind,
        rerun: Callable[[], bytes] | None,
        *,
        repeatable: bool,
    ) -> None:
        self.name = name
        self.data = data
        self.key = key
        self.keys = keys
        self.kind = kind
        self.rerun = rerun
        """The bytes that run the script where it is not known."""
        self.repeatable = repeatable
        self.single = len(keys) == 1
        self.deadline = 0.0
        self.target: Address | None = None
        """Where to send the next attempt, whoever owns the slot."""
        self.asking = False
        self.address: Address | None = None
        """Where the last attempt went."""
        self.call: Call | None = None
        self.sent = False
        """An earlier attempt may have run."""
        self.cause: Exception | None = None
        self.reason = ""
        """The last cause in words."""
        self.failures = 0
        self.refresh = False
        self.outages: set[Address] | None = None


class Store:
    """Redis, whatever its shape: no I/O before the first call, then for one event loop until `aclose`.

    Attributes:
        deadline: the bound on one call in seconds, where the call gives none.
        description: of the connection; for logs and errors, says nothing secret.
        stats: counters.
        faults: for tests; called before each attempt with the name of the script or command and its keys.
    """

    def __init__(
        self, settings: ConnectionSettings | RedisConnOpt | str | RedisClient, *, clock: Clock | None = None
    ) -> None:
        self._settings = settings if isinstance(settings, ConnectionSettings) else settings_of(settings)
        self.deadline = self._settings.deadline
        self.description = self._settings.description
        self.is_cluster = self._settings.kind == "cluster"
        self.clock: Clock = clock or SystemClock()
        self.faults: Callable[[str, Sequence[str | bytes]], Fault | None] | None = None
        self._stats = Stats()
        self._topology = Topology(self._settings, self._on_topology)
        self._watch = Watch(self._settings.reply_timeout, self._on_stall)
        self._lanes: dict[LaneKind, dict[Address, Lane]] = {"main": {}, "lease": {}, "large": {}}
        self._closing: set[Lane] = set()
        self._waiting: set[Waiter | Subscription] = set()
        self._outages: dict[Address, float] = {}
        self._dials_failed: dict[Address, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._offset_ns = 0
        self._clock_warned = False
        self._clock_task: asyncio.Task[None] | None = None
        self._clock_read: asyncio.Event | None = None
        self._sentinel_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- time

    def now_ns(self) -> int:
        """Unix time in nanoseconds by Redis' clock, as far as it has been compared with ours: `ready` sees to that.

        A clock that was handed in is believed as it is.
        """
        return self.clock.time_ns() + self._offset_ns

    def now(self) -> float:
        """The same in seconds."""
        return self.now_ns() / 1e9

    # -- calls

    async def run(
        self,
        script: Script,
        keys: Sequence[str | bytes],
        args: Sequence[Argument],
        *,
        repeatable: bool = True,
        deadline: float | None = None,
        lane: LaneKind = "main",
    ) -> Any:
        """What the script returns: bytes, int, None or a list; an error inside a list stays an exception object.

        All keys are in one slot. `repeatable`: the script recognises a repeat, so that it may be sent again after its
        reply was lost. `deadline`: seconds.

        Raises:
            BrokerUnavailableError: out of reach until the deadline; `sent` tells whether anything may have been done.
            OutcomeUnknownError: not repeatable, and the reply was lost.
            BrokerAuthError, BrokerFullError, BrokerError: Redis said no.
        """
        count = len(keys)
        data = pack_command((b"EVALSHA", script.sha, count, *keys, *args))

        def rerun() -> bytes:
            return pack_command((b"EVAL", script.source, count, *keys, *args))

        return await self._perform(
            _Attempts(script.name, data, keys[0], keys, lane, rerun, repeatable=repeatable), deadline
        )

    async def call(
        self,
        *command: Argument,
        key: str | bytes | None,
        repeatable: bool = True,
        deadline: float | None = None,
        lane: LaneKind = "main",
    ) -> Any:
        """The reply to one plain command, for the node of `key`, its only key, or for any node.

        Raises:
            As `run` does.
        """
        keys = () if key is None else (key,)
        name = str(command[0])
        return await self._perform(
            _Attempts(name, pack_command(command), key, keys, lane, None, repeatable=repeatable), deadline
        )

    async def ready(self) -> None:
        """Connect, and compare the clocks, if that has not been done yet. A failure here is left to the next call."""
        self._enter()
        if self._clock_read is not None:
            await self._clock_read.wait()

    async def ping(self) -> None:
        """Return when some node has answered.

        Raises:
            As `run` does.
        """
        await self.call("PING", key=None)

    async def check(self) -> ServerFacts:
        """Facts about the server, or one node of the cluster; that it is of the right kind and not too old.

        Raises:
            ConfigError: a cluster where the settings are those of a single server, or the reverse.
            BrokerError: too old; and as `run` does.
        """
        facts = _facts_of(await self.call("INFO", key=None))
        if facts.is_cluster and not self.is_cluster:
            raise ConfigError(
                f"{self.description} is a node of a Redis Cluster, but the settings are those of a single server: "
                "expected RedisClusterClientOpt, or a URI that begins with redis-cluster://"
            )
        oldest = _OLDEST[facts.server]
        if tuple(int(part) for part in facts.version.split(".")[:2]) < oldest:
            wanted = ".".join(map(str, oldest))
            raise BrokerError(
                f"{self.description} runs {facts.server} {facts.version}, which is too old: "
                f"expected {wanted} or later; upgrade the server"
            )
        return facts

    def waiter(self, key: str) -> Waiter:
        """A blocking peek at a list, on a connection of its own; close it after use."""
        self._enter()
        waiter = Waiter(self._settings, self._topology, key, self._waiting.discard)
        self._waiting.add(waiter)
        return waiter

    async def subscribe(self, *channels: str) -> Subscription:
        """Messages of these channels from now on; close it after use.

        Raises:
            As `run` does.
        """
        self._enter()
        subscription = Subscription(self._settings, self._topology, channels, self._waiting.discard)
        self._waiting.add(subscription)
        try:
            await subscription.open(self.deadline)
        except BaseException:
            await subscription.aclose()
            raise
        return subscription

    async def aclose(self) -> None:
        """Close every connection. Calls that are under way end with BrokerUnavailableError."""
        if self._closed:
            return
        self._closed = True
        if self._loop is None:
            return
        self._enter_loop()
        for child in (self._clock_task, self._sentinel_task):
            if child is not None:
                child.cancel()
                await asyncio.wait([child])
        for waiting in tuple(self._waiting):
            await waiting.aclose()
        closed = BrokerUnavailableError(f"the connection to {self.description} was closed")
        lanes = {lane for kind in self._lanes.values() for lane in kind.values()} | self._closing
        for lane in lanes:
            lane.end(closed)
        self._watch.stop()
        await self._topology.aclose()
        if lanes:
            await asyncio.wait([lane.closed for lane in lanes])

    @property
    def stats(self) -> Stats:
        """The counters."""
        self._stats.refreshes = self._topology.refreshes
        return self._stats

    @property
    def lanes(self) -> list[Lane]:
        """Those that are open."""
        return [lane for kind in self._lanes.values() for lane in kind.values()]

    # -- one call

    async def _perform(self, attempts: _Attempts, deadline: float | None) -> Any:
        loop = self._enter()
        self._stats.calls += 1
        if deadline is None:
            # No timer of its own: its lane settles it in time, and a lane that is stuck ends.
            attempts.deadline = loop.time() + self.deadline
            reply = await self._attempt(attempts)
            if not isinstance(reply, Exception):
                if self._outages:
                    self._heal(attempts)
                return reply
        else:
            attempts.deadline = loop.time() + deadline
            reply = None
        limit = asyncio.timeout_at(attempts.deadline)
        try:
            async with limit:
                if deadline is not None:
                    reply = await self._attempt(attempts)
                while isinstance(reply, Exception):
                    await self._prepare(attempts, reply)
                    self._stats.repeats += 1
                    reply = await self._attempt(attempts)
        except TimeoutError as exc:
            if limit.expired():
                seconds = self.deadline if deadline is None else deadline
                raise self._give_up(attempts, seconds) from attempts.cause or exc
            raise
        if self._outages:
            self._heal(attempts)
        return reply

    async def _attempt(self, attempts: _Attempts) -> Any:
        """Send once; the reply, an error reply, NotSent or ReplyLost."""
        if self._closed:
            return NotSent(RedisConnectionError("closed"))
        address = attempts.target
        if address is None:
            key = attempts.key
            address = self._topology.any_master() if key is None else self._topology.owner(key)
            if address is None:
                return NotSent(self._topology.trouble)
        attempts.address = address
        fault = None if self.faults is None else self.faults(attempts.name, attempts.keys)
        if fault is Fault.NOT_SENT:
            return NotSent(RedisConnectionError("a test wants it so"))
        kind = attempts.kind
        if kind == "main" and len(attempts.data) > LARGE_BYTES:
            kind = "large"
        lane = self._lanes[kind].get(address) or self._open_lane(kind, address)
        call = attempts.call = lane.send(attempts.data, attempts.deadline, asking=attempts.asking)
        reply = await call.reply
        if fault is Fault.REPLY_LOST:
            return ReplyLost(RedisConnectionError("a test wants it so"))
        return reply

    async def _prepare(self, attempts: _Attempts, outcome: Exception) -> None:
        """Learn from a failure, and wait until the next attempt has a chance. Raises what no repeat can mend."""
        if self._closed:
            attempts.sent = attempts.sent or isinstance(outcome, ReplyLost)
            raise self._give_up(attempts, 0.0)
        attempts.call = None
        attempts.refresh = False
        pause = self._judge(attempts, outcome)
        if attempts.refresh:
            # A call that waits for the news of a failover is sooner at its goal than one that tries in vain.
            await self._topology.refreshed()
        if pause:
            await asyncio.sleep(pause)

    def _judge(self, attempts: _Attempts, outcome: Exception) -> float:
        """How long to wait before the next attempt, in seconds."""
        address = attempts.address
        asked, attempts.asking, attempts.target = attempts.asking, False, None
        if isinstance(outcome, (NotSent, ReplyLost)):
            return self._judge_loss(attempts, outcome)
        assert address is not None  # noqa: S101  (somebody has answered)
        attempts.cause, attempts.reason = outcome, f"{node_name(address)} said {_reply_text(outcome)}"
        # The order matters: MovedError is an AskError, MasterDownError a ClusterDownError, and what refuses access
        # and BusyLoadingError are ConnectionErrors.
        match outcome:
            case MovedError():
                self._stats.moved += 1
                self._topology.moved(outcome, address)
                attempts.failures += 1
                return 0.0 if attempts.failures < 3 else _jitter()  # nodes that point at each other
            case AskError():
                if not attempts.single:
                    return _jitter()
                self._stats.asked += 1
                attempts.asking, attempts.target = True, self._topology.resolve(outcome, address)
                return 0.0
            case TryAgainError():
                return _jitter()
            case NoScriptError() if attempts.rerun is not None:
                attempts.data, attempts.rerun = attempts.rerun(), None
                attempts.asking, attempts.target = asked, address
                return 0.0
            case ClusterDownError() | BusyLoadingError() | ReadOnlyError():
                if isinstance(outcome, ReadOnlyError):
                    self._retire(address)  # behind a name, another server may be the master by now
                self._outage(address, attempts.reason)
                return _back_off(attempts, address)
            case _ if is_refusal(outcome):
                self._retire(address)  # a new connection gives the password anew
                raise auth_error(outcome, address)
            case OutOfMemoryError():
                raise BrokerFullError(
                    f"Redis at {node_name(address)} is full: {_reply_text(outcome)}; nothing was written. "
                    "Raise maxmemory, or let workers drain the queues"
                )
        if str(outcome).startswith(_PASSING) or isinstance(outcome, RedisConnectionError):  # the latter: "max clients"
            self._outage(address, attempts.reason)
            return _back_off(attempts, address)
        raise BrokerError(f"{attempts.name}: {_reply_text(outcome)}")

    def _judge_loss(self, attempts: _Attempts, outcome: NotSent | ReplyLost) -> float:
        cause: Exception = outcome.args[0]
        address = attempts.address
        if isinstance(cause, AsynqError):
            raise type(cause)(*cause.args) from cause
        if is_refusal(cause) and address is not None:
            raise auth_error(cause, address)
        attempts.cause, attempts.reason = cause, cause_text(cause, address)
        if isinstance(outcome, ReplyLost):
            self._stats.lost += 1
            attempts.sent = True
            if not attempts.repeatable:
                raise self._unknown(attempts) from cause
        elif address is None and attempts.failures:  # the first time, nobody has been asked yet
            address = self._settings.seeds[0]
            attempts.reason = cause_text(cause, address)
            self._outage(address, attempts.reason)
        return _back_off(attempts, address)

    def _give_up(self, attempts: _Attempts, seconds: float) -> AsynqError:
        if attempts.call is not None and attempts.call.written:
            attempts.sent = True
            if attempts.address is not None and not attempts.reason:
                attempts.reason = f"{node_name(attempts.address)} has not answered"
        if attempts.sent and not attempts.repeatable:
            return self._unknown(attempts)
        where = "" if attempts.sent else "; nothing was sent"
        if self._closed:
            return BrokerUnavailableError(f"the connection to {self.description} was closed{where}", sent=attempts.sent)
        reason = attempts.reason or "no connection yet"
        return BrokerUnavailableError(
            f"{self.description} did not answer {attempts.name} within {seconds:g} s: {reason}{where}",
            sent=attempts.sent,
        )

    def _unknown(self, attempts: _Attempts) -> OutcomeUnknownError:
        return OutcomeUnknownError(
            f"{attempts.name} was sent to {self.description} and its reply was lost: {attempts.reason}; "
            "it may have run, or not"
        )

    # -- lanes

    def _open_lane(self, kind: LaneKind, address: Address) -> Lane:
        large = kind == "large"
        lanes = self._lanes[kind]

        def on_end(lane: Lane, cause: Exception | None) -> None:
            if lanes.get(address) is lane:
                del lanes[address]
            self._closing.add(lane)
            lane.closed.add_done_callback(lambda _: self._closing.discard(lane))
            if cause is None or self._closed:
                return
            self._topology.suspect(address)
            if lane.connected:
                _log.debug("connection to %s lost: %s", node_name(address), cause)
            elif not is_refusal(cause):
                self._dials_failed[address] = self._dials_failed.get(address, 0) + 1
                if self._dials_failed[address] > 1:  # once is a server that is busy, or a connection that was killed
                    self._outage(address, cause_text(cause, address))

        async def connect() -> Any:
            connection = await dial(self._settings, address)
            self._topology.trust(address)
            self._dials_failed.pop(address, None)
            return connection

        self._stats.dials += 1
        lane = lanes[address] = Lane(
            address,
            connect,
            self._watch,
            on_end,
            max_bytes=_LARGE_IN_FLIGHT_BYTES if large else MAX_BYTES,
            patience=_LARGE_PATIENCE if large else 1,
        )
        return lane

    def _retire(self, address: Address) -> None:
        """New calls to this node dial anew; those under way are answered first."""
        for lanes in self._lanes.values():
            lane = lanes.pop(address, None)
            if lane is not None:
                self._closing.add(lane)  # it may be long in ending
                lane.retire()

    def _on_stall(self, lane: Lane) -> None:
        self._topology.suspect(lane.address)
        self._topology.refresh()
        if lane.patience == 1:
            self._outage(lane.address, f"{node_name(lane.address)}: no reply for {STALL_SECONDS:g} s")

    def _on_topology(self) -> None:
        masters = self._topology.masters
        for lane in self.lanes:
            if lane.address not in masters:
                self._retire(lane.address)
        for address in self._outages.keys() - set(masters):
            seconds = self.clock.monotonic() - self._outages.pop(address)
            _log.warning("%s: %s is replaced, after %.1f s", self.description, node_name(address), seconds)

    # -- outages: one line at the start, one at the end

    def _outage(self, address: Address, reason: str) -> None:
        if address not in self._outages:
            self._outages[address] = self.clock.monotonic()
            _log.warning("%s: %s; calls wait for it, up to %g s each", self.description, reason, self.deadline)

    def _heal(self, attempts: _Attempts) -> None:
        answered = {attempts.address} if attempts.address is not None else set()
        if attempts.key is not None and attempts.outages is not None:
            answered |= attempts.outages  # the slot has found another owner
        for address in answered & self._outages.keys():
            seconds = self.clock.monotonic() - self._outages.pop(address)
            _log.warning(
                "%s: calls are answered again, after %.1f s (%s)", self.description, seconds, node_name(address)
            )

    # -- the loop, and the clock

    def _enter(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise BrokerUnavailableError(f"the connection to {self.description} was closed")
        return self._enter_loop()

    def _enter_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None:
                raise ConfigError(
                    f"the connection to {self.description} belongs to the event loop that used it first, and this is "
                    "another one (another thread, or another asyncio.run): make one client for each event loop"
                )
            self._loop = loop
            if isinstance(self.clock, SystemClock):
                self._clock_read = asyncio.Event()
                self._clock_task = loop.create_task(self._compare_clocks(self._clock_read), name="clock offset")
            if self._settings.kind == "sentinel":
                self._sentinel_task = loop.create_task(self._hear_sentinels(), name="sentinel events")
        return loop

    async def _hear_sentinels(self) -> None:
        """Leave a master as soon as the sentinels do.

        After a failover by hand the old master takes writes for some 10 s more (measured), and forgets them then.
        """
        sentinels = replace(self._settings, kind="standalone", dial=self._settings.sentinel_dial)
        async with Subscription(
            sentinels, Topology(sentinels, lambda: None), ["+switch-master"], lambda _: None
        ) as events:
            async for _ in events:
                self._topology.refresh()

    async def _compare_clocks(self, read: asyncio.Event) -> None:
        """Keep the offset to Redis' clock; at the start and each minute."""
        while True:
            try:
                await self.ping()  # the connection is there, or the first answer would take as long as the dial
                before = self.clock.time_ns()
                seconds, micros = await self.call("TIME", key=None)
                after = self.clock.time_ns()
            except (BrokerError, ConfigError) as exc:
                _log.debug("%s: the clocks were not compared: %s", self.description, exc)
            else:
                redis_ns = int(seconds) * 1_000_000_000 + int(micros) * 1000
                self._offset_ns = redis_ns - (before + after) // 2
                if abs(self._offset_ns) > _CLOCK_WARNING_NS and not self._clock_warned:
                    self._clock_warned = True
                    _log.warning(
                        "%s: its clock is %+.1f s off this host's; times are written by its clock. Set up NTP",
                        self.description,
                        self._offset_ns / 1e9,
                    )
            finally:
                read.set()
            await asyncio.sleep(_CLOCK_SECONDS)


def _back_off(attempts: _Attempts, address: Address | None) -> float:
    """Nobody is there, or nobody who can work: ask who is, and wait 10 ms, doubling, up to 0.5 s."""
    attempts.refresh = True
    attempts.failures += 1
    if address is not None:
        if attempts.outages is None:
            attempts.outages = set()
        attempts.outages.add(address)
    # A lost connection is no outage: the first repeat goes at once.
    return (
        0.0 if attempts.failures == 1 else random.uniform(0.5, 1.0) * min(0.5, 0.005 * 2 ** min(attempts.failures, 8))
    )


def _jitter() -> float:
    """While a slot moves: short, since a key that is in the way arrives within milliseconds."""
    return random.uniform(0.004, 0.025)


def _reply_text(reply: Exception) -> str:
    """The error reply as Redis sent it: redis-py takes the code off where it knows it."""
    code = getattr(reply, "status_code", None)
    return f"{code} {reply}" if code else str(reply)


def _facts_of(info: bytes) -> ServerFacts:
    pairs = (line.partition(b":") for line in info.splitlines())
    fields = {name.decode(): value.decode(errors="replace") for name, colon, value in pairs if colon}
    valkey = fields.get("valkey_version")
    return ServerFacts(
        server="valkey" if valkey else "redis",
        version=valkey or fields["redis_version"],
        is_cluster=fields.get("cluster_enabled") == "1",
        role=fields.get("role", "master"),
        maxmemory=int(fields.get("maxmemory", 0)),
        maxmemory_policy=fields.get("maxmemory_policy", "noeviction"),
    )
