"""A private Redis Cluster: made in seconds, agreed upon by all its nodes, and able to move a slot."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
from redis.exceptions import RedisError

from asynq_aio._broker.embedded.server import EmbeddedRedis, in_thread
from asynq_aio.errors import BrokerUnavailableError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

__all__ = ["EmbeddedCluster"]

SLOTS: Final = 16_384
AGREE_SECONDS: Final = 30.0
_JOIN_TIMEOUT_MS: Final = "500"
_MIGRATE_MILLISECONDS: Final = 60_000


class EmbeddedCluster:
    """Some masters, each with its replicas; `async with EmbeddedCluster() as cluster:`, or `start()` and `stop()`.

    Args:
        masters: How many; the slots are divided evenly.
        replicas: Of each master.
        ports: One for each node, masters first. None: free ones.
        node_timeout_ms: After how long a silent node counts as failed. Busy cores miss pings: 15,000 in tests.
        directory: Where each node has a directory named by its number, kept at the end. None: temporary ones.
        settings: Further lines of every node's configuration.
        binary: Another server than the one of `find_binary()`.
        lifeline: As in `EmbeddedRedis`.

    Attributes:
        nodes: All servers, first masters, then their replicas, as they were made; a failover changes roles.
    """

    def __init__(
        self,
        masters: int = 3,
        replicas: int = 1,
        *,
        ports: Sequence[int] | None = None,
        node_timeout_ms: int = 5000,
        directory: Path | None = None,
        settings: Mapping[str, str] | None = None,
        binary: Path | None = None,
        lifeline: Path | None = None,
    ) -> None:
        count = masters * (1 + replicas)
        if masters < 1 or replicas < 0:
            raise ConfigError(f"masters={masters}, replicas={replicas}: expected masters >= 1 and replicas >= 0")
        if ports is not None and len(ports) != count:
            raise ConfigError(f"{len(ports)} ports; expected {count}: {masters} masters with {replicas} replicas each")
        self._masters = masters
        self.nodes = [
            EmbeddedRedis(
                port=None if ports is None else ports[number],
                appendonly=True,
                directory=None if directory is None else directory / str(number),
                settings={
                    "cluster-enabled": "yes",
                    "cluster-config-file": "nodes.conf",
                    "cluster-node-timeout": str(node_timeout_ms),
                    **(settings or {}),
                },
                binary=binary,
                lifeline=lifeline,
            )
            for number in range(count)
        ]

    @property
    def addrs(self) -> list[str]:
        """`host:port` of every node."""
        return [node.addr for node in self.nodes]

    @property
    def uri(self) -> str:
        """What `Client(...)` takes."""
        return f"redis-cluster://{','.join(self.addrs)}"

    # Life

    def start(self) -> None:
        """Start the nodes, join them, and wait until all of them agree and every replica is linked.

        Raises:
            BrokerUnavailableError: a node did not start, or they did not agree; the text says which, or on what.
        """
        try:
            for node in self.nodes:
                node.launch()
            self._on_all(EmbeddedRedis.wait)
            self._join()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all nodes."""
        self._on_all(EmbeddedRedis.stop)

    async def __aenter__(self) -> Self:
        await in_thread(self.start, undo=self.stop)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.stop)

    def _on_all(self, action: Callable[[EmbeddedRedis], None]) -> None:
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            for outcome in [pool.submit(action, node) for node in self.nodes]:
                outcome.result()

    def _join(self) -> None:
        masters, replicas = self.nodes[: self._masters], self.nodes[self._masters :]
        # Nodes ping each other at least every half of the timeout, and what one does not know yet comes with a ping:
        # with 5 s the wait below lasts up to 8 s on busy cores. A node that is late meanwhile must not be replaced.
        final = self._configure({"cluster-node-timeout": _JOIN_TIMEOUT_MS, "cluster-replica-no-failover": "yes"})
        for number, node in enumerate(masters):
            first, end = (SLOTS * n // self._masters for n in (number, number + 1))
            node.execute("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for number, node in enumerate(self.nodes):
            node.execute("CLUSTER", "SET-CONFIG-EPOCH", number + 1)  # else they collide, and settle it in rounds
        for number, node in enumerate(self.nodes):
            for other in self.nodes[number + 1 :]:  # gossip would find the others, but seconds later
                node.execute("CLUSTER", "MEET", other.host, other.port)
        everybody = {self.node_id(node) for node in self.nodes}
        self._wait("all nodes know each other", lambda: all(self._knows(node, everybody) for node in self.nodes))
        for number, node in enumerate(replicas):
            node.execute("CLUSTER", "REPLICATE", self.node_id(masters[number % self._masters]))
        self.wait_until_agreed()
        self._configure(final)

    def _configure(self, settings: Mapping[str, str]) -> dict[str, str]:
        """Change settings of all nodes; returns what they were."""
        before = {name: self.nodes[0].execute("CONFIG", "GET", name)[1] for name in settings}
        for node in self.nodes:
            for name, value in settings.items():
                node.execute("CONFIG", "SET", name, value)
        return before

    def _knows(self, node: EmbeddedRedis, everybody: set[str]) -> bool:
        rows = self._rows(node)
        return {row[0] for row in rows} == everybody and not any("handshake" in row[2] for row in rows)

    # What the nodes say

    def node_id(self, node: EmbeddedRedis) -> str:
        """The node's own name for itself."""
        return str(node.execute("CLUSTER", "MYID"))

    def node_at(self, port: int) -> EmbeddedRedis:
        """The node on this port."""
        return next(node for node in self.nodes if node.port == port)

    def masters(self) -> list[EmbeddedRedis]:
        """The running nodes that say that they are masters and have slots."""
        return [node for node in self.nodes if node.running and self._own_slots(node)]

    def owner(self, slot: int) -> EmbeddedRedis:
        """The master that says that this slot is its own."""
        for node in self.masters():
            if slot in self._own_slots(node):
                return node
        raise BrokerUnavailableError(f"no running node owns slot {slot}")

    def replicas_of(self, master: EmbeddedRedis) -> list[EmbeddedRedis]:
        """The nodes that this master counts as its replicas."""
        name = self.node_id(master)
        return [self.node_at(_port(row)) for row in self._rows(master) if row[3] == name]

    def wait_until_agreed(self) -> None:
        """Wait until all running nodes have the same masters, replicas and slots, and every replica is linked."""
        self._wait("all nodes agree and every replica is linked", self._agreed)

    def _agreed(self) -> bool:
        views = set()
        for node in self.nodes:
            if not node.running:
                continue
            rows = self._rows(node)
            if "cluster_state:ok" not in node.execute("CLUSTER", "INFO") or any("?" in row[2] for row in rows):
                return False
            # Replicas, too, as CLUSTER SLOTS would show them: name, role, master, slots (open ones are [in brackets]).
            views.add(frozenset((row[0], "master" in row[2], row[3], *_ranges(row)) for row in rows))
            replication = node.execute("INFO", "replication")
            if "role:slave" in replication and "master_link_status:up" not in replication:
                return False
        return len(views) == 1

    def _own_slots(self, node: EmbeddedRedis) -> set[int]:
        mine = next(row for row in self._rows(node) if "myself" in row[2])
        if "master" not in mine[2]:
            return set()
        slots: set[int] = set()
        for text in _ranges(mine):
            first, _, last = text.partition("-")
            slots.update(range(int(first), int(last or first) + 1))
        return slots

    def _rows(self, node: EmbeddedRedis) -> list[list[str]]:
        """CLUSTER NODES: id, address, flags, master, ping, pong, epoch, link, slots ..."""
        return [line.split() for line in str(node.execute("CLUSTER", "NODES")).splitlines()]

    def _wait(self, what: str, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + AGREE_SECONDS
        while True:
            cause = ""
            try:
                if holds():
                    return
            except RedisError as exc:  # a node that is loading, or just being restarted
                cause = f" ({exc})"
            if time.monotonic() > until:
                raise BrokerUnavailableError(f"not so after {AGREE_SECONDS:g} s: {what}{cause}")
            time.sleep(0.05)

    # Moving a slot

    async def move_slot(self, slot: int, target: EmbeddedRedis, *, batch: int = 100) -> int:
        """Move a slot with its keys to another master, as redis-cli does: nobody needs to stop working meanwhile.

        Returns:
            How many keys were moved.
        Raises:
            ResponseError: a node refused a step, for example BUSYKEY: the target has a key of that name already. The
                slot is open then: `begin_move` names it, `finish_move` or `abort_move` close it.
        """
        run = anyio.to_thread.run_sync
        if await run(self.owner, slot) is target:
            return 0
        source = await run(self.begin_move, slot, target)
        moved = 0
        while keys := await run(self.keys_in, source, slot, batch):
            await run(self.move_keys, source, target, keys)
            moved += len(keys)
        await run(self.finish_move, slot, source, target)
        return moved

    def begin_move(self, slot: int, target: EmbeddedRedis) -> EmbeddedRedis:
        """Open the slot on both sides; returns its owner."""
        source = self.owner(slot)
        target.execute("CLUSTER", "SETSLOT", slot, "IMPORTING", self.node_id(source))
        source.execute("CLUSTER", "SETSLOT", slot, "MIGRATING", self.node_id(target))
        return source

    def keys_in(self, node: EmbeddedRedis, slot: int, limit: int = 100) -> list[str]:
        """Names of keys of this slot that are at this node; at most `limit`."""
        found: list[str] = node.execute("CLUSTER", "GETKEYSINSLOT", slot, limit)
        return found

    def move_keys(self, source: EmbeddedRedis, target: EmbeddedRedis, keys: Sequence[str]) -> None:
        """Move these keys; those that are gone meanwhile do not matter."""
        source.execute("MIGRATE", target.host, target.port, "", 0, _MIGRATE_MILLISECONDS, "KEYS", *keys)

    def finish_move(self, slot: int, source: EmbeddedRedis, target: EmbeddedRedis) -> None:
        """Close the slot: the target owns it. All keys must have moved: what is left at the source is deleted by it.

        The target is told first: else nobody would own the slot for a moment.
        """
        owner = self.node_id(target)
        others = [node for node in self.masters() if node not in (source, target)]
        for node in (target, source, *others):
            node.execute("CLUSTER", "SETSLOT", slot, "NODE", owner)

    def abort_move(self, slot: int, source: EmbeddedRedis, target: EmbeddedRedis) -> None:
        """Close the slot: the source keeps it, and gets back the keys that had moved."""
        source.execute("CLUSTER", "SETSLOT", slot, "STABLE")  # first: a slot that migrates takes no keys
        while keys := self.keys_in(target, slot):
            self.move_keys(target, source, keys)
        target.execute("CLUSTER", "SETSLOT", slot, "STABLE")


def _port(row: Sequence[str]) -> int:
    """Of `127.0.0.1:7000@17000,hostname`."""
    return int(row[1].partition("@")[0].rpartition(":")[2])


def _ranges(row: Sequence[str]) -> list[str]:
    """The slots that are owned, as `0-5460`; those that are moving stand in brackets behind them."""
    return [text for text in row[8:] if not text.startswith("[")]
