"""Options, URIs and the order in which addresses are found: all of it without a server."""

from __future__ import annotations

import json
import ssl
import traceback
from dataclasses import FrozenInstanceError, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from asynq_aio import _config
from asynq_aio._config import (
    CLUSTER_ADDRS,
    EMBEDDED,
    Address,
    RedisClientOpt,
    RedisClusterClientOpt,
    RedisConnOpt,
    RedisFailoverClientOpt,
    TLSOptions,
    join_address,
    remap_address,
    split_address,
)
from asynq_aio._defaults import default_redis, find_config_file
from asynq_aio._uris import parse_redis_uri
from asynq_aio.errors import ConfigError

SECRET = "s3cr3t"


def failover(*addrs: str, **fields: Any) -> RedisFailoverClientOpt:
    """An option for Sentinel; `mymaster` unless told otherwise."""
    return RedisFailoverClientOpt(**{"master_name": "mymaster", "sentinel_addrs": addrs, **fields})


def cluster(*addrs: str, **fields: Any) -> RedisClusterClientOpt:
    """An option for a cluster."""
    return RedisClusterClientOpt(addrs=addrs, **fields)


def texts(error: BaseException | None) -> str:
    """All that a log could show of an error: its text, its repr, and those of the errors that it came from."""
    shown = []
    while error is not None:
        shown += [str(error), repr(error), "".join(traceback.format_exception_only(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


# URIs

URIS: list[tuple[str, RedisConnOpt]] = [
    # bare
    ("localhost", RedisClientOpt("localhost:6379")),
    ("localhost:7777", RedisClientOpt("localhost:7777")),
    ("127.0.0.1:6379", RedisClientOpt()),
    ("[::1]:6380", RedisClientOpt("[::1]:6380")),
    ("[::1]", RedisClientOpt("[::1]:6379")),
    ("/run/redis.sock", RedisClientOpt("/run/redis.sock")),
    # one server
    ("redis://", RedisClientOpt("localhost:6379")),
    ("redis://host", RedisClientOpt("host:6379")),
    ("REDIS://host", RedisClientOpt("host:6379")),
    ("redis://host:1234", RedisClientOpt("host:1234")),
    ("redis://host:1234/", RedisClientOpt("host:1234")),
    ("redis://host/3", RedisClientOpt("host:6379", db=3)),
    ("redis://host/3/", RedisClientOpt("host:6379", db=3)),
    ("redis://host/3/more", RedisClientOpt("host:6379", db=3)),
    ("redis://host?db=4", RedisClientOpt("host:6379", db=4)),
    ("redis://host/?db=4", RedisClientOpt("host:6379", db=4)),
    ("redis://host/4?db=4", RedisClientOpt("host:6379", db=4)),
    ("redis://:pw@host", RedisClientOpt("host:6379", password="pw")),
    ("redis://user:pw@host:1/2", RedisClientOpt("host:1", username="user", password="pw", db=2)),
    ("redis://@host", RedisClientOpt("host:6379")),
    ("redis://:@host", RedisClientOpt("host:6379")),
    ("redis://:p%40%3A%2F%3F%23%25%20w@host", RedisClientOpt("host:6379", password="p@:/?#% w")),
    ("redis://us%3Aer:p%C3%A4@host", RedisClientOpt("host:6379", username="us:er", password="pä")),
    ("redis://u:p+w@host", RedisClientOpt("host:6379", username="u", password="p+w")),
    ("redis://:a:b@host", RedisClientOpt("host:6379", password="a:b")),
    ("redis://:a@b@host", RedisClientOpt("host:6379", password="a@b")),
    ("redis://[::1]", RedisClientOpt("[::1]:6379")),
    ("redis://:pw@[2001:db8::7]:6380/1", RedisClientOpt("[2001:db8::7]:6380", password="pw", db=1)),
    ("redis://[fe80::1%25eth0]:6380", RedisClientOpt("[fe80::1%eth0]:6380")),
    ("redis://h?connect_timeout=2", RedisClientOpt("h", connect_timeout=timedelta(seconds=2))),
    ("redis://h?connect_timeout=0.25", RedisClientOpt("h", connect_timeout=timedelta(milliseconds=250))),
    ("redis://h?read_timeout=500ms", RedisClientOpt("h", read_timeout=timedelta(milliseconds=500))),
    ("redis://h?deadline=1m30s", RedisClientOpt("h", deadline=timedelta(seconds=90))),
    ("redis://h?deadline=1h0.5m.5s", RedisClientOpt("h", deadline=timedelta(seconds=3630.5))),
    ("redis://h?deadline=1500us", RedisClientOpt("h", deadline=timedelta(microseconds=1500))),
    (
        "redis://h/1?deadline=9&read_timeout=8&connect_timeout=7",
        RedisClientOpt(
            "h",
            db=1,
            deadline=timedelta(seconds=9),
            read_timeout=timedelta(seconds=8),
            connect_timeout=timedelta(seconds=7),
        ),
    ),
    # TLS
    ("rediss://host", RedisClientOpt("host:6379", tls=True)),
    ("rediss://host?verify=true", RedisClientOpt("host:6379", tls=TLSOptions())),
    ("rediss://host?verify=false", RedisClientOpt("host:6379", tls=TLSOptions(verify=False))),
    ("rediss://host?verify=0", RedisClientOpt("host:6379", tls=TLSOptions(verify=False))),
    ("rediss://host?ca=/etc/a%20b.pem", RedisClientOpt("host:6379", tls=TLSOptions(ca_file="/etc/a b.pem"))),
    (
        "rediss://u:p@host?ca=ca.pem&cert=c.pem&key=k.pem&server_name=redis.test",
        RedisClientOpt(
            "host",
            username="u",
            password="p",
            tls=TLSOptions(ca_file="ca.pem", cert_file="c.pem", key_file="k.pem", server_name="redis.test"),
        ),
    ),
    # Unix sockets
    ("redis-socket:///run/redis.sock", RedisClientOpt("/run/redis.sock")),
    ("redis-socket:///run/redis.sock?db=3", RedisClientOpt("/run/redis.sock", db=3)),
    ("redis-socket://:pw@/run/redis.sock", RedisClientOpt("/run/redis.sock", password="pw")),
    ("unix://user:pw@/run/a%20b.sock?db=3", RedisClientOpt("/run/a b.sock", username="user", password="pw", db=3)),
    ("unix:///run/a@b.sock", RedisClientOpt("/run/a@b.sock")),
    # Sentinel
    ("redis-sentinel://h", failover("h:26379")),
    ("redis-sentinel://h1,h2:5000", failover("h1:26379", "h2:5000")),
    ("redis-sentinel://h1,[::1]:5000/3?master=main", failover("h1:26379", "[::1]:5000", db=3, master_name="main")),
    ("redis-sentinel://:pw@h", failover("h:26379", password="pw", shared_password=True)),
    ("redis-sentinel://user:pw@h", failover("h:26379", username="user", password="pw")),
    ("redis-sentinel://:pw@h?sentinel_password=sp", failover("h:26379", password="pw", sentinel_password="sp")),
    (
        "rediss-sentinel://u:pw@h?sentinel_username=su&sentinel_password=s%40p&master=m&verify=no",
        failover(
            "h:26379",
            username="u",
            password="pw",
            sentinel_username="su",
            sentinel_password="s@p",
            master_name="m",
            tls=TLSOptions(verify=False),
        ),
    ),
    ("redis-sentinel://h?sentinel_password=s@p", failover("h:26379", sentinel_password="s@p")),
    # Cluster
    ("redis-cluster://h", cluster("h:6379")),
    ("redis-cluster://h1:7000,h2:7001/", cluster("h1:7000", "h2:7001")),
    ("redis-cluster://h1:7000/0", cluster("h1:7000")),
    ("redis-cluster://h1:7000?db=0", cluster("h1:7000")),
    ("redis-cluster://user:pw@h1:7000,[::1]:7001", cluster("h1:7000", "[::1]:7001", username="user", password="pw")),
    ("redis-cluster://h1:7000?addr=h2:7001&addr=h3", cluster("h1:7000", "h2:7001", "h3:6379")),
    ("redis-cluster://?addr=h2:7001", cluster("h2:7001")),
    ("rediss-cluster://h1", cluster("h1:6379", tls=True)),
    ("redis+cluster://h1", cluster("h1:6379")),
    ("rediss+cluster://h1?server_name=n", cluster("h1:6379", tls=TLSOptions(server_name="n"))),
    # embedded
    ("embedded://", RedisClientOpt(EMBEDDED)),
    ("embedded://?db=2&deadline=1s", RedisClientOpt(EMBEDDED, db=2, deadline=timedelta(seconds=1))),
]


@pytest.mark.parametrize(("uri", "option"), URIS, ids=[uri for uri, _ in URIS])
def test_uri_stands_for_an_option(uri: str, option: RedisConnOpt) -> None:
    """Each form of a URI gives the option of the same meaning, with ports filled in."""
    parsed = parse_redis_uri(uri)
    if isinstance(option.tls, TLSOptions) and option.tls == TLSOptions():
        assert parsed.tls in {True, TLSOptions()}
        parsed = replace(parsed, tls=option.tls)
    assert parsed == option


WRONG_URIS = [
    ("", "is empty"),
    ("   ", "is empty"),
    ("http://host", 'unsupported Redis URI scheme: "http"'),
    ("redi://host", "did you mean 'redis'?"),
    ("redis-clutser://host", "did you mean 'redis-cluster'?"),
    ("h1:1,h2:2", "redis-cluster://h1:1,h2:2"),
    ("host:port", "no port number behind 'host:'"),
    ("host:", "no port number behind 'host:'"),
    ("host:0", "port 0; expected one from 1 to 65535"),
    ("host:65536", "port 65536; expected one from 1 to 65535"),
    (":6379", "has no host"),
    ("::1", "an IPv6 address goes in brackets, such as [::1]:6379"),
    ("[::1", "no IPv6 address in brackets"),
    ("[nonsense]:6379", "no IPv6 address in brackets"),
    ("[::1]6379", "no IPv6 address in brackets"),
    ("host:1/2", "no port number"),
    ("ho st", "cannot be read"),
    ("redis://h1,h2", "has several hosts"),
    ("redis://host:x", "no port number"),
    ("redis://host/-1", "the database number should be the first segment of the path, 0 or more, not '-1'"),
    ("redis://host/one", "the database number should be the first segment of the path"),
    ("redis://host/one/2", "the database number should be the first segment of the path"),
    ("redis://host?db=one", "?db= should be a number"),
    ("redis://host/1?db=2", "the database 1 in its path and 2 in ?db="),
    ("redis://host?db=", "no value for ?db="),
    ("redis://host?db", "no value for ?db="),
    ("redis://host?db=1&db=1", "?db= twice"),
    ("redis://host?dp=1", "unknown query key 'dp'; did you mean 'db'?"),
    ("redis://host?read_timout=1", "did you mean 'read_timeout'?"),
    ("redis://host?dial_timeout=1", "did you mean 'connect_timeout'?"),
    ("redis://host?socket_timeout=1", "did you mean 'read_timeout'?"),
    ("redis://host?zzz=1", "expected db, connect_timeout"),
    ("redis://host?master=m", "unknown query key 'master'"),
    ("redis://host?verify=false", "?verify=, which needs TLS"),
    ("rediss://host?verify=maybe", "expected true or false"),
    ("rediss://host?key=k.pem", "without cert_file"),
    ("rediss://host?ssl_ca_certs=k.pem", "did you mean 'ca'?"),
    ("redis://host?deadline=0", "above 0"),
    ("redis://host?deadline=-1s", "above 0"),
    ("redis://host?deadline=1d", "Go duration"),
    ("redis://host?deadline=nan", "Go duration"),
    ("redis://host?deadline=1e3", "Go duration"),
    ("redis://host?deadline=99999999999h", "Go duration"),
    ("redis://host#1", "has a '#'"),
    ("redis://user@host", "user name without a password"),
    ("redis://user:@host", "user name without a password"),
    ("redis://:a%b@host", "write a plain '%' as %25"),
    ("redis://:%ff@host", "not UTF-8"),
    ("redis-socket://", "has no path"),
    ("redis-socket:///", "has no path"),
    ("redis-socket://run/redis.sock", "three slashes"),
    ("redis-socket:///run/redis.sock?db=x", "?db= should be a number"),
    ("redis-sentinel://", "has no host"),
    ("redis-sentinel://h/x", "the database number should be the first segment of the path"),
    ("redis-sentinel://h?sentinel_username=u", "without ?sentinel_password="),
    ("redis-sentinel://h?master_name=m", "did you mean 'master'?"),
    ("redis-sentinel://h1,,h2", "has no host"),
    ("redis-cluster://", "has no host"),
    ("redis-cluster://h/1", "a Redis Cluster has database 0 alone"),
    ("redis-cluster://h?db=1", "a Redis Cluster has database 0 alone"),
    ("redis-cluster://h?adr=h2", "did you mean 'addr'?"),
    ("embedded://host", "takes no host"),
    ("embedded:///tmp", "takes no host"),
]


@pytest.mark.parametrize(("uri", "says"), WRONG_URIS, ids=[uri for uri, _ in WRONG_URIS])
def test_wrong_uri_is_refused(uri: str, says: str) -> None:
    """A URI that cannot be right is refused with what was wrong and what was expected."""
    with pytest.raises(ConfigError) as caught:
        parse_redis_uri(uri)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        f"redis://:{SECRET}@host:port",
        f"redis://:{SECRET}@host/x",
        f"redis://:{SECRET}@host?nope=1",
        f"redis://:{SECRET}/more@host",
        f"redis://:12/{SECRET}@host",
        f"redis://:{SECRET}?more@host",
        f"redis://user:{SECRET}?x=y@host",
        f"redis://:12?{SECRET}@host",
        f"redis://:{SECRET}#more@host",
        f"redis://:more#{SECRET}@host",
        f"redis://:{SECRET}%zz@host",
        f"redis://:{SECRET}%ff@host",
        f"redis://{SECRET}@host",
        f"redis://user:{SECRET}",
        f"redis://user:{SECRET}:6379",
        f"redis://host/0?sentinel_password={SECRET}",
        f"redis-sentinel://host?sentinel_password={SECRET}&nope=1",
        f"redis-sentinel://host?sentinel_password={SECRET}%ff",
        f"redis-sentinel://host?sentinel_username=u&sentinel_pasword={SECRET}",
        f"redis-cluster://u:{SECRET}@h1,h2:x",
        f"redis-socket://:{SECRET}@host/x.sock",
        f"embedded://:{SECRET}@",
        f"user:{SECRET}@host",
        f"user:{SECRET}:6379",
        f":{SECRET}@host:6379",
        f"user:{SECRET}@redis://host",
        f"redis//:{SECRET}@host",
        f"redis://:{SECRET}/1,{SECRET}@h",
    ],
)
def test_no_password_in_errors_of_uris(uri: str) -> None:
    """However a URI is mistyped, the password is not in the error, nor in the ones that it came from."""
    with pytest.raises(ConfigError) as caught:
        parse_redis_uri(uri)
    assert SECRET not in texts(caught.value)


def test_uri_must_be_text() -> None:
    """Anything but a str is refused by its type."""
    with pytest.raises(ConfigError, match="of type bytes; expected a str"):
        parse_redis_uri(b"redis://host")  # type: ignore[arg-type]


# Options


def test_defaults_of_the_options() -> None:
    """The defaults are those of the parity table."""
    opt = RedisClientOpt()
    assert (opt.addr, opt.username, opt.password, opt.db, opt.tls) == ("127.0.0.1:6379", None, None, 0, False)
    for one in (opt, failover("h"), cluster("h")):
        assert (one.connect_timeout, one.read_timeout) == (timedelta(seconds=5), timedelta(seconds=5))
        assert one.deadline == timedelta(seconds=30)


def test_options_are_frozen() -> None:
    """An option is checked once and does not change after."""
    with pytest.raises(FrozenInstanceError):
        RedisClientOpt().db = 1  # type: ignore[misc]


def test_lists_become_tuples_with_ports() -> None:
    """The caller's list is copied, and default ports are filled in."""
    addrs = ["h1", "[::1]", "h2:1"]
    opt = RedisClusterClientOpt(addrs=addrs)
    addrs.clear()
    assert opt.addrs == ("h1:6379", "[::1]:6379", "h2:1")
    assert failover("h1", "h2:1").sentinel_addrs == ("h1:26379", "h2:1")


WRONG_OPTIONS: list[tuple[type, dict[str, Any], str]] = [
    (RedisClientOpt, {"addr": ""}, "RedisClientOpt.addr has no host"),
    (RedisClientOpt, {"addr": None}, "RedisClientOpt.addr is of type NoneType; expected a str"),
    (RedisClientOpt, {"addr": "redis://host"}, "RedisClientOpt.addr is a URI"),
    (RedisClientOpt, {"addr": "user@host"}, "RedisClientOpt.addr has an '@'"),
    (RedisClientOpt, {"db": -1}, "RedisClientOpt.db is -1; expected 0 or more"),
    (RedisClientOpt, {"db": "1"}, "RedisClientOpt.db is '1'; expected an int"),
    (RedisClientOpt, {"db": True}, "RedisClientOpt.db is True; expected an int"),
    (RedisClientOpt, {"tls": "yes"}, "RedisClientOpt.tls is of type str"),
    (RedisClientOpt, {"tls": None}, "RedisClientOpt.tls is of type NoneType"),
    (RedisClientOpt, {"addr": "/run/redis.sock", "tls": True}, "a Unix socket has no TLS"),
    (RedisClientOpt, {"addr": EMBEDDED, "password": "p"}, "neither users nor passwords nor TLS"),
    (RedisClientOpt, {"addr": EMBEDDED, "tls": True}, "neither users nor passwords nor TLS"),
    (RedisClientOpt, {"username": b"u"}, "RedisClientOpt.username is of type bytes"),
    (RedisClientOpt, {"password": b"p"}, "RedisClientOpt.password is of type bytes"),
    (RedisClientOpt, {"connect_timeout": 5}, "RedisClientOpt.connect_timeout is 5; expected a timedelta"),
    (RedisClientOpt, {"read_timeout": timedelta(0)}, "RedisClientOpt.read_timeout is 0:00:00; expected more than 0"),
    (RedisClientOpt, {"deadline": timedelta(seconds=-1)}, "RedisClientOpt.deadline is -1 day"),
    (RedisFailoverClientOpt, {"master_name": "", "sentinel_addrs": ["h"]}, "master_name is ''"),
    (RedisFailoverClientOpt, {"master_name": " ", "sentinel_addrs": ["h"]}, "master_name is ' '"),
    (RedisFailoverClientOpt, {"master_name": None, "sentinel_addrs": ["h"]}, "master_name is None"),
    (RedisFailoverClientOpt, {"master_name": 7, "sentinel_addrs": ["h"]}, "master_name is 7"),
    (RedisFailoverClientOpt, {"master_name": "m", "sentinel_addrs": []}, "sentinel_addrs is empty"),
    (RedisFailoverClientOpt, {"master_name": "m", "sentinel_addrs": "h:1"}, "sentinel_addrs is of type str"),
    (RedisFailoverClientOpt, {"master_name": "m", "sentinel_addrs": None}, "sentinel_addrs is of type NoneType"),
    (RedisFailoverClientOpt, {"master_name": "m", "sentinel_addrs": ["h:x"]}, "sentinel_addrs has no port number"),
    (RedisFailoverClientOpt, {"master_name": "m", "sentinel_addrs": ["h"], "db": -2}, "db is -2"),
    (RedisFailoverClientOpt, {"master_name": "m", "sentinel_addrs": ["h"], "sentinel_password": 1}, "of type int"),
    (RedisFailoverClientOpt, {"master_name": "m", "sentinel_addrs": ["h"], "shared_password": True}, "goes with"),
    (RedisFailoverClientOpt, {"master_name": "m", "sentinel_addrs": ["h"], "shared_password": 1}, "True or False"),
    (RedisClusterClientOpt, {"addrs": []}, "RedisClusterClientOpt.addrs is empty"),
    (RedisClusterClientOpt, {"addrs": "h1,h2"}, "RedisClusterClientOpt.addrs is of type str"),
    (RedisClusterClientOpt, {"addrs": [("h", 1)]}, "RedisClusterClientOpt.addrs holds a tuple"),
    (RedisClusterClientOpt, {"addrs": ["h"], "db": 1}, "a Redis Cluster has database 0 alone"),
    (RedisClusterClientOpt, {"addrs": ["h"], "address_remap": ["h"]}, "address_remap is of type list"),
    (RedisClusterClientOpt, {"addrs": ["h"], "address_remap": {"h": 1}}, "expected str to str"),
    (RedisClusterClientOpt, {"addrs": ["h"], "address_remap": {"h:1": "i"}}, "a port on both sides"),
    (RedisClusterClientOpt, {"addrs": ["h"], "address_remap": {"h:1": "i:x"}}, "address_remap has no port number"),
    (TLSOptions, {"key_file": "k"}, "without cert_file"),
    (TLSOptions, {"ca_file": ""}, "TLSOptions.ca_file is ''"),
    (TLSOptions, {"server_name": 1}, "TLSOptions.server_name is 1"),
    (TLSOptions, {"verify": "no"}, "TLSOptions.verify is 'no'; expected True or False"),
    (TLSOptions, {"verify": False, "ca_file": "ca"}, "would never be looked at"),
]


@pytest.mark.parametrize(("kind", "fields", "says"), WRONG_OPTIONS, ids=[says for _, _, says in WRONG_OPTIONS])
def test_wrong_option_is_refused(kind: type, fields: dict[str, Any], says: str) -> None:
    """An option that cannot be right is refused when it is made, with field, value and what was expected."""
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    assert says in str(caught.value)


def test_no_password_in_reprs() -> None:
    """No option shows a password, nor the callable that knows it."""
    for opt in (
        RedisClientOpt(password=SECRET),
        RedisClientOpt(password=lambda: SECRET),
        failover("h", password=SECRET, sentinel_password=SECRET),
        cluster("h", username="u", password=SECRET),
    ):
        assert SECRET not in repr(opt)
        assert "password=" not in repr(opt).replace("shared_password=", "")


def test_every_kind_of_tls_is_taken() -> None:
    """False, True, a context and TLSOptions are what `tls` may be; paths may be `Path`s."""
    context = ssl.create_default_context()
    assert RedisClientOpt(tls=context).tls is context
    assert TLSOptions(ca_file=Path("/ca.pem")).ca_file == "/ca.pem"  # type: ignore[arg-type]


# Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("h", ("h", 1)),
        ("h:2", ("h", 2)),
        ("[::1]", ("::1", 1)),
        ("[::1]:2", ("::1", 2)),
        ("1.2.3.4:65535", ("1.2.3.4", 65535)),
    ],
)
def test_addresses_split_and_join(text: str, address: Address) -> None:
    """An address comes apart, and together again with its port."""
    assert split_address(text, 1, "it") == address
    assert split_address(join_address(*address), 1, "it") == address


