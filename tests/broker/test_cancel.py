"""Cancellation: a bare task ID on one channel, heard wherever one listens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import redis.asyncio as redis_client

from asynq_aio._broker import cancel
from asynq_aio._wire import keys

if TYPE_CHECKING:
    from asynq_aio._broker.store import Store
    from tests.servers import Servers


async def test_every_node_hears_it(frozen: Store, server: Servers, queue: str) -> None:
    """Published once, anywhere; every node of a cluster, and every replica, passes it on, as the bare ID."""
    wanted = f"{queue}/täsk"
    async with asyncio.timeout(20):
        for port in server.ports:
            node = redis_client.Redis(host="127.0.0.1", port=port, protocol=2)
            async with node, node.pubsub() as listener:
                await listener.subscribe(keys.CANCEL_CHANNEL)
                await cancel.publish(frozen, wanted)
                heard = None
                while heard != wanted.encode():
                    message = await listener.get_message(ignore_subscribe_messages=True, timeout=1.0)
                    heard = message and message["data"]


async def test_our_subscription_hears_it(frozen: Store, queue: str) -> None:
    """As servers listen."""
    async with asyncio.timeout(20), await frozen.subscribe(keys.CANCEL_CHANNEL) as subscription:
        await cancel.publish(frozen, queue)
        async for channel, data in subscription:
            if (channel, data) == (keys.CANCEL_CHANNEL, queue.encode()):
                return
