"""From options, URIs and existing clients to connections: the only file that knows URIs, TLS and redis-py clients.

The connections are redis-py's, in RESP2, with its retries, health checks and decoding off: who uses them matches
replies and repeats calls himself (lanes.py, store.py).
"""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import redis.cluster
import redis.sentinel
from redis import CredentialProvider, UsernamePasswordCredentialProvider
from redis import Redis as SyncRedis
from redis import SSLConnection as SyncSSLConnection
from redis import UnixDomainSocketConnection as SyncUnixDomainSocketConnection
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    RedisSSLContext,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.sentinel import MasterNotFoundError, SentinelConnectionPool
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from asynq_aio._config import (
    EMBEDDED,
    TLS,
    Address,
    AddressRemap,
    Password,
    RedisClientOpt,
    RedisClusterClientOpt,
    RedisConnOpt,
    RedisFailoverClientOpt,
    TLSOptions,
    join_address,
    remap_address,
    split_address,
)
from asynq_aio._uris import parse_redis_uri
from asynq_aio.errors import ConfigError

__all__ = ["ConnectionSettings", "Kind", "RedisClient", "settings_of"]

CLIENT_NAME: Final = "asynq-aio"
"""What `CLIENT LIST` shows for our connections."""

Kind: TypeAlias = Literal["standalone", "sentinel", "cluster"]

RedisClient: TypeAlias = Redis | RedisCluster | SyncRedis | redis.cluster.RedisCluster
"""The clients of redis-py that may be handed in."""

_TCP_ONLY: Final = ("socket_keepalive", "socket_keepalive_options", "socket_type")

_LAGGARDS_SECONDS: Final = 0.25
"""How long a sentinel that answered waits for the others: one cut off from them knows an older master."""


