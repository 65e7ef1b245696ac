"""The whole tutorial in one command, on a private cluster: enqueue, look, work, and move a slot under the load.

    make demo

It starts six Redis nodes (three masters, three replicas), runs client.py and worker.py as a reader of the tutorial
would, and then enqueues thousands of tasks while the slot of one queue goes to another master and back. Every task is
numbered; at the end it counts what the worker has printed.
"""

from __future__ import annotations

import asyncio
import collections
import os
import re
import signal
import socket
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from asynq_aio import Client, EmbeddedCluster, Inspector, RedisClusterClientOpt, Task

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HERE = Path(__file__).parent
PORTS = range(7000, 7006)
QUEUES = ("notifications", "webhooks", "images")
PER_QUEUE = 2_000
MOVES = 4


def say(text: str = "") -> None:
    """One line for the person who watches."""
    print(text, flush=True)


def step(number: int, text: str) -> None:
    """A heading."""
    say(f"\n\033[1m{number}. {text}\033[0m" if sys.stdout.isatty() else f"\n{number}. {text}")


def ports_are_free() -> bool:
    """Whether the ports of the tutorial, and those of the cluster bus 10,000 above, can be had."""
    for port in [*PORTS, *(port + 10_000 for port in PORTS)]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


async def run(*command: str, env: dict[str, str]) -> None:
    """Run a program of the tutorial as a reader would, and show what it says."""
    say(f"$ {' '.join(command)}")
    python = (
        [sys.executable, *command[1:]] if command[0] == "python" else [sys.executable, "-m", "asynq_aio", *command[1:]]
    )
    process = await asyncio.create_subprocess_exec(*python, env=env, cwd=HERE)
    if await process.wait() != 0:
        raise SystemExit(f"{command} failed with exit code {process.returncode}")


@asynccontextmanager
async def worker(env: dict[str, str], output: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """worker.py, its output in a file; ended by SIGTERM."""
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "worker.py", env=env, cwd=HERE, stdout=file, stderr=asyncio.subprocess.STDOUT
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                await process.wait()


def lines(output: Path, pattern: str) -> collections.Counter[str]:
    """What the worker has printed: how often each."""
    return collections.Counter(re.findall(pattern, output.read_text(), re.MULTILINE))


async def until(what: str, holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise SystemExit(f"gave up after {seconds:g} s: {what}")
        await asyncio.sleep(0.05)


async def produce(client: Client) -> int:
    """Enqueue numbered tasks of all three kinds, from sixteen callers; how many were refused."""
    errors = 0

    async def caller(first: int) -> None:
        nonlocal errors
        for number in range(first, PER_QUEUE, 16):
            tasks = (
                Task("notifications:email", {"from": 1, "to": number}, queue="notifications"),
                Task("webhooks:sync", {"data": number}, queue="webhooks"),
                Task("images:resize", {"src": f"img/{number}"}, queue="images"),
            )
            for task in tasks:
                try:
                    await client.enqueue(task)
                except Exception as exc:  # noqa: BLE001  (the demo reports whatever reaches a caller)
                    errors += 1
                    say(f"   an error reached a caller: {exc!r}")
            await asyncio.sleep(0.01)

    await asyncio.gather(*(caller(first) for first in range(16)))
    return errors


async def move_slot_to_and_fro(cluster: EmbeddedCluster, slot: int) -> None:
    """The slot of one queue goes to another master, key by key, and back; several times."""
    home = await asyncio.to_thread(cluster.owner, slot)
    away = next(node for node in await asyncio.to_thread(cluster.masters) if node is not home)
    for move in range(MOVES):
        target = home if move % 2 else away
        moved = await cluster.move_slot(slot, target)
        say(f"   slot {slot} is now at {target.addr}; {moved} keys were moved under the load")
        await asyncio.sleep(0.2)


async def main() -> int:
    """Everything; the exit code."""
    began = time.monotonic()
    say("asynq_aio on a Redis Cluster: the tutorial, end to end")

    step(1, "Six nodes: three masters, a replica each")
    free = ports_are_free()
    if not free:
        say("   ports 7000 to 7005 are taken; other ones will do")
    async with EmbeddedCluster(ports=list(PORTS) if free else None) as cluster:
        say(f"   {' '.join(cluster.addrs)}")
        env = {**os.environ, "TUTORIAL_ADDRS": ",".join(cluster.addrs), "PYTHONUNBUFFERED": "1"}
        cli = ("--cluster", "--cluster_addrs", ",".join(cluster.addrs))
        redis = RedisClusterClientOpt(addrs=cluster.addrs)

        step(2, "Enqueue a task of each kind")
        await run("python", "client.py", env=env)

        step(3, "Each queue is one slot, and the slots are spread over the masters")
        await run("asynq-aio", "queue", "ls", *cli, env=env)

        output = Path(tempfile.mkdtemp(prefix="asynq-aio-demo-")) / "worker.log"
        async with worker(env, output):
            step(4, "Work them: python worker.py")
            await until("three tasks", lambda: lines(output, r"^(?:Send|Sync|Resize) .*").total() == 3)
            for text in lines(output, r"^(?:Send|Sync|Resize) .*"):
                say(f"   {text}")

            step(5, f"Move a slot while {len(QUEUES) * PER_QUEUE} tasks are enqueued and worked")
            async with Client(redis) as client, Inspector(redis) as inspector:
                slot = inspector.cluster_key_slot("notifications")
                errors, _ = await asyncio.gather(produce(client), move_slot_to_and_fro(cluster, slot))
            patterns = (r"^Send email from 1 to (\d+)$", r"^Sync webhook with data (\d+)$", r"^Resize image img/(\d+)$")
            await until(
                "every task is worked",
                lambda: all(len(lines(output, pattern)) >= PER_QUEUE for pattern in patterns),
            )
        step(6, "Count")
        # The webhook of step 2 has the number 123, too.
        counts = [lines(output, pattern) for pattern in patterns]
        counts[1]["123"] -= 1
        worked = sum(len(count) for count in counts)
        twice = sum(number - 1 for count in counts for number in count.values() if number > 1)
        say(f"   enqueued {len(QUEUES) * PER_QUEUE}, worked {worked}, worked twice {twice}, errors at callers {errors}")
        summary = re.findall(r"the server has shut down: (.*)", output.read_text())
        say(f"   the worker says: {summary[-1] if summary else 'nothing (see ' + str(output) + ')'}")
    say(f"\nDone in {time.monotonic() - began:.0f} s; the nodes are gone. The programs: examples/{HERE.name}")
    return 0 if not errors and not twice and worked == len(QUEUES) * PER_QUEUE else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
