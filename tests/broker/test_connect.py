"""From options, URIs and clients to connections: what is copied, what is dialled, and who the master is."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.cluster
import redis.sentinel
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from asynq_aio._broker.connect import ConnectionSettings, settings_of
from asynq_aio._config import EMBEDDED, RedisClientOpt, RedisClusterClientOpt, RedisFailoverClientOpt
from asynq_aio.errors import ConfigError
from tests.broker.own_server import free_port, own_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio.connection import AbstractConnection

    from asynq_aio._config import Address

SECRET = "s3cr3t"


async def ask(connection: AbstractConnection, *command: str) -> Any:
    """Connect, send one command, disconnect; its reply."""
    try:
        await connection.connect_check_health()
        await connection.send_command(*command)
        return await connection.read_response()
    finally:
        await connection.disconnect()


async def ask_seed(settings: ConnectionSettings, *command: str) -> Any:
    """The same, to the first seed."""
    return await ask(settings.connection(*settings.seeds[0]), *command)


# What the settings say


def test_settings_of_options() -> None:
    """Each kind of option gives its kind, seeds and times; the description says what is meant, and nothing secret."""
    one = settings_of(
        RedisClientOpt(
            "h:1",
            db=2,
            username="u",
            password=SECRET,
            tls=True,
            connect_timeout=timedelta(seconds=1),
            read_timeout=timedelta(seconds=2),
            deadline=timedelta(seconds=3),
        )
    )
    assert (one.kind, one.seeds) == ("standalone", [("h", 1)])
    assert (one.connect_timeout, one.reply_timeout, one.deadline) == (1, 2, 3)
    assert one.description == "Redis at h:1 (TLS, database 2)"
    group = settings_of(
        RedisFailoverClientOpt(
            master_name="m", sentinel_addrs=["h", "[::1]:5"], password=SECRET, sentinel_password=SECRET, db=3
        )
    )
    assert (group.kind, group.seeds, group.master_name) == ("sentinel", [("h", 26379), ("::1", 5)], "m")
    assert group.description == "Redis master 'm' of the sentinels h:26379,[::1]:5 (database 3)"
    cluster = settings_of(RedisClusterClientOpt(addrs=["h1", "h2:7"], password=SECRET))
    assert (cluster.kind, cluster.seeds) == ("cluster", [("h1", 6379), ("h2", 7)])
    assert cluster.description == "Redis Cluster at h1:6379,h2:7"
    for settings in (one, group, cluster):
        assert SECRET not in f"{settings!r}{settings}"


@pytest.mark.parametrize(
    ("uri", "kind", "seeds", "description"),
    [
        ("h:1", "standalone", [("h", 1)], "Redis at h:1"),
        ("/run/r.sock", "standalone", [("/run/r.sock", 0)], "Redis at /run/r.sock"),
        ("unix:///r.sock?db=1", "standalone", [("/r.sock", 0)], "Redis at /r.sock (database 1)"),
        ("embedded://", "standalone", [(EMBEDDED, 0)], "Redis at a private server"),
        ("redis-sentinel://h", "sentinel", [("h", 26379)], "Redis master 'mymaster' of the sentinels h:26379"),
        ("rediss-cluster://h", "cluster", [("h", 6379)], "Redis Cluster at h:6379 (TLS)"),
    ],
)
def test_settings_of_uris(uri: str, kind: str, seeds: list[Address], description: str) -> None:
    """A URI stands for the option that it is read as."""
    settings = settings_of(uri)
    assert (settings.kind, settings.seeds, settings.description) == (kind, seeds, description)


@pytest.mark.parametrize("target", [None, 7, b"redis://h", object(), redis.ConnectionPool(), ["h:1"]])
def test_anything_else_is_refused(target: Any) -> None:
    """What is neither option, URI nor client is named by its type."""
    with pytest.raises(ConfigError, match=f"{type(target).__name__}; expected a URI, RedisClientOpt"):
        settings_of(target)


def test_connections_are_plain() -> None:
    """RESP2, no decoding, no retries, no health checks, the times of the settings; nothing is dialled."""
    settings = settings_of("redis://:pw@h:1/2?connect_timeout=1.5&read_timeout=2.5")
    for connection in (settings.connection("h", 1), settings.connection("/r.sock", 0)):
        assert connection.protocol == 2
        assert connection.encoder.decode_responses is False
        assert connection.retry.get_retries() == 0
        assert connection.health_check_interval == 0
        assert (connection.socket_connect_timeout, connection.socket_timeout) == (1.5, 2.5)
        assert connection.db == 2
        assert not connection.is_connected
        assert "Hiredis" in type(connection._parser).__name__


# Clients that were handed in


@pytest.mark.parametrize("module", [redis.asyncio, redis])
def test_settings_of_a_client(module: Any) -> None:
    """Address, database and times of a client are copied, async or sync; the rest of it is ours."""
    client = module.Redis(
        host="h",
        port=1,
        db=2,
        socket_timeout=7,
        socket_connect_timeout=8,
        client_name="mine",
        decode_responses=True,
        socket_keepalive=False,
        health_check_interval=9,
        protocol=3,
    )
    before = dict(client.connection_pool.connection_kwargs)
    settings = settings_of(client)
    assert (settings.kind, settings.seeds, settings.deadline) == ("standalone", [("h", 1)], 30)
    assert (settings.connect_timeout, settings.reply_timeout) == (8, 7)
    connection: Any = settings.connection("h", 1)
    assert (connection.db, connection.encoder.decode_responses, connection.get_protocol()) == (2, False, 2)
    assert connection.socket_keepalive is False
    assert connection.health_check_interval == 0
    assert connection.name_for_server == "mine"
    assert client.connection_pool.connection_kwargs == before
    assert settings_of(module.Redis(socket_timeout=None, socket_connect_timeout=None)).reply_timeout == 5
    assert settings_of(module.Redis(unix_socket_path="/r.sock", db=3)).seeds == [("/r.sock", 0)]
    assert settings_of(module.Redis.from_url("unix:///r.sock?db=3")).description == "Redis at /r.sock (database 3)"
    assert settings_of(module.Redis.from_url("redis://h:5/6")).description == "Redis at h:5 (database 6)"


@pytest.mark.parametrize("module", [redis.asyncio.sentinel, redis.sentinel])
def test_settings_of_a_client_of_sentinel(module: Any) -> None:
    """`master_for` gives the sentinels with their login, and the login of the servers; `slave_for` cannot write."""
    sentinel = module.Sentinel(
        [("h1", 1), ("h2", 2)], sentinel_kwargs={"password": "sp"}, password=SECRET, socket_timeout=3
    )
    settings = settings_of(sentinel.master_for("m", db=4))
    assert (settings.kind, settings.seeds, settings.master_name) == ("sentinel", [("h1", 1), ("h2", 2)], "m")
    assert settings.reply_timeout == 3
    assert (settings.dial.db, settings.sentinel_dial.db) == (4, 0)
    assert settings.dial.credentials is not None
    assert settings.dial.credentials.get_credentials() == (SECRET,)
    assert settings.sentinel_dial.credentials is not None
    assert settings.sentinel_dial.credentials.get_credentials() == ("sp",)
    assert SECRET not in repr(settings)
    secure = settings_of(module.Sentinel([("h", 1)], ssl=True).master_for("m"))
    assert (secure.dial.tls is None, secure.sentinel_dial.tls is None) == (False, True)
    with pytest.raises(ConfigError, match=r"slave_for\(\), which cannot write"):
        settings_of(sentinel.slave_for("m"))
    with pytest.raises(ConfigError, match="without sentinels"):
        settings_of(module.Sentinel([]).master_for("m"))


@pytest.mark.parametrize("module", [redis.asyncio, redis])
def test_clients_that_cannot_be_copied(module: Any) -> None:
    """A hook at connect, and connections that are not redis-py's, are refused rather than dropped."""

    def hook(connection: object) -> None:
        """Nothing."""

    class Odd:
        """No connection of redis-py's."""

        def __init__(self, **_: object) -> None:
            """Takes anything."""

    with pytest.raises(ConfigError, match="redis_connect_func"):
        settings_of(module.Redis(redis_connect_func=hook))
    pool = module.ConnectionPool(connection_class=Odd)
    with pytest.raises(ConfigError, match=r"Odd; expected redis-py's own"):
        settings_of(module.Redis(connection_pool=pool))


