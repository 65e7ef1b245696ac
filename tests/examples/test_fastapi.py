"""examples/fastapi under real uvicorn, with two workers: SIGTERM under load loses nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from tests.servers import own_standalone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi"

# The app as it is, but for a mailer that takes its time and writes down what it did.
_SLOW_MAILER = """
import asyncio, os
from app import app

async def mail(welcome):
    await asyncio.sleep(0.05)
    with open(os.environ["LEDGER"], "a") as ledger:
        ledger.write(f"{welcome.user_id}\\n")

app.state.mailer = mail
"""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def uvicorn(directory: Path, env: dict[str, str]) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Uvicorn with two workers, ready: (its process, its address)."""
    port = free_port()
    log = (directory / f"uvicorn-{port}.log").open("wb")
    command = [sys.executable, "-m", "uvicorn", "slow:app", "--port", str(port), "--workers", "2"]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, env=env, stdout=log, stderr=asyncio.subprocess.STDOUT
    )
    address = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=address) as http, asyncio.timeout(30):
            ready = 0
            while ready < 5:  # both of them, whichever answers
                try:
                    ready = ready + 1 if (await http.get("/readyz")).status_code == 200 else 0
                except httpx.TransportError:
                    ready = 0
                    await asyncio.sleep(0.05)
        yield process, address
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        log.close()


async def test_sigterm_under_load_loses_nothing(tmp_path: Path) -> None:
    """Every sign-up that was answered is mailed once; what SIGTERM left in the queue, the next process does."""
    (tmp_path / "slow.py").write_text(_SLOW_MAILER)
    ledger = tmp_path / "ledger"
    answered: list[int] = []
    async with own_standalone() as redis:
        env = {**os.environ, "ASYNQ_URI": redis.uri, "LEDGER": str(ledger), "PYTHONPATH": str(EXAMPLE)}
        async with uvicorn(tmp_path, env) as (process, address), httpx.AsyncClient(base_url=address) as http:
            stopping, enough = asyncio.Event(), asyncio.Event()

            async def sign_up(first: int) -> None:
                user_id = first
                while not stopping.is_set():
                    try:
                        reply = await http.post(f"/users/{user_id}")
                    except httpx.TransportError:  # uvicorn closes: this one was not answered
                        return
                    assert reply.status_code == 202, reply.text
                    answered.append(user_id)
                    user_id += 16
                    if len(answered) >= 600:
                        enough.set()

            async with asyncio.TaskGroup() as load:
                for first in range(16):
                    load.create_task(sign_up(first))
                await enough.wait()
                process.send_signal(signal.SIGTERM)
                await process.wait()
                stopping.set()
            assert process.returncode in (0, -signal.SIGTERM)
        assert redis.execute("LLEN", "asynq:{mail}:active") == 0  # drained, or given back
        assert redis.execute("ZCARD", "asynq:{mail}:lease") == 0
        async with uvicorn(tmp_path, env), asyncio.timeout(60):
            while len(set(ledger.read_text().split())) < len(answered):  # noqa: ASYNC110  (other processes write it)
                await asyncio.sleep(0.05)
    mailed = Counter(map(int, ledger.read_text().split()))
    assert set(answered) <= set(mailed)
    assert [user_id for user_id, times in mailed.items() if times > 1] == []


async def test_app_comes_up_without_redis_and_refuses_doubles(tmp_path: Path) -> None:
    """Not ready while Redis is away, ready when it comes; a second sign-up of one user is a conflict."""
    (tmp_path / "slow.py").write_text(_SLOW_MAILER)
    async with own_standalone() as redis:
        env = {**os.environ, "ASYNQ_URI": redis.uri, "LEDGER": str(tmp_path / "ledger"), "PYTHONPATH": str(EXAMPLE)}
        async with uvicorn(tmp_path, env) as (_, address), httpx.AsyncClient(base_url=address) as http:
            first, second = await http.post("/users/7"), await http.post("/users/7")
            assert (first.status_code, second.status_code) == (202, 409)
            assert re.search(f"task {first.json()['task_id']}$", second.json()["detail"])
    env["ASYNQ_URI"] = f"redis://127.0.0.1:{free_port()}"
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "slow:app", "--port", str(port), "--log-level", "warning"]
    process = await asyncio.create_subprocess_exec(*command, cwd=tmp_path, env=env, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http, asyncio.timeout(30):
            while True:
                try:
                    reply = await http.get("/readyz")
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
                else:
                    break
        assert reply.status_code == 503
        assert "has not answered yet" in reply.json()["status"]
    finally:
        process.terminate()
        async with asyncio.timeout(20):
            await process.wait()
