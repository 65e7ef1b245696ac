"""One process that keeps N worker processes running: restarts those that die, and those whose code has changed.

Each child is an `asynq-aio worker` of its own with a server entry of its own, in a process group of its own: Ctrl-C in
a terminal reaches the supervisor alone, which passes it on once. Between the two there is a socket. On it the child
says each second how it is; and when the supervisor is gone, however it went, the socket's end tells the child to drain
and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Self

import orjson

from asynq_aio.cli.health import STALE_SECONDS, Answer
from asynq_aio.cli.output import FAILED, OK, CommandError

__all__ = ["Link", "Status", "Supervisor", "require_supervision"]

logger = logging.getLogger("asynq_aio.supervisor")

_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
_STEADY_SECONDS: Final = 60.0
"""A child that lived for so long did not die of its start: the next pause is a short one again."""
_HEAD_START_SECONDS: Final = 2.0
"""The first child goes ahead for so long, unless it is healthy earlier: what is wrong for all of them is said once."""
_GRACE_SECONDS: Final = 10.0
"""What a child has, beyond its shutdown timeout, until it is killed."""
_ABORT_SECONDS: Final = 5.0
"""What a child has after a second signal."""
_IMPORT_SECONDS: Final = 60.0
"""What a child has to import its program before it counts as hanging."""
_LAST_WORDS_SECONDS: Final = 1.0
"""How long the socket of a child that has ended is read: a process that it forked may still hold it open."""


def require_supervision(*, reload: bool) -> None:
    """Check that this platform, and with `reload` this installation, can do it.

    Raises:
        CommandError: it cannot; says what to do.
    """
    if sys.platform == "win32":
        raise CommandError("--processes and --reload need POSIX signals", hint="start several workers, one by one")
    if reload:
        try:
            import watchfiles  # noqa: F401  (is it there?)
        except ImportError:
            raise CommandError(
                "--reload needs watchfiles, which is not installed", hint="pip install 'asynq_aio[reload]'"
            ) from None


@dataclass(frozen=True, slots=True)
class Status:
    """What a child tells its supervisor each second."""

    healthy: bool
    reason: str | None
    shutdown_seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    """Since its start: processed, succeeded and so on."""

    def encode(self) -> bytes:
        """One line."""
        return orjson.dumps(asdict(self)) + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Self:
        """The status in one line."""
        return cls(**orjson.loads(line))


class Link:
    """The child's end of the socket to its supervisor."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)  # what a handler starts must not keep it open
        self._socket.setblocking(False)

    def tell(self, status: Status) -> None:
        """Send the status. One that does not fit is left out: the next will come."""
        with contextlib.suppress(OSError):  # the supervisor is gone: `watching` says so
            self._socket.send(status.encode())

    @contextlib.contextmanager
    def watching(self, on_end: Callable[[], None]) -> Iterator[None]:
        """Call `on_end` when the supervisor is gone."""
        loop = asyncio.get_running_loop()

        def look() -> None:
            try:
                gone = not self._socket.recv(1)
            except BlockingIOError:
                return
            except OSError:
                gone = True
            if gone:
                loop.remove_reader(self._socket)
                on_end()

        loop.add_reader(self._socket, look)
        try:
            yield
        finally:
            loop.remove_reader(self._socket)