async def test_settings_of_an_async_cluster_client() -> None:
    """Seeds, login, TLS and remapping of a cluster client are copied, before it has dialled anything."""
    nodes = [redis.asyncio.cluster.ClusterNode("h1", 1), redis.asyncio.cluster.ClusterNode("h2", 2)]
    client = redis.asyncio.cluster.RedisCluster(
        startup_nodes=nodes,
        username="u",
        password=SECRET,
        ssl=True,
        address_remap=lambda address: ("x", address[1]),
        load_balancing_strategy=redis.cluster.LoadBalancingStrategy.ROUND_ROBIN,
        socket_timeout=7,
    )
    settings = settings_of(client)
    assert (settings.kind, settings.seeds, settings.reply_timeout) == ("cluster", [("h1", 1), ("h2", 2)], 7)
    assert settings.remap("h1", 1) == ("x", 1)
    assert settings.dial.tls is not None
    assert settings.dial.credentials is not None
    assert settings.dial.credentials.get_credentials() == ("u", SECRET)
    assert SECRET not in repr(settings)
    assert settings.connection("h1", 1).protocol == 2
    from_url = redis.asyncio.cluster.RedisCluster.from_url("rediss://:pw@h:7")
    assert settings_of(from_url).description == "Redis Cluster at h:7 (TLS)"