@dataclass(frozen=True, slots=True)
class Dial:
    """How one kind of server is dialled."""

    credentials: CredentialProvider | None = None
    may_lack_password: bool = False
    """A server without any password is used without one."""
    db: int = 0
    tls: ssl.SSLContext | None = None
    connect_timeout: float = 5.0
    reply_timeout: float = 5.0
    client_name: str = CLIENT_NAME
    socket: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of a client that was handed in: keep-alive and read size."""

    def connection(self, host: str, port: int) -> AbstractConnection:
        """A connection to this address that is not connected yet."""
        settings: dict[str, Any] = {
            **self.socket,
            "db": self.db,
            "credential_provider": self.credentials,
            "protocol": 2,
            "decode_responses": False,
            "socket_connect_timeout": self.connect_timeout,
            "socket_timeout": self.reply_timeout,  # of the handshake; lanes read with timeout=math.inf
            "health_check_interval": 0,
            "retry": None,
            "retry_on_error": [],
        }
        connection: _Ours
        if host == EMBEDDED:
            connection = _EmbeddedConnection(**settings)
        elif host.startswith("/"):
            connection = _UnixConnection(path=host, **{k: v for k, v in settings.items() if k not in _TCP_ONLY})
        elif self.tls is None:
            connection = _TCPConnection(host=host, port=port, **settings)
        else:
            secure = _TLSConnection(host=host, port=port, **settings)
            secure.ssl_context.context = self.tls  # made once and shared: reading the authorities takes milliseconds
            connection = secure
        connection.name_for_server = self.client_name
        connection.may_lack_password = self.may_lack_password
        return connection


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """All that is needed to reach a Redis, a Sentinel group or a Redis Cluster; made without I/O on the network."""

    kind: Kind
    seeds: list[Address]
    """What is dialled first: the server, the sentinels, or some cluster nodes. A Unix socket is `(path, 0)`."""
    description: str
    """For logs and errors; says nothing secret."""
    deadline: float
    """The bound on all waiting, in seconds."""
    connect_timeout: float
    """The bound on one attempt to connect, in seconds."""
    reply_timeout: float
    """After this many seconds without a reply that is due, a connection counts as lost."""
    master_name: str = ""
    """For Sentinel."""
    dial: Dial = field(default_factory=Dial, repr=False)
    """To the Redis servers."""
    sentinel_dial: Dial = field(default_factory=Dial, repr=False)
    """To the sentinels."""
    address_remap: AddressRemap | None = field(default=None, repr=False)

    def connection(self, host: str, port: int) -> AbstractConnection:
        """A connection to a Redis server, not connected yet; the address is dialled as it is, so `remap` it first.

        `await connection.connect()` dials, authenticates and selects the database, in `connect_timeout` and one
        `reply_timeout` per reply, and raises what redis-py raises. No text of it has a secret.
        """
        return self.dial.connection(host, port)

    def sentinel_connection(self, host: str, port: int) -> AbstractConnection:
        """A connection to a sentinel, not connected yet."""
        return self.sentinel_dial.connection(host, port)

    def remap(self, host: str, port: int) -> Address:
        """Where the node that announces this address is dialled."""
        return (host, port) if self.address_remap is None else remap_address(self.address_remap, (host, port))

    async def discover_master(self) -> Address:
        """The address at which to dial the master, which has said itself that it is one.

        All sentinels are asked at once. Of their answers the one with the highest epoch is tried first.

        Raises:
            AuthenticationError: no sentinel let us in.
            MasterNotFoundError (a ConnectionError): no sentinel knows a live master that says so; the text tells what
                each of them answered.
        """
        return await _discover_master(self)


def settings_of(redis: RedisConnOpt | str | RedisClient) -> ConnectionSettings:
    """The settings that an option, a URI or an existing redis-py client stands for. No network I/O.

    A client is copied: it is neither changed nor closed, and its `decode_responses`, retries and pool do not matter.

    Raises:
        ConfigError: it cannot be right.
    """
    match redis:
        case str():
            return settings_of(parse_redis_uri(redis))
        case RedisClientOpt():
            return _of_server(redis)
        case RedisFailoverClientOpt():
            return _of_failover(redis)
        case RedisClusterClientOpt():
            return _of_cluster(redis)
        case _:
            return _of_client(redis)


# Options


def _of_server(opt: RedisClientOpt) -> ConnectionSettings:
    local = opt.addr == EMBEDDED or opt.addr.startswith("/")
    seed = (opt.addr, 0) if local else split_address(opt.addr, 6379, "RedisClientOpt.addr")
    return _of_parts("standalone", [seed], _dial(opt, opt.db), deadline=opt.deadline.total_seconds())


def _of_failover(opt: RedisFailoverClientOpt) -> ConnectionSettings:
    seeds = [split_address(addr, 26379, "RedisFailoverClientOpt.sentinel_addrs") for addr in opt.sentinel_addrs]
    dial = _dial(opt, opt.db, may_lack_password=opt.shared_password)
    sentinels = Dial(
        credentials=dial.credentials
        if opt.shared_password
        else _credentials(opt.sentinel_username, opt.sentinel_password),
        may_lack_password=opt.shared_password,
        tls=dial.tls,
        connect_timeout=dial.connect_timeout,
        reply_timeout=dial.reply_timeout,
    )
    return _of_parts(
        "sentinel",
        seeds,
        dial,
        sentinels,
        opt.master_name,
        opt.address_remap,
        opt.deadline.total_seconds(),
    )


def _of_cluster(opt: RedisClusterClientOpt) -> ConnectionSettings:
    seeds = [split_address(addr, 6379, "RedisClusterClientOpt.addrs") for addr in opt.addrs]
    return _of_parts(
        "cluster",
        seeds,
        _dial(opt, 0),
        address_remap=opt.address_remap,
        deadline=opt.deadline.total_seconds(),
    )


def _dial(opt: RedisConnOpt, db: int, *, may_lack_password: bool = False) -> Dial:
    return Dial(
        credentials=_credentials(opt.username, opt.password),
        may_lack_password=may_lack_password,
        db=db,
        tls=_tls_context(opt.tls),
        connect_timeout=opt.connect_timeout.total_seconds(),
        reply_timeout=opt.read_timeout.total_seconds(),
    )


def _describe(kind: Kind, seeds: Iterable[Address], master_name: str, dial: Dial) -> str:
    where = ",".join(
        "a private server" if host == EMBEDDED else host if host.startswith("/") else join_address(host, port)
        for host, port in seeds
    )
    what = {
        "standalone": f"Redis at {where}",
        "sentinel": f"Redis master {master_name!r} of the sentinels {where}",
        "cluster": f"Redis Cluster at {where}",
    }[kind]
    extras = [*(["TLS"] if dial.tls else []), *([f"database {dial.db}"] if dial.db else [])]
    return f"{what} ({', '.join(extras)})" if extras else what


# Credentials


class _Credentials(CredentialProvider):
    """What AUTH sends; asked for at each new connection. No repr of it shows a secret."""

    def __init__(self, username: str | None, password: Password) -> None:
        self._username = username
        self._password = password

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        if isinstance(self._password, str):
            found: object = self._password
        else:
            try:
                found = self._password()
                if inspect.isawaitable(found):
                    found = await found
            except Exception as exc:
                # redis-py closes the socket for errors of its own alone.
                raise RedisConnectionError(f"the callable given as password raised {type(exc).__name__}") from exc
        match found:
            case str() if self._username:
                return self._username, found
            case str():
                return (found,)
            case (str() as username, str() as password):
                return username, password
        raise AuthenticationError(
            f"the callable given as password returned {type(found).__name__}; expected a str, or (user name, password)"
        )


def _credentials(username: str | None, password: Password | None) -> CredentialProvider | None:
    return _Credentials(username, password) if password else None


# TLS


class _ServerNameContext(ssl.SSLContext):
    """A context that asks for one server name and checks it, whatever host is dialled.

    asyncio and uvloop pass the dialled host to `wrap_bio`, and redis-py has no setting for another one.
    """

    server_name: str

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002  (as in ssl)
        server_hostname: str | bytes | None = None,  # noqa: ARG002  (as in ssl)
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return super().wrap_bio(incoming, outgoing, server_side, self.server_name, session)


def _tls_context(tls: TLS) -> ssl.SSLContext | None:
    if tls is False:
        return None
    if isinstance(tls, ssl.SSLContext):
        return tls
    options = TLSOptions() if tls is True else tls
    context: ssl.SSLContext
    if options.server_name is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    else:
        named = _ServerNameContext(ssl.PROTOCOL_TLS_CLIENT)
        named.server_name = options.server_name
        context = named
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif options.ca_file is None:
        context.load_default_certs()
    else:
        try:
            context.load_verify_locations(cafile=options.ca_file)
        except OSError as exc:  # ssl.SSLError is one
            raise ConfigError(
                f"TLSOptions.ca_file {options.ca_file!r} cannot be read: {_reason(exc)}; expected PEM certificates"
            ) from exc
    if options.cert_file is not None:
        try:
            # An encrypted key would make OpenSSL ask on the terminal; an empty password makes it fail instead.
            context.load_cert_chain(options.cert_file, options.key_file, password="")
        except OSError as exc:
            files = f"cert_file {options.cert_file!r} and key_file {options.key_file or options.cert_file!r}"
            raise ConfigError(
                f"TLSOptions: {files} cannot be used: {_reason(exc)}; "
                "expected a certificate and its unencrypted key in PEM form"
            ) from exc
    return context


def _reason(exc: OSError) -> str:
    return exc.strerror or type(exc).__name__


# Connections


class _Ours(AbstractConnection):
    """What our connections do besides redis-py's."""

    name_for_server: str
    may_lack_password: bool

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:  # noqa: FBT001, FBT002
        """Dial and shake hands; whatever goes wrong, no socket stays open."""
        try:
            try:
                await super().connect_check_health(check_health, retry_socket_connect)
            except AuthenticationError as exc:
                # Redis 6+: "AUTH <password> called without any password configured"; older: "but no password is set".
                if not self.may_lack_password or "without any password" not in str(exc):
                    raise
                self.credential_provider = None
                await super().connect_check_health(check_health, retry_socket_connect)
        except BaseException:
            # redis-py closes for its own errors, and not when it is cancelled within the handshake.
            if self.is_connected:
                await self.disconnect(nowait=True)
            raise

    async def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002  (as in redis-py)
        """AUTH, SELECT and our name."""
        await super().on_connect_check_health(check_health)
        await self.send_command("CLIENT", "SETNAME", self.name_for_server, check_health=False)
        try:
            await self.read_response()
        except ResponseError:
            # An ACL user need not be permitted to have a name; redis-py's own `client_name` would end the connection.
            return


