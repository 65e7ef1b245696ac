"""Go's programs speak to a single server and to a cluster; every test runs on both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asynq_aio import Client
from tests.interop.go_peer import GoClient, GoInspector

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.servers import Servers


@pytest.fixture(params=["standalone-redis7", "cluster-valkey9"])
def topology(request: pytest.FixtureRequest) -> str:
    """Where Go and Python meet."""
    name: str = request.param
    return name


@pytest.fixture
async def client(uri: str) -> AsyncGenerator[Client]:
    """Our client."""
    async with Client(uri) as opened:
        yield opened


@pytest.fixture
async def go_client(server: Servers) -> AsyncGenerator[GoClient]:
    """Go's client."""
    async with GoClient(server) as started:
        yield started


@pytest.fixture
async def go_inspector(server: Servers) -> AsyncGenerator[GoInspector]:
    """Go's inspector."""
    async with GoInspector(server) as started:
        yield started
