"""The compose files are valid, and what they start works: checked without a Docker daemon."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from asynq_aio import Client, RedisClusterClientOpt
from asynq_aio._broker.embedded import EmbeddedRedis, server
from tests.servers import eventually, own_standalone

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "compose"
FILES = ["cluster.yaml", "full.yaml"]
PORTS = [str(port) for port in range(7000, 7006)]
LOADER = "github.com/compose-spec/compose-go/v2/cmd@v2.16.2"
"""What `docker compose config` is made of; it refuses unknown keys, wrong types and references that lead nowhere."""


@cache
def model(file: str) -> dict[str, Any]:
    """The file as `docker compose config` understands it; by its loader alone where the plugin is not installed."""
    docker = shutil.which("docker")
    plugin = docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True, check=False)
    if plugin and plugin.returncode == 0:
        command = ["docker", "compose", "-f", str(COMPOSE / file), "config", "--format", "json"]
    else:
        command = ["go", "run", LOADER, "-format", "json", str(COMPOSE / file)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=COMPOSE)
    assert made.returncode == 0, made.stderr
    loaded: dict[str, Any] = json.loads(made.stdout)
    return loaded


def options(file: str, node: str) -> dict[str, str]:
    """What a node of the file is started with: the lines of node.conf and its own arguments."""
    program, configuration, *arguments = model(file)["services"][node]["command"]
    assert (program, configuration) == ("valkey-server", "/etc/valkey/node.conf")
    lines = (COMPOSE / "node.conf").read_text().splitlines()
    settings = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    return settings | {
        name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)
    }


@pytest.mark.parametrize("file", FILES)
def test_is_valid_and_has_six_nodes(file: str) -> None:
    """Docker compose accepts the file; the nodes are configured as the tutorial says."""
    nodes = [name for name in model(file)["services"] if name.startswith("node-")]
    assert nodes == [f"node-{port}" for port in PORTS]
    for node in nodes:
        told = options(file, node)
        assert (told["port"], told["cluster-enabled"], told["cluster-config-file"]) == (node[5:], "yes", "nodes.conf")
        assert (told["cluster-node-timeout"], told["appendonly"]) == ("5000", "yes")


@pytest.mark.parametrize("file", FILES)
def test_every_file_that_is_mounted_is_there(file: str) -> None:
    """A source that is missing would become an empty directory."""
    for name, service in model(file)["services"].items():
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                assert Path(mount["source"]).is_file(), name
    assert os.access(COMPOSE / "create-cluster.sh", os.X_OK)


@pytest.mark.parametrize("file", FILES)
def test_only_the_host_itself_reaches_in(file: str) -> None:
    """Nothing has a password, so every published port is bound to loopback."""
    for service in model(file)["services"].values():
        assert {port["host_ip"] for port in service.get("ports", [])} <= {"127.0.0.1"}


def test_the_tutorials_cluster_is_reachable_from_the_host() -> None:
    """Each node announces the address at which its port is published, and all share the network that publishes it."""
    services = model("cluster.yaml")["services"]
    assert [port["published"] for port in services["cluster"]["ports"]] == PORTS
    assert [str(port["target"]) for port in services["cluster"]["ports"]] == PORTS
    for port in PORTS:
        told = options("cluster.yaml", f"node-{port}")
        assert (told["cluster-announce-ip"], told["cluster-announce-port"]) == ("127.0.0.1", port)
        assert told["cluster-announce-bus-port"] == str(int(port) + 10_000)
        assert services[f"node-{port}"]["network_mode"] == "service:cluster"


def _free_ports() -> dict[str, str]:
    """Ports for the nodes of a file, since 7000 may be taken."""
    drawn: set[int] = set()
    while len(drawn) < len(PORTS):
        drawn.add(server._free_port())
    return dict(zip(PORTS, map(str, drawn), strict=True))


@pytest.mark.parametrize("file", FILES)
async def test_the_nodes_become_a_cluster_that_our_client_uses(file: str, tmp_path: Path) -> None:
    """The nodes as configured, joined by create-cluster.sh, agree and serve; joining them again changes nothing."""
    ports = _free_ports()
    with ExitStack() as stack:
        nodes = []
        for port in PORTS:
            settings = options(file, f"node-{port}") | {"bind": "127.0.0.1"}
            if "cluster-announce-port" in settings:
                settings["cluster-announce-port"] = ports[port]
                settings["cluster-announce-bus-port"] = str(int(ports[port]) + 10_000)
            node = EmbeddedRedis(port=int(ports[port]), settings=settings | {"port": ports[port]})
            stack.callback(node.stop)
            node.start()
            nodes.append(node)

        script, *addresses = model(file)["services"]["cluster"]["command"]
        assert [address.rpartition(":")[2] for address in addresses] == PORTS
        here = [f"127.0.0.1:{ports[address.rpartition(':')[2]]}" for address in addresses]
        (tmp_path / "valkey-cli").symlink_to(shutil.which("redis-cli") or "redis-cli is missing")
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "READY": str(tmp_path / "ready")}
        for _ in range(2):
            with subprocess.Popen([COMPOSE / script, *here], env=environment, stdout=subprocess.DEVNULL) as joining:
                try:
                    assert eventually((tmp_path / "ready").exists, 60)
                    assert joining.poll() is None  # it stays, so that its container does
                finally:
                    joining.kill()
            (tmp_path / "ready").unlink()
        for node in nodes:
            assert "cluster_known_nodes:6\r" in node.execute("CLUSTER", "INFO")
        roles = sorted(node.execute("ROLE")[0] for node in nodes)
        assert roles == ["master"] * 3 + ["slave"] * 3

        redis = RedisClusterClientOpt(
            addrs=here[:1], address_remap={f"node-{port}": "127.0.0.1" for port in PORTS}
        )  # in full.yaml the nodes tell their host names, which only its own network resolves
        async with Client(redis) as client:
            for queue in ("notifications", "webhooks", "images"):
                assert (await client.enqueue("task", {}, queue=queue)).queue == queue
        names = {f"node-{port}" for port in PORTS} if file == "full.yaml" else {"127.0.0.1"}
        assert eventually(lambda: all(_hosts(node) == names for node in nodes))


def _hosts(node: EmbeddedRedis) -> set[str]:
    """The hosts of all nodes, as this one tells its clients."""
    return {str(owner[0]) for row in node.execute("CLUSTER", "SLOTS") for owner in row[2:]}


async def test_the_workers_command_works_and_drains() -> None:
    """The command line of the worker starts, answers its health check, and ends well at SIGTERM."""
    worker = model("full.yaml")["services"]["worker"]
    (health,) = (word for word in worker["command"] if word.startswith("--health-port="))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = re.search(r"http://\S+?:(\d+)/readyz", " ".join(worker["healthcheck"]["test"]))
    assert url is not None
    assert url[1] == health.partition("=")[2]

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    async with own_standalone() as redis:
        command = [f"--health-port={port}" if word == health else word for word in worker["command"]]
        environment = {**os.environ, "ASYNQ_URI": redis.uri}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert eventually(ready, 30)
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=30)
            finally:
                process.kill()
        assert process.returncode == 0, said


def test_the_image_has_all_that_its_build_copies() -> None:
    """.dockerignore lets through what the Dockerfile copies, and all of that is there."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    let_through = [pattern.removeprefix("!") for pattern in ignored if pattern.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (COMPOSE / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, pattern) for pattern in let_through), source


def test_the_web_app_is_there() -> None:
    """The module that uvicorn is told to serve, and the address of the health check in it."""
    web = model("full.yaml")["services"]["web"]
    app, directory = web["command"][1], web["command"][2].removeprefix("--app-dir=")
    module = ROOT / directory / f"{app.partition(':')[0]}.py"
    assert f"\n{app.partition(':')[2]} = FastAPI(" in module.read_text()
    path = re.search(r"http://127\.0\.0\.1:8000(/\w+)", " ".join(web["healthcheck"]["test"]))
    assert path is not None
    assert f'"{path[1]}"' in module.read_text()