class _TCPConnection(_Ours, Connection):
    """Over TCP."""


class _TLSConnection(_Ours, SSLConnection):
    """Over TCP and TLS."""


class _UnixConnection(_Ours, UnixDomainSocketConnection):
    """Over a Unix socket."""

    async def on_connect(self) -> None:
        """Nothing: redis-py would shake hands twice, and a refusal would lose its class and leave the socket open."""


class _EmbeddedConnection(_UnixConnection):
    """To the private server of this process, which the first connection starts."""

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:  # noqa: FBT001, FBT002
        """Start the server, unless it runs, and dial it.

        Raises:
            ConfigError: there is no server to start.
            BrokerUnavailableError: it did not start.
        """
        from asynq_aio._broker.embedded import private_server

        server = await asyncio.to_thread(private_server)  # left alone when we are cancelled: the next caller finds it
        self.path = str(server.unix_socket)
        await super().connect_check_health(check_health, retry_socket_connect)


# Sentinel


@dataclass(frozen=True, slots=True)
class _Sighting:
    """What one sentinel says about the master."""

    address: Address
    up: bool
    epoch: int


async def _discover_master(settings: ConnectionSettings) -> Address:
    failures: list[tuple[str, Exception]] = []
    tried: set[Address] = set()
    children = {asyncio.create_task(_ask_sentinel(settings, seed)): join_address(*seed) for seed in settings.seeds}
    pending = set(children)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if pending and any(child.exception() is None for child in done):
                late, pending = await asyncio.wait(pending, timeout=_LAGGARDS_SECONDS)
                done |= late
            sightings: list[_Sighting] = []
            for child in done:
                match child.exception():
                    case None:
                        sightings.append(child.result())
                    case RedisError() | OSError() | RuntimeError() as exc:
                        failures.append((f"sentinel {children[child]}", exc))
                    case exc:
                        raise exc
            for sighting in sorted(sightings, key=lambda one: (one.up, one.epoch), reverse=True):
                address = settings.remap(*sighting.address)
                if address in tried:
                    continue
                tried.add(address)
                try:
                    await _check_master(settings, address)
                except (RedisError, OSError, RuntimeError) as exc:  # RuntimeError: uvloop, on a dead transport
                    failures.append((f"master at {join_address(*address)}", exc))
                else:
                    return address
    finally:
        for child in children:
            child.cancel()
        await asyncio.gather(*children, return_exceptions=True)
    texts = "; ".join(f"{who}: {str(exc) or type(exc).__name__}" for who, exc in failures)
    message = f"no master found under the name {settings.master_name!r}: {texts}"
    for refusal in (AuthenticationError, NoPermissionError):
        if any(isinstance(exc, refusal) for _, exc in failures):
            raise refusal(message)
    raise MasterNotFoundError(message)


