"""What the inspector says of queues and nodes."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import Client, ClusterNode, ConfigError, Inspector, InvalidTaskError, NotFoundError
from asynq_aio._wire import keys
from tests.servers import Servers, own_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from asynq_aio._broker.store import Store

CLUSTERS = pytest.mark.parametrize("topology", ["cluster-valkey9", "cluster-redis7"], indirect=True)


@pytest.fixture
async def inspector(uri: str) -> AsyncGenerator[Inspector]:
    """An inspector of the topology's servers, closed after the test."""
    async with Inspector(uri) as opened:
        yield opened


async def test_queues(client: Client, inspector: Inspector, queue: str) -> None:
    """All queues that a client has used, sorted."""
    assert queue not in await inspector.queues()
    names = [f"{queue}-{odd}" for odd in ("b", "ä", "a")]
    await client.enqueue_many([("t", None)], queue=names[0])
    for name in names:
        await client.enqueue("t", queue=name)
    found = await inspector.queues()
    assert set(names) <= set(found)
    assert found == sorted(found)
    await inspector.ping()


def test_the_slot_is_computed_without_redis() -> None:
    """The slots that Go's command line prints for these queues."""
    inspector = Inspector("redis://127.0.0.1:1")
    slots = {queue: inspector.cluster_key_slot(queue) for queue in ("images", "webhooks", "notifications")}
    assert slots == {"images": 9450, "webhooks": 4418, "notifications": 16340}
    with pytest.raises(ConfigError, match="queue name must contain one or more characters"):
        inspector.cluster_key_slot(" ")


@CLUSTERS
@pytest.mark.parametrize("odd", ["", "{", "a}b", "ö"])
async def test_the_slot_is_that_of_redis(inspector: Inspector, redis: Any, queue: str, odd: str) -> None:
    """For odd names too."""
    name = queue + odd
    assert inspector.cluster_key_slot(name) == await redis.cluster_keyslot(keys.pending(name))


@CLUSTERS
async def test_cluster_nodes(inspector: Inspector, redis: Any, queue: str) -> None:
    """The master first, then its replicas; ids and addresses are those that the cluster itself names."""
    async with asyncio.timeout(30):
        # A cluster that has just been made: not every node has heard of every replica.
        while len(nodes := await inspector.cluster_nodes(queue)) < 2:  # noqa: ASYNC110  (Redis sends no event)
            await asyncio.sleep(0.05)
    master, _replica = nodes
    slot = inspector.cluster_key_slot(queue)
    await redis.initialize()
    owner = redis.nodes_manager.get_node_from_slot(slot)
    assert master.addr == f"{owner.host}:{owner.port}"
    ids = {addr.partition("@")[0]: facts["node_id"] for addr, facts in (await redis.cluster_nodes()).items()}
    assert {node.addr: node.id for node in nodes} == {node.addr: ids[node.addr] for node in nodes}
    assert re.fullmatch(r"[0-9a-f]{40} 127\.0\.0\.1:\d+", str(master))
    assert isinstance(master, ClusterNode)
    with pytest.raises(ConfigError, match="queue name"):
        await inspector.cluster_nodes("")


@pytest.mark.parametrize("topology", ["standalone-valkey9", "sentinel-redis7"], indirect=True)
async def test_cluster_nodes_without_a_cluster(inspector: Inspector) -> None:
    """Said in words, with what to use."""
    with pytest.raises(ConfigError, match=r"is no Redis Cluster.*RedisClusterClientOpt"):
        await inspector.cluster_nodes("images")


async def test_a_slot_that_nobody_serves(queue: str) -> None:
    """A cluster may have a hole; the error names slot and queue."""
    async with own_cluster(1, 0) as cluster, Inspector(cluster.uri) as inspector:
        await inspector.ping()
        slot = inspector.cluster_key_slot(queue)
        cluster.nodes[0].execute("CLUSTER", "DELSLOTS", slot)
        with pytest.raises(NotFoundError, match=f"nodes not found.* slot {slot} of queue '{queue}'"):
            await inspector.cluster_nodes(queue)


async def test_cancel_is_heard_by_every_server(inspector: Inspector, store: Store, queue: str) -> None:
    """On whatever node of a cluster it listens."""
    subscription = await store.subscribe(keys.CANCEL_CHANNEL)
    try:
        await inspector.cancel(queue)
        async with asyncio.timeout(20):
            async for _, data in subscription:
                if data == queue.encode():
                    break
    finally:
        await subscription.aclose()
    with pytest.raises(InvalidTaskError, match="task ID cannot be empty"):
        await inspector.cancel("")


@pytest.mark.parametrize("topology", ["standalone-valkey9"], indirect=True)
async def test_a_closed_inspector_says_so(server: Servers) -> None:
    """Closing twice is fine; using it is not."""
    inspector = Inspector(server.uri)
    await inspector.queues()
    await inspector.aclose()
    await inspector.aclose()
    with pytest.raises(RuntimeError, match="this Inspector is closed; make a new one"):
        await inspector.queues()
