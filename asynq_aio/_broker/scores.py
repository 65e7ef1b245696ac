"""Scores of sorted sets, as Redis writes them."""

from __future__ import annotations

__all__ = ["unix_of"]

_FOREVER = 2**62


def unix_of(score: bytes) -> int:
    """Whole Unix seconds, cut off; `inf`, by which somebody has put a task off for ever, is very far away."""
    return int(min(max(float(score), -_FOREVER), _FOREVER))
