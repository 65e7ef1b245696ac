"""A worker as a program of its own, for tests that kill one: `python -m tests.server.program '{"uri": ..., ...}'`.

What it does stands in its ledger, a file that survives it: a line per event, written at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from asynq_aio import AsyncServer, Context, ServeMux, Task
from tests.server.look import until

if TYPE_CHECKING:
    from types import TracebackType

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Line:
    """One event of a ledger."""

    event: str
    task_id: str
    retried: int


class Worker:
    """A worker process; `async with Worker(uri, queue, directory) as worker:`, killed at the end if it still runs.

    Returns when it has found Redis, unless `wait` is false.
    """

    def __init__(self, uri: str, queue: str, directory: Path, *, wait: bool = True, **settings: Any) -> None:
        number = len(list(directory.glob("*.ledger")))
        self.ledger = directory / f"{number}.ledger"
        self.log = directory / f"{number}.log"
        self.ledger.touch()
        self._settings = {"uri": uri, "queue": queue, "ledger": str(self.ledger), **settings}
        self._wait = wait
        self.process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "tests.server.program", json.dumps(self._settings)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        if not self._wait:
            return self
        await until(lambda: any(line.event == "ready" for line in self.lines()) or self.exit_status is not None)
        assert self.exit_status is None, self.log.read_text()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if exc is not None:
            print(f"--- {self.log.name}\n{self.log.read_text()[-4000:]}")

    @property
    def exit_status(self) -> int | None:
        """None while it runs; below 0: the signal that ended it."""
        assert self.process is not None
        return self.process.poll()

    @property
    def pid(self) -> int:
        """Its process ID."""
        assert self.process is not None
        return self.process.pid

    def signal(self, signum: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, signum)

    async def ended(self) -> int:
        """Wait for its end; its exit status."""
        await until(lambda: self.exit_status is not None)
        status = self.exit_status
        assert status is not None
        return status

    def lines(self) -> list[Line]:
        """What it has done so far."""
        return read(self.ledger)


def read(ledger: Path) -> list[Line]:
    """The events of a ledger; a line that is not whole yet is left out."""
    whole = ledger.read_text().rpartition("\n")[0]
    return [Line(event, task_id, int(retried)) for event, task_id, retried in map(str.split, whole.splitlines())]


def events(directory: Path, event: str) -> Counter[str]:
    """How often each task has had this event, over all workers of a directory."""
    return Counter(
        line.task_id for ledger in directory.glob("*.ledger") for line in read(ledger) if line.event == event
    )


async def main(settings: dict[str, Any]) -> None:
    """Work until a signal."""
    ledger = os.open(settings.pop("ledger"), os.O_WRONLY | os.O_APPEND)
    queue, uri, burst = settings.pop("queue"), settings.pop("uri"), settings.pop("burst", False)

    def note(event: str, ctx: Context) -> None:
        os.write(ledger, f"{event} {ctx.task_id} {ctx.retried}\n".encode())

    mux = ServeMux()

    @mux.handler("sleep")
    async def sleep(ctx: Context, task: Task) -> str:
        note("start", ctx)
        try:
            await asyncio.sleep(task.payload.get_float("seconds"))
        except asyncio.CancelledError:
            note("cancelled", ctx)
            raise
        note("done", ctx)
        return f"by {os.getpid()}"

    @mux.handler("spin")
    async def spin(ctx: Context, task: Task) -> None:
        """Block the event loop."""
        note("start", ctx)
        end = time.monotonic() + task.payload.get_float("seconds")
        while time.monotonic() < end:
            sum(range(10_000))
        note("done", ctx)

    @mux.handler("die")
    async def die(ctx: Context, _task: Task) -> None:
        note("start", ctx)
        os.kill(os.getpid(), signal.SIGKILL)

    @mux.handler("deaf")
    async def deaf(ctx: Context, _task: Task) -> None:
        note("start", ctx)
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

    @contextlib.asynccontextmanager
    async def lifespan() -> Any:
        os.write(ledger, b"ready - 0\n")
        yield
        os.write(ledger, b"closed - 0\n")

    if "shutdown_timeout" in settings:
        settings["shutdown_timeout"] = timedelta(seconds=settings["shutdown_timeout"])
    server = AsyncServer(uri, queues=[queue], lifespan=lifespan, **settings)
    await server.run(mux, burst=burst)
    os.write(ledger, f"{server.state} {server.stats.succeeded} {server.stats.lost}\n".encode())


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if given.pop("uvloop", False):
        import uvloop

        uvloop.run(main(given))
    else:
        asyncio.run(main(given))
