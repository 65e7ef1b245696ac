"""People look and steer: `Inspector`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asynq_aio._broker import cancel
from asynq_aio._config import join_address
from asynq_aio._door import Door
from asynq_aio._wire import keys
from asynq_aio.errors import BrokerError, ConfigError, InvalidTaskError, NotFoundError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from asynq_aio._broker.connect import RedisClient
    from asynq_aio._config import RedisConnOpt

__all__ = ["ClusterNode", "Inspector"]


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """One node of a Redis Cluster."""

    id: str
    """40 hex digits."""
    addr: str
    """`host:port`, as the cluster announces it."""

    def __str__(self) -> str:
        return f"{self.id} {self.addr}"


class Inspector:
    """Looks at queues and steers tasks. One object serves any number of concurrent callers of one event loop.

    `redis` as for `Client`. Connects when first used.

    Raises:
        ConfigError: `redis` cannot be right.
    """

    def __init__(self, redis: RedisConnOpt | str | RedisClient | None = None) -> None:
        self._door = Door(redis, "Inspector")

    def __repr__(self) -> str:
        return f"<Inspector of {self._door.description}>"

    async def __aenter__(self) -> Self:
        self._door.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def queues(self) -> list[str]:
        """The names of all queues that have ever had a task and were not deleted, sorted.

        Redis:
            asynq:queues    SET    read
        Source:
            hibiken/asynq 0.26, inspector.go: Inspector.Queues
        """
        names = await self._door.enter().call("SMEMBERS", keys.QUEUES, key=keys.QUEUES)
        return sorted(name.decode(errors="replace") for name in names)

    def cluster_key_slot(self, queue: str) -> int:
        """The slot of a Redis Cluster in which all keys of the queue lie, 0 to 16383; computed here, without Redis.

        Raises:
            ConfigError: the name is blank.
        """
        return keys.queue_slot(_checked(queue))

    async def cluster_nodes(self, queue: str) -> list[ClusterNode]:
        """The nodes that hold the queue: the master, then its replicas.

        Raises:
            ConfigError: this is no cluster, or the name is blank.
            NotFoundError: no node serves the slot.
        Source:
            hibiken/asynq 0.26, inspector.go: Inspector.ClusterNodes
        """
        store = self._door.enter()
        slot = keys.queue_slot(_checked(queue))
        if not store.is_cluster:
            raise ConfigError(
                f"{store.description} is no Redis Cluster, so its queues have no cluster nodes; expected"
                " RedisClusterClientOpt, or a URI that begins with redis-cluster://"
            )
        for first, last, *nodes in await store.call("CLUSTER", "SLOTS", key=None):
            if first <= slot <= last:
                return [_node(host, port, node_id) for host, port, node_id, *_ in nodes]
        raise NotFoundError(f"nodes not found: no node of {store.description} serves slot {slot} of queue {queue!r}")

    async def cancel(self, task_id: str) -> None:
        """Ask whichever server runs this task to cancel its handler.

        A message, no more: that it was sent says nothing about whether somebody runs the task.

        Raises:
            InvalidTaskError: the ID is blank.
        """
        if not task_id.strip():
            raise InvalidTaskError("task ID cannot be empty")
        await cancel.publish(self._door.enter(), task_id)

    async def ping(self) -> None:
        """Return when Redis has answered; of a cluster, any node.

        Raises:
            BrokerUnavailableError: out of reach until the deadline.
            BrokerAuthError: it does not let us in.
            RuntimeError: the inspector is closed, or belongs to another event loop.
        """
        await self._door.enter().ping()

    async def aclose(self) -> None:
        """Close the connections; only what this inspector has opened, never a redis-py client that was handed in.

        Raises:
            RuntimeError: the inspector belongs to another event loop.
        """
        store = self._door.close()
        if store is not None:
            await store.aclose()


def _checked(queue: str) -> str:
    if not queue.strip():
        raise ConfigError("queue name must contain one or more characters")
    return queue


def _node(host: bytes | None, port: int, node_id: bytes) -> ClusterNode:
    if not host:
        raise BrokerError(
            f"node {node_id.decode()} announces no address (cluster-preferred-endpoint-type unknown-endpoint); expected"
            " one that has cluster-announce-ip or cluster-announce-hostname"
        )
    return ClusterNode(node_id.decode(), join_address(host.decode(), port))