@pytest.mark.parametrize(
    ("remap", "announced", "dialled"),
    [
        ({"10.0.0.5:6379": "localhost:7000"}, ("10.0.0.5", 6379), ("localhost", 7000)),
        ({"10.0.0.5:6379": "localhost:7000"}, ("10.0.0.5", 6380), ("10.0.0.5", 6380)),
        ({"10.0.0.5": "localhost"}, ("10.0.0.5", 6380), ("localhost", 6380)),
        ({"a": "b", "a:1": "c:2"}, ("a", 1), ("c", 2)),
        ({"[::2]:1": "[::1]:2"}, ("::2", 1), ("::1", 2)),
        ({"[::2]": "[::1]"}, ("::2", 1), ("::1", 1)),
        (lambda address: ("x", address[1] + 1), ("a", 1), ("x", 2)),
    ],
)
def test_remap(remap: Any, announced: Address, dialled: Address) -> None:
    """A mapping names single nodes or whole hosts; a callable decides itself."""
    cluster("h", address_remap=remap)
    assert remap_address(remap, announced) == dialled


# The order: argument, environment, file, default


def test_local_redis_when_nobody_says_anything(tmp_path: Path) -> None:
    """Without flags, environment and file, Redis is on this machine."""
    assert default_redis({}) == RedisClientOpt("127.0.0.1:6379")
    assert default_redis({"HOME": str(tmp_path)}) == RedisClientOpt("127.0.0.1:6379")
    assert default_redis({"ASYNQ_URI": ""}, flags={"uri": None}) == RedisClientOpt("127.0.0.1:6379")


