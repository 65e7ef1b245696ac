"""Scenes in which our key space is not Go's, and what it is instead.

Each row names the flaw of Go that it mends (parity.md 20), or wire.md 8.2, by which the text of an error is our own.
The scenes are replayed all the same: the recorded keys with the change below merged in (None: not there) must be ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DIFFERENT", "Different", "merged"]

_TASK = "asynq:{default}:t:t1"
_QUEUE_COUNTERS: dict[str, Any] = {
    f"asynq:{{default}}:{name}{day}": {"type": "string", "ttl": ttl, "value": "1"}
    for name in ("processed", "failed")
    for day, ttl in (("", "none"), (":<today>", 90 * 86_400))
}


@dataclass(frozen=True)
class Different:
    """One row."""

    row: str
    why: str
    keys: dict[str, Any] = field(default_factory=dict)
    """Merged into the recorded keys."""
    results: list[str] = field(default_factory=list)
    """In what results and errors differ."""


def _text(text: str) -> dict[str, Any]:
    """Another last error."""
    return {_TASK: {"value": {"msg": {"fields": {"error_msg": text}}}}}


def _zset(member: str, score: str) -> dict[str, Any]:
    return {"type": "zset", "ttl": "none", "value": [[member, score]]}


DIFFERENT = {
    "005-enqueue-max-retry-negative": Different(
        "2.2",
        "a negative max_retry is refused, before Redis is asked, instead of taken for 0",
        {"asynq:queues": None, "asynq:{default}:pending": None, _TASK: None},
        ["error: expected none, found ConfigError('option max_retry: must be between 0 and 2147483647, not -5')"],
    ),
    "007-enqueue-timeout-fraction": Different(
        "F12",
        "a timeout is rounded up to whole seconds: one below a second is not taken for none",
        {
            _TASK: {"value": {"msg": {"fields": {"timeout": 1}, "hex": None}}},
            "asynq:{default}:t:t2": {"value": {"msg": {"fields": {"timeout": 2}, "hex": None}}},
        },
        [
            "step 1: result > timeout_s: expected 0, found 1",
            "result > timeout_s: expected 1, found 2",
        ],
    ),
    "022-enqueue-group-unique": Different(
        "F5",
        "the hash of a grouped task names its lock, so that deleting the task can release it (wire.md 13.2, F2)",
        {_TASK: {"value": {"unique_key": "asynq:{default}:unique:email:welcome:1181f89307fa271072c095747d5813cc"}}},
    ),
    "035-enqueue-unique-duplicate-id": Different(
        "F4",
        "a task that is refused because its ID is taken leaves no lock",
        {"asynq:{default}:unique:email:welcome:1181f89307fa271072c095747d5813cc": None},
    ),
    "057-retry-empty-error": Different("8.2", "an error without a text is shown by its name", _text("RuntimeError")),
    "059-retry-error-not-utf8": Different(
        "F31",
        "a text that no message can carry is mended, and the outcome is written instead of lost",
        {
            "asynq:{default}:active": None,
            "asynq:{default}:lease": None,
            "asynq:{default}:retry": _zset("t1", "now+60"),
            **_QUEUE_COUNTERS,
            _TASK: {
                "value": {
                    "state": "retry",
                    "msg": {"fields": {"error_msg": "?", "retried": 1, "last_failed_at": "now"}, "hex": None},
                }
            },
        },
    ),
    "060-panic": Different("8.2", "Python has no panic: an exception is an exception", _text("kaboom")),
    "061-panic-archived": Different("8.2", "Python has no panic: an exception is an exception", _text("kaboom")),
    "072-requeue-at-shutdown": Different(
        "F17", "a task that goes back says since when it waits", {_TASK: {"value": {"pending_since": "ns:now"}}}
    ),
    "081-forward-group": Different(
        "F8",
        "a scheduled task joins its group when it is due",
        {
            "asynq:{default}:pending": None,
            "asynq:{default}:g:g1": _zset("t1", "now"),
            "asynq:{default}:groups": {"type": "set", "ttl": "none", "value": ["g1"]},
            _TASK: {"value": {"state": "aggregating", "group": "g1", "pending_since": None}},
        },
    ),
    "082-forward-group-field": Different(
        "F9",
        "the group of a task that comes back to it is registered again",
        {"asynq:{default}:groups": {"type": "set", "ttl": "none", "value": ["g1"]}},
    ),
}


def merged(recorded: Any, change: Any) -> Any:
    """The recorded keys with this change."""
    if not isinstance(recorded, dict) or not isinstance(change, dict):
        return copy.deepcopy(change)
    keys = {**recorded}
    for name, value in change.items():
        if value is None and name != "hex":
            keys.pop(name, None)
        else:
            keys[name] = merged(recorded.get(name), value)
    return keys