async def test_cluster_clients_against_a_cluster() -> None:
    """A cluster client that is in use, sync or async, is copied with its login; it stays as it was, and open."""
    port, bus = free_port(), free_port()
    lines = (f"port {port}", "cluster-enabled yes", f"cluster-port {bus}", f"requirepass {SECRET}")
    async with own_server(*lines) as directory:
        assert (directory / "nodes.conf").exists()
        assert await ask_seed(
            settings_of(f"redis://:{SECRET}@127.0.0.1:{port}"), "CLUSTER", "ADDSLOTSRANGE", "0", "16383"
        )
        while b"cluster_state:ok" not in await ask_seed(  # noqa: ASYNC110  (another process's state)
            settings_of(f"redis://:{SECRET}@127.0.0.1:{port}"), "CLUSTER", "INFO"
        ):
            await asyncio.sleep(0.02)
        async with redis.asyncio.cluster.RedisCluster(host="127.0.0.1", port=port, password=SECRET) as client:
            settings = settings_of(client)
            assert settings.seeds == [("127.0.0.1", port)]
            assert await ask_seed(settings, "PING") == b"PONG"
            assert await client.ping()
        for login in (
            {"password": SECRET},
            {"credential_provider": redis.UsernamePasswordCredentialProvider(password=SECRET)},
        ):
            sync = redis.cluster.RedisCluster(host="127.0.0.1", port=port, **login)
            with sync:
                settings = settings_of(sync)
                assert settings.seeds == [("127.0.0.1", port)]
                assert await ask_seed(settings, "PING") == b"PONG"
                assert SECRET not in repr(settings)
                assert sync.ping()


# Dialling


async def test_tcp_and_unix_socket() -> None:
    """Both are dialled, named, and set to their database; `decode_responses` of a client does not matter."""
    port = free_port()
    async with own_server(f"port {port}", "unixsocket redis.sock") as directory:
        path = f"{directory}/redis.sock"
        for target in (
            f"redis://127.0.0.1:{port}/3",
            f"unix://{path}?db=3",
            RedisClientOpt(path, db=3),
            redis.asyncio.Redis(port=port, db=3, decode_responses=True),
            redis.Redis(unix_socket_path=path, db=3, decode_responses=True),
        ):
            shown = await ask_seed(settings_of(target), "CLIENT", "INFO")
            assert b" name=asynq-aio " in shown
            assert b" db=3 " in shown
            assert b" resp=2" in shown


