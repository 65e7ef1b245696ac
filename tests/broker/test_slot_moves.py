"""Slots that move under many callers: redis-py's cluster client fails at it and repeats calls; the store does not.

Two masters and the true sequence: SETSLOT IMPORTING and MIGRATING, MIGRATE for the keys, SETSLOT NODE on both.
"""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest
import redis.asyncio
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import ResponseError

from asynq_aio._broker.embedded import EmbeddedCluster
from asynq_aio._broker.store import Store
from asynq_aio._wire import keys
from asynq_aio.errors import BrokerUnavailableError
from tests.broker.scenes import COUNT, COUNT_MANY, Crowd, all_given_back, until
from tests.servers import binary, own_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Version

CALLERS = 64
SLOT = keys.slot("{move}")


@pytest.fixture(scope="module", params=["valkey9", "redis7"])
def cluster(request: pytest.FixtureRequest) -> Iterator[EmbeddedCluster]:
    """Two masters, to move slots between."""
    made = EmbeddedCluster(masters=2, replicas=0, node_timeout_ms=15_000, binary=binary(request.param))
    made.start()
    yield made
    made.stop()


async def move_to_and_fro(cluster: EmbeddedCluster, moves: int, crowd: Crowd) -> None:
    """Move the slot so often, and let some calls pass between the moves."""
    for _ in range(moves):
        owner = cluster.owner(SLOT)
        await cluster.move_slot(SLOT, next(node for node in cluster.masters() if node is not owner), batch=5)
        await crowd.more(CALLERS)


def executed(cluster: EmbeddedCluster, name: str) -> dict[str, int]:
    """How often each token was counted, over all the hashes of the callers."""
    node = cluster.owner(SLOT)
    counted: dict[str, int] = {}
    for caller in range(CALLERS):
        flat = node.execute("HGETALL", f"{{move}}:{name}:{caller}")
        counted.update(zip(flat[::2], map(int, flat[1::2]), strict=True))
    return counted


async def redis_py_under_moves(version: Version) -> tuple[str, bool]:
    """Move a slot under redis-py's cluster client until something goes wrong; what happened, and whether it did."""
    async with own_cluster(masters=2, replicas=0, version=version) as cluster:
        async with RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port) as client:

            async def call(caller: int, token: str) -> str:
                name = f"{{move}}:stock:{caller}"
                reply = await client.execute_command("EVAL", COUNT.source, 1, name, token)
                return str(reply[0].decode())

            crowd = Crowd(CALLERS, call)
            await crowd.more(CALLERS)
            twice: list[str] = []
            broken: ResponseError | None = None
            for _ in range(60):
                owner = cluster.owner(SLOT)
                try:
                    await cluster.move_slot(
                        SLOT, next(node for node in cluster.masters() if node is not owner), batch=5
                    )
                    goal = len(crowd.done) + CALLERS
                    await until(lambda goal=goal: bool(crowd.errors) or len(crowd.done) >= goal)  # type: ignore[misc]
                    twice = [token for token, times in executed(cluster, "stock").items() if times > 1]
                except ResponseError as exc:
                    # BUSYKEY: an ASKING that met another's command made a second key; ASK: and the slot stays open.
                    broken = exc
                    break
                if crowd.errors or twice:
                    break
            await crowd.stop()
        return f"{crowd.summary()}; twice: {len(twice)}; move: {broken}", bool(crowd.errors or twice or broken)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the connections that redis-py leaves behind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("version", ["valkey9", "redis7"])
def test_redis_py_fails_and_repeats_while_a_slot_moves(version: Version) -> None:
    """What the store is there for: errors for callers, calls that ran twice, or a move that breaks, in a few moves."""
    what, went_wrong = asyncio.run(redis_py_under_moves(version))
    print(what)
    gc.collect()  # while the warnings are off
    assert went_wrong, what


async def test_nothing_fails_while_a_slot_moves(cluster: EmbeddedCluster) -> None:
    """Single-key scripts: no error, nothing executed twice, every reply its caller's own, every place given back."""
    async with Store(cluster.uri) as store:

        async def call(caller: int, token: str) -> str:
            reply = await store.run(COUNT, [f"{{move}}:single:{caller}"], [token], repeatable=False)
            return str(reply[0].decode())

        crowd = Crowd(CALLERS, call)
        await crowd.more(CALLERS)
        await move_to_and_fro(cluster, 10, crowd)
        await crowd.stop()
        print(crowd.summary(), store.stats)
        await all_given_back(store)
        assert store.stats.moved > 0
    crowd.assert_right()
    assert executed(cluster, "single") == dict.fromkeys(crowd.done, 1)


