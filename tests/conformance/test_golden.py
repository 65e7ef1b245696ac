"""Every golden scene of the operations that exist is replayed by our public API, and the key spaces are equal.

Where we do better than Go (parity.md 20), or where a text is ours to choose (wire.md 8.2), the scene is replayed too,
and differs in exactly what different.py says. Scenes of aggregation, of the Inspector's mutations and of the scheduler
are told by their operations (`later`).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from asynq_aio._server.duties import recoverer
from tests import keyspace
from tests.conformance.different import DIFFERENT, Different, merged
from tests.conformance.replay import SCENES, Replay, later, scene

if TYPE_CHECKING:
    from tests.servers import Servers

REPLAYED = [name for name in SCENES if later(scene(name)) is None]


@pytest.fixture
def steady_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recoverer need not have had Redis for 15 s before it believes an expired lease: nobody regains any here."""
    monkeypatch.setattr(recoverer, "_STEADY", 0.0)


@pytest.mark.usefixtures("steady_at_once")
@pytest.mark.parametrize("name", REPLAYED)
async def test_the_key_space_is_that_of_the_recording(name: str, empty_server: Servers) -> None:
    """Played by our Client and AsyncServer, a scene ends with the keys, TTLs, values and bytes that Go left."""
    played = scene(name)
    looker = empty_server.client()
    try:
        results, found = await Replay(empty_server, looker).play(played)
    finally:
        await looker.aclose()
    different = DIFFERENT.get(name, Different("", ""))
    assert keyspace.same(merged(played["keys"], different.keys), found) == []
    assert results == different.results
    if different.keys:
        assert keyspace.same(played["keys"], found) != [], "the row is not needed any more"


def test_every_scene_is_replayed_or_told_by_its_operation() -> None:
    """No scene is left out in silence: what is not replayed has an operation that a later part of the system brings."""
    by_operation = Counter(later(scene(name)) for name in SCENES)
    assert by_operation.pop(None) == len(REPLAYED) == 80
    assert by_operation.pop("aggregation_check") == 4
    assert sum(by_operation.values()) == 45
    assert not by_operation.keys() & {"enqueue", "serve", "cancel_processing"}


def test_each_row_names_a_replayed_scene_and_its_reason() -> None:
    """A scene differs for a flaw of Go's (F-row), for the text of an error (8.2), or for an option's bound (2.2)."""
    assert DIFFERENT.keys() <= set(REPLAYED)
    for name, different in DIFFERENT.items():
        assert re.fullmatch(r"F\d+|8\.2|2\.2", different.row), name
        assert different.why, name
        if different.row == "8.2":
            assert merged(scene(name)["keys"], different.keys) != scene(name)["keys"], name
