"""AsyncServer: what is wired to what, its states, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import anyio

from asynq_aio._broker.presence import Presence
from asynq_aio._broker.store import Store
from asynq_aio._client import Client
from asynq_aio._defaults import default_redis
from asynq_aio._handler import ServeMux, compile_handler
from asynq_aio._server.config import ServerConfig
from asynq_aio._server.duties.forwarder import Forwarder
from asynq_aio._server.duties.healthcheck import HealthChecker
from asynq_aio._server.duties.heartbeater import Heartbeater
from asynq_aio._server.duties.janitor import Janitor
from asynq_aio._server.duties.processor import Processor
from asynq_aio._server.duties.recoverer import Recoverer
from asynq_aio._server.duties.subscriber import Subscriber
from asynq_aio._server.duties.syncer import Syncer
from asynq_aio._server.execution import Executor, ServerStats
from asynq_aio._server.lease import Holdings
from asynq_aio._wire import keys
from asynq_aio._wire.messages import ServerInfo, Timestamp
from asynq_aio.errors import BrokerError, BrokerUnavailableError, ConfigError, ServerClosedError, ServerStateError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
    from datetime import timedelta

    from asynq_aio._broker.connect import RedisClient
    from asynq_aio._broker.store import ServerFacts
    from asynq_aio._config import RedisConnOpt
    from asynq_aio._handler import Handler, TaskHandler
    from asynq_aio._server.config import ErrorHandler, HealthCheck, Lifespan, RetryDelay

__all__ = ["AsyncServer"]

logger = logging.getLogger("asynq_aio.server")

_T = TypeVar("_T")

State = Literal["new", "active", "stopped", "closed"]

# Unwritten outcomes: so many, or ten rounds of all slots; then no more tasks are taken until Redis is back.
_MOST_UNWRITTEN = 10_000
# What an aborted server gives its last outcomes, seconds.
_LAST_WRITES = 1.0
# An application's start waits for Redis at most so long, seconds.
_PATIENCE = 5.0
# The first task is taken when cancellations are heard, or, where nobody may subscribe, after this long, seconds.
_LISTEN = 1.0
# An entry older than this means that Redis, or this process, does not keep up: not healthy, seconds.
_STALE = 15.0


class AsyncServer:
    """Takes tasks from its queues and runs a handler for each, as many at once as `concurrency` says.

    `redis` says where: an option, a URI or a redis-py client, whose settings are copied; without one, what the
    environment (`ASYNQ_URI`) or the config file says, else 127.0.0.1:6379.

    `async with server.running(mux)` inside of an application, `await server.run(mux)` as a program of its own. A server
    runs once; afterwards make a new one.

    Raises:
        ConfigError: a setting is out of bounds, or no option of this name; before any I/O.
    """

    def __init__(  # noqa: PLR0913  (each is a setting of ServerConfig; `config` takes them ready made)
        self,
        redis: RedisConnOpt | str | RedisClient | None = None,
        *,
        concurrency: int | None = None,
        queues: Mapping[str, int] | Sequence[str] | None = None,
        strict_priority: bool | None = None,
        retry_delay: RetryDelay | None = None,
        is_failure: Callable[[BaseException], bool] | None = None,
        on_error: ErrorHandler | None = None,
        lifespan: Lifespan | None = None,
        shutdown_timeout: timedelta | None = None,
        on_health_check: HealthCheck | None = None,
        health_check_interval: timedelta | None = None,
        delayed_task_check_interval: timedelta | None = None,
        task_check_interval: timedelta | None = None,
        janitor_interval: timedelta | None = None,
        janitor_batch_size: int | None = None,
        sync_concurrency: int | None = None,
        max_recoveries: int | None = None,
        config: ServerConfig | None = None,
    ) -> None:
        given = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "redis", "config", "__class__") and value is not None
        }
        if config is not None and given:
            raise ConfigError(f"config= holds every setting; give {', '.join(given)} there, or leave config= out")
        self.config = config if config is not None else ServerConfig(**given)
        self.server_id = str(uuid.uuid4())
        self.host = socket.gethostname() or "unknown-host"
        self.pid = os.getpid()
        self.state: State = "new"
        self.stats = ServerStats()
        self._redis = default_redis(os.environ) if redis is None else redis
        self._store = Store(self._redis)
        self.description = self._store.description
        """What it is connected to, without secrets."""
        self._client: Client | None = None
        self._started_ns = 0
        self._executor: Executor | None = None
        self._processor: Processor | None = None
        self._heartbeater: Heartbeater | None = None
        self._end = asyncio.Event()
        self._abort = asyncio.Event()
        self._ended = asyncio.Event()

    def __repr__(self) -> str:
        return f"<AsyncServer {self.state} {self.description} queues={dict(self.config.queues)}>"

    # -- what people ask

    @property
    def healthy(self) -> bool:
        """Whether it takes tasks: active, its duties alive, its entry in Redis not older than 15 s."""
        return self.unhealthy_reason is None

    @property
    def unhealthy_reason(self) -> str | None:
        """Why it is not healthy; None: it is."""
        if self.state != "active":
            return f"the server is {self.state}"
        seen_at = self._heartbeater.seen_at if self._heartbeater is not None else None
        if seen_at is None:
            return f"{self.description} has not answered yet"
        age = self._store.clock.monotonic() - seen_at
        return f"{self.description} has not answered for {age:.0f} s" if age > _STALE else None

    @property
    def running_tasks(self) -> int:
        """How many handlers run now."""
        return self._executor.running if self._executor is not None else 0

    async def ping(self) -> None:
        """Return when Redis has answered.

        Raises:
            ServerClosedError: it was shut down.
            BrokerUnavailableError: out of reach until the deadline.
        """
        if self.state == "closed":
            raise ServerClosedError
        await self._store.ping()

    async def facts(self) -> ServerFacts:
        """What the Redis that it is connected to says of itself.

        Raises:
            ConfigError: a cluster where the settings are those of a single server, or the reverse.
            BrokerError: too old, out of reach, or it refused.
        """
        return await self._store.check()

    # -- life

    async def run(self, handler: Handler | TaskHandler | Callable[..., Any], *, burst: bool = False) -> None:
        """Work until SIGTERM or SIGINT, then drain; a second signal aborts at once. SIGTSTP takes no more tasks.

        `burst`: end when the queues are empty, without waiting for a signal. Signal handlers are put back afterwards.

        Raises:
            ServerStateError, ServerClosedError: it runs already, or has run.
            ConfigError, BrokerError: what will not get better by waiting: wrong password, no cluster, too old.
            Whatever a duty dies of.
        """
        with self._signals():
            await self._serve(handler, burst=burst)

    @asynccontextmanager
    async def running(self, handler: Handler | TaskHandler | Callable[..., Any]) -> AsyncIterator[AsyncServer]:
        """Work as long as the block runs, then drain; for the lifespan of an application. Installs no signal handlers.

        Where a duty dies, the block is cancelled and its error is raised here.

        Raises:
            As `run` does.
        """
        ready = asyncio.Event()
        error: BaseException | None = None
        host_error: BaseException | None = None

        async def serve(scope: anyio.CancelScope) -> None:
            nonlocal error
            try:
                await self._serve(handler, ready=ready)
            except asyncio.CancelledError:
                raise
            except BaseException as exc:  # noqa: BLE001  (raised in the host, without an exception group around it)
                error = exc
                ready.set()
                scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(serve, group.cancel_scope)
            await ready.wait()
            try:
                if error is None:
                    yield self
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as exc:  # noqa: BLE001  (raised below: the group would put it into a group)
                host_error = exc
            finally:
                if error is None:  # else it has ended, or is another run, which goes on
                    self._end.set()
                    with anyio.CancelScope(shield=True):
                        await self._ended.wait()
        if error is not None:
            raise error from host_error
        if host_error is not None:
            raise host_error

    def stop(self) -> None:
        """Take no more tasks; those that run go on, and the server stays visible. Does nothing unless it is active."""
        if self.state == "active":
            self.state = "stopped"
            logger.info("stopped: no more tasks are taken, %d handlers go on", self.running_tasks)
            if self._processor is not None:
                self._processor.stop()

    async def shutdown(self) -> None:
        """Drain, and return when that is done. Does nothing on a server that is new or closed."""
        if self.state in ("active", "stopped"):
            self._end.set()
            await self._ended.wait()

    def abort(self) -> None:
        """End now: running handlers are cancelled, their tasks go back to the queue."""
        self._end.set()
        self._abort.set()

    # -- the nesting is the shutdown order, innermost first

    async def _serve(
        self,
        handler: Handler | TaskHandler | Callable[..., Any],
        *,
        burst: bool = False,
        ready: asyncio.Event | None = None,
    ) -> None:
        if handler is None:
            raise ConfigError("asynq: server cannot run with nil handler")
        compiled = compile_handler(handler)
        if isinstance(compiled, ServeMux):
            compiled.compose()  # a middleware that cannot work is refused now, not at the first task
        if self.state == "closed":
            raise ServerClosedError
        if self.state != "new":
            raise ServerStateError(
                "asynq: the server is already running"
                if self.state == "active"
                else "asynq: the server is in the stopped state. Waiting for shutdown."
            )
        self.state = "active"
        try:
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(self._close)
                if await self._connect(ready):
                    await self._work(compiled, stack, burst=burst, ready=ready)
        finally:
            self.state = "closed"
            self._ended.set()

    async def _work(
        self, handler: Handler, stack: contextlib.AsyncExitStack, *, burst: bool, ready: asyncio.Event | None
    ) -> None:
        config, store, queues = self.config, self._store, list(self.config.queues)
        holdings = Holdings()
        most = max(_MOST_UNWRITTEN, 10 * config.concurrency)
        syncer = Syncer(store, holdings, self.stats, most=most, written=self._freed)
        executor = self._executor = Executor(
            store,
            handler,
            config,
            holdings,
            self.stats,
            put=syncer.put,
            freed=self._freed,
            client=self._make_client,
            sync_limiter=anyio.CapacityLimiter(config.sync_concurrency),
        )
        name = f"{self.host}:{self.pid}:{self.server_id}"
        processor = self._processor = Processor(store, config, name, executor, syncer, holdings)
        presence = Presence(
            store, keys.server(self.host, self.pid, self.server_id), keys.workers(self.host, self.pid, self.server_id)
        )
        heartbeater = self._heartbeater = Heartbeater(store, presence, self._info, holdings, executor)
        interval = config.delayed_task_check_interval.total_seconds()
        forwarder = Forwarder(store, queues, interval)
        recoverer = Recoverer(store, queues, config, holdings, self.stats)
        subscriber = Subscriber(store, holdings, executor, forwarder)
        janitor = Janitor(
            store, queues, interval=config.janitor_interval.total_seconds(), batch=config.janitor_batch_size
        )
        others: list[_Duty] = [recoverer, subscriber, janitor]
        if config.on_health_check is not None:
            seconds = config.health_check_interval.total_seconds()
            others.append(HealthChecker(store, config.on_health_check, seconds))

        if config.lifespan is not None:
            executor.state = await stack.enter_async_context(config.lifespan())
        try:
            async with self._on_duty(heartbeater):
                try:
                    async with self._on_duty(syncer):
                        try:
                            async with self._on_duty(*others, forwarder):
                                await subscriber.listens(_LISTEN)
                                if ready is not None:
                                    ready.set()
                                await self._process(processor, burst=burst)
                        finally:  # a duty has died, or all is well: what runs is not abandoned
                            await _shielded(self._drain(processor))
                finally:
                    left = await _shielded(self._write_rest(syncer))
                    if left:
                        logger.error(
                            "%d outcomes could not be written; those tasks run again when their leases end", left
                        )
        finally:
            await _shielded(self._clear(presence))
        logger.info("the server has shut down: %s", self.summary())

    async def _process(self, processor: Processor, *, burst: bool) -> None:
        """Until the end is asked for, or, in a burst, reached; then no more tasks are taken."""
        ends: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._end.wait())]
        if burst:
            ends.append(asyncio.ensure_future(processor.until_idle()))
        taking = asyncio.ensure_future(processor.run())
        try:
            await asyncio.wait([*ends, taking], return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                taking.result()  # raises what it died of
        finally:
            for child in (*ends, taking):
                child.cancel()
            await asyncio.gather(*ends, taking, return_exceptions=True)

    async def _drain(self, processor: Processor) -> None:
        if self.state == "active" and self.running_tasks:
            logger.info("shutting down: %d handlers have %s to end", self.running_tasks, self.config.shutdown_timeout)
        self.state = "closed"
        draining = asyncio.ensure_future(
            processor.drain(self.config.shutdown_timeout.total_seconds(), patience=self._store.deadline)
        )
        aborting = asyncio.ensure_future(self._abort.wait())
        await asyncio.wait([draining, aborting], return_when=asyncio.FIRST_COMPLETED)
        aborting.cancel()
        if not draining.done():
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
            await processor.drain(0, patience=_LAST_WRITES)
        else:
            draining.result()

    async def _write_rest(self, syncer: Syncer) -> int:
        """Wait for the outcomes that are not written, for at most the deadline; a second signal ends the wait."""
        draining = asyncio.ensure_future(syncer.drain(self._store.deadline))
        aborting = asyncio.ensure_future(self._abort.wait())
        await asyncio.wait([draining, aborting], return_when=asyncio.FIRST_COMPLETED)
        aborting.cancel()
        if draining.done():
            return draining.result()
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        return await syncer.drain(_LAST_WRITES)

    @asynccontextmanager
    async def _on_duty(self, *duties: _Duty) -> AsyncIterator[None]:
        """The duties run as long as the block; a duty that dies cancels the block, loudly."""
        try:
            async with anyio.create_task_group() as group:
                for duty in duties:
                    group.start_soon(self._watched, duty, name=type(duty).__name__)
                yield
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise _single(errors) from None

    async def _watched(self, duty: _Duty) -> None:
        try:
            await duty.run()
        except asyncio.CancelledError:
            raise
        except BaseException:
            logger.critical("the %s has died; the server shuts down", type(duty).__name__, exc_info=True)
            raise

    async def _connect(self, ready: asyncio.Event | None) -> bool:
        """Wait for Redis, however long it is away; what waiting does not mend is raised. False: ended before it came.

        An application is not held up at its start for longer than a few seconds: it is told by `healthy`.
        """
        self._started_ns = self._store.clock.time_ns()
        ending = asyncio.ensure_future(self._end.wait())
        connecting: asyncio.Future[ServerFacts] = asyncio.ensure_future(self._reach())
        both: list[asyncio.Future[Any]] = [ending, connecting]
        try:
            await asyncio.wait(both, timeout=_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            if ready is not None and not connecting.done():
                ready.set()
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                return False
            facts = connecting.result()
        finally:
            ending.cancel()
            connecting.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        self._started_ns = self._store.now_ns()
        if facts.maxmemory and facts.maxmemory_policy != "noeviction":
            logger.warning(
                "%s evicts keys when memory is full (maxmemory-policy %s), tasks can vanish: set it to noeviction",
                self.description,
                facts.maxmemory_policy,
            )
        return True

    async def _reach(self) -> ServerFacts:
        while True:
            try:
                facts = await self._store.check()
                await self._store.ready()
            except BrokerUnavailableError as exc:
                logger.warning("waiting for Redis: %s", exc)
            else:
                return facts

    async def _clear(self, presence: Presence) -> None:
        """The server's entry goes; where Redis is away, by itself after 10 s."""
        try:
            async with asyncio.timeout(5.0):
                await presence.clear()
        except (BrokerError, TimeoutError) as exc:  # all is done: a refusal, too, is no reason to fail now
            logger.warning("the server's entry could not be cleared, it expires: %s", str(exc) or "no answer in 5 s")

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            if self._client is not None:
                await self._client.aclose()
            await self._store.aclose()

    # -- parts

    def _freed(self) -> None:
        if self._processor is not None:
            self._processor.freed()

    def _make_client(self) -> Client:
        if self._client is None:
            self._client = Client(self._redis)
        return self._client

    def _info(self) -> ServerInfo:
        return ServerInfo(
            host=self.host,
            pid=self.pid,
            server_id=self.server_id,
            concurrency=self.config.concurrency,
            queues=self.config.queues,
            strict_priority=self.config.strict_priority,
            status=self.state,
            start_time=Timestamp.from_ns(self._started_ns),
            active_worker_count=self.running_tasks,
        )

    def summary(self) -> str:
        """What it has done, for people."""
        s = self.stats
        parts = {"succeeded": s.succeeded, "retried": s.retried, "archived": s.archived, "revoked": s.revoked}
        parts |= {"requeued": s.requeued, "recovered": s.recovered, "lost": s.lost}
        shown = [f"{count} {word}" for word, count in parts.items() if count or word == "succeeded"]
        return f"{s.processed} tasks processed: {', '.join(shown)}"

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server, the second one aborts it; SIGTSTP stops it. Put back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        loop = asyncio.get_running_loop()

        def end(signum: int, _frame: object) -> None:
            loop.call_soon_threadsafe(self._on_end_signal, signal.Signals(signum).name)

        def quiet(_signum: int, _frame: object) -> None:
            loop.call_soon_threadsafe(self.stop)

        wanted: dict[int, Callable[[int, Any], None]] = {signal.SIGTERM: end, signal.SIGINT: end}
        if sys.platform == "win32":
            wanted[signal.SIGBREAK] = end
        else:
            wanted[signal.SIGTSTP] = quiet
        before = {signum: signal.signal(signum, handler) for signum, handler in wanted.items()}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_end_signal(self, name: str) -> None:
        if self._end.is_set():
            logger.warning("%s again: aborting", name)
            self.abort()
        else:
            logger.info("%s: shutting down; once more to abort", name)
            self._end.set()


class _Duty(Protocol):
    """Runs until it is cancelled."""

    async def run(self) -> None:
        """Until cancelled."""
        ...


async def _shielded(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Await it to its end, even in a scope that is cancelled; the cleanup of the server is bounded by itself."""
    with anyio.CancelScope(shield=True):
        return await coroutine
    raise AssertionError  # no shield swallows an exception; mypy cannot know


def _single(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error itself where there is only one: who embeds a server wants to catch it by its name."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
