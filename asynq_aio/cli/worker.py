"""`asynq-aio worker app:mux`: works tasks, in one process or in several."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from asynq_aio import (
    AsyncServer,
    AsynqError,
    BrokerUnavailableError,
    RedisClientOpt,
    RedisConnOpt,
    ServeMux,
    ServerConfig,
    __version__,
)
from asynq_aio.cli.connection import EMBEDDED, Connection
from asynq_aio.cli.health import STALE_SECONDS, Answer, serving
from asynq_aio.cli.logs import LogFormat, LogLevel, start_logging
from asynq_aio.cli.output import OK, USAGE, CommandError
from asynq_aio.cli.supervisor import Link, Status, Supervisor, require_supervision
from asynq_aio.cli.target import Target, load
from asynq_aio.cli.values import parse_duration, parse_queues

__all__ = ["WorkerFlags", "supervise", "worker"]

logger = logging.getLogger("asynq_aio.worker")

T = TypeVar("T")

_COUNTS: Final = ("processed", "succeeded", "retried", "archived", "revoked", "requeued", "recovered", "lost")
"""What the summary at exit says, by the names of ServerStats."""
_ALWAYS_SAID: Final = ("succeeded", "retried", "archived", "requeued")
_THREADS_SECONDS: Final = 0.5
"""How long threads may take to end, at the end of the process."""

_TURN_SECONDS: Final = 1.0
"""How often the loop shows that it turns."""

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="app:mux", help="module:attribute; a ServeMux, an AsyncServer, or a callable that returns one."
    ),
]
QueuesOption = Annotated[
    str | None,
    typer.Option("--queues", metavar="QUEUES", help="critical=6,default=3, or critical,default. \\[default: default]"),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option("--concurrency", "-c", metavar="N", min=1, help="How many handlers run at once. \\[default: 100]"),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Always the queue with the highest weight first; else weights are shares.")
]
ProcessesOption = Annotated[
    int, typer.Option("--processes", metavar="N", min=1, help="How many processes; one that dies is started anew.")
]
ShutdownOption = Annotated[
    str | None,
    typer.Option(
        "--shutdown-timeout",
        metavar="DURATION",
        help="How long running handlers may go on at shutdown, such as 30s; then their tasks go back. \\[default: 8s]",
    ),
]
HealthOption = Annotated[
    int | None,
    typer.Option(
        "--health-port", metavar="PORT", min=0, max=65535, help="Answer /livez and /readyz there; 0 takes a free port."
    ),
]
LevelOption = Annotated[LogLevel, typer.Option("--log-level", help="At debug, each task's start and end too.")]
FormatOption = Annotated[LogFormat, typer.Option("--log-format", help="Lines to read, or one JSON object per line.")]


@dataclass(frozen=True, slots=True)
class WorkerFlags:
    """The flags that one worker process and a whole herd of them have in common."""

    target: str
    queues: str | None = None
    concurrency: int | None = None
    strict: bool = False
    shutdown_timeout: str | None = None
    burst: bool = False
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.TEXT
    decided_by: str = ""
    """What says where Redis is, flags by commas or `dev`: a server made by the program cannot follow it."""

    def arguments(self) -> list[str]:
        """The command line of a process that works by these flags; nothing secret is in it."""
        words = ["worker", self.target, "--log-level", self.log_level, "--log-format", self.log_format]
        words += [] if self.queues is None else ["--queues", self.queues]
        words += [] if self.concurrency is None else ["--concurrency", str(self.concurrency)]
        words += [] if self.shutdown_timeout is None else ["--shutdown-timeout", self.shutdown_timeout]
        words += ["--strict"] if self.strict else []
        words += ["--decided-by", self.decided_by] if self.decided_by else []
        words += ["--burst"] if self.burst else []
        # Where Redis is stands in the environment, all of it: no config file may add to that.
        return [*words, "--config", os.devnull]

    def config(self) -> ServerConfig:
        """The settings of the server.

        Raises:
            BadParameter, ConfigError: a flag cannot be right.
        """
        given: dict[str, object] = {"strict_priority": self.strict}
        if self.queues is not None:
            given["queues"] = parse_queues(self.queues)
        if self.concurrency is not None:
            given["concurrency"] = self.concurrency
        if self.shutdown_timeout is not None:
            timeout = parse_duration(self.shutdown_timeout)
            if timeout < timedelta(0):
                raise typer.BadParameter(f"--shutdown-timeout is {self.shutdown_timeout}; expected 0 or more")
            given["shutdown_timeout"] = timeout
        return ServerConfig(**given)  # type: ignore[arg-type]  # one type per name, as above

    def of_server(self) -> list[str]:
        """The flags given that a server made by the user's program has decided already."""
        given = {
            "--queues": self.queues,
            "--concurrency": self.concurrency,
            "--strict": self.strict or None,
            "--shutdown-timeout": self.shutdown_timeout,
        }
        return [flag for flag, value in given.items() if value is not None]


