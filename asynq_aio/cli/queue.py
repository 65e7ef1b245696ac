"""`asynq-aio queue ...`: looks at queues."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer

from asynq_aio import AsynqError, Inspector
from asynq_aio.cli.connection import Connection, connected
from asynq_aio.cli.output import FAILED, explain, print_error, print_json, print_note, print_table

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Look at queues.")


@app.callback()
@connected
def queue(connection: Connection) -> None:
    """Look at queues."""


@app.command("list")
@app.command("ls", hidden=True)
@connected
def list_queues(
    connection: Connection,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the queues, one name per line (alias: ls).

    With --cluster a table says for each queue which slot its keys are in, and which nodes serve the slot: the master
    first, then its replicas.

    [bold]Example:[/bold] asynq-aio queue ls --cluster
    """
    if not asyncio.run(_list(connection, as_json=as_json)):
        raise typer.Exit(FAILED)


async def _list(connection: Connection, *, as_json: bool) -> bool:
    """Print them; tells whether each look-up went well."""
    well = True
    async with Inspector(connection.redis(os.environ)) as inspector:
        names = sorted(await inspector.queues())
        if not connection.cluster:
            if as_json:
                print_json(names)
            else:
                for name in names:
                    print(name)
        else:
            rows, documents = [], []
            for name in names:
                try:
                    slot = inspector.cluster_key_slot(name)
                    nodes = await inspector.cluster_nodes(name)
                except AsynqError as error:
                    print_error(explain(error).about(f"queue {name!r}"))
                    well = False
                    continue
                rows.append([name, str(slot), ", ".join(map(str, nodes))])
                documents.append(
                    {"queue": name, "slot": slot, "nodes": [{"id": node.id, "addr": node.addr} for node in nodes]}
                )
            if as_json:
                print_json(documents)
            else:
                print_table(["Queue", "Cluster KeySlot", "Cluster Nodes"], rows)
        if not names:
            print_note("no queues yet: the first task of a queue makes it")
    return well