async def _ask_sentinel(settings: ConnectionSettings, seed: Address) -> _Sighting:
    connection = settings.sentinel_connection(*seed)
    try:
        await connection.connect_check_health()
        try:
            reply = await _ask(connection, "SENTINEL", "MASTER", settings.master_name)
        except NoPermissionError:
            # All that go-redis asks for, and so all that a careful ACL may permit.
            pair = await _ask(connection, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", settings.master_name)
            if pair is None:
                raise ResponseError("No such master with that name") from None
            return _Sighting((pair[0].decode(), int(pair[1])), up=True, epoch=0)
    finally:
        await connection.disconnect(nowait=True)
    facts: dict[bytes, bytes] = dict(zip(reply[::2], reply[1::2], strict=True))
    return _Sighting(
        (facts[b"ip"].decode(), int(facts[b"port"])),
        up=b"down" not in facts[b"flags"],  # s_down, o_down
        epoch=int(facts[b"config-epoch"]),
    )


async def _check_master(settings: ConnectionSettings, address: Address) -> None:
    """Raise unless the server there says itself that it is a master: a sentinel is the last to hear of a failover."""
    connection = settings.connection(*address)
    try:
        await connection.connect_check_health()
        # HELLO tells the role to every ACL user; ROLE and INFO are `@dangerous`, so many users lack them.
        reply = await _ask(connection, "HELLO", "2")
    finally:
        await connection.disconnect(nowait=True)
    role = dict(zip(reply[::2], reply[1::2], strict=True)).get(b"role")
    if role != b"master":
        raise RedisConnectionError(f"it says that it is a {role.decode() if role else 'sentinel'}")


async def _ask(connection: AbstractConnection, *command: str) -> Any:
    await connection.send_command(*command, check_health=False)
    return await connection.read_response()


# Clients that were handed in


def _of_client(client: object) -> ConnectionSettings:
    match client:
        case RedisCluster() | redis.cluster.RedisCluster():
            return _of_cluster_client(client)
        case Redis() | SyncRedis():
            pool: Any = client.connection_pool
        case _:
            raise ConfigError(
                f"redis is of type {type(client).__module__}.{type(client).__qualname__}; expected a URI, "
                "RedisClientOpt, RedisFailoverClientOpt, RedisClusterClientOpt, "
                "or a Redis or RedisCluster client of redis-py 8"
            )
    if isinstance(pool, SentinelConnectionPool | redis.sentinel.SentinelConnectionPool):
        return _of_sentinel_pool(pool)
    dial = _dial_of_pool(pool)
    kwargs = pool.connection_kwargs
    seed = (
        (str(kwargs["path"]), 0)
        if "path" in kwargs
        else (kwargs.get("host", "localhost"), int(kwargs.get("port", 6379)))
    )
    return _of_parts("standalone", [seed], dial)


def _of_sentinel_pool(pool: Any) -> ConnectionSettings:
    if not pool.is_master:
        raise ConfigError(
            "redis is a client of Sentinel.slave_for(), which cannot write; hand in Sentinel.master_for()"
        )
    sentinels = [sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels]
    seeds = [(one.connection_kwargs["host"], int(one.connection_kwargs["port"])) for one in sentinels]
    if not seeds:
        raise ConfigError("redis is a client of a Sentinel without sentinels; expected at least one (host, port)")
    return _of_parts("sentinel", seeds, _dial_of_pool(pool), _dial_of_pool(sentinels[0]), str(pool.service_name))


def _of_cluster_client(client: RedisCluster | redis.cluster.RedisCluster) -> ConnectionSettings:
    manager: Any = client.nodes_manager
    kwargs: dict[str, Any] = dict(client.get_connection_kwargs())
    connect_func = kwargs.pop("redis_connect_func", None)
    if isinstance(client, redis.cluster.RedisCluster):
        connect_func = client.user_on_connect_func
    elif getattr(connect_func, "__self__", None) is client:
        connect_func = None  # redis-py's own, for reading from replicas
    if connect_func is not None:
        kwargs["redis_connect_func"] = connect_func
    secure = bool(kwargs.get("ssl")) or issubclass(
        kwargs.get("connection_class", Connection), SSLConnection | SyncSSLConnection
    )
    nodes = [*manager.startup_nodes.values(), *client.get_nodes()]
    seeds = list(dict.fromkeys((str(node.host), int(node.port)) for node in nodes))
    return _of_parts("cluster", seeds, _dial_of_kwargs(kwargs, secure=secure), address_remap=manager.address_remap)


def _of_parts(
    kind: Kind,
    seeds: list[Address],
    dial: Dial,
    sentinel_dial: Dial | None = None,
    master_name: str = "",
    address_remap: AddressRemap | None = None,
    deadline: float = 30.0,
) -> ConnectionSettings:
    return ConnectionSettings(
        kind=kind,
        seeds=seeds,
        description=_describe(kind, seeds, master_name, dial),
        deadline=deadline,
        connect_timeout=dial.connect_timeout,
        reply_timeout=dial.reply_timeout,
        master_name=master_name,
        dial=dial,
        sentinel_dial=sentinel_dial or dial,
        address_remap=address_remap,
    )


def _dial_of_pool(pool: Any) -> Dial:
    known = (Connection, UnixDomainSocketConnection, redis.Connection, SyncUnixDomainSocketConnection)
    if not issubclass(pool.connection_class, known):
        name = f"{pool.connection_class.__module__}.{pool.connection_class.__qualname__}"
        raise ConfigError(
            f"redis has connections of type {name}; expected redis-py's own, over TCP, TLS or a Unix socket"
        )
    secure = issubclass(pool.connection_class, SSLConnection | SyncSSLConnection)
    return _dial_of_kwargs(pool.connection_kwargs, secure=secure)


def _dial_of_kwargs(kwargs: Mapping[str, Any], *, secure: bool) -> Dial:
    if kwargs.get("redis_connect_func") is not None:
        raise ConfigError(
            "redis has a redis_connect_func, which cannot be copied; pass its settings as an option or a URI"
        )
    default = Dial()
    credentials = kwargs.get("credential_provider")
    username, password = kwargs.get("username"), kwargs.get("password")
    if credentials is None and (username or password):
        credentials = UsernamePasswordCredentialProvider(username, password)
    socket = {name: kwargs[name] for name in ("socket_keepalive", "socket_type", "socket_read_size") if name in kwargs}
    options = kwargs.get("socket_keepalive_options", ...)
    if options is None or isinstance(options, Mapping):  # else redis-py's mark for its own defaults
        socket["socket_keepalive_options"] = options
    return Dial(
        credentials=credentials,
        db=int(kwargs.get("db") or 0),
        tls=_tls_of_kwargs(kwargs) if secure else None,
        connect_timeout=float(kwargs.get("socket_connect_timeout") or default.connect_timeout),
        reply_timeout=float(kwargs.get("socket_timeout") or default.reply_timeout),
        client_name=kwargs.get("client_name") or default.client_name,
        socket=socket,
    )


_TLS_KEYS: Final = {
    "ssl_keyfile": "keyfile",
    "ssl_certfile": "certfile",
    "ssl_cert_reqs": "cert_reqs",
    "ssl_include_verify_flags": "include_verify_flags",
    "ssl_exclude_verify_flags": "exclude_verify_flags",
    "ssl_ca_certs": "ca_certs",
    "ssl_ca_data": "ca_data",
    "ssl_ca_path": "ca_path",
    "ssl_check_hostname": "check_hostname",
    "ssl_min_version": "min_version",
    "ssl_ciphers": "ciphers",
    "ssl_password": "password",
}


def _tls_of_kwargs(kwargs: Mapping[str, Any]) -> ssl.SSLContext:
    for name, value in kwargs.items():
        if name.startswith("ssl_") and name not in _TLS_KEYS and value:
            raise ConfigError(
                f"redis is set to {name}, which redis-py's asyncio connections do not have; "
                "pass an ssl.SSLContext as tls of an option"
            )
    settings: dict[str, Any] = {"cert_reqs": "required", "check_hostname": True}
    settings.update({ours: kwargs[theirs] for theirs, ours in _TLS_KEYS.items() if theirs in kwargs})
    try:
        return RedisSSLContext(**settings).get()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the TLS files of the client given as redis cannot be used: {type(exc).__name__}") from exc
