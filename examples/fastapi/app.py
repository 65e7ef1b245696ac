"""A web app that enqueues and works: the routes put tasks in, the same process takes them out.

ASYNQ_URI=redis://127.0.0.1 uvicorn app:app --app-dir=examples/fastapi
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, FastAPI, HTTPException, Request, Response

from asynq_aio import AsyncServer, Client, DuplicateTaskError, ServeMux

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

mux = ServeMux()


@dataclass
class Welcome:
    """What the task needs; a payload that lacks it is archived, with the reason."""

    user_id: int
    pause_ms: int = 0


@mux.handler("email:welcome")
async def send_welcome(welcome: Welcome) -> None:
    """The work itself."""
    await app.state.mailer(welcome)


async def log_mail(welcome: Welcome) -> None:
    """Stands for what sends mail; tests put another one here."""
    print(f"welcome, user {welcome.user_id}", flush=True)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The worker lives as long as the app: it drains before the client closes, and before uvicorn ends the process."""
    uri = os.environ.get("ASYNQ_URI", "redis://127.0.0.1:6379")
    server = AsyncServer(uri, concurrency=50, queues={"mail": 1}, shutdown_timeout=timedelta(seconds=10))
    async with Client(uri) as client, server.running(mux):
        app.state.client, app.state.server = client, server
        yield


app = FastAPI(title="asynq_aio", lifespan=lifespan)
app.state.mailer = log_mail


def client_of(request: Request) -> Client:
    """The client of this process, for the routes."""
    client: Client = request.app.state.client
    return client


@app.post("/users/{user_id}", status_code=202)
async def sign_up(user_id: int, client: Annotated[Client, Depends(client_of)]) -> dict[str, str]:
    """Answer at once; the mail goes out later. A second sign-up within a minute is refused."""
    try:
        info = await client.enqueue(
            send_welcome.task(Welcome(user_id)), queue="mail", unique_for=timedelta(minutes=1), max_retry=5
        )
    except DuplicateTaskError as exc:
        raise HTTPException(409, f"user {user_id} is being welcomed by task {exc.holder_id}") from exc
    return {"task_id": info.id}


@app.get("/readyz")
async def ready(request: Request, response: Response) -> dict[str, str]:
    """For the load balancer: does this process work on tasks?"""
    server: AsyncServer = request.app.state.server
    if not server.healthy:
        response.status_code = 503
        return {"status": server.unhealthy_reason or "not healthy"}
    return {"status": "ok"}
