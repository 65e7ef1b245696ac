"""Where Redis is and how to reach it: the connection options, and the URIs that stand for them.

Everything here is pure: an option that exists is complete (default ports filled in) and can be right; nothing was
dialled.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import ssl
import tomllib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, TypeGuard
from urllib.parse import unquote

from asynq_aio.errors import ConfigError

__all__ = [
    "CLUSTER_ADDRS",
    "EMBEDDED",
    "Address",
    "AddressRemap",
    "Password",
    "RedisClientOpt",
    "RedisClusterClientOpt",
    "RedisConnOpt",
    "RedisFailoverClientOpt",
    "TLSOptions",
    "default_redis",
    "find_config_file",
    "join_address",
    "parse_redis_uri",
    "split_address",
]

EMBEDDED: Final = "embedded://"
"""The address of this process' private server."""

CLUSTER_ADDRS: Final = tuple(f"127.0.0.1:{port}" for port in range(7000, 7006))
"""The seeds that the command line takes when it is told `cluster` and nothing else."""

_REDIS_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_MAX_PORT: Final = 65535
_LOCAL: Final = f"127.0.0.1:{_REDIS_PORT}"

Address: TypeAlias = tuple[str, int]
"""Host (IPv6 without brackets) and port."""

Credentials: TypeAlias = str | tuple[str, str]
"""A password, or a user name and a password."""

Password: TypeAlias = str | Callable[[], Credentials | Awaitable[Credentials]]
"""A password, or a callable, sync or async, that is asked at each new connection for it, or for user and password."""