async def test_nothing_fails_while_a_slot_with_scripts_of_many_keys_moves(cluster: EmbeddedCluster) -> None:
    """Scripts with several keys, one of them absent: the same, and none is ever sent with ASKING."""
    async with Store(cluster.uri) as store:

        async def call(caller: int, token: str) -> str:
            names = [f"{{move}}:many:{caller}", f"{{move}}:total:{caller}", "{move}:absent"]
            reply = await store.run(COUNT_MANY, names, [token], repeatable=False)
            return str(reply[0].decode())

        crowd = Crowd(CALLERS, call)
        await crowd.more(CALLERS)
        await move_to_and_fro(cluster, 6, crowd)
        await crowd.stop()
        print(crowd.summary(), store.stats)
        await all_given_back(store)
        assert store.stats.asked == 0
    crowd.assert_right()
    assert executed(cluster, "many") == dict.fromkeys(crowd.done, 1)


async def test_nothing_fails_while_slots_migrate_atomically() -> None:
    """Valkey 9 moves a slot as a whole: one MOVED, no ASK, and nobody notices."""
    async with own_cluster(masters=2, replicas=0, version="valkey9") as cluster:
        async with Store(cluster.uri) as store:

            async def call(caller: int, token: str) -> str:
                names = [f"{{move}}:atomic:{caller}", f"{{move}}:total:{caller}", "{move}:absent"]
                reply = await store.run(COUNT_MANY, names, [token], repeatable=False)
                return str(reply[0].decode())

            crowd = Crowd(CALLERS, call)
            await crowd.more(CALLERS)
            for _ in range(3):
                source = cluster.owner(SLOT)
                target = next(node for node in cluster.masters() if node is not source)
                source.execute("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", SLOT, SLOT, "NODE", cluster.node_id(target))
                while cluster.owner(SLOT) is not target:
                    await crowd.more(1)
                await crowd.more(CALLERS)
            await crowd.stop()
            print(crowd.summary(), store.stats)
            await all_given_back(store)
            assert store.stats.moved > 0
            assert store.stats.asked == 0
        crowd.assert_right()
        assert executed(cluster, "atomic") == dict.fromkeys(crowd.done, 1)


async def test_an_aborted_move_ends_well(cluster: EmbeddedCluster) -> None:
    """Scripts with several keys wait while the slot is open, and go on when it is closed, even where it was."""
    async with Store(cluster.uri) as store:

        async def call(caller: int, token: str) -> str:
            names = [f"{{move}}:abort:{caller}", f"{{move}}:total:{caller}", "{move}:absent"]
            reply = await store.run(COUNT_MANY, names, [token], repeatable=False)
            return str(reply[0].decode())

        crowd = Crowd(CALLERS, call)
        await crowd.more(CALLERS)
        target = next(node for node in cluster.masters() if node is not cluster.owner(SLOT))
        source = cluster.begin_move(SLOT, target)
        cluster.move_keys(source, target, cluster.keys_in(source, SLOT, 20))
        repeats = store.stats.repeats
        await until(lambda: store.stats.repeats >= repeats + CALLERS)  # they have met the open slot
        cluster.abort_move(SLOT, source, target)
        await crowd.more(CALLERS)
        await crowd.stop()
        await all_given_back(store)
    crowd.assert_right()
    assert executed(cluster, "abort") == dict.fromkeys(crowd.done, 1)


async def test_an_open_slot_is_named_at_the_deadline(cluster: EmbeddedCluster) -> None:
    """A move that nobody ends: the error says what was in the way; other queues go on."""
    target = next(node for node in cluster.masters() if node is not cluster.owner(SLOT))
    source = cluster.begin_move(SLOT, target)
    try:
        async with Store(cluster.uri) as store:
            with pytest.raises(BrokerUnavailableError, match=rf"within 0.3 s: 127\.0\.0\.1:\d+ said ASK {SLOT}"):
                await store.run(COUNT_MANY, ["{move}:a", "{move}:b", "{move}:c"], ["x"], deadline=0.3)
            assert await store.run(COUNT_MANY, ["{other}:a", "{other}:b", "{other}:c"], ["x"]) == [b"x", 1]
            await all_given_back(store)
    finally:
        cluster.abort_move(SLOT, source, target)


async def test_no_call_takes_the_way_of_the_cluster_client(
    cluster: EmbeddedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py's cluster client repeats calls and closes connections, so it runs nothing, even when it is handed in."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a call went through redis-py's client")

    client = RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port)
    for owner in (redis.asyncio.Redis, RedisCluster):
        monkeypatch.setattr(owner, "execute_command", refuse)
        monkeypatch.setattr(owner, "pipeline", refuse)
    async with Store(client) as store:
        await store.check()
        await store.ping()
        assert await store.run(COUNT, ["{a}:way"], ["x"]) == [b"x", 1]
        assert await store.call("LPUSH", "{a}:list", "x", key="{a}:list") == 1
        async with store.waiter("{a}:list") as waiter, await store.subscribe("channel") as subscription:
            assert await waiter.wait(5)
            await store.call("PUBLISH", "channel", "x", key=None)
            assert await anext(subscription) == ("channel", b"x")
    await client.aclose()
