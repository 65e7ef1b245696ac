"""Workers that are killed, stopped or told to end in mid-work, as processes of their own; every task is counted."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from asynq_aio import Client, Task
from asynq_aio._wire import keys
from tests.servers import own_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

    from asynq_aio import EmbeddedCluster

QUEUE = "kill"

# Each execution is a line in the file of its process, written when the work is done.
_APP = """
import asyncio, os, pathlib
from asynq_aio import ServeMux, Task

mux = ServeMux()
ledger = (pathlib.Path(os.environ["LEDGER"]) / str(os.getpid())).open("a", buffering=1)

@mux.handler("numbered")
async def numbered(task: Task) -> None:
    await asyncio.sleep(float(os.environ["WORK_SECONDS"]))
    ledger.write(f"{task.payload.get_int('n')}\\n")
"""


class Fleet:
    """Workers of one cluster, and what they have done."""

    def __init__(self, cluster: EmbeddedCluster, directory: Path) -> None:
        self.cluster = cluster
        self.ledger = directory / "ledger"
        self.ledger.mkdir()
        (directory / "app.py").write_text(_APP)
        self._directory = directory
        self._processes: list[asyncio.subprocess.Process] = []

    async def worker(self, *, seconds: float = 0.02, concurrency: int = 20) -> asyncio.subprocess.Process:
        """One more worker; returns when it has begun to work."""
        env = {**os.environ, "ASYNQ_URI": self.cluster.uri, "LEDGER": str(self.ledger), "WORK_SECONDS": str(seconds)}
        command = [sys.executable, "-m", "asynq_aio", "worker", "app:mux", "--queues", QUEUE]
        command += ["--concurrency", str(concurrency), "--log-level", "warn"]
        with (self._directory / "worker.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(*command, env=env, cwd=self._directory, stderr=log)
        self._processes.append(process)
        await until((self.ledger / str(process.pid)).exists)
        return process

    async def end(self) -> None:
        """End those that are left."""
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                await process.wait()

    def done(self, process: asyncio.subprocess.Process | None = None) -> Counter[int]:
        """How often each number was worked, by this process or by all."""
        files: Iterable[Path] = self.ledger.iterdir() if process is None else [self.ledger / str(process.pid)]
        return Counter(int(line) for file in files for line in file.read_text().split())

    def count(self, command: str, key: str) -> int:
        """What Redis has there."""
        reply: int = self.cluster.owner(keys.queue_slot(QUEUE)).execute(command, key)
        return reply


@asynccontextmanager
async def fleet(directory: Path, tasks: int) -> AsyncIterator[Fleet]:
    """A cluster with so many numbered tasks in its queue."""
    async with own_cluster(masters=3, replicas=0) as cluster:
        async with Client(cluster.uri) as client:
            await client.enqueue_many([Task("numbered", {"n": n}, max_retry=3) for n in range(tasks)], queue=QUEUE)
        workers = Fleet(cluster, directory)
        try:
            yield workers
        finally:
            await workers.end()


async def until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110  (other processes do it)
            await asyncio.sleep(0.05)


async def test_kill_9_twice_loses_nothing(tmp_path: Path) -> None:
    """Two of three workers are killed in mid-work: all of 5,000 tasks are done within 30 s of the last kill."""
    async with fleet(tmp_path, 5_000) as workers:
        first, second, third = await asyncio.gather(*(workers.worker() for _ in range(3)))
        await until(lambda: len(workers.done(first)) > 200)
        first.kill()
        await until(lambda: len(workers.done(second)) > 400)
        second.kill()
        killed_at = time.monotonic()
        held = workers.count("LLEN", keys.active(QUEUE))
        await until(lambda: len(workers.done()) == 5_000)
        took = time.monotonic() - killed_at
        await until(lambda: workers.count("LLEN", keys.active(QUEUE)) == 0)
        assert workers.count("ZCARD", keys.lease(QUEUE)) == 0
        assert workers.count("LLEN", keys.pending(QUEUE)) == 0
        assert held > 0  # else nobody was in mid-work, and this test has shown nothing
        assert took < 30
        # A task runs twice only where its worker died between its work and its outcome.
        assert sum(times - 1 for times in workers.done().values()) <= 40
        assert third.returncode is None


async def test_sigterm_under_load_drains(tmp_path: Path) -> None:
    """Told to end, a worker ends its running tasks and exits with 0; the next one does the rest; none runs twice."""
    async with fleet(tmp_path, 3_000) as workers:
        first = await workers.worker()
        await until(lambda: len(workers.done(first)) > 500)
        first.terminate()
        assert await first.wait() == 0
        assert workers.count("LLEN", keys.active(QUEUE)) == 0
        assert workers.count("ZCARD", keys.lease(QUEUE)) == 0
        done = len(workers.done())
        assert workers.count("LLEN", keys.pending(QUEUE)) == 3_000 - done > 0
        await workers.worker()
        await until(lambda: len(workers.done()) == 3_000)
        assert set(workers.done().values()) == {1}


async def test_a_worker_that_was_stopped_does_no_harm_when_it_goes_on(tmp_path: Path) -> None:
    """SIGSTOP: another worker takes up its tasks; SIGCONT: its late outcomes are not counted, and it works on."""
    async with fleet(tmp_path, 400) as workers:
        stopped = await workers.worker(seconds=0.3, concurrency=10)
        await until(lambda: len(workers.done(stopped)) > 20)
        stopped.send_signal(signal.SIGSTOP)
        held = workers.count("LLEN", keys.active(QUEUE))
        assert 0 < held <= 10
        await workers.worker(seconds=0.05)
        await until(lambda: len(workers.done()) == 400)  # what it held came back by the rule of the silent owner
        stopped.send_signal(signal.SIGCONT)
        async with Client(workers.cluster.uri) as client:
            await client.enqueue_many([Task("numbered", {"n": n}) for n in range(400, 800)], queue=QUEUE)
        await until(lambda: len(workers.done()) == 800)
        await until(lambda: workers.count("LLEN", keys.active(QUEUE)) == 0)
        assert workers.count("ZCARD", keys.lease(QUEUE)) == 0
        assert sum(times - 1 for times in workers.done().values()) <= held
        assert int(workers.count("GET", keys.processed(QUEUE))) == 800
        assert len(workers.done(stopped)) > 20
