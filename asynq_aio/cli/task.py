"""`asynq-aio task ...`: makes tasks."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer

from asynq_aio import Client, Task, TaskInfo
from asynq_aio.cli.connection import Connection, connected
from asynq_aio.cli.output import print_json
from asynq_aio.cli.values import parse_duration, parse_headers, parse_moment

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Make tasks.")


@app.callback()
@connected
def task(connection: Connection) -> None:
    """Make tasks."""


@app.command("enqueue")
@connected
def enqueue(  # noqa: PLR0913, PLR0917  (a flag each, by contract with Go)
    connection: Connection,
    type_name: Annotated[str, typer.Option("--type-name", "-t", metavar="TYPE", help="Type of the task.")],
    payload: Annotated[
        str, typer.Option("--payload", "-l", metavar="TEXT", help="Payload, taken as it is; usually JSON.")
    ],
    retry: Annotated[
        int | None, typer.Option("--retry", metavar="N", min=0, help="How often it may be retried. \\[default: 25]")
    ] = None,
    queue: Annotated[str | None, typer.Option("--queue", metavar="NAME", help="Queue. \\[default: default]")] = None,
    task_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="ID of the task. \\[default: a new one]")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="How long one attempt may take, such as 30s.")
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            "--deadline", metavar="MOMENT", help="Until when it may be worked on, such as 2030-01-31T08:00:00Z."
        ),
    ] = None,
    unique: Annotated[
        str | None,
        typer.Option("--unique", metavar="DURATION", help="Refuse another one like it for so long, such as 1h."),
    ] = None,
    process_at: Annotated[
        str | None,
        typer.Option("--process-at", metavar="MOMENT", help="When it is due, such as 2030-01-31T08:00:00+01:00."),
    ] = None,
    process_in: Annotated[
        str | None, typer.Option("--process-in", metavar="DURATION", help="In how long it is due, such as 1h30m.")
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option("--retention", metavar="DURATION", help="How long it is kept when it is done, such as 24h."),
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="NAME", help="Group in which it waits to be aggregated.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", metavar="KEY=VALUE", help="A header; may stand several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Enqueue a task.

    [bold]Example:[/bold] asynq-aio task enqueue -t email:welcome -l '{"to": 123}' --queue critical --process-in 10m
    """
    options: dict[str, object] = {
        "max_retry": retry,
        "queue": queue,
        "task_id": task_id,
        "group": group,
        "timeout": None if timeout is None else parse_duration(timeout),
        "deadline_at": None if deadline is None else parse_moment(deadline),
        "unique_for": None if unique is None else parse_duration(unique),
        "process_at": None if process_at is None else parse_moment(process_at),
        "process_in": None if process_in is None else parse_duration(process_in),
        "retention": None if retention is None else parse_duration(retention),
    }
    given = {name: value for name, value in options.items() if value is not None}
    # The bytes that stand on the command line, be they UTF-8 or not.
    made = Task(type_name, os.fsencode(payload), headers=parse_headers(header or []), **given)  # type: ignore[arg-type]
    info = asyncio.run(_enqueue(connection, made))
    if as_json:
        print_json(
            {
                "id": info.id,
                "queue": info.queue,
                "type": info.type,
                "state": info.state,
                "next_process_at": info.next_process_at,
            }
        )
    else:
        print(f"Enqueued task {info.id} to queue {info.queue}")


async def _enqueue(connection: Connection, task: Task) -> TaskInfo:
    async with Client(connection.redis(os.environ)) as client:
        return await client.enqueue(task)
