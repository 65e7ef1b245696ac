"""The worker of the tutorial: one server for three queues that lie on different nodes of the cluster."""

from __future__ import annotations

import asyncio
import logging
import os

from asynq_aio import AsyncServer, RedisClusterClientOpt, ServeMux, Task

# The demo may have to take other ports.
ADDRS = os.environ.get(
    "TUTORIAL_ADDRS", "127.0.0.1:7000,127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003,127.0.0.1:7004,127.0.0.1:7005"
).split(",")

mux = ServeMux()


@mux.handler("notifications:email")
async def send_email(task: Task) -> None:
    print(f"Send email from {task.payload.get_int('from')} to {task.payload.get_int('to')}", flush=True)


@mux.handler("webhooks:sync")
async def sync_webhook(task: Task) -> None:
    print(f"Sync webhook with data {task.payload.get_int('data')}", flush=True)


@mux.handler("images:resize")
async def resize_image(task: Task) -> None:
    print(f"Resize image {task.payload.get_str('src')}", flush=True)


async def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    redis = RedisClusterClientOpt(addrs=ADDRS)
    server = AsyncServer(redis, concurrency=20, queues={"notifications": 1, "webhooks": 1, "images": 1})
    await server.run(mux)


if __name__ == "__main__":
    asyncio.run(main())
