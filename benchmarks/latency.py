"""How long from `enqueue` to the start of the handler on an idle worker, and what an idle worker asks of Redis.

    python -m benchmarks.latency [--tasks 200] [--idle 30] [--uri redis://...]

Single tasks, 50 ms apart, from the same process: the moment before `await client.enqueue(...)` is compared with the
first line of the handler. Then nothing happens for `--idle` seconds, and the calls are counted as `INFO commandstats`
does, inner calls of scripts included.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from asynq_aio import AsyncServer, Client, ServeMux, Task
from asynq_aio._broker.store import Store
from benchmarks.drain import run, server_at


async def calls(store: Store) -> int:
    """All calls so far, but for INFO itself."""
    total = 0
    for line in (await store.call("INFO", "commandstats", key=None)).splitlines():
        name, colon, rest = line.partition(b":calls=")
        if colon and name not in (
            b"cmdstat_info",
            b"cmdstat_hello",
            b"cmdstat_client|setinfo",
            b"cmdstat_client|setname",
        ):
            total += int(rest.partition(b",")[0])
    return total


async def main(options: argparse.Namespace) -> None:
    """Latency first, then silence."""
    mux = ServeMux()
    started: asyncio.Queue[float] = asyncio.Queue()

    @mux.handler("tick")
    async def tick(_task: Task) -> None:
        started.put_nowait(time.perf_counter())

    async with server_at(options.uri) as uri, AsyncServer(uri, concurrency=10, queues=["latency"]).running(mux):
        async with Client(uri) as client:
            took = []
            for _ in range(options.tasks):
                await asyncio.sleep(0.05)
                before = time.perf_counter()
                await client.enqueue("tick", queue="latency")
                took.append((await started.get() - before) * 1000)
        took.sort()
        p50, p95, p99 = (took[int(len(took) * share)] for share in (0.5, 0.95, 0.99))
        print(
            f"enqueue to handler start, {options.tasks} single tasks: p50 {p50:.2f} ms, p95 {p95:.2f}, p99 {p99:.2f}, ",
            end="",
        )
        print(f"mean {statistics.mean(took):.2f}")
        async with Store(uri) as store:
            await store.ready()
            await asyncio.sleep(1)
            before_calls = await calls(store)
            await asyncio.sleep(options.idle)
            made = await calls(store) - before_calls
        print(f"idle, one queue: {made / options.idle:.2f} calls/s ({made} in {options.idle} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--idle", type=int, default=30)
    parser.add_argument("--uri")
    run(main(parser.parse_args()))
