"""Who owns a slot: found out, corrected, asked for again, on real clusters."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from redis.exceptions import AskError, MovedError

from asynq_aio._broker.connect import settings_of
from asynq_aio._broker.embedded import EmbeddedCluster
from asynq_aio._broker.store import Store
from asynq_aio._broker.topology import Topology
from asynq_aio._config import RedisClientOpt, RedisClusterClientOpt, RedisFailoverClientOpt
from asynq_aio._wire.keys import slot
from asynq_aio.errors import BrokerAuthError, BrokerUnavailableError, ConfigError
from tests.servers import own_cluster, own_standalone

if TYPE_CHECKING:
    from collections.abc import Iterator

TAGS = ["{a}", "{b}", "{c}", "{q}", "{move}"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    """One for this file; nobody moves anything in it."""
    made = EmbeddedCluster(masters=3, replicas=0, node_timeout_ms=15_000)
    made.start()
    yield made
    made.stop()


async def test_one_question_for_many_callers(cluster: EmbeddedCluster) -> None:
    """A refresh is single flight; afterwards every slot has its owner."""
    changes: list[None] = []
    topology = Topology(settings_of(cluster.uri), lambda: changes.append(None))
    assert topology.owner("{a}") is None
    await asyncio.gather(*(topology.refreshed() for _ in range(50)))
    assert (topology.refreshes, len(changes)) == (1, 1)
    for tag in TAGS:
        assert topology.owner(tag) == ("127.0.0.1", cluster.owner(slot(tag)).port)
    assert set(topology.masters) == {("127.0.0.1", node.port) for node in cluster.nodes}
    await topology.refreshed()
    assert (topology.refreshes, len(changes)) == (2, 1)
    await topology.aclose()


async def test_moved_corrects_one_slot(cluster: EmbeddedCluster) -> None:
    """The others stay; a node that nobody knew makes a refresh, which knows better."""
    topology = Topology(settings_of(cluster.uri), lambda: None)
    await topology.refreshed()
    owner = {tag: topology.owner(tag) for tag in TAGS}
    other = next(address for address in topology.masters if address != owner["{a}"])
    topology.moved(MovedError(f"{slot('{a}')} {other[0]}:{other[1]}"), other)
    assert {tag: topology.owner(tag) for tag in TAGS} == {**owner, "{a}": other}
    assert topology.refreshes == 1
    topology.moved(MovedError(f"{slot('{a}')} 127.0.0.1:1"), other)
    await topology.refreshed()
    assert {tag: topology.owner(tag) for tag in TAGS} == owner
    await topology.aclose()


async def test_a_caller_that_leaves_does_not_stop_a_refresh(cluster: EmbeddedCluster) -> None:
    """The others who wait for it get it."""
    topology = Topology(settings_of(cluster.uri), lambda: None)
    leaving, staying = (asyncio.create_task(topology.refreshed()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await staying
    assert topology.owner("{a}") is not None
    assert topology.refreshes == 1


async def test_nobody_answers() -> None:
    """A refresh never raises: it keeps what was in the way, and the call at its deadline says so."""
    async with own_standalone() as gone:
        pass
    options = RedisClusterClientOpt(addrs=[gone.addr], deadline=timedelta(seconds=0.5))
    topology = Topology(settings_of(options), lambda: None)
    await topology.refreshed()
    await topology.refreshed()
    assert str(gone.port) in str(topology.trouble)
    async with Store(options) as store:
        with pytest.raises(BrokerUnavailableError, match=r"within 0\.5 s: .*nothing was sent"):
            await store.call("GET", "{a}", key="{a}")


async def test_a_node_that_is_dead_is_asked_last() -> None:
    """With one of two seeds gone, the map is found by the other, each time."""
    async with own_standalone() as gone:
        pass
    async with own_cluster(masters=2, replicas=0) as cluster:
        options = RedisClusterClientOpt(addrs=[gone.addr, cluster.nodes[0].addr])
        topology = Topology(settings_of(options), lambda: None)
        await topology.refreshed()
        assert topology.owner("{a}") is not None
        assert topology._candidates()[-1] == ("127.0.0.1", gone.port)


def test_no_host_means_the_one_that_answered() -> None:
    """MOVED and ASK from nodes that do not know their own name; IPv6 has colons of its own."""
    topology = Topology(settings_of("redis-cluster://10.0.0.1:7000"), lambda: None)
    for text, address in (
        ("12 :7001", ("10.0.0.9", 7001)),
        ("12 ?:7001", ("10.0.0.9", 7001)),
        ("12 10.0.0.2:7001", ("10.0.0.2", 7001)),
        ("12 fe80::1:7001", ("fe80::1", 7001)),
    ):
        for kind in (MovedError, AskError):
            assert topology.resolve(kind(text), ("10.0.0.9", 7000)) == address


async def test_nodes_without_a_name() -> None:
    """`cluster-preferred-endpoint-type unknown-endpoint`: CLUSTER SLOTS and MOVED name no host."""
    settings = {"cluster-preferred-endpoint-type": "unknown-endpoint"}
    async with own_cluster(masters=2, replicas=0, settings=settings) as cluster, Store(cluster.uri) as store:
        for tag in TAGS:
            await store.call("SET", tag, "x", key=tag)
        first, second = ((node.host, node.port) for node in cluster.nodes)
        owners = store._topology._owners
        owners[:] = [second if owner == first else first for owner in owners]  # all wrong
        for tag in TAGS:
            assert await store.call("GET", tag, key=tag) == b"x"
        assert store.stats.moved == len(TAGS)


async def test_nodes_with_names_that_only_they_know() -> None:
    """`address_remap`: what the nodes call themselves is turned into what can be dialled."""
    settings = {"cluster-preferred-endpoint-type": "hostname", "cluster-announce-hostname": "redis.invalid"}
    async with own_cluster(masters=2, replicas=0, settings=settings) as cluster:
        options = RedisClusterClientOpt(addrs=cluster.addrs[:1], address_remap={"redis.invalid": "127.0.0.1"})
        async with Store(options) as store:
            for tag in TAGS:
                await store.call("SET", tag, "x", key=tag)
            assert {lane.address for lane in store.lanes} == {(node.host, node.port) for node in cluster.nodes}


async def test_a_cluster_url_at_a_single_server() -> None:
    """An error at once, that names the right option."""
    async with own_standalone() as server, Store(f"redis-cluster://{server.addr}") as store:
        with pytest.raises(ConfigError, match=rf"{server.addr} is a single Redis server.*RedisClientOpt.*redis://"):
            await store.call("GET", "{a}", key="{a}")
        with pytest.raises(ConfigError, match="single Redis server"):
            await store.check()


async def test_a_single_servers_url_at_a_cluster(cluster: EmbeddedCluster) -> None:
    """The same, by `check`, and by the first call that is redirected."""
    async with Store(RedisClientOpt(cluster.nodes[0].addr)) as store:
        with pytest.raises(ConfigError, match=r"node of a Redis Cluster.*RedisClusterClientOpt.*redis-cluster://"):
            await store.check()
        with pytest.raises(ConfigError, match="RedisClusterClientOpt"):
            await asyncio.gather(*(store.call("GET", tag, key=tag) for tag in TAGS))


async def test_a_cluster_with_another_password() -> None:
    """An error at once: no later refresh would mend it."""
    settings = {"requirepass": "right", "masterauth": "right"}
    async with own_cluster(masters=2, replicas=0, settings=settings) as cluster:
        async with Store(RedisClusterClientOpt(addrs=cluster.addrs, password="wr0ng")) as store:
            with pytest.raises(BrokerAuthError, match="check the user name and the password"):
                await store.call("GET", "{a}", key="{a}")
        async with Store(RedisClusterClientOpt(addrs=cluster.addrs, password="right")) as store:
            assert await store.call("GET", "{a}", key="{a}") is None


async def test_no_sentinel_answers() -> None:
    """At the deadline, an error that names the sentinels."""
    async with own_standalone() as gone:
        pass
    options = RedisFailoverClientOpt(
        master_name="mymaster", sentinel_addrs=[gone.addr], deadline=timedelta(seconds=0.4)
    )
    async with Store(options) as store:
        with pytest.raises(BrokerUnavailableError, match=rf"no master found .*'mymaster'.*{gone.port}"):
            await store.ping()
