"""The command as people run it: a subprocess, in a directory with a program of theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis as redis_py

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 20.0

PROGRAM = """
import asyncio, os, time
from asynq_aio import AsyncServer, Client, Context, ServeMux, Task

mux = ServeMux()

@mux.handler("email:welcome")
async def send(task: Task) -> None:
    print("sent", bytes(task.payload).decode(), dict(task.headers), flush=True)

@mux.handler("email:long")
async def long(task: Task) -> None:
    print(f"begun {os.getpid()}\\n", end="", flush=True)
    await asyncio.sleep(task.payload.json())
    print(f"ended {os.getpid()}\\n", end="", flush=True)

@mux.handler("email:broken")
async def broken(task: Task) -> None:
    raise ValueError("no such address")

@mux.handler("loop:block")
async def block(task: Task) -> None:
    time.sleep(task.payload.json())

@mux.handler("thread:long")
def sleep(task: Task) -> None:
    print(f"begun {os.getpid()}\\n", end="", flush=True)
    time.sleep(task.payload.json())

def make():
    return mux

async def make_later():
    return mux

def wrong():
    return 42

def fails():
    raise RuntimeError("no database")

def takes(name):
    return mux

number = 42
"""


def environment(**more: str) -> dict[str, str]:
    """The environment without anything that says where Redis is, and without colours."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ASYNQ_")}
    return {**inherited, "COLUMNS": "120", "PYTHONUNBUFFERED": "1", **more}


class Running:
    """A command that runs; what it says, on both streams, is in `text`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def text(self) -> str:
        with self._news:
            return "".join(self._lines)

    def wait_for(self, words: str, times: int = 1) -> str:
        """Return the line that has these words the n-th time."""
        until = time.monotonic() + PATIENCE
        with self._news:
            while True:
                found = [line for line in self._lines if words in line]
                if len(found) >= times:
                    return found[times - 1]
                if not self._reader.is_alive() or not self._news.wait(until - time.monotonic()):
                    raise AssertionError(f"it never said {words!r} {times} times:\n{''.join(self._lines)}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def stop(self) -> int:
        """TERM, and wait."""
        self.send(signal.SIGTERM)
        return self.end()


class Command:
    """`asynq-aio` in a directory of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, text: str, name: str = "app.py") -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def _line(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "asynq_aio", *arguments]

    def __call__(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self._line(arguments),
            cwd=self.directory,
            env=environment(HOME=str(self.directory), **(env or {})),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    @contextmanager
    def running(
        self, *arguments: str, env: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
    ) -> Generator[Running]:
        """Run it as long as the block, `before` first in its process; what is left then is killed."""
        with subprocess.Popen(
            self._line(arguments),
            cwd=self.directory,
            env=environment(HOME=str(self.directory), **(env or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            preexec_fn=before,  # noqa: PLW1509  (it only makes system calls)
        ) as process:
            running = Running(process)
            try:
                yield running
            finally:
                if process.poll() is None:
                    process.kill()  # its children end with it
                process.wait()
                running._reader.join()


@pytest.fixture(params=["standalone-valkey9"])
def topology(request: pytest.FixtureRequest) -> str:
    """Commands go through the public API, which is tested on all; one is enough, unless a test wants another."""
    name: str = request.param
    return name


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """The command, in a directory with `app.py`."""
    made = Command(tmp_path)
    made.write(PROGRAM)
    return made


@pytest.fixture
def look(uri: str) -> Generator[Any]:
    """A blocking redis-py client on the standalone server."""
    client = redis_py.Redis.from_url(uri)
    yield client
    client.close()


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait until a condition holds."""

    def wait(condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"never: {what}"
            time.sleep(0.02)

    return wait
