"""A door whose clock stands still, so that what is written can be told exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asynq_aio._broker.store import Store
from tests.clock import FrozenClock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@pytest.fixture
def clock() -> FrozenClock:
    """It begins at the present second and is moved by the test."""
    return FrozenClock()


@pytest.fixture
async def frozen(uri: str, clock: FrozenClock) -> AsyncGenerator[Store]:
    """A store that goes by `clock`; Redis itself does not: TTLs and `TIME` are real."""
    async with Store(uri, clock=clock) as opened:
        yield opened
