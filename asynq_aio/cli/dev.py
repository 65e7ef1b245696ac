"""`asynq-aio dev app:mux`: a private Redis, a worker and a reload, for the desk."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from typing import Annotated

import typer

from asynq_aio import EmbeddedCluster, EmbeddedRedis
from asynq_aio.cli.connection import Connection, point_to
from asynq_aio.cli.logs import LogFormat, LogLevel, start_logging
from asynq_aio.cli.output import OK, USAGE, CommandError, print_note
from asynq_aio.cli.supervisor import require_supervision
from asynq_aio.cli.worker import (
    ConcurrencyOption,
    FormatOption,
    HealthOption,
    LevelOption,
    ProcessesOption,
    QueuesOption,
    ShutdownOption,
    StrictOption,
    TargetArgument,
    WorkerFlags,
    supervise,
)

__all__ = ["dev"]


def dev(
    connection: Connection,
    target: TargetArgument,
    queues: QueuesOption = None,
    concurrency: ConcurrencyOption = None,
    strict: StrictOption = False,
    processes: ProcessesOption = 1,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="PORT", min=1, max=65535, help="Port of the server. \\[default: a free one]"),
    ] = None,
    shutdown_timeout: ShutdownOption = None,
    health_port: HealthOption = None,
    log_level: LevelOption = LogLevel.DEBUG,
    log_format: FormatOption = LogFormat.TEXT,
) -> None:
    """Work tasks on a private Redis that is gone, with its data, at the end; restart when the code changes.

    It prints the address, so that a second terminal can enqueue. With --cluster it is a cluster of six nodes.

    [bold]Example:[/bold] asynq-aio dev app:mux
    """
    if others := [flag for flag in connection.given() if flag != "--cluster"]:
        raise CommandError(
            f"dev has a Redis server of its own; {', '.join(others)} would lead elsewhere",
            hint=f"leave it out, or use yours: asynq-aio worker {target} --reload",
            code=USAGE,
        )
    if connection.cluster and port is not None:
        raise CommandError("--port is the port of one server; with --cluster there are six, on free ports", code=USAGE)
    reload = importlib.util.find_spec("watchfiles") is not None
    require_supervision(reload=reload)
    flags = WorkerFlags(
        target,
        queues,
        concurrency,
        strict,
        shutdown_timeout,
        log_level=log_level,
        log_format=log_format,
        decided_by="dev",
    )
    flags.config()
    start_logging(log_level, log_format)
    if not reload:
        print_note("changes of the code are not seen: pip install 'asynq_aio[reload]'")
    redis = EmbeddedCluster() if connection.cluster else EmbeddedRedis(port=port)
    code = asyncio.run(_dev(flags, redis, count=processes, reload=reload, health_port=health_port))
    if code != OK:
        raise typer.Exit(code)


async def _dev(
    flags: WorkerFlags, redis: EmbeddedRedis | EmbeddedCluster, *, count: int, reload: bool, health_port: int | None
) -> int:
    async with redis:
        point_to(redis.uri, os.environ)
        print(f"private server: {redis.uri}")
        print("in another terminal:")
        print(f"  export ASYNQ_URI={redis.uri}")
        print("  asynq-aio task enqueue --type-name TYPE --payload '{}'", flush=True)
        return await supervise(flags, count=count, reload=reload, health_port=health_port)