def worker(
    connection: Connection,
    target: TargetArgument,
    queues: QueuesOption = None,
    concurrency: ConcurrencyOption = None,
    strict: StrictOption = False,
    processes: ProcessesOption = 1,
    burst: Annotated[bool, typer.Option("--burst", help="End when the queues are empty.")] = False,
    reload: Annotated[
        bool, typer.Option("--reload", help="Restart when a Python file of this directory changes.")
    ] = False,
    shutdown_timeout: ShutdownOption = None,
    health_port: HealthOption = None,
    log_level: LevelOption = LogLevel.INFO,
    log_format: FormatOption = LogFormat.TEXT,
    supervised: Annotated[int | None, typer.Option("--supervised", hidden=True)] = None,
    decided_by: Annotated[str, typer.Option("--decided-by", hidden=True)] = "",
) -> None:
    """Work tasks: take them from the queues and run their handlers, until a signal.

    TERM and Ctrl-C: take no more tasks, wait for those that run, end; a second one aborts. TSTP: take no more tasks,
    but stay. The current directory is importable.

    With --processes the health port answers for all processes, and none is ready unless all are.

    [bold]Example:[/bold] asynq-aio worker app:mux --queues critical=6,default=3 --concurrency 50
    """
    if supervised is None:
        decided_by = ",".join(connection.given())
    flags = WorkerFlags(target, queues, concurrency, strict, shutdown_timeout, burst, log_level, log_format, decided_by)
    flags.config()  # what is wrong with a flag is said before anything starts
    redis = connection.settle(os.environ)
    start_logging(log_level, log_format)
    if supervised is None and (processes > 1 or reload):
        require_supervision(reload=reload)
        if isinstance(redis, RedisClientOpt) and redis.addr == EMBEDDED:
            raise CommandError(
                f"{EMBEDDED} is a private server of one process, which --processes and --reload would start many of",
                hint=f"asynq-aio dev {target} has one server for all of them",
                code=USAGE,
            )
        code = asyncio.run(supervise(flags, count=processes, reload=reload, health_port=health_port))
    else:
        link = None if supervised is None else Link(supervised)
        found = load(target)
        code = _run_loop(_Worker(flags, found, redis, link).run(health_port))
        _leave_threads(code)
    if code != OK:
        raise typer.Exit(code)


async def supervise(flags: WorkerFlags, *, count: int, reload: bool, health_port: int | None) -> int:
    """Run worker processes by the flags, with the Redis of this process' environment; returns the exit code."""
    started = time.monotonic()
    supervisor = Supervisor(
        flags.arguments(), os.environ, count=count, burst=flags.burst, reload=Path.cwd() if reload else None
    )
    logger.info(
        "asynq-aio %s; pid %d runs %d process%s of %s%s",
        *(__version__, os.getpid(), count, "" if count == 1 else "es", flags.target),
        f", and again when a file in {Path.cwd()} changes" if reload else "",
        extra={"version": __version__, "processes": count},
    )
    with serving(health_port, {"livez": supervisor.live, "readyz": supervisor.ready}) as port:
        _say_health_port(port)
        code = await supervisor.run()
    _say_summary("all processes: ", supervisor.counts, time.monotonic() - started)
    return code