class _Child:
    """One worker process, from its start to its end."""

    def __init__(self, index: int, process: asyncio.subprocess.Process) -> None:
        self.index, self.process = index, process
        self.status: Status | None = None
        self.started_at = self.heard_at = time.monotonic()
        self.asked_to_stop = False
        self.up = False
        """It has been healthy once: its server runs, and its signal handlers are set."""
        self.silenced = False
        self._killer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def send(self, number: signal.Signals) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the loop has not heard yet
                self.process.send_signal(number)

    def stop(self) -> None:
        """Ask it to drain; the second time, to abort; and kill it where it does neither in its time."""
        patience = _ABORT_SECONDS
        if not self.asked_to_stop:
            patience = _GRACE_SECONDS + (0 if self.status is None else self.status.shutdown_seconds)
        self.asked_to_stop = True
        self.send(signal.SIGTERM)
        if self._killer is not None:
            self._killer.cancel()
        self._killer = asyncio.get_running_loop().call_later(patience, self._kill, patience)

    def silence(self) -> None:
        """Ask it to take no more tasks; one that is not up yet would be suspended by the signal."""
        if self.up and not self.silenced:
            self.silenced = True
            self.send(signal.SIGTSTP)

    def _kill(self, patience: float) -> None:
        if self.running:
            logger.error("process %d did not end within %.0f s; killing it", self.process.pid, patience)
            self.send(signal.SIGKILL)

    async def listen(self, line: socket.socket, on_news: Callable[[_Child], None]) -> None:
        """Take in what it says, until its end of the socket closes."""
        reader, writer = await asyncio.open_connection(sock=line)
        try:
            with contextlib.suppress(ConnectionError):
                while text := await reader.readline():
                    self.heard_at = time.monotonic()
                    self.status = Status.decode(text)
                    on_news(self)
        finally:
            writer.close()

    def ended(self) -> None:
        if self._killer is not None:
            self._killer.cancel()

    def fate(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode or 0
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"


class Supervisor:
    """Runs `count` processes of one worker command.

    Args:
        arguments: The command line of a child, behind `asynq-aio`.
        environ: Its environment; says where Redis is.
        count: How many.
        burst: A child that ends well is not restarted.
        reload: The directory whose Python files are watched; a change restarts the children.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        *,
        count: int = 1,
        burst: bool = False,
        reload: Path | None = None,
    ) -> None:
        self._arguments, self._environ = list(arguments), dict(environ)
        self._count, self._burst, self._reload = count, burst, reload
        self._children: dict[int, _Child] = {}
        self._counts: Counter[str] = Counter()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._healthy = asyncio.Event()
        """Set for good when the first child is healthy."""
        self._quiet = False

    @property
    def counts(self) -> Mapping[str, int]:
        """The sums over all processes that have ended."""
        return self._counts

    # What it tells

    def live(self) -> Answer:
        """Whether the event loop of each running child turns."""
        processes = []
        for index, child in sorted(self._children.items()):
            silence = time.monotonic() - child.heard_at
            live = not child.running or silence < (STALE_SECONDS if child.status else _IMPORT_SECONDS)
            reason = None if live else f"not heard for {silence:.0f} s: a handler blocks its event loop"
            processes.append({"index": index, "pid": child.process.pid, "live": live, "reason": reason})
        return Answer(all(process["live"] for process in processes), {"processes": processes})

    def ready(self) -> Answer:
        """Whether all children are there and healthy."""
        processes = []
        for index in range(self._count):
            child = self._children.get(index)
            reason: str | None
            if child is None or child.status is None:
                ready, reason = False, "starting"
            elif not child.running:
                ready, reason = False, child.fate()
            else:
                ready, reason = child.status.healthy, child.status.reason
            processes.append({"index": index, "pid": child and child.process.pid, "ready": ready, "reason": reason})
        stopping = self._stopping.is_set()
        well = not stopping and all(process["ready"] for process in processes)
        return Answer(well, {"stopping": stopping, "processes": processes})

    # What it does

    async def run(self) -> int:
        """Keep them running until a signal, or in burst mode until each has ended well; returns the exit code."""
        with self._signals():
            async with asyncio.TaskGroup() as group:
                keepers = [group.create_task(self._keep(0))]
                watcher = group.create_task(self._watch()) if self._reload else None
                await self._head_start(keepers[0])
                if not self._stopping.is_set():
                    keepers += [group.create_task(self._keep(index)) for index in range(1, self._count)]
                codes = await asyncio.gather(*keepers)
                self._stopping.set()  # ends the watcher
                if watcher is not None:
                    await watcher
        return next((code for code in codes if code != OK), OK)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers = {
            signal.SIGTERM: self._on_end_signal,
            signal.SIGINT: self._on_end_signal,
            signal.SIGTSTP: self._silence,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _on_end_signal(self) -> None:
        again = self._stopping.is_set()
        logger.info("second signal: aborting" if again else "stopping; a second signal aborts")
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        for child in self._children.values():
            if child.running:
                child.stop()

    def _silence(self) -> None:
        self._quiet = True
        logger.info("the workers take no more tasks")
        for child in self._children.values():
            child.silence()

    async def _head_start(self, first: asyncio.Task[int]) -> None:
        healthy = asyncio.create_task(self._healthy.wait())
        await asyncio.wait([first, healthy], timeout=_HEAD_START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        healthy.cancel()

    async def _keep(self, index: int) -> int:
        """Run the child of this index, again and again; returns its exit code."""
        pause = _FIRST_PAUSE
        while True:
            child = await self._run_child(index)
            code = child.process.returncode or 0
            if self._stopping.is_set():
                # Before its handlers are set, TERM ends a child by itself.
                return OK if code in {0, -signal.SIGTERM} else FAILED
            if child.asked_to_stop:  # for its code has changed
                continue
            if self._burst and code == 0:
                return OK
            if self._reload is not None:
                logger.error("process %d %s; waiting for a change of the code", child.process.pid, child.fate())
                await self._first_of(self._changed, self._stopping)
                if self._stopping.is_set():
                    return OK
                continue
            if code > 0 and not self._healthy.is_set():
                # It has said why, and none has ever been well: trying again would say the same.
                self._stop()
                return code
            if time.monotonic() - child.started_at > _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            delay = pause * random.uniform(0.8, 1.2)
            logger.error("process %d %s; starting another in %.1f s", child.process.pid, child.fate(), delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
                return OK
            pause = min(pause * 2, _LONGEST_PAUSE)

    @staticmethod
    async def _first_of(*events: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in events]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _run_child(self, index: int) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "asynq_aio", *self._arguments, "--supervised", str(theirs.fileno())),
                env=self._environ,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        child = self._children[index] = _Child(index, process)
        if self._stopping.is_set():  # while it was started
            child.stop()
        listener = asyncio.create_task(child.listen(ours, self._on_news))
        await process.wait()
        child.ended()
        await asyncio.wait([listener], timeout=_LAST_WORDS_SECONDS)
        listener.cancel()
        if child.status is not None:
            self._counts.update(child.status.counts)
        return child

    def _on_news(self, child: _Child) -> None:
        if child.status is None or not child.status.healthy:
            return
        child.up = True
        self._healthy.set()
        if self._quiet:  # and this one came after the signal
            child.silence()

    async def _watch(self) -> None:
        """Restart the children at each change of a Python file."""
        from watchfiles import PythonFilter, awatch

        assert self._reload is not None  # noqa: S101  (for mypy: who calls this has looked)
        root = self._reload
        async for changes in awatch(root, watch_filter=PythonFilter(), stop_event=self._stopping, step=100):
            names = sorted({path.removeprefix(f"{root}{os.sep}") for _, path in changes})
            logger.info("%s changed; restarting", ", ".join(names[:3]) + (" ..." if len(names) > 3 else ""))
            for child in self._children.values():
                if child.running and not child.asked_to_stop:  # one that drains already will start with the newest code
                    child.stop()
            self._changed.set()
            self._changed.clear()  # who waits was woken; the next one waits for the next change
