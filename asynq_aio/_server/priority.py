"""In which order to ask the queues; pure."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Weighted", "strict_order"]


def strict_order(weights: Mapping[str, int]) -> list[str]:
    """The queues, highest weight first, equal ones as listed."""
    return sorted(weights, key=lambda name: -weights[name])


class Weighted:
    """Draws a queue for each free slot, with a chance of weight / sum of weights among those that may have tasks.

    Go shuffles a list in which each queue stands as often as its weight says and asks in that order: the same chances.
    """

    def __init__(self, weights: Mapping[str, int], rng: random.Random | None = None) -> None:
        self._weights = weights
        self._rng = rng or random.Random()

    def draw(self, queues: Sequence[str], slots: int) -> Mapping[str, int]:
        """How many of `slots` each of `queues` gets."""
        if len(queues) == 1:
            return {queues[0]: slots}
        return Counter(self._rng.choices(queues, [self._weights[name] for name in queues], k=slots))
