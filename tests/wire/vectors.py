"""The golden vectors: what the real Go library wrote, as `tests/golden/README.md` describes it."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from asynq_aio._wire import codec
from asynq_aio._wire.messages import (
    SchedulerEnqueueEvent,
    SchedulerEntry,
    ServerInfo,
    TaskMessage,
    Timestamp,
    WorkerInfo,
)

GOLDEN = Path(__file__).parents[1] / "golden"

Message = TaskMessage | ServerInfo | WorkerInfo | SchedulerEntry | SchedulerEnqueueEvent

# kind -> (class, encode, decode)
CODECS: dict[str, tuple[Any, Any, Any]] = {
    "TaskMessage": (TaskMessage, codec.encode_task, codec.decode_task),
    "ServerInfo": (ServerInfo, codec.encode_server_info, codec.decode_server_info),
    "WorkerInfo": (WorkerInfo, codec.encode_worker_info, codec.decode_worker_info),
    "SchedulerEntry": (SchedulerEntry, codec.encode_scheduler_entry, codec.decode_scheduler_entry),
    "SchedulerEnqueueEvent": (SchedulerEnqueueEvent, codec.encode_enqueue_event, codec.decode_enqueue_event),
}


@cache
def load(name: str) -> Any:
    """The content of one file of vectors."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def message(kind: str, values: dict[str, Any]) -> Message:
    """The message with these golden `fields`; every field must be there."""
    cls = CODECS[kind][0]
    given = {name.removesuffix("_hex"): _value(name, value) for name, value in values.items()}
    assert given.keys() == {field.name for field in fields(cls)}
    made: Message = cls(**given)
    return made


def _value(name: str, value: Any) -> Any:
    if name.endswith("_hex"):
        return bytes.fromhex(value)
    if isinstance(value, dict) and value.keys() == {"seconds", "nanos"}:
        return Timestamp(value["seconds"], value["nanos"])
    return tuple(value) if isinstance(value, list) else value
