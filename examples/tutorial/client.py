"""The producer of the tutorial: one task of each kind, each to a queue of its own."""

from __future__ import annotations

import asyncio
import os

from asynq_aio import Client, RedisClusterClientOpt

# The demo may have to take other ports.
ADDRS = os.environ.get(
    "TUTORIAL_ADDRS", "127.0.0.1:7000,127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003,127.0.0.1:7004,127.0.0.1:7005"
).split(",")


async def main() -> None:
    async with Client(RedisClusterClientOpt(addrs=ADDRS)) as client:
        info = await client.enqueue("notifications:email", {"to": 123, "from": 456}, queue="notifications")
        print(f"Enqueued to notifications: {info}")

        info = await client.enqueue("webhooks:sync", {"data": 123}, queue="webhooks")
        print(f"Enqueued to webhooks: {info}")

        info = await client.enqueue("images:resize", {"src": "some/path/to/img"}, queue="images")
        print(f"Enqueued to images: {info}")


if __name__ == "__main__":
    asyncio.run(main())
