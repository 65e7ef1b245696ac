"""How fast queued no-op tasks are drained: the framework beside a bare loop over the same scripts, interleaved.

    python -m benchmarks.drain [--tasks 20000] [--concurrency 100] [--rounds 3] [--uri redis://...]

The bare loop claims and finishes through the same door and the same scripts, and decodes each message, but has no
handler, no child task, no deadline, no lease and no duty: it reaches what this Redis and this client can do.
Prints a Markdown table: medians, and the framework's share of the bare loop's rate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import resource
import statistics
import time
import uuid
from typing import TYPE_CHECKING

from asynq_aio import AsyncServer, Client, EmbeddedRedis, ServeMux, Task
from asynq_aio._broker import dequeue, finish
from asynq_aio._broker.leases import Lease
from asynq_aio._broker.store import Store
from asynq_aio._wire import codec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine


async def fill(uri: str, queue: str, tasks: int) -> None:
    """Queue no-ops."""
    async with Client(uri) as client:
        await client.enqueue_many([Task("noop", {"n": n}) for n in range(tasks)], queue=queue)


async def bare(uri: str, queue: str, tasks: int, concurrency: int) -> None:
    """Claim and finish, the one beside the other, and nothing else."""
    async with Store(uri) as store:
        await store.ready()
        server = f"bench:1:{uuid.uuid4()}"
        number = done = 0
        writing: asyncio.Task[object] | None = None
        while done < tasks:
            number += 1
            claim = dequeue.new_claim(store, queue, server, number)
            _, claimed = await dequeue.claim(store, claim, concurrency)
            outcomes = []
            for task in claimed:
                message = codec.decode_task(task.encoded)
                outcomes.append(
                    finish.Done(Lease(queue, message.id, claim.owner, claim.expires_unix), message.unique_key)
                )
            done += len(outcomes)
            if writing is not None:
                await writing
            writing = asyncio.ensure_future(finish.finish(store, queue, outcomes)) if outcomes else None
        if writing is not None:
            await writing


async def framework(uri: str, queue: str, tasks: int, concurrency: int) -> None:
    """A whole server, until its queue is empty."""
    mux = ServeMux()
    ran = 0

    @mux.handler("noop")
    async def noop(_task: Task) -> None:
        nonlocal ran
        ran += 1

    await AsyncServer(uri, concurrency=concurrency, queues=[queue]).run(mux, burst=True)
    if ran != tasks:
        raise SystemExit(f"{ran} of {tasks} tasks ran")


@contextlib.asynccontextmanager
async def server_at(uri: str | None) -> AsyncIterator[str]:
    """The Redis to measure, by default a private one."""
    if uri is not None:
        yield uri
        return
    async with EmbeddedRedis() as server:
        yield server.uri


async def timed(
    drain: Callable[[str, str, int, int], Awaitable[None]], uri: str, tasks: int, concurrency: int
) -> tuple[float, float]:
    """(tasks a second, own CPU microseconds a task)."""
    queue = f"bench-{uuid.uuid4()}"
    await fill(uri, queue, tasks)
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    await drain(uri, queue, tasks, concurrency)
    took = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    own = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    return tasks / took, own / tasks * 1e6


async def main(options: argparse.Namespace) -> None:
    """A B A B ..., then the table."""
    results: dict[str, list[tuple[float, float]]] = {"bare loop": [], "framework": []}
    async with server_at(options.uri) as uri:
        for _ in range(options.rounds):
            results["bare loop"].append(await timed(bare, uri, options.tasks, options.concurrency))
            results["framework"].append(await timed(framework, uri, options.tasks, options.concurrency))
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    print(
        f"{options.tasks} no-ops, concurrency {options.concurrency}, {options.rounds} rounds, one worker process, ",
        end="",
    )
    print(f"CPython {platform.python_version()}, {loop}\n")
    print("| | tasks/s, median (min to max) | client CPU µs/task, median |\n|---|---:|---:|")
    for name, runs in results.items():
        rates, cpus = [rate for rate, _ in runs], [cpu for _, cpu in runs]
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"| {name} | {statistics.median(rates):,.0f} ({spread}) | {statistics.median(cpus):.1f} |")
    shares = [ours / limit for (limit, _), (ours, _) in zip(*results.values(), strict=True)]
    print(f"\nThe framework reaches {statistics.median(shares):.0%} of the bare loop (pairwise median).")


def run(work: Coroutine[None, None, None]) -> None:
    """On uvloop, where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uri")
    run(main(parser.parse_args()))
