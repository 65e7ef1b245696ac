"""The instrument that compares key spaces measures right: every golden state is put into Redis and read back."""

from __future__ import annotations

import copy
import json
import re
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from asynq_aio._wire import codec, messages
from asynq_aio._wire.messages import Timestamp
from tests import keyspace
from tests.servers import Servers

STATES = sorted((Path(__file__).parent / "golden" / "states").glob("*.json"))
pytestmark = pytest.mark.parametrize("topology", ["standalone-valkey9", "cluster-redis7"], indirect=True)

_ENCODERS: dict[str, Any] = {
    "TaskMessage": codec.encode_task,
    "ServerInfo": codec.encode_server_info,
    "WorkerInfo": codec.encode_worker_info,
    "SchedulerEntry": codec.encode_scheduler_entry,
    "SchedulerEnqueueEvent": codec.encode_enqueue_event,
}


def _unix(text: str, now: int) -> int:
    offset = re.fullmatch(r"(?:ns:)?now([+-]\d+)?(?:\.\.\d+)?", text)
    assert offset is not None, text
    return now + int(offset[1] or 0)


def _bytes(value: Any, now: int) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if value.get("hex"):
        return bytes.fromhex(value["hex"])
    given: dict[str, Any] = {}
    for name, field in value["fields"].items():
        if name.endswith("_hex"):
            given[name.removesuffix("_hex")] = bytes.fromhex(field)
        elif name == "pid":
            given[name] = 4711
        elif name.endswith("_time") or (name == "deadline" and value["proto"] == "WorkerInfo"):
            given[name] = Timestamp.NEVER if field == "zero" else Timestamp(_unix(field, now))
        elif name in ("deadline", "last_failed_at", "completed_at"):
            given[name] = field and _unix(field, now)
        else:
            given[name] = field
    encoded: bytes = _ENCODERS[value["proto"]](getattr(messages, value["proto"])(**given))
    return encoded


async def _restore(redis: Any, states: dict[str, Any], now: int) -> None:
    """The opposite of `keyspace.dump`."""
    for key, entry in states.items():
        value = entry["value"]
        match entry["type"]:
            case "string" if key.endswith(":paused"):
                await redis.set(key, _unix(value, now))
            case "string":
                await redis.set(key, _bytes(value, now))
            case "list":
                await redis.rpush(key, *[_bytes(member, now) for member in value])
            case "set":
                await redis.sadd(key, *value)
            case "zset":
                await redis.zadd(key, {_bytes(member, now): _unix(score, now) for member, score in value})
            case "hash":
                for field, text in value.items():
                    stored = _unix(text, now) * 10**9 if field == "pending_since" else _bytes(text, now)
                    await redis.hset(key, field, stored)
        if entry["ttl"] != "none":
            await redis.expireat(key, now + entry["ttl"])


async def test_a_dump_of_a_golden_state_is_that_state(empty_server: Servers) -> None:
    """What Go left behind, put into Redis, is dumped as it was recorded: keys, types, TTLs, values, bytes."""
    redis = empty_server.client()
    try:
        for path in STATES:
            now = int(time.time())
            ids = {
                f"<{kind}:{n}>": str(uuid.uuid4()) for kind in ("task", "server", "scheduler", "entry") for n in (1, 2)
            }
            ids |= {
                "<set:1>": str(uuid.uuid4()),
                "<host>": "host.example",
                "<pid>": "4711",
                "<file>:<line>": "mux.py:12",
            }
            ids["<today>"] = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")
            expected = json.loads(path.read_text(encoding="utf-8"))["keys"]
            states = keyspace._substitute(copy.deepcopy(expected), ids)
            assert isinstance(states, dict)
            await _restore(redis, states, now)
            names = {text: name for name, text in ids.items() if name.startswith("<task")}
            assert keyspace.same(expected, await keyspace.dump(redis, now=now, names=names)) == [], path.name
            empty_server.flush()
    finally:
        await redis.aclose()


async def test_differences_are_named(empty_server: Servers) -> None:
    """Each difference is a line that says where, what was expected and what was found."""
    redis = empty_server.client()
    try:
        now = int(time.time())
        await redis.sadd("asynq:queues", "q")
        await redis.zadd("asynq:{q}:lease", {"a": now + 30, "b": now + 90})
        await redis.set("asynq:{q}:failed", 1, exat=now + 100)
        await redis.hset("asynq:{q}:t:a", mapping={"state": "active", "aio_owner": "us"})
        await redis.set("asynq:{q}:aio:fence:s", 3)
        found = await keyspace.dump(redis, now=now)
    finally:
        await redis.aclose()
    assert "asynq:{q}:aio:fence:s" not in found
    expected = {
        "asynq:queues": {"type": "set", "ttl": "none", "value": ["q"]},
        "asynq:{q}:lease": {"type": "zset", "ttl": "none", "value": [["a", "now+32"], ["b", "now+60"]]},
        "asynq:{q}:failed": {"type": "string", "ttl": 90, "value": "1"},
        "asynq:{q}:processed": {"type": "string", "ttl": "none", "value": "1"},
    }
    assert keyspace.same(expected, found) == [
        "asynq:{q}:failed > ttl: expected 90, found 100",
        "asynq:{q}:lease > value > b[1]: expected 'now+60', found 'now+90'",
        "asynq:{q}:processed: missing; expected {'type': 'string', 'ttl': 'none', 'value': '1'}",
        "asynq:{q}:t:a: not expected; found {'type': 'hash', 'ttl': 'none', 'value': {'state': 'active'}}",
    ]


async def test_a_dump_of_some_queues_leaves_the_others_out(empty_server: Servers) -> None:
    """With queues given, only their keys and names are there; private additions on request."""
    redis = empty_server.client()
    try:
        await redis.sadd("asynq:queues", "q", "q}:x")
        await redis.set("asynq:{q}:processed", 1)
        await redis.set("asynq:{q}:aio:fence:s", 3)
        await redis.set("asynq:{q}:x}:processed", 2)
        found = await keyspace.dump(redis, ["q"], private=True)
    finally:
        await redis.aclose()
    assert list(found) == ["asynq:queues", "asynq:{q}:aio:fence:s", "asynq:{q}:processed"]
    assert found["asynq:queues"]["value"] == ["q"]
