"""Fixtures over real servers; servers.py says which.

A test that takes `topology`, `server`, `uri`, `store` or `redis` runs six times, once on each topology. One that is
about some of them says so: `@pytest.mark.parametrize("topology", ["cluster-valkey9"], indirect=True)`.
"""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import servers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from asynq_aio._broker.store import Store

RUN_DIRECTORY = pytest.StashKey[Path]()
LIFELINE = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """One directory for a run, made by its controller, which holds the lifeline of the shared servers."""
    if hasattr(config, "workerinput"):  # an xdist worker
        config.stash[RUN_DIRECTORY] = Path(config.workerinput["run_directory"])
    else:
        config.stash[RUN_DIRECTORY] = Path(tempfile.mkdtemp(prefix="asynq-aio-run-"))
        config.stash[LIFELINE] = servers.open_lifeline(config.stash[RUN_DIRECTORY])


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_configure_node(node: Any) -> None:
    """Tell a worker where the run's directory is."""
    node.workerinput["run_directory"] = str(node.config.stash[RUN_DIRECTORY])


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the shared servers."""
    if LIFELINE in config.stash:
        left = servers.close_lifeline(config.stash[RUN_DIRECTORY], config.stash[LIFELINE])
        if left:
            raise RuntimeError(f"shared servers that outlived the run: {left}")


@pytest.fixture(scope="session")
def run_directory(pytestconfig: pytest.Config) -> Path:
    """Shared by the xdist workers of this run."""
    return pytestconfig.stash[RUN_DIRECTORY]


# Of each test, not of the session: when xdist hands tests to another worker, pytest 9 now and then gives a test the
# session's server of the topology before.
@pytest.fixture(params=servers.TOPOLOGIES)
def topology(request: pytest.FixtureRequest) -> str:
    """The name of the topology: kind and version."""
    name: str = request.param
    return name


@pytest.fixture
def server(topology: str, run_directory: Path) -> servers.Servers:
    """The servers of this topology, shared by the whole run: a test leaves them as they are, but for its own queue."""
    return servers.shared(topology, run_directory)


@pytest.fixture
def empty_server(topology: str, run_directory: Path) -> Generator[servers.Servers]:
    """Servers of this topology, empty, and for this test alone: for dumps of a whole key space."""
    with servers.exclusive(topology, run_directory) as alone:
        yield alone


@pytest.fixture
def uri(server: servers.Servers) -> str:
    """Its address, as `Client(...)` takes it."""
    return server.uri


@pytest.fixture
async def store(uri: str) -> AsyncGenerator[Store]:
    """A door to it, closed after the test."""
    from asynq_aio._broker.store import Store

    opened = Store(uri)
    yield opened
    await opened.aclose()


@pytest.fixture
async def redis(server: servers.Servers) -> AsyncGenerator[Any]:
    """A plain redis-py client on it, to look with; replies are bytes."""
    client = server.client()
    await client.initialize()  # redis-py's cluster client breaks some of several first calls at once
    yield client
    await client.aclose()


@pytest.fixture
def queue() -> str:
    """A queue that nobody else has."""
    return f"q{uuid.uuid4().hex[:12]}"