def test_flag_before_environment_before_file(tmp_path: Path) -> None:
    """The first that says something wins, setting by setting."""
    file = tmp_path / ".asynq.yaml"
    file.write_text("uri: file:1\ndb: 7\n")
    home = {"HOME": str(tmp_path)}
    assert default_redis(home) == RedisClientOpt("file:1", db=7)
    assert default_redis({**home, "ASYNQ_URI": "env:1"}) == RedisClientOpt("env:1", db=7)
    assert default_redis({**home, "ASYNQ_URI": "env:1", "ASYNQ_DB": "8"}) == RedisClientOpt("env:1", db=8)
    assert default_redis({**home, "ASYNQ_URI": "env:1"}, flags={"uri": "flag:1"}) == RedisClientOpt("flag:1", db=7)
    assert default_redis({**home, "ASYNQ_DB": "8"}, flags={"db": 0}) == RedisClientOpt("file:1", db=0)


def test_what_a_uri_says_counts_where_the_uri_stands() -> None:
    """A weaker source adds what the URI leaves open, and replaces nothing that it says."""
    environ = {"ASYNQ_PASSWORD": "weak", "ASYNQ_USERNAME": "weak", "ASYNQ_DB": "9"}
    assert default_redis(environ, flags={"uri": "redis://u:strong@h/0"}) == RedisClientOpt(
        "h", username="u", password="strong", db=0
    )
    assert default_redis(environ, flags={"uri": "h"}) == RedisClientOpt("h", username="weak", password="weak", db=9)
    assert default_redis(
        {"ASYNQ_URI": "redis://u:weak@h/1"}, flags={"password": "strong", "db": "2"}
    ) == RedisClientOpt("h", username="u", password="strong", db=2)


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        ({"cluster": True}, cluster(*CLUSTER_ADDRS)),
        ({"cluster": True, "cluster_addrs": "h1:1, h2:2"}, cluster("h1:1", "h2:2")),
        ({"cluster": True, "uri": "h:7000"}, cluster("h:7000")),
        ({"cluster": True, "uri": "redis-cluster://h:7000"}, cluster("h:7000")),
        ({"cluster": True, "uri": "redis-cluster://:p@h", "cluster_addrs": "i"}, cluster("i", password="p")),
        ({"cluster": True, "password": "p", "username": "u"}, cluster(*CLUSTER_ADDRS, username="u", password="p")),
        ({"cluster": "false", "cluster_addrs": "h1:1"}, RedisClientOpt()),
        ({"cluster_addrs": "h1:1"}, RedisClientOpt()),
        ({"tls": True}, RedisClientOpt(tls=True)),
        ({"tls": "true", "insecure": "true"}, RedisClientOpt(tls=TLSOptions(verify=False))),
        ({"tls_server": "n"}, RedisClientOpt(tls=TLSOptions(server_name="n"))),
        ({"insecure": True}, RedisClientOpt()),
        ({"uri": "rediss://h", "insecure": True}, RedisClientOpt("h", tls=TLSOptions(verify=False))),
        (
            {"uri": "rediss://h?ca=ca", "tls_server": "n"},
            RedisClientOpt("h", tls=TLSOptions(ca_file="ca", server_name="n")),
        ),
        ({"cluster": True, "tls": True}, cluster(*CLUSTER_ADDRS, tls=True)),
    ],
)
def test_the_settings_of_gos_command_line(flags: dict[str, object], option: RedisConnOpt) -> None:
    """Cluster and TLS settings mean what they mean to Go's `asynq`; a URI beside `cluster` is its seed."""
    assert default_redis({}, flags=flags) == option
    environ = {f"ASYNQ_{name.upper()}": str(value) for name, value in flags.items()}
    assert default_redis(environ) == option