class _Worker:
    """One process: a server, and what people and probes see of it."""

    def __init__(self, flags: WorkerFlags, target: Target, redis: RedisConnOpt, link: Link | None) -> None:
        self._flags, self._target, self._redis, self._link = flags, target, redis, link
        self._started = self._turned = time.monotonic()

    async def run(self, health_port: int | None) -> int:
        """Work until a signal, or until the queues are empty in burst mode; returns the exit code."""
        made, mux = await self._target.resolve()
        server = self._server(made)
        if not mux.patterns and mux.not_found is None:
            raise CommandError(
                f"{self._target.name} has no handlers", hint='register one: @mux.handler("email:welcome")', code=USAGE
            )
        self._say_start(server, mux)
        probes = {"livez": self._live, "readyz": lambda: Answer(server.healthy, _readiness(server))}
        with serving(health_port, probes) as port, self._beside(server):
            _say_health_port(port)
            await server.run(mux, burst=self._flags.burst)
        _say_summary("", _counts(server), time.monotonic() - self._started)
        return OK

    def _server(self, made: AsyncServer | None) -> AsyncServer:
        """The server by the flags, or the user's own, which flags cannot change."""
        mine = AsyncServer(self._redis, config=self._flags.config())
        if made is None:
            return mine
        given = self._flags.of_server()
        if self._flags.decided_by and made.description != mine.description:
            given += self._flags.decided_by.split(",")
        if given:
            module = self._target.module.__name__
            raise CommandError(
                f"{self._target.name} is an AsyncServer with its own settings; {', '.join(given)} cannot change them",
                hint=f"leave the flags out, or name the mux: asynq-aio worker {module}:mux",
                code=USAGE,
            )
        return made

    def _live(self) -> Answer:
        silence = time.monotonic() - self._turned
        live = silence < STALE_SECONDS
        reason = None if live else f"the event loop has not turned for {silence:.0f} s: a handler blocks it"
        return Answer(live, {"pid": os.getpid(), "reason": reason})

    @contextlib.contextmanager
    def _beside(self, server: AsyncServer) -> Iterator[None]:
        """What goes on beside the server: showing that the loop turns, and saying what it is connected to."""
        children = [asyncio.create_task(self._turn(server)), asyncio.create_task(_say_redis(server))]
        with contextlib.nullcontext() if self._link is None else self._link.watching(_end_alone):
            try:
                yield
            finally:
                for child in children:
                    child.cancel()
                self._tell(server, healthy=False)

    async def _turn(self, server: AsyncServer) -> None:
        told = False
        while True:
            self._turned = time.monotonic()
            self._tell(server, healthy=server.healthy)
            # Until it is up for the first time, look often: the supervisor waits for it.
            told = told or server.healthy
            await asyncio.sleep(_TURN_SECONDS if told else _TURN_SECONDS / 20)

    def _tell(self, server: AsyncServer, *, healthy: bool) -> None:
        if self._link is not None:
            reason = None if healthy else server.unhealthy_reason or server.state
            shutdown = server.config.shutdown_timeout.total_seconds()
            self._link.tell(Status(healthy, reason, shutdown, _counts(server)))

    def _say_start(self, server: AsyncServer, mux: ServeMux) -> None:
        queues, config = dict(server.config.queues), server.config
        loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
        logger.info(
            "asynq-aio %s on Python %s and %s; pid %d%s",
            *(__version__, platform.python_version(), loop, os.getpid(), ", burst" if self._flags.burst else ""),
            extra={"version": __version__, "python": platform.python_version(), "loop": loop},
        )
        logger.info("connecting to %s", server.description, extra={"redis": server.description})
        logger.info(
            "queues: %s (%s); concurrency %d",
            ", ".join(f"{name}={weight}" for name, weight in queues.items()),
            *("strict" if config.strict_priority else "weighted", config.concurrency),
            extra={"queues": queues, "strict": config.strict_priority, "concurrency": config.concurrency},
        )
        handlers = [*mux.patterns, *([] if mux.not_found is None else ["(all others)"])]
        logger.info("handlers: %s", ", ".join(handlers), extra={"handlers": handlers})


async def _say_redis(server: AsyncServer) -> None:
    while True:
        try:
            facts = await server.facts()
        except BrokerUnavailableError:
            await asyncio.sleep(_TURN_SECONDS)  # the server waits too, and says so
        except AsynqError:
            return  # the server ends with it
        else:
            break
    logger.info(
        "connected to %s: %s %s, %s",
        *(
            server.description,
            facts.server.capitalize(),
            facts.version,
            "cluster" if facts.is_cluster else "no cluster",
        ),
        extra={"redis": server.description, "redis_server": facts.server, "redis_version": facts.version},
    )


def _readiness(server: AsyncServer) -> Mapping[str, object]:
    return {"pid": os.getpid(), "state": server.state, "reason": server.unhealthy_reason}


def _counts(server: AsyncServer) -> dict[str, int]:
    return {name: getattr(server.stats, name) for name in _COUNTS}


def _end_alone() -> None:
    logger.error("the supervisor is gone; ending")
    os.kill(os.getpid(), signal.SIGTERM)


def _say_health_port(port: int | None) -> None:
    if port is not None:
        logger.info("health: http://127.0.0.1:%d/livez and /readyz", port, extra={"health_port": port})


def _say_summary(who: str, counts: Mapping[str, int], seconds: float) -> None:
    summary = Counter({name: counts.get(name, 0) for name in _COUNTS})
    rest = ", ".join(f"{summary[name]} {name}" for name in _COUNTS[1:] if summary[name] or name in _ALWAYS_SAID)
    logger.info(
        "%sprocessed %d tasks in %.1f s: %s",
        who,
        summary["processed"],
        seconds,
        rest,
        extra={**summary, "seconds": round(seconds, 3)},
    )


def _leave_threads(code: int) -> None:
    """End the process where handlers on threads go on: nothing can stop them, and Python would wait for them for ever.

    Their tasks are back in the queue already.
    """
    until = time.monotonic() + _THREADS_SECONDS
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, until - time.monotonic()))  # those that idle end by themselves
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    stuck = [thread for thread in others if not thread.daemon]
    if stuck:
        logger.error("%d handlers on threads go on; the process ends without them", len(stuck))
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_loop(main: Coroutine[object, object, T]) -> T:
    """Run it in a new event loop: uvloop's, where that is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform != "win32" and importlib.util.find_spec("uvloop") is not None:
        factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)
