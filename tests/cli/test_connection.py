"""The global flags: anywhere on the line, before environment and file, and as one URI for what is started."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from asynq_aio import (
    ConfigError,
    RedisClientOpt,
    RedisClusterClientOpt,
    RedisConnOpt,
    RedisFailoverClientOpt,
    TLSOptions,
    parse_redis_uri,
)
from asynq_aio.cli.connection import Connection, uri_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Command

SECONDS = timedelta(seconds=7)


@pytest.mark.parametrize(
    "opt",
    [
        RedisClientOpt(),
        RedisClientOpt("[::1]:7", username="me", password="p@ss/w:rd?#%", db=3, deadline=timedelta(milliseconds=500)),
        RedisClientOpt("/run/my redis.sock", password="x", db=2),
        RedisClientOpt("embedded://"),
        RedisClientOpt("a:1", tls=True),
        RedisClientOpt("a:1", tls=TLSOptions(server_name="b", ca_file="/c a.pem", cert_file="/d", key_file="/e&f")),
        RedisClientOpt("a:1", tls=TLSOptions(verify=False), connect_timeout=SECONDS, read_timeout=SECONDS),
        RedisFailoverClientOpt(master_name="my master", sentinel_addrs=["a:1", "b"], db=1),
        RedisFailoverClientOpt(master_name="m", sentinel_addrs=["a"], password="p", shared_password=True),
        RedisFailoverClientOpt(
            master_name="m",
            sentinel_addrs=["a"],
            username="u",
            password="p",
            sentinel_username="s",
            sentinel_password="t&u",
            tls=True,
        ),
        RedisClusterClientOpt(addrs=["a:1", "b:2"], username="u", password="p+ +"),
        RedisClusterClientOpt(addrs=["a:1"], tls=True),
    ],
)
def test_every_option_has_a_uri(opt: RedisConnOpt) -> None:
    """What the URI stands for is the option that it was made of."""
    assert parse_redis_uri(uri_of(opt)) == opt


def test_a_password_for_redis_alone_stays_one() -> None:
    """Without a user name Go reads the URI's password as one for the sentinels; Redis calls that user `default`."""
    opt = RedisFailoverClientOpt(master_name="m", sentinel_addrs=["a"], password="p")
    assert parse_redis_uri(uri_of(opt)) == replace(opt, username="default")


def test_the_environment_says_all_and_only_that(tmp_path: Path) -> None:
    """After `settle` a program that looks only at ASYNQ_URI finds the Redis of flags, environment and file together."""
    config = tmp_path / "redis.yaml"
    config.write_text("password: from-file\ntls: true\n")
    environ = {"ASYNQ_DB": "4", "ASYNQ_PASSWORD": "from-environment", "OTHER": "1"}
    opt = Connection(uri="example.org:7", config=config).settle(environ)
    assert opt == RedisClientOpt("example.org:7", db=4, password="from-environment", tls=True)
    assert set(environ) == {"ASYNQ_URI", "OTHER"}
    assert parse_redis_uri(environ["ASYNQ_URI"]) == opt


def test_inner_flags_win() -> None:
    """What stands further right wins; what is given nowhere stays open."""
    outer = Connection(uri="a", db=1, cluster=True)
    assert Connection(uri="b", cluster=False).over(outer) == Connection(uri="b", db=1, cluster=False)
    assert Connection().over(None).given() == []
    assert Connection(uri="a", tls_server="b", no_color=True).given() == ["--uri", "--tls-server"]


def test_a_flag_that_cannot_be_right_is_refused() -> None:
    """The text says what was expected."""
    with pytest.raises(ConfigError, match="expected host:port"):
        Connection(cluster=True, cluster_addrs="a b").redis({})


def test_flags_stand_anywhere(command: Command, uri: str, queue: str) -> None:
    """Before the command, between command and sub-command, and behind; with dashes and underscores."""
    enqueued = command("task", "enqueue", "-t", "x", "-l", "1", "--queue", queue, "--uri", uri)
    assert enqueued.returncode == 0, enqueued.stderr
    places = [
        ["-u", uri, "queue", "ls"],
        ["queue", "-u", uri, "ls"],
        ["queue", "ls", f"--uri={uri}"],
        ["--uri", "127.0.0.1:1", "queue", "ls", "--uri", uri],
        ["--cluster=true", "queue", "ls", "--cluster=false", "-u", uri],
    ]
    for place in places:
        listed = command(*place)
        assert (listed.returncode, queue in listed.stdout.split()) == (0, True), (place, listed)


def test_flag_before_environment_before_file(command: Command, uri: str, queue: str) -> None:
    """The first of flag, environment and file counts."""
    command("task", "enqueue", "-t", "x", "-l", "1", "--queue", queue, "--uri", uri)
    nowhere = "redis://127.0.0.1:1?deadline=200ms"
    command.write(f"uri: '{nowhere}'\n", ".asynq.yaml")
    assert command("queue", "ls").returncode == 1
    assert queue in command("queue", "ls", env={"ASYNQ_URI": uri}).stdout
    assert queue in command("queue", "ls", "-u", uri, env={"ASYNQ_URI": nowhere}).stdout
    command.write(f"uri: '{uri}'\n", "mine.yaml")
    assert queue in command("queue", "ls", "--config", "mine.yaml").stdout


def test_a_broken_file_is_named(command: Command) -> None:
    """A config file is never ignored in silence."""
    command.write("urii: x\n", "mine.yaml")
    listed = command("queue", "ls", "--config", "mine.yaml")
    assert listed.returncode == 2
    assert "mine.yaml has the unknown key 'urii'; did you mean 'uri'?" in listed.stderr


def test_unreachable(command: Command) -> None:
    """Where nobody listens: the address, the reason, and what to do."""
    listed = command("queue", "ls", "--uri", "redis://127.0.0.1:1?deadline=300ms")
    assert (listed.returncode, listed.stdout) == (1, "")
    assert "error: Redis at 127.0.0.1:1 did not answer" in listed.stderr
    assert "hint: is Redis running there?" in listed.stderr
    assert "Traceback" not in listed.stderr


def test_wrong_password(command: Command, uri: str) -> None:
    """A refused password is no outage, is said at once, and is not repeated in the text."""
    listed = command("queue", "ls", "--uri", uri, "-p", "geheim")
    assert listed.returncode == 1
    assert "refused access" in listed.stderr
    assert "hint: check --username and --password" in listed.stderr
    assert "geheim" not in listed.stderr


def test_cluster_flag_at_a_single_server(command: Command, uri: str) -> None:
    """The flag is wrong, and the text says what stands there."""
    listed = command("queue", "ls", "--uri", uri, "--cluster")
    assert listed.returncode == 2
    assert "is a single Redis server, not a node of a cluster" in listed.stderr


@pytest.mark.parametrize("topology", ["cluster-valkey9"], indirect=True)
def test_single_server_at_a_cluster(command: Command, uri: str) -> None:
    """And the reverse, on each node that would send us elsewhere."""
    nodes = uri.removeprefix("redis-cluster://").split(",")
    listed = [command("queue", "ls", "--uri", node) for node in nodes[:2]]  # one master has the slot of asynq:queues
    refused = [one for one in listed if one.returncode != 0]
    assert refused
    for one in refused:
        assert one.returncode == 2
        assert "is a node of a Redis Cluster" in one.stderr
        assert "redis-cluster://" in one.stderr
        assert "Traceback" not in one.stderr
