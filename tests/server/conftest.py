"""Servers are tested on a cluster, the centre of it all; what may differ elsewhere asks for `servers.TOPOLOGIES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asynq_aio import Client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@pytest.fixture(params=["cluster-valkey9"])
def topology(request: pytest.FixtureRequest) -> str:
    """One of `servers.TOPOLOGIES`; a test that wants others parametrizes it."""
    name: str = request.param
    return name


@pytest.fixture
async def client(uri: str) -> AsyncGenerator[Client]:
    """A client of these servers."""
    async with Client(uri) as opened:
        yield opened
