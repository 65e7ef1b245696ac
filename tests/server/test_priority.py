"""In which order queues are asked: by weight strictly, or by shares."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from asynq_aio._server.priority import Weighted, strict_order

WEIGHTS = st.dictionaries(st.text(min_size=1), st.integers(1, 1_000), min_size=1, max_size=8)


def test_strict_order() -> None:
    """The highest weight first; equal ones as they were given."""
    assert strict_order({"low": 1, "b": 5, "high": 9, "a": 5}) == ["high", "b", "a", "low"]


@given(WEIGHTS)
def test_strict_order_leaves_none_out(weights: dict[str, int]) -> None:
    """Every queue is asked, once, in falling order of weights."""
    order = strict_order(weights)
    assert sorted(order) == sorted(weights)
    assert [weights[name] for name in order] == sorted(weights.values(), reverse=True)


@given(WEIGHTS, st.integers(0, 200), st.randoms(use_true_random=False), st.data())
def test_every_slot_is_drawn(weights: dict[str, int], slots: int, rng: random.Random, data: st.DataObject) -> None:
    """As many slots are given as there are, only to queues that may have tasks."""
    ready = data.draw(st.lists(st.sampled_from(sorted(weights)), min_size=1, unique=True))
    drawn = Weighted(weights, rng).draw(ready, slots)
    assert sum(drawn.values()) == slots
    assert set(drawn) <= set(ready)
    assert all(count >= 0 for count in drawn.values())


def test_shares() -> None:
    """Over many draws each queue gets weight / sum of weights, among those that may have tasks."""
    weighted = Weighted({"critical": 6, "default": 3, "low": 1}, random.Random(7))
    for ready, shares in (
        (["critical", "default", "low"], [0.6, 0.3, 0.1]),
        (["critical", "low"], [6 / 7, 1 / 7]),
        (["default"], [1.0]),
    ):
        drawn = weighted.draw(ready, 30_000)
        assert [abs(drawn[name] / 30_000 - share) < 0.02 for name, share in zip(ready, shares, strict=True)] == [
            True
        ] * len(ready)
