"""Where Redis is and how to reach it: the connection options.

Everything here is pure: an option that exists is complete (default ports filled in) and can be right; nothing was
dialled.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final, TypeAlias

from asynq_aio.errors import ConfigError

__all__ = [
    "CLUSTER_ADDRS",
    "CONNECT_TIMEOUT",
    "DEADLINE",
    "EMBEDDED",
    "READ_TIMEOUT",
    "REDIS_PORT",
    "SENTINEL_PORT",
    "Address",
    "AddressRemap",
    "Password",
    "RedisClientOpt",
    "RedisClusterClientOpt",
    "RedisConnOpt",
    "RedisFailoverClientOpt",
    "TLSOptions",
    "complete_address",
    "join_address",
    "remap_address",
    "split_address",
]

EMBEDDED: Final = "embedded://"
"""The address of this process' private server."""

CLUSTER_ADDRS: Final = tuple(f"127.0.0.1:{port}" for port in range(7000, 7006))
"""The seeds that the command line takes when it is told `cluster` and nothing else."""

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
_MAX_PORT: Final = 65535
_LOCAL: Final = f"127.0.0.1:{REDIS_PORT}"

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

CONNECT_TIMEOUT: Final = timedelta(seconds=5)
READ_TIMEOUT: Final = timedelta(seconds=5)
DEADLINE: Final = timedelta(seconds=30)


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

    connect_timeout: timedelta = CONNECT_TIMEOUT
    """How long one attempt to connect may take, TLS included."""

    read_timeout: timedelta = READ_TIMEOUT
    """How long a reply may take until the connection counts as lost; blocking waits have their own bound."""

    deadline: timedelta = DEADLINE
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
            object.__setattr__(self, "addr", complete_address(self.addr, REDIS_PORT, f"{who}.addr"))


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

    connect_timeout: timedelta = CONNECT_TIMEOUT
    """How long one attempt to connect may take, TLS included."""

    read_timeout: timedelta = READ_TIMEOUT
    """How long a reply may take until the connection counts as lost; blocking waits have their own bound."""

    deadline: timedelta = DEADLINE
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
        addrs = _complete_all(self.sentinel_addrs, SENTINEL_PORT, f"{who}.sentinel_addrs")
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

    connect_timeout: timedelta = CONNECT_TIMEOUT
    """How long one attempt to connect may take, TLS included."""

    read_timeout: timedelta = READ_TIMEOUT
    """How long a reply may take until the connection counts as lost; blocking waits have their own bound."""

    deadline: timedelta = DEADLINE
    """The one bound on all waiting for Redis, across failovers and slot moves."""

    def __post_init__(self) -> None:
        who = "RedisClusterClientOpt"
        _check_login(who, self)
        _check_db(who, self.db)
        if self.db != 0:
            raise ConfigError(f"{who}.db is {self.db}; a Redis Cluster has database 0 alone, leave db out")
        _check_remap(who, self.address_remap)
        object.__setattr__(self, "addrs", _complete_all(self.addrs, REDIS_PORT, f"{who}.addrs"))


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


def complete_address(address: str, default_port: int, name: str) -> str:
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
    return tuple(complete_address(address, default_port, name) for address in addresses)


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
        split_address(announced, REDIS_PORT, name)
        split_address(dialled, REDIS_PORT, name)
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