async def test_refusals_over_a_unix_socket() -> None:
    """A wrong password keeps its class there, the handshake happens once, and no socket stays open."""
    async with own_server("port 0", "unixsocket redis.sock", "requirepass right") as directory:
        path = f"{directory}/redis.sock"
        connection = settings_of(RedisClientOpt(path, password=SECRET)).connection(path, 0)
        with pytest.raises(AuthenticationError, match="invalid username-password"):
            await connection.connect_check_health()
        assert not connection.is_connected
        settings = settings_of(RedisClientOpt(path, password="right"))
        stats = await ask_seed(settings, "INFO", "commandstats")
        assert b"cmdstat_auth:calls=2," in stats  # the refused one and this
        with pytest.raises(RedisConnectionError, match=r"none\.sock"):
            await settings.connection(f"{directory}/none.sock", 0).connect_check_health()


async def test_ipv6() -> None:
    """Brackets are for texts; what is dialled is the address."""
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = int(probe.getsockname()[1])
    async with own_server(f"port {port}", "bind ::1"):
        for target in (f"[::1]:{port}", f"redis://[::1]:{port}/0", RedisClientOpt(f"[::1]:{port}")):
            settings = settings_of(target)
            assert settings.seeds == [("::1", port)]
            assert await ask_seed(settings, "PING") == b"PONG"
        with pytest.raises(RedisConnectionError, match="::1"):
            await settings.connection("::1", free_port()).connect_check_health()


async def test_a_cancelled_handshake_leaves_no_socket() -> None:
    """Whoever gives up while a silent server owes an answer to AUTH leaves nothing behind."""
    heard = asyncio.Event()
    closed: asyncio.Queue[None] = asyncio.Queue()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        heard.set()
        while await reader.read(1000):
            """Swallow all until the other side closes."""
        writer.close()
        await writer.wait_closed()
        closed.put_nowait(None)

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        connection = settings_of(f"redis://:pw@127.0.0.1:{port}").connection("127.0.0.1", port)
        child = asyncio.create_task(connection.connect_check_health())
        await heard.wait()
        child.cancel()
        with pytest.raises(asyncio.CancelledError):
            await child
        assert not connection.is_connected
        await closed.get()
        slow = settings_of(f"redis://:pw@127.0.0.1:{port}?read_timeout=50ms").connection("127.0.0.1", port)
        with pytest.raises(RedisError, match="Timeout reading"):
            await slow.connect_check_health()
        assert not slow.is_connected
        await closed.get()
    del connection, slow, child
    gc.collect()  # an open one would warn here, and warnings are errors


