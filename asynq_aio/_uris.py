"""The URIs that stand for connection options: Go's forms, those of redis-py, and `redis-cluster://`, `embedded://`."""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Final, NoReturn
from urllib.parse import unquote

from asynq_aio._config import (
    CONNECT_TIMEOUT,
    DEADLINE,
    EMBEDDED,
    READ_TIMEOUT,
    REDIS_PORT,
    SENTINEL_PORT,
    RedisClientOpt,
    RedisClusterClientOpt,
    RedisConnOpt,
    RedisFailoverClientOpt,
    TLSOptions,
    complete_address,
    split_address,
)
from asynq_aio._convert import parse_duration
from asynq_aio.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BOOLS", "parse_redis_uri", "says_database"]

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
        split_address(address, REDIS_PORT, "the Redis address")
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
        hosts = self.addresses(self.hosts or "localhost", REDIS_PORT)
        if len(hosts) > 1:
            self.fail("has several hosts; use redis-cluster:// for a cluster, redis-sentinel:// for sentinels")
        return RedisClientOpt(
            hosts[0],
            username=self.username,
            password=self.password,
            db=self.database(),
            tls=self.tls(),
            connect_timeout=self.duration("connect_timeout", CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", READ_TIMEOUT),
            deadline=self.duration("deadline", DEADLINE),
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
            connect_timeout=self.duration("connect_timeout", CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", READ_TIMEOUT),
            deadline=self.duration("deadline", DEADLINE),
        )

    def sentinel(self) -> RedisFailoverClientOpt:
        sentinel_username, sentinel_password = self.one("sentinel_username"), self.one("sentinel_password")
        if sentinel_username and not sentinel_password:
            self.fail("has ?sentinel_username= without ?sentinel_password=")
        return RedisFailoverClientOpt(
            master_name=self.one("master") or "mymaster",
            sentinel_addrs=self.addresses(self.hosts, SENTINEL_PORT),
            username=self.username,
            password=self.password,
            sentinel_username=sentinel_username,
            sentinel_password=sentinel_password,
            # Go's asynq gives a password without a user to the sentinels; most people mean the servers. Both work.
            shared_password=bool(self.password and not self.username and not sentinel_password),
            db=self.database(),
            tls=self.tls(),
            connect_timeout=self.duration("connect_timeout", CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", READ_TIMEOUT),
            deadline=self.duration("deadline", DEADLINE),
        )

    def cluster(self) -> RedisClusterClientOpt:
        if self.path not in {"", "/", "/0"} or self.query_database():
            self.fail("has a database; a Redis Cluster has database 0 alone, leave it out")
        more = [address for value in self.query.get("addr", []) for address in self.addresses(value, REDIS_PORT)]
        first = self.addresses(self.hosts, REDIS_PORT) if self.hosts or not more else []
        return RedisClusterClientOpt(
            addrs=[*first, *more],
            username=self.username,
            password=self.password,
            tls=self.tls(),
            connect_timeout=self.duration("connect_timeout", CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", READ_TIMEOUT),
            deadline=self.duration("deadline", DEADLINE),
        )

    def embedded(self) -> RedisClientOpt:
        if self.hosts or self.path.strip("/") or self.password:
            self.fail("takes no host, path or password; write embedded:// alone")
        return RedisClientOpt(
            EMBEDDED,
            db=self.query_database() or 0,
            connect_timeout=self.duration("connect_timeout", CONNECT_TIMEOUT),
            read_timeout=self.duration("read_timeout", READ_TIMEOUT),
            deadline=self.duration("deadline", DEADLINE),
        )

    def addresses(self, text: str, default_port: int) -> list[str]:
        if self.dubious:
            with suppress(ConfigError):
                return [complete_address(unquote(one), default_port, "") for one in text.split(",")]
            self.fail("cannot be read; in a password write '/' as %2F, '?' as %3F and '@' as %40")
        host = f"the host of {self.name}"
        return [complete_address(self.decode(one, "host"), default_port, host) for one in text.split(",")]

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
        if verify.lower() not in BOOLS:
            self.fail(f"has ?verify={verify}; expected true or false")
        return TLSOptions(
            server_name=self.one("server_name"),
            ca_file=self.one("ca"),
            cert_file=self.one("cert"),
            key_file=self.one("key"),
            verify=BOOLS[verify.lower()],
        )


BOOLS: Final = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def _parse_duration(text: str) -> timedelta | None:
    """Seconds such as `5` or `0.5`, or a Go duration; None when it is neither, or negative."""
    with suppress(ValueError, OverflowError):
        if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text, re.ASCII):
            return timedelta(seconds=float(text))
        if text[:1] not in ("+", "-"):
            return parse_duration(text)
    return None


def says_database(uri: str) -> bool:
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return False
    parsed = _URI(scheme.lower(), rest)
    return parsed.one("db") is not None or (parsed.form != "socket" and parsed.path.strip("/") != "")