AddressRemap: TypeAlias = Mapping[str, str] | Callable[[Address], Address]
"""From the address that a node announces to the one that it is dialled at.

A mapping has `host:port` keys and values, or `host` keys and values where the ports stay; other
addresses stay.
"""


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """TLS with certificates of one's own. The files are read when the connection settings are made."""

    _: KW_ONLY
    server_name: str | None = None
    """The name that the certificate must carry, where it is not the host that is dialled."""

    ca_file: str | None = None
    """PEM file of the authorities to trust; None = the system's."""

    cert_file: str | None = None
    """PEM file of the client's certificate, for servers that want one."""

    key_file: str | None = None
    """PEM file of its key; None = the key is in `cert_file`."""

    verify: bool = True
    """False = any certificate will do; the connection is encrypted, and may be to anybody."""

    def __post_init__(self) -> None:
        for name in ("server_name", "ca_file", "cert_file", "key_file"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
            elif not isinstance(value, str) or not value:
                raise ConfigError(f"TLSOptions.{name} is {value!r}; expected a non-empty str, or None")
        if not isinstance(self.verify, bool):
            raise ConfigError(f"TLSOptions.verify is {self.verify!r}; expected True or False")
        if self.key_file and not self.cert_file:
            raise ConfigError(
                f"TLSOptions.key_file is {self.key_file!r} without cert_file; give the certificate of this key too"
            )
        if self.ca_file and not self.verify:
            raise ConfigError(
                f"TLSOptions.verify is False, so ca_file {self.ca_file!r} would never be looked at; drop one of them"
            )


TLS: TypeAlias = bool | ssl.SSLContext | TLSOptions

_CONNECT_TIMEOUT: Final = timedelta(seconds=5)
_READ_TIMEOUT: Final = timedelta(seconds=5)
_DEADLINE: Final = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class RedisClientOpt:
    """One Redis server."""

    addr: str = _LOCAL
    """`host:port` (the port defaults to 6379; IPv6 in brackets), the path of a Unix socket, or `embedded://`: a private
    server that this process starts for itself and that is gone, with its data, when the process ends."""

    _: KW_ONLY
    username: str | None = None
    """ACL user; sent only together with a password."""

    password: Password | None = field(default=None, repr=False)
    """Password, or a callable that is asked at each new connection."""

    db: int = 0
    """Number of the database."""

    tls: TLS = False
    """True = TLS with the system's authorities and a check of the host name."""

    connect_timeout: timedelta = _CONNECT_TIMEOUT
    """How long one attempt to connect may take, TLS included."""

    read_timeout: timedelta = _READ_TIMEOUT
    """How long a reply may take until the connection counts as lost; blocking waits have their own bound."""

    deadline: timedelta = _DEADLINE
    """The one bound on all waiting for Redis, across failovers and slot moves."""

    def __post_init__(self) -> None:
        who = "RedisClientOpt"
        _check_login(who, self)
        _check_db(who, self.db)
        if not isinstance(self.addr, str):
            raise ConfigError(f"{who}.addr is of type {type(self.addr).__name__}; expected a str such as {_LOCAL!r}")
        if self.addr == EMBEDDED:
            if self.username or self.password or self.tls is not False:
                raise ConfigError(
                    f"{who}: the private server of {EMBEDDED!r} has neither users nor passwords nor TLS; leave them out"
                )
        elif self.addr.startswith("/"):
            if self.tls is not False:
                raise ConfigError(f"{who}.tls is set, but a Unix socket has no TLS; leave it out")
        else:
            object.__setattr__(self, "addr", _complete(self.addr, _REDIS_PORT, f"{who}.addr"))


@dataclass(frozen=True, slots=True)
class RedisFailoverClientOpt:
    """A Redis master and its replicas, found through Sentinel."""

    _: KW_ONLY
    master_name: str
    """The name under which the sentinels watch the master."""

    sentinel_addrs: Sequence[str]
    """`host:port` of each sentinel; the port defaults to 26379. One that answers is enough."""

    username: str | None = None
    """ACL user on the Redis servers; sent only together with a password."""

    password: Password | None = field(default=None, repr=False)
    """Password on the Redis servers, or a callable that is asked at each new connection."""

    sentinel_username: str | None = None
    """ACL user on the sentinels; sent only together with a password."""

    sentinel_password: Password | None = field(default=None, repr=False)
    """Password on the sentinels."""

    shared_password: bool = False
    """Try `password` on the sentinels too; a server that has no password is used without one. Said by URIs of the form
    `redis-sentinel://:password@...`, which Go's asynq means for the sentinels and most people for the servers."""

    db: int = 0
    """Number of the database."""

    tls: TLS = False
    """TLS to the sentinels and to the Redis servers; True = the system's authorities and a check of the host name."""

    address_remap: AddressRemap | None = field(default=None, repr=False)
    """Where the master is dialled, if not at the address that the sentinels know (NAT, containers)."""

    connect_timeout: timedelta = _CONNECT_TIMEOUT
    """How long one attempt to connect may take, TLS included."""

    read_timeout: timedelta = _READ_TIMEOUT
    """How long a reply may take until the connection counts as lost; blocking waits have their own bound."""

    deadline: timedelta = _DEADLINE
    """The one bound on all waiting for Redis, across failovers."""

    def __post_init__(self) -> None:
        who = "RedisFailoverClientOpt"
        _check_master_name(who, self.master_name)
        _check_login(who, self)
        _check_user(who, "sentinel_username", self.sentinel_username)
        _check_password(who, "sentinel_password", self.sentinel_password)
        _check_db(who, self.db)
        _check_remap(who, self.address_remap)
        if not isinstance(self.shared_password, bool):
            raise ConfigError(f"{who}.shared_password is {self.shared_password!r}; expected True or False")
        if self.shared_password and (
            not self.password or self.sentinel_password or self.username or self.sentinel_username
        ):
            raise ConfigError(f"{who}.shared_password goes with `password` alone; else give each its own password")
        addrs = _complete_all(self.sentinel_addrs, _SENTINEL_PORT, f"{who}.sentinel_addrs")
        object.__setattr__(self, "sentinel_addrs", addrs)


@dataclass(frozen=True, slots=True)
class RedisClusterClientOpt:
    """A Redis Cluster."""

    _: KW_ONLY
    addrs: Sequence[str]
    """`host:port` of some nodes; the port defaults to 6379. One that answers is enough: it knows the others."""

    username: str | None = None
    """ACL user; sent only together with a password."""

    password: Password | None = field(default=None, repr=False)
    """Password, or a callable that is asked at each new connection."""

    db: int = 0
    """A cluster has database 0 alone."""

    tls: TLS = False
    """True = TLS with the system's authorities and a check of the host name; nodes that announce themselves by address
    need certificates that carry it, or `TLSOptions(server_name=...)`."""

    address_remap: AddressRemap | None = field(default=None, repr=False)
    """Where a node is dialled, if not at the address that it announces (NAT, containers). Seeds stay."""

    connect_timeout: timedelta = _CONNECT_TIMEOUT
    """How long one attempt to connect may take, TLS included."""

    read_timeout: timedelta = _READ_TIMEOUT
    """How long a reply may take until the connection counts as lost; blocking waits have their own bound."""

    deadline: timedelta = _DEADLINE
    """The one bound on all waiting for Redis, across failovers and slot moves."""

    def __post_init__(self) -> None:
        who = "RedisClusterClientOpt"
        _check_login(who, self)
        _check_db(who, self.db)
        if self.db != 0:
            raise ConfigError(f"{who}.db is {self.db}; a Redis Cluster has database 0 alone, leave db out")
        _check_remap(who, self.address_remap)
        object.__setattr__(self, "addrs", _complete_all(self.addrs, _REDIS_PORT, f"{who}.addrs"))


RedisConnOpt: TypeAlias = RedisClientOpt | RedisFailoverClientOpt | RedisClusterClientOpt
"""What every class of asynq_aio takes as its first argument, besides a URI and a redis-py client."""


# Addresses


def split_address(address: str, default_port: int, name: str) -> Address:
    """The host (IPv6 without brackets) and port of `host`, `host:port`, `[v6]` or `[v6]:port`.

    Raises:
        ConfigError: it is none of these; the text starts with `name` and repeats nothing that may be a password.
    """
    example = f"expected host:port, such as 127.0.0.1:{default_port}"
    if "@" in address:
        raise ConfigError(
            f"{name} has an '@'; user and password go into fields of their own, or into a URI "
            "such as redis://user:password@127.0.0.1:6379"
        )
    if "://" in address:
        raise ConfigError(f"{name} is a URI; {example}; a URI stands for a whole option: parse_redis_uri(uri)")
    if address.startswith("["):
        literal, bracket, rest = address[1:].partition("]")
        if not bracket or not _is_ipv6(literal) or (rest and not rest.startswith(":")):
            raise ConfigError(f"{name} is no IPv6 address in brackets; expected one such as [::1]:{default_port}")
        return literal, _port(rest[1:], name, f"[{literal}]") if rest else default_port
    if _is_ipv6(address):
        raise ConfigError(f"{name} is {address!r}; an IPv6 address goes in brackets, such as [::1]:{default_port}")
    host, colon, port = address.partition(":")
    if not host:
        raise ConfigError(f"{name} has no host; {example}")
    if ":" in port or re.search(r"[\s/?#,%\[\]\\]", host):
        raise ConfigError(f"{name} cannot be read; {example}")
    return host, _port(port, name, host) if colon else default_port


def join_address(host: str, port: int) -> str:
    """`host:port`, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _port(text: str, name: str, host: str) -> int:
    # What stands there may be a password whose '@' was forgotten: only numbers are shown.
    if not re.fullmatch(r"[0-9]+", text):
        raise ConfigError(f"{name} has no port number behind '{host}:'; expected one from 1 to {_MAX_PORT}")
    if len(text) > len(str(_MAX_PORT)) or not 1 <= int(text) <= _MAX_PORT:
        raise ConfigError(f"{name} has port {text[:9]}; expected one from 1 to {_MAX_PORT}")
    return int(text)


def _complete(address: str, default_port: int, name: str) -> str:
    return join_address(*split_address(address, default_port, name))


def _complete_all(addresses: object, default_port: int, name: str) -> tuple[str, ...]:
    if isinstance(addresses, str) or not isinstance(addresses, Sequence):
        raise ConfigError(
            f"{name} is of type {type(addresses).__name__}; expected a list such as ['127.0.0.1:{default_port}']"
        )
    if not addresses:
        raise ConfigError(f"{name} is empty; expected at least one host:port")
    for address in addresses:
        if not isinstance(address, str):
            raise ConfigError(
                f"{name} holds a {type(address).__name__}; expected texts such as '127.0.0.1:{default_port}'"
            )
    return tuple(_complete(address, default_port, name) for address in addresses)


# Checks that the options share


def _check_login(who: str, opt: RedisConnOpt) -> None:
    _check_user(who, "username", opt.username)
    _check_password(who, "password", opt.password)
    if not isinstance(opt.tls, bool | ssl.SSLContext | TLSOptions):
        raise ConfigError(
            f"{who}.tls is of type {type(opt.tls).__name__}; expected False, True, an ssl.SSLContext or TLSOptions"
        )
    for name in ("connect_timeout", "read_timeout", "deadline"):
        value = getattr(opt, name)
        if not isinstance(value, timedelta):
            raise ConfigError(f"{who}.{name} is {value!r}; expected a timedelta, such as timedelta(seconds=5)")
        if value <= timedelta(0):
            raise ConfigError(f"{who}.{name} is {value}; expected more than 0")


def _check_master_name(who: str, name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{who}.master_name is {name!r}; expected the name in sentinel.conf, such as 'mymaster'")


def _check_user(who: str, name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{who}.{name} is of type {type(value).__name__}; expected a str, or None")


def _check_password(who: str, name: str, value: object) -> None:
    if value is not None and not isinstance(value, str) and not callable(value):
        raise ConfigError(
            f"{who}.{name} is of type {type(value).__name__}; expected a str, a callable that returns one, or None"
        )


def _check_db(who: str, db: object) -> None:
    if not isinstance(db, int) or isinstance(db, bool):
        raise ConfigError(f"{who}.db is {db!r}; expected an int")
    if db < 0:
        raise ConfigError(f"{who}.db is {db}; expected 0 or more")


def _check_remap(who: str, remap: object) -> None:
    if remap is None or callable(remap):
        return
    name = f"{who}.address_remap"
    if not isinstance(remap, Mapping):
        raise ConfigError(
            f"{name} is of type {type(remap).__name__}; expected a callable, or a dict "
            "such as {'10.0.0.5:6379': 'localhost:7000'}"
        )
    for announced, dialled in remap.items():
        if not isinstance(announced, str) or not isinstance(dialled, str):
            raise ConfigError(
                f"{name} has the entry {announced!r}: {dialled!r}; "
                "expected str to str, such as '10.0.0.5:6379': 'localhost:7000'"
            )
        split_address(announced, _REDIS_PORT, name)
        split_address(dialled, _REDIS_PORT, name)
        if _has_port(announced) != _has_port(dialled):
            raise ConfigError(
                f"{name} has the entry {announced!r}: {dialled!r}; "
                "give a port on both sides, or on none to keep the ports"
            )


def _has_port(address: str) -> bool:
    return re.search(r":\d+$", address) is not None


def remap_address(remap: AddressRemap, address: Address) -> Address:
    """Where the node that announces `address` is dialled."""
    if callable(remap):
        return remap(address)
    host, port = address
    bracketed = f"[{host}]" if ":" in host else host
    for announced, dialled in remap.items():
        if announced == f"{bracketed}:{port}":
            return split_address(dialled, port, "address_remap")
    # Only after all exact entries: a host alone stands for those of its ports that have no entry.
    if (dialled_host := remap.get(bracketed)) is not None:
        return split_address(dialled_host, port, "address_remap")
    return address


# URIs

_TIMEOUT_KEYS: Final = ("connect_timeout", "read_timeout", "deadline")
_TLS_KEYS: Final = ("verify", "ca", "cert", "key", "server_name")
_SENTINEL_KEYS: Final = ("master", "sentinel_username", "sentinel_password")

_SCHEMES: Final = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "redis-socket": ("socket", False),
    "unix": ("socket", False),
    "redis-sentinel": ("sentinel", False),
    "rediss-sentinel": ("sentinel", True),
    "redis-cluster": ("cluster", False),
    "rediss-cluster": ("cluster", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "embedded": ("embedded", False),
}

_KEYS: Final = {
    "server": ("db",),
    "socket": ("db",),
    "sentinel": ("db", *_SENTINEL_KEYS),
    "cluster": ("addr", "db"),
    "embedded": ("db",),
}

_KEYS_ELSEWHERE: Final = {
    "dial_timeout": "connect_timeout",  # go-redis
    "socket_connect_timeout": "connect_timeout",  # redis-py
    "socket_timeout": "read_timeout",
    "timeout": "read_timeout",
    "write_timeout": "read_timeout",
    "master_name": "master",
    "ssl_ca_certs": "ca",
    "ssl_certfile": "cert",
    "ssl_keyfile": "key",
    "ssl_cert_reqs": "verify",
    "skip_verify": "verify",
    "insecure": "verify",
}
"""How other programs call them: the nearest key by spelling would be a wrong one."""


def parse_redis_uri(uri: str) -> RedisConnOpt:
    """The option that a URI, or a bare `host:port`, stands for.

        redis://[user:password@]host[:port][/db]                rediss:// with TLS
        redis-socket://[user:password@]/path[?db=n]             also unix://
        redis-sentinel://[user:password@]h1[:p],h2[:p][/db]     rediss-sentinel://; ?master= (default mymaster),
                                                                ?sentinel_username=, ?sentinel_password=
        redis-cluster://[user:password@]h1[:p],h2[:p]           rediss-cluster://, also redis+cluster://; ?addr=h3:p
        embedded://                                             a private server of this process
        host, host:port, /path/of/a.sock

    All take ?db=, ?connect_timeout=, ?read_timeout= and ?deadline= (seconds, or Go durations such as 1m30s); with TLS
    also ?verify=false, ?ca=, ?cert=, ?key= (PEM files) and ?server_name=. Everything is percent-decoded; a plus sign
    stays one.

    Raises:
        ConfigError: what is wrong, without any password.
    """
    if not isinstance(uri, str):
        raise ConfigError(
            f"the Redis URI is of type {type(uri).__name__}; expected a str such as 'redis://localhost:6379/0'"
        )
    if not uri.strip():
        raise ConfigError("the Redis URI is empty; expected one such as 'redis://localhost:6379/0', or host:port")
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _parse_bare(uri)
    if scheme.lower() not in _SCHEMES:
        # What precedes "://" may be the middle of a mistyped URI, with a password in it.
        near = difflib.get_close_matches(scheme.lower(), _SCHEMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(_SCHEMES)}"
        shown = f' "{scheme}"' if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) else ""
        raise ConfigError(f"unsupported Redis URI scheme{shown and ':'}{shown}; {hint}")
    return _URI(scheme.lower(), rest).option()


def _parse_bare(address: str) -> RedisClientOpt:
    if "," in address and "@" not in address:
        raise ConfigError(
            f"the Redis address {address!r} has a comma; several addresses need a scheme, such as redis-cluster://{address}"
        )
    if not address.startswith("/"):
        split_address(address, _REDIS_PORT, "the Redis address")
    return RedisClientOpt(address)


class _URI:
    """One URI, taken apart by hand: no library reads several hosts, and passwords must not get into errors."""

    def __init__(self, scheme: str, rest: str) -> None:
        self.form, self.secure = _SCHEMES[scheme]
        self.name = f"the {scheme}:// URI"
        if "#" in rest:
            self.fail("has a '#', which means nothing here; in a password write it as %23")
        end = min((at for at in (rest.find("/"), rest.find("?")) if at >= 0), default=len(rest))
        authority, tail = rest[:end], rest[end:]
        path, _, query = tail.partition("?")
        if self.form != "socket" and "@" in path:
            self.fail("has an '@' behind a '/'; in a password write '/' as %2F and '?' as %3F")
        login, _, self.hosts = authority.rpartition("@")
        # With an '@' only in the query, what looks like host and port may be the beginning of a password.
        self.dubious = not login and "@" in query
        user, _, password = login.partition(":")
        self.username = self.decode(user, "user name") or None
        self.password = self.decode(password, "password") or None
        if self.username and not self.password:
            self.fail(
                "has a user name without a password, which is never sent; write user:password@host, "
                "or :password@host if it was meant as the password"
            )
        self.path = self.decode(path, "path")
        self.query = self.read_query(query)

    def fail(self, text: str) -> NoReturn:
        raise ConfigError(f"{self.name} {text}")

    def decode(self, text: str, what: str) -> str:
        if re.search(r"%(?![0-9A-Fa-f]{2})", text):
            self.fail(f"has a '%' in its {what} without two hexadecimal digits behind it; write a plain '%' as %25")
        decoded = None
        with suppress(UnicodeDecodeError):  # and not chained from it: it quotes the bytes
            decoded = unquote(text, errors="strict")
        if decoded is None:
            self.fail(f"has percent-encoded bytes in its {what} that are not UTF-8")
        return decoded

    def read_query(self, query: str) -> dict[str, list[str]]:
        allowed = (*_KEYS[self.form], *_TIMEOUT_KEYS, *(_TLS_KEYS if self.secure else ()))
        found: dict[str, list[str]] = {}
        for item in filter(None, query.split("&")):
            raw, equals, value = item.partition("=")
            key = self.decode(raw, "query")
            if key not in allowed:
                if self.dubious or not re.fullmatch(r"[\w.-]+", key):
                    self.fail(f"has a query that cannot be read; expected key=value pairs of {', '.join(allowed)}")
                self.refuse_key(key, allowed)
            if not equals or not value:
                self.fail(f"has no value for ?{key}=")
            if key in found and key != "addr":
                self.fail(f"has ?{key}= twice; give it once")
            found.setdefault(key, []).append(self.decode(value, f"?{key}="))
        return found

    def refuse_key(self, key: str, allowed: Sequence[str]) -> NoReturn:
        if key in _TLS_KEYS:
            self.fail(f"has ?{key}=, which needs TLS; use the scheme that begins with rediss")
        near = _KEYS_ELSEWHERE.get(key) or next(iter(difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)), None)
        hint = f"did you mean {near!r}?" if near in allowed else f"expected {', '.join(allowed)}"
        self.fail(f"has the unknown query key {key!r}; {hint}")

    def option(self) -> RedisConnOpt:
        match self.form:
            case "server":
                return self.server()
            case "socket":
                return self.socket()
            case "sentinel":
                return self.sentinel()
            case "cluster":
                return self.cluster()
            case _:
                return self.embedded()

    def server(self) -> RedisClientOpt:
        hosts = self.addresses(self.hosts or "localhost", _REDIS_PORT)
        if len(hosts) > 1:
            self.fail("has several hosts; use redis-cluster:// for a cluster, redis-sentinel:// for sentinels")
        return RedisClientOpt(
            hosts[0],
            username=self.username,
            password=self.password,
            db=self.database(),
            tls=self.tls(),
            connect_timeout=self.duration("connect_timeout", _CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", _READ_TIMEOUT),
            deadline=self.duration("deadline", _DEADLINE),
        )

    def socket(self) -> RedisClientOpt:
        if self.hosts:
            self.fail("has a host; a Unix socket needs three slashes, such as redis-socket:///run/redis.sock")
        if not self.path.strip("/"):
            self.fail("has no path; expected one such as redis-socket:///run/redis.sock")
        return RedisClientOpt(
            self.path,
            username=self.username,
            password=self.password,
            db=self.query_database() or 0,
            connect_timeout=self.duration("connect_timeout", _CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", _READ_TIMEOUT),
            deadline=self.duration("deadline", _DEADLINE),
        )

    def sentinel(self) -> RedisFailoverClientOpt:
        sentinel_username, sentinel_password = self.one("sentinel_username"), self.one("sentinel_password")
        if sentinel_username and not sentinel_password:
            self.fail("has ?sentinel_username= without ?sentinel_password=")
        return RedisFailoverClientOpt(
            master_name=self.one("master") or "mymaster",
            sentinel_addrs=self.addresses(self.hosts, _SENTINEL_PORT),
            username=self.username,
            password=self.password,
            sentinel_username=sentinel_username,
            sentinel_password=sentinel_password,
            # Go's asynq gives a password without a user to the sentinels; most people mean the servers. Both work.
            shared_password=bool(self.password and not self.username and not sentinel_password),
            db=self.database(),
            tls=self.tls(),
            connect_timeout=self.duration("connect_timeout", _CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", _READ_TIMEOUT),
            deadline=self.duration("deadline", _DEADLINE),
        )

    def cluster(self) -> RedisClusterClientOpt:
        if self.path not in {"", "/", "/0"} or self.query_database():
            self.fail("has a database; a Redis Cluster has database 0 alone, leave it out")
        more = [address for value in self.query.get("addr", []) for address in self.addresses(value, _REDIS_PORT)]
        first = self.addresses(self.hosts, _REDIS_PORT) if self.hosts or not more else []
        return RedisClusterClientOpt(
            addrs=[*first, *more],
            username=self.username,
            password=self.password,
            tls=self.tls(),
            connect_timeout=self.duration("connect_timeout", _CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", _READ_TIMEOUT),
            deadline=self.duration("deadline", _DEADLINE),
        )

    def embedded(self) -> RedisClientOpt:
        if self.hosts or self.path.strip("/") or self.password:
            self.fail("takes no host, path or password; write embedded:// alone")
        return RedisClientOpt(
            EMBEDDED,
            db=self.query_database() or 0,
            connect_timeout=self.duration("connect_timeout", _CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", _READ_TIMEOUT),
            deadline=self.duration("deadline", _DEADLINE),
        )

    def addresses(self, text: str, default_port: int) -> list[str]:
        if self.dubious:
            with suppress(ConfigError):
                return [_complete(unquote(one), default_port, "") for one in text.split(",")]
            self.fail("cannot be read; in a password write '/' as %2F, '?' as %3F and '@' as %40")
        return [
            _complete(self.decode(one, "host"), default_port, f"the host of {self.name}") for one in text.split(",")
        ]

    def database(self) -> int:
        first = self.path.strip("/").partition("/")[0]
        if not first:
            return self.query_database() or 0
        in_path = self.number(first, "the database number should be the first segment of the path")
        in_query = self.query_database()
        if in_query is not None and in_query != in_path:
            self.fail(f"has the database {in_path} in its path and {in_query} in ?db=; give it once")
        return in_path

    def query_database(self) -> int | None:
        text = self.one("db")
        return None if text is None else self.number(text, "?db= should be a number")

    def number(self, text: str, what: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text):
            shown = "" if self.dubious else f", not {text!r}"
            self.fail(f"has a wrong database: {what}, 0 or more{shown}")
        return int(text)

    def one(self, key: str) -> str | None:
        values = self.query.get(key)
        return values[0] if values else None

    def duration(self, key: str, default: timedelta) -> timedelta:
        text = self.one(key)
        if text is None:
            return default
        found = _parse_duration(text)
        if found is None or found <= timedelta(0):
            self.fail(f"has ?{key}={text}; expected seconds, or a Go duration such as 500ms or 1m30s, above 0")
        return found

    def tls(self) -> bool | TLSOptions:
        if not self.secure:
            return False
        if not any(key in self.query for key in _TLS_KEYS):
            return True
        verify = self.one("verify") or "true"
        if verify.lower() not in _BOOLS:
            self.fail(f"has ?verify={verify}; expected true or false")
        return TLSOptions(
            server_name=self.one("server_name"),
            ca_file=self.one("ca"),
            cert_file=self.one("cert"),
            key_file=self.one("key"),
            verify=_BOOLS[verify.lower()],
        )


_BOOLS: Final = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}

_MICROSECONDS: Final = {"ns": 1e-3, "us": 1, "µs": 1, "μs": 1, "ms": 1e3, "s": 1e6, "m": 60e6, "h": 3600e6}
_PART: Final = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)"


def _parse_duration(text: str) -> timedelta | None:
    """Seconds such as `5` or `0.5`, or a Go duration; None when it is neither."""
    try:
        if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text, re.ASCII):
            return timedelta(seconds=float(text))
        if re.fullmatch(f"(?:{_PART})+", text, re.ASCII):
            parts = re.findall(_PART, text, re.ASCII)
            return timedelta(microseconds=sum(float(number) * _MICROSECONDS[unit] for number, unit in parts))
    except OverflowError:
        return None
    return None


# Where Redis is when nobody says so

_CONFIG_NAMES: Final = (".asynq.yaml", ".asynq.yml", ".asynq.json", ".asynq.toml")
_SETTINGS: Final = ("uri", "db", "username", "password", "cluster", "cluster_addrs", "tls", "tls_server", "insecure")

_FLAG, _ENVIRONMENT, _FILE, _NOWHERE = range(4)


@dataclass(frozen=True, slots=True)
class _Setting:
    """A value, and who says so: the lower the rank, the more it counts."""

    rank: int
    name: str
    value: object = field(repr=False)

    def text(self) -> str:
        if isinstance(self.value, str):
            return self.value
        raise ConfigError(f"{self.name} is of type {type(self.value).__name__}; expected a text (in quotes, in a file)")

    def number(self) -> int:
        if isinstance(self.value, int) and not isinstance(self.value, bool):
            return self.value
        if isinstance(self.value, str) and re.fullmatch(r"-?[0-9]{1,9}", self.value):
            return int(self.value)
        raise ConfigError(f"{self.name} is {self.value!r}; expected a number")

    def switch(self) -> bool:
        if isinstance(self.value, bool):
            return self.value
        if isinstance(self.value, str) and self.value.lower() in _BOOLS:
            return _BOOLS[self.value.lower()]
        raise ConfigError(f"{self.name} is {self.value!r}; expected true or false")

    def addresses(self) -> list[str]:
        value = self.value
        if isinstance(value, str):
            return [one.strip() for one in value.split(",")]
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return value
        raise ConfigError(f"{self.name} is of type {type(value).__name__}; expected host:port,host:port")


def default_redis(
    environ: Mapping[str, str],
    *,
    flags: Mapping[str, object] | None = None,
    config_path: str | Path | None = None,
) -> RedisConnOpt:
    """Where Redis is, by the first of: flags, environment (`ASYNQ_URI` ...), config file, 127.0.0.1:6379.

    The settings are those of Go's command line: uri, db, username, password, cluster, cluster_addrs, tls, tls_server
    and insecure; in the environment in capitals behind `ASYNQ_`. What a URI says counts as said where the URI stands: a
    password of the environment does not replace the one in a URI that is given as a flag.

    Args:
        environ: The environment, usually `os.environ`.
        flags: Settings from the command line; None = not given.
        config_path: The config file; None = `find_config_file(environ)`. YAML, JSON, or TOML by its suffix.
    Raises:
        ConfigError: a setting cannot be right, or the config file cannot be read.
    """
    given: dict[str, _Setting] = {}
    path = Path(config_path) if config_path is not None else find_config_file(environ)
    if path is not None:
        for name, value in _read_config(path).items():
            given[name] = _Setting(_FILE, f"{name} in {path}", value)
    for name in _SETTINGS:
        variable = f"ASYNQ_{name.upper()}"
        if text := environ.get(variable):
            given[name] = _Setting(_ENVIRONMENT, variable, text)
    for name, value in (flags or {}).items():
        if value is not None:
            given[name] = _Setting(_FLAG, f"--{name}", value)
    return _combine(given)


def find_config_file(environ: Mapping[str, str]) -> Path | None:
    """`.asynq.yaml`, `.yml`, `.json` or `.toml` in the home directory, the first that is there."""
    home = environ.get("HOME") or environ.get("USERPROFILE")
    if not home:
        return None
    return next((path for name in _CONFIG_NAMES if (path := Path(home, name)).is_file()), None)


def _read_config(path: Path) -> dict[str, object]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"the config file {path} cannot be read: {exc.strerror or type(exc).__name__}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the config file {path} is not UTF-8; save it as UTF-8") from exc
    where = ""
    try:
        found: object = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except tomllib.TOMLDecodeError:
        found, where = (), " as TOML"
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        found, where = (), f" as YAML{f', line {mark.line + 1}' if mark else ''}"
    # Outside the handlers: the parsers' errors quote the file, and it may hold a password.
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"the config file {path} cannot be read{where}; expected lines such as 'uri: 127.0.0.1:6379'")
    settings = {str(name).lower(): value for name, value in found.items() if value is not None}
    for name in settings:
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, _SETTINGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_SETTINGS)}"
            raise ConfigError(f"the config file {path} has the unknown key {name!r}; {hint}")
    return settings


def _combine(given: Mapping[str, _Setting]) -> RedisConnOpt:
    uri, cluster = given.get("uri"), given.get("cluster")
    opt: RedisConnOpt = RedisClientOpt()
    uri_rank = _NOWHERE
    db_said = False
    if uri is not None:
        opt, uri_rank = parse_redis_uri(uri.text()), uri.rank
        db_said = _says_database(uri.text())
    if cluster is not None and cluster.rank <= uri_rank and cluster.switch():
        opt = _as_cluster(opt, uri, given.get("cluster_addrs"))

    def wins(setting: _Setting | None, *, said_by_uri: bool) -> TypeGuard[_Setting]:
        return setting is not None and (setting.rank <= uri_rank or not said_by_uri)

    login_said = opt.password is not None
    if wins(user := given.get("username"), said_by_uri=login_said):
        opt = replace(opt, username=user.text())
    if wins(password := given.get("password"), said_by_uri=login_said):
        opt = replace(opt, password=password.text())
    if wins(db := given.get("db"), said_by_uri=db_said):
        opt = replace(opt, db=db.number())
    tls, server, insecure = given.get("tls"), given.get("tls_server"), given.get("insecure")
    wanted = opt.tls is not False or server is not None or (tls is not None and tls.switch())
    if wanted:
        options = opt.tls if isinstance(opt.tls, TLSOptions) else TLSOptions()
        if wins(server, said_by_uri=options.server_name is not None):
            options = replace(options, server_name=server.text())
        if wins(insecure, said_by_uri=not options.verify) and insecure.switch():
            options = replace(options, verify=False)
        opt = replace(opt, tls=True if options == TLSOptions() else options)
    return opt


def _says_database(uri: str) -> bool:
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return False
    parsed = _URI(scheme.lower(), rest)
    return parsed.one("db") is not None or (parsed.form != "socket" and parsed.path.strip("/") != "")


def _as_cluster(opt: RedisConnOpt, uri: _Setting | None, addrs: _Setting | None) -> RedisConnOpt:
    """The cluster that `opt`, read from `uri`, is a node of."""
    match opt:
        case RedisClusterClientOpt():
            return opt if addrs is None else replace(opt, addrs=addrs.addresses())
        case RedisClientOpt() if opt.addr != EMBEDDED and not opt.addr.startswith("/"):
            if addrs is not None:
                seeds: Sequence[str] = addrs.addresses()
            else:
                seeds = CLUSTER_ADDRS if uri is None else [opt.addr]
            return RedisClusterClientOpt(
                addrs=seeds,
                username=opt.username,
                password=opt.password,
                db=opt.db,
                tls=opt.tls,
                connect_timeout=opt.connect_timeout,
                read_timeout=opt.read_timeout,
                deadline=opt.deadline,
            )
        case _:
            name = "the URI" if uri is None else uri.name
            raise ConfigError(f"{name} is no address of a cluster node, but cluster is set; leave one of them out")