def test_embedded_server_starts_with_the_first_connection() -> None:
    """`embedded://` is one private server per process, started when it is first dialled and gone with the process."""
    program = """
import asyncio
from asynq_aio._broker.connect import settings_of

async def ask(uri, *command):
    settings = settings_of(uri)
    connection = settings.connection(*settings.seeds[0])
    await connection.connect_check_health()
    await connection.send_command(*command)
    reply = await connection.read_response()
    await connection.disconnect()
    return reply

async def pid(uri):
    info = await ask(uri, "INFO", "server")
    return next(line for line in info.decode().splitlines() if line.startswith("process_id:"))

first, second = asyncio.run(pid("embedded://")), asyncio.run(pid("embedded://?db=3"))
assert first == second
print(first.partition(":")[2])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    with pytest.raises(ProcessLookupError):
        os.kill(int(ran.stdout), 0)


# Sentinel


@asynccontextmanager
async def sentinel_group(
    *, redis_lines: tuple[str, ...] = (), sentinel_lines: tuple[str, ...] = (), sentinels: int = 1, password: str = ""
) -> AsyncIterator[tuple[int, int, list[int]]]:
    """A master, a replica and sentinels that watch it as `main`; gives their ports."""
    async with AsyncExitStack() as stack:
        master, replica = free_port(), free_port()
        auth = [f"requirepass {password}", f"masterauth {password}"] if password else []
        await stack.enter_async_context(own_server(f"port {master}", *redis_lines, *auth))
        await stack.enter_async_context(
            own_server(f"port {replica}", f"replicaof 127.0.0.1 {master}", *redis_lines, *auth)
        )
        ports = []
        for _ in range(sentinels):
            ports.append(free_port())
            await stack.enter_async_context(
                own_server(
                    f"port {ports[-1]}",
                    f"sentinel monitor main 127.0.0.1 {master} 1",
                    *([f"sentinel auth-pass main {password}"] if password else []),
                    *sentinel_lines,
                    sentinel=True,
                )
            )
        yield master, replica, ports


async def test_discovers_the_master() -> None:
    """The master is found though some sentinels are dead, and its address is remapped."""
    async with sentinel_group(sentinels=2) as (master, replica, sentinels):
        addrs = [f"127.0.0.1:{free_port()}", *(f"127.0.0.1:{port}" for port in sentinels)]
        settings = settings_of(RedisFailoverClientOpt(master_name="main", sentinel_addrs=addrs))
        assert await settings.discover_master() == ("127.0.0.1", master)
        settings = settings_of(f"redis-sentinel://{','.join(addrs)}?master=main")
        assert await settings.discover_master() == ("127.0.0.1", master)
        for module in (redis.asyncio.sentinel, redis.sentinel):
            client = module.Sentinel([("127.0.0.1", sentinels[0])]).master_for("main")
            assert await settings_of(client).discover_master() == ("127.0.0.1", master)
        remapped = settings_of(
            RedisFailoverClientOpt(
                master_name="main",
                sentinel_addrs=addrs,
                address_remap={f"127.0.0.1:{master}": f"localhost:{master}"},
            )
        )
        assert await remapped.discover_master() == ("localhost", master)
        astray = settings_of(
            RedisFailoverClientOpt(
                master_name="main",
                sentinel_addrs=addrs,
                address_remap={f"127.0.0.1:{master}": f"127.0.0.1:{replica}"},
            )
        )
        with pytest.raises(MasterNotFoundError, match="it says that it is a replica"):
            await astray.discover_master()


async def test_no_master() -> None:
    """An unknown name, sentinels that are not there, and a Redis in place of a sentinel are told apart."""
    async with sentinel_group() as (master, _, sentinels):
        dead = free_port()
        for addrs, name, says in (
            ([f"127.0.0.1:{sentinels[0]}"], "other", "name 'other': sentinel .*No such master with that name"),
            ([f"127.0.0.1:{dead}"], "main", f"sentinel 127.0.0.1:{dead}: .*connecting to"),
            ([f"127.0.0.1:{master}"], "main", f"sentinel 127.0.0.1:{master}: .*unknown command"),
        ):
            settings = settings_of(RedisFailoverClientOpt(master_name=name, sentinel_addrs=addrs))
            with pytest.raises(MasterNotFoundError, match=says):
                await settings.discover_master()


async def test_a_failover_is_followed() -> None:
    """After a failover the new master is found, whoever is asked."""
    async with sentinel_group() as (master, replica, sentinels):
        settings = settings_of(f"redis-sentinel://127.0.0.1:{sentinels[0]}?master=main")
        assert await settings.discover_master() == ("127.0.0.1", master)
        sentinel = settings.sentinel_connection("127.0.0.1", sentinels[0])
        async with asyncio.timeout(60):
            # The sentinel hears of the replica with its next INFO to the master.
            while b"num-slaves" not in (  # noqa: ASYNC110  (another process's state)
                facts := await ask(sentinel, "SENTINEL", "MASTER", "main")
            ) or (facts[facts.index(b"num-slaves") + 1] != b"1"):
                await asyncio.sleep(0.05)
            while True:
                try:
                    await ask(sentinel, "SENTINEL", "FAILOVER", "main")
                    break
                except RedisError as exc:  # NOGOODSLAVE until the replica has been heard
                    assert "NOGOODSLAVE" in str(exc)  # noqa: PT017  (retried, not expected)
                    await asyncio.sleep(0.05)
            while True:
                try:
                    found = await settings.discover_master()
                except MasterNotFoundError:
                    continue
                if found == ("127.0.0.1", replica):
                    break
                await asyncio.sleep(0.05)


async def test_passwords_of_sentinels_and_servers() -> None:
    """Each has its own; a wrong one is an authentication error that does not tell it."""
    async with sentinel_group(password="rp", sentinel_lines=("requirepass sp",)) as (master, _, sentinels):
        addr = f"127.0.0.1:{sentinels[0]}"
        good = settings_of(f"redis-sentinel://:rp@{addr}?master=main&sentinel_password=sp")
        assert await good.discover_master() == ("127.0.0.1", master)
        for uri in (
            f"redis-sentinel://:rp@{addr}?master=main&sentinel_password={SECRET}",
            f"redis-sentinel://default:{SECRET}@{addr}?master=main&sentinel_password=sp",
            f"redis-sentinel://:{SECRET}@{addr}?master=main",
            f"redis-sentinel://{addr}?master=main",
        ):
            with pytest.raises(AuthenticationError, match="no master found under the name 'main'") as caught:
                await settings_of(uri).discover_master()
            assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("redis_password", "sentinel_lines"),
    [("pw", ()), ("", ("requirepass pw",)), ("pw", ("requirepass pw",)), ("", ())],
    ids=["server", "sentinels (Go)", "both", "neither"],
)
async def test_one_password_without_user(redis_password: str, sentinel_lines: tuple[str, ...]) -> None:
    """`redis-sentinel://:pw@...` works where it is the sentinels' (Go's reading), the servers', or both's."""
    async with sentinel_group(password=redis_password, sentinel_lines=sentinel_lines) as (master, _, sentinels):
        settings = settings_of(f"redis-sentinel://:pw@127.0.0.1:{sentinels[0]}?master=main")
        assert await settings.discover_master() == ("127.0.0.1", master)
        assert await ask(settings.connection("127.0.0.1", master), "PING") == b"PONG"


async def test_sentinel_user_with_few_permissions() -> None:
    """A user of the sentinels who may only ask for the address, and one of the servers without ROLE, will do."""
    lines = ("user ann on >sp ~* &* -@all +auth +sentinel|get-master-addr-by-name",)
    few = ("user bea on >rp ~* &* -@all +ping +hello",)
    async with sentinel_group(redis_lines=few, sentinel_lines=lines) as (master, _, sentinels):
        addr = f"127.0.0.1:{sentinels[0]}"
        login = "master=main&sentinel_username=ann&sentinel_password=sp"
        settings = settings_of(f"redis-sentinel://bea:rp@{addr}?{login}")
        assert await settings.discover_master() == ("127.0.0.1", master)
        with pytest.raises(MasterNotFoundError, match="No such master with that name"):
            await settings_of(f"redis-sentinel://bea:rp@{addr}?{login.replace('main', 'none')}").discover_master()


async def test_the_newest_sight_of_the_master_wins() -> None:
    """Of two sentinels that disagree, the one with the higher epoch is believed: the other was cut off."""
    async with sentinel_group() as (old, _, stale), sentinel_group() as (new, _, fresh):
        connection = settings_of(f"redis-sentinel://127.0.0.1:{fresh[0]}").sentinel_connection("127.0.0.1", fresh[0])
        await ask(connection, "SENTINEL", "REMOVE", "main")
        async with own_server(
            f"port {(third := free_port())}",
            f"sentinel monitor main 127.0.0.1 {new} 1",
            "sentinel config-epoch main 7",
            "sentinel current-epoch 7",
            sentinel=True,
        ):
            uri = f"redis-sentinel://127.0.0.1:{stale[0]},127.0.0.1:{third}?master=main"
            assert await settings_of(uri).discover_master() == ("127.0.0.1", new)
            assert await settings_of(f"redis-sentinel://127.0.0.1:{stale[0]}?master=main").discover_master() == (
                "127.0.0.1",
                old,
            )