def test_cluster_of_a_file_gives_way_to_a_uri(tmp_path: Path) -> None:
    """`cluster: true` in the file does not turn the address of a flag into a cluster."""
    file = tmp_path / "conf.yaml"
    file.write_text("cluster: true\ncluster_addrs: [h1:1, h2:2]\n")
    assert default_redis({}, config_path=file) == cluster("h1:1", "h2:2")
    assert default_redis({}, config_path=file, flags={"uri": "h:1"}) == RedisClientOpt("h:1")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".asynq.yaml", "uri: h:1\npassword: '12'\nDB: 3\nusername:\n"),
        (".asynq.yml", "{uri: 'h:1', password: '12', db: 3}"),
        (".asynq.json", json.dumps({"uri": "h:1", "password": "12", "db": 3})),
        (".asynq.toml", 'uri = "h:1"\npassword = "12"\ndb = 3\n'),
    ],
)
def test_config_files(tmp_path: Path, name: str, text: str) -> None:
    """YAML, JSON and TOML in the home directory are found by their names."""
    (tmp_path / name).write_text(text)
    environ = {"HOME": str(tmp_path)}
    assert find_config_file(environ) == tmp_path / name
    assert default_redis(environ) == RedisClientOpt("h:1", password="12", db=3)


def test_empty_config_file_says_nothing(tmp_path: Path) -> None:
    """A file of comments alone is like none."""
    (tmp_path / ".asynq.yaml").write_text("# nothing yet\n")
    assert default_redis({"HOME": str(tmp_path)}) == RedisClientOpt()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", f"password: {SECRET}\n  - : [", "as YAML, line 2"),
        ("a.yaml", SECRET, "expected lines such as"),
        ("a.yaml", f"[{SECRET}]", "expected lines such as"),
        ("a.toml", f"password = {SECRET}", "as TOML"),
        ("a.yaml", "urii: h", "unknown key 'urii'; did you mean 'uri'?"),
        ("a.yaml", "password: 12", "password in "),
        ("a.yaml", "db: x", "expected a number"),
        ("a.yaml", "cluster: maybe", "expected true or false"),
        ("a.yaml", "cluster: true\ncluster_addrs: 7", "expected host:port,host:port"),
        ("a.yaml", "cluster: true\nuri: redis-sentinel://h", "no address of a cluster node"),
        ("a.yaml", "cluster: true\ndb: 2", "a Redis Cluster has database 0 alone"),
    ],
)
def test_broken_config_file_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    """A file that cannot be right is not ignored, and its content is not shown."""
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        default_redis({}, config_path=file)
    assert says in str(caught.value)
    assert SECRET not in texts(caught.value)


def test_named_config_file_must_be_there(tmp_path: Path) -> None:
    """A file that somebody named is not optional."""
    with pytest.raises(ConfigError, match="No such file"):
        default_redis({}, config_path=tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"uri: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        default_redis({}, config_path=tmp_path / "latin.yaml")


def test_every_public_name_is_listed() -> None:
    """`__all__` names what there is, in order."""
    assert sorted(_config.__all__, key=lambda name: (not name.isupper(), name)) == _config.__all__
    assert all(hasattr(_config, name) for name in _config.__all__)
