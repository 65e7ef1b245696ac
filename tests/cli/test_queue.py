"""`asynq-aio queue list`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests import servers

if TYPE_CHECKING:
    from tests.cli.conftest import Command


@pytest.mark.parametrize("name", ["ls", "list"])
def test_names(command: Command, uri: str, queue: str, name: str) -> None:
    """One per line, sorted, by either name of the command."""
    for one in (f"{queue}b", f"{queue}a"):
        command("task", "enqueue", "-t", "a", "-l", "1", "--queue", one, "-u", uri)
    listed = command("queue", name, "-u", uri)
    assert listed.returncode == 0
    assert [line for line in listed.stdout.splitlines() if queue in line] == [f"{queue}a", f"{queue}b"]
    assert queue + "a" in json.loads(command("queue", name, "-u", uri, "--json").stdout)


@pytest.mark.parametrize("topology", ["cluster-valkey9"], indirect=True)
def test_the_tutorials_table(command: Command, uri: str) -> None:
    """Queue, slot, and its nodes: the master first, then its replicas."""
    for queue in ("notifications", "webhooks", "images"):
        command("task", "enqueue", "-t", "a", "-l", "1", "--queue", queue, "-u", uri)
    listed = command("queue", "ls", "--cluster", "-u", uri)
    assert listed.returncode == 0, listed.stderr
    titles, rule, *rows = listed.stdout.splitlines()
    assert titles.split("  ")[0] == "Queue"
    assert re.fullmatch(r"-{5} +-{15}  -{13} *", rule)
    slots = {}
    for row in rows:
        if row.split(" ")[0] in ("notifications", "webhooks", "images"):  # others' queues have odd names, by intent
            found = re.fullmatch(r"(\S+) +(\d+) +([0-9a-f]{40} [\d.]+:\d+, [0-9a-f]{40} [\d.]+:\d+) *", row)
            assert found, row
            slots[found[1]] = int(found[2])
    assert slots == {"images": 9450, "webhooks": 4418, "notifications": 16340}


@pytest.mark.parametrize("topology", ["cluster-valkey9"], indirect=True)
def test_the_table_as_json(command: Command, server: servers.Servers, uri: str, queue: str) -> None:
    """The same for programs; the addresses are those of the cluster."""
    command("task", "enqueue", "-t", "a", "-l", "1", "--queue", queue, "-u", uri)
    documents = json.loads(command("queue", "ls", "--cluster", "-u", uri, "--json").stdout)
    (found,) = [document for document in documents if document["queue"] == queue]
    assert 0 <= found["slot"] < 16384
    assert len(found["nodes"]) == 2
    assert all(int(node["addr"].rpartition(":")[2]) in server.ports for node in found["nodes"])


async def test_a_queue_without_nodes_is_an_error_of_its_own(command: Command) -> None:
    """The others are still printed; exit code 1."""
    async with servers.own_cluster(2, 0, settings={"cluster-require-full-coverage": "no"}) as cluster:
        for queue in ("webhooks", "images"):  # slots 4418 and 9450: a master each
            assert command("task", "enqueue", "-t", "a", "-l", "1", "--queue", queue, "-u", cluster.uri).returncode == 0
        for node in cluster.nodes:
            node.execute("CLUSTER", "DELSLOTS", "9450")
        listed = command("queue", "ls", "--cluster", "-u", cluster.uri)
        assert listed.returncode == 1
        assert "webhooks" in listed.stdout
        assert "images" not in listed.stdout
        assert "error: queue 'images': nodes not found" in listed.stderr


async def test_no_queues(command: Command) -> None:
    """Nothing on stdout; a note beside it."""
    async with servers.own_standalone() as empty:
        listed = command("queue", "ls", "-u", empty.uri)
    assert (listed.returncode, listed.stdout) == (0, "")
    assert "no queues yet" in listed.stderr
