"""What stands in Redis, in the shape of `golden/states/`: moments as offsets from now, random ids as placeholders.

    before = time.time()
    info = await client.enqueue(...)
    found = await keyspace.dump(redis, now=before, names={info.id: "<task:1>"})
    assert keyspace.same(scene["keys"], found) == []

golden/README.md describes the shape.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from itertools import count
from typing import TYPE_CHECKING, Any

from asynq_aio._wire import codec, keys
from asynq_aio._wire.messages import Timestamp
from asynq_aio.errors import MessageDecodeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

TOLERANCE_SECONDS = 2
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NOW = re.compile(r"(ns:)?now(?:([+-]\d+)(?:\.\.(\d+))?)?")
_PROCESS_KEY = re.compile(r"asynq:(server|worker|scheduler)s:\{(.*):(\d+):([^:]*)\}", re.DOTALL)


async def dump(
    redis: Any,
    queues: Iterable[str] | None = None,
    *,
    now: float | None = None,
    names: Mapping[str, str] | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """Every key, as `{type, ttl, value}`.

    Args:
        redis: A client of `redis.asyncio`, of a cluster or not, that does not decode.
        queues: The keys of these queues and their names in `asynq:queues`, instead of everything.
        now: Unix seconds of the moment of the operation; by default Redis' time.
        names: Placeholders for random ids. Those of servers, schedulers, entries and aggregation sets are found here;
            so are those of tasks where there is but one.
        private: Keep what only we write: fields `aio_*` and keys `asynq:*aio:*`.
    """
    if now is None:
        seconds, microseconds = await _time(redis)
        now = seconds + microseconds / 1e6
    found = {}
    for key in sorted([key async for key in redis.scan_iter(match="*", count=1000)]):
        read = await _read(redis, key)
        if read is not None:
            found[_text(key)] = read
    registered = [_text(name) for name in found.get("asynq:queues", ("set", -1, []))[2]]
    wanted = registered if queues is None else list(queues)
    reader = _Reader(now, {*wanted, *registered}, private=private)
    if queues is not None:
        found = {key: value for key, value in found.items() if key == "asynq:queues" or reader.queue_of(key) in wanted}
        if "asynq:queues" in found:
            found["asynq:queues"] = ("set", -1, [name.encode() for name in registered if name in wanted])
    entries = {key: reader.entry(key, *value) for key, value in found.items() if private or not reader.is_private(key)}
    named = _substitute(entries, _placeholders(entries, names or {}))
    assert isinstance(named, dict)
    return named


async def _time(redis: Any) -> tuple[int, int]:
    if hasattr(redis, "get_random_node"):  # a cluster's
        found: tuple[int, int] = await redis.time(target_nodes=redis.get_random_node())
    else:
        found = await redis.time()
    return found


async def _read(redis: Any, key: bytes) -> tuple[str, int, Any] | None:
    """Type, expiry in Unix ms (-1: none) and contents; None when it has expired meanwhile."""
    kind = (await redis.type(key)).decode()
    value: Any
    match kind:
        case "string":
            value = await redis.get(key)
        case "list":
            value = await redis.lrange(key, 0, -1)
        case "set":
            value = sorted(await redis.smembers(key))
        case "zset":
            value = await redis.zrange(key, 0, -1, withscores=True)
        case "hash":
            value = await redis.hgetall(key)
        case _:
            return None
    expires = await redis.execute_command("PEXPIRETIME", key)
    return None if value is None or expires == -2 else (kind, int(expires), value)


class _Reader:
    """From raw replies to the shape of the golden states, random ids left as they are."""

    def __init__(self, now: float, queues: Iterable[str], *, private: bool) -> None:
        self._now = now
        # The longest first: `a` is not the queue of "asynq:{a}:x}:pending".
        self._prefixes = {f"asynq:{{{queue}}}:": queue for queue in sorted(queues, key=len, reverse=True)}
        self._private = private

    def queue_of(self, key: str) -> str | None:
        """The queue that this key belongs to; one that nobody has registered is read up to its first "}:"."""
        for prefix, queue in self._prefixes.items():
            if key.startswith(prefix):
                return queue
        unregistered = re.match(r"asynq:\{(.*?)\}:", key, re.DOTALL)
        return None if unregistered is None else unregistered[1]

    def is_private(self, key: str) -> bool:
        """Whether only we write it."""
        return key.startswith("asynq:aio:") or self._role(key).startswith("aio:")

    def _role(self, key: str) -> str:
        queue = self.queue_of(key)
        return "" if queue is None else key.removeprefix(keys.prefix(queue))

    def entry(self, key: str, kind: str, expires_ms: int, value: Any) -> dict[str, Any]:
        ttl = "none" if expires_ms < 0 else round(expires_ms / 1000 - self._now)
        return {"type": kind, "ttl": ttl, "value": self._value(key, self._role(key), kind, value)}

    def _value(self, key: str, role: str, kind: str, value: Any) -> Any:
        match kind:
            case "string" if key.startswith("asynq:servers:"):
                return self._proto("ServerInfo", value)
            case "string" if role == "paused":
                return self._moment(int(value))
            case "string":
                return _readable(value)
            case "list" if key.startswith("asynq:schedulers:"):
                return [self._proto("SchedulerEntry", member) for member in value]
            case "list" | "set":
                return [_readable(member) for member in value]
            case "zset" if key.startswith("asynq:scheduler_history:"):
                return [[self._proto("SchedulerEnqueueEvent", member), self._moment(score)] for member, score in value]
            case "zset":
                return [[_readable(member), self._moment(score)] for member, score in value]
            case "hash" if key.startswith("asynq:workers:"):
                return {_text(field): self._proto("WorkerInfo", info) for field, info in value.items()}
            case "hash" if role.startswith("t:"):
                return dict(self._task_fields(value))
            case _:
                return {_text(field): _readable(text) for field, text in value.items()}

    def _task_fields(self, raw: Mapping[bytes, bytes]) -> Iterator[tuple[str, Any]]:
        for field, value in sorted(raw.items()):
            match field:
                case b"msg":
                    yield "msg", self._proto("TaskMessage", value)
                case b"pending_since":
                    yield "pending_since", f"ns:{self._moment(int(value) // 1_000_000_000)}"
                case _ if self._private or not field.startswith(b"aio_"):
                    yield _text(field), _readable(value)

    def _proto(self, kind: str, data: bytes) -> Any:
        decode: Any = _DECODERS[kind]
        try:
            message = decode(data)
        except MessageDecodeError:
            return _readable(data)
        shown = {}
        for field in fields(message):
            value = getattr(message, field.name)
            if isinstance(value, bytes):
                shown[f"{field.name}_hex"] = value.hex()
            elif isinstance(value, Timestamp):
                shown[field.name] = "zero" if value == Timestamp.NEVER else self._rounded(value)
            elif kind == "TaskMessage" and field.name in ("deadline", "last_failed_at", "completed_at") and value:
                shown[field.name] = self._moment(value)
            else:
                shown[field.name] = _plain(value)
        if kind in ("ServerInfo", "WorkerInfo"):
            shown |= {"host": "<host>", "pid": "<pid>"}
        return {"proto": kind, "fields": shown, **({"hex": data.hex()} if kind == "TaskMessage" else {})}

    def _moment(self, unix: float) -> str:
        return _offset(math.floor(unix) - math.floor(self._now))

    def _rounded(self, moment: Timestamp) -> str:
        return _offset(round(moment.seconds + moment.nanos / 1e9 - self._now))


_DECODERS = {
    "TaskMessage": codec.decode_task,
    "ServerInfo": codec.decode_server_info,
    "WorkerInfo": codec.decode_worker_info,
    "SchedulerEntry": codec.decode_scheduler_entry,
    "SchedulerEnqueueEvent": codec.decode_enqueue_event,
}


def _offset(seconds: int) -> str:
    return f"now{seconds:+d}" if seconds else "now"


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _readable(raw: bytes) -> str | dict[str, str]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"hex": raw.hex()}


def _plain(value: Any) -> Any:
    """Immutable containers of messages as JSON has them."""
    if isinstance(value, str | int):
        return value
    return dict(value) if hasattr(value, "items") else list(value)


def _placeholders(entries: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """What to write for which text: the caller's names, and what the key names give away."""
    placeholders = dict(names)
    counters = {kind: count(1) for kind in ("server", "scheduler", "entry", "set")}

    def name(kind: str, text: str) -> None:
        if text not in placeholders:
            placeholders[text] = f"<{kind}:{next(counters[kind])}>"

    for key, entry in entries.items():
        process = _PROCESS_KEY.fullmatch(key)
        if process is not None:
            kind = "scheduler" if process[1] == "scheduler" else "server"
            name(kind, process[4])
            placeholders.setdefault(
                f"{process[2]}:{process[3]}:{process[4]}", f"<host>:<pid>:{placeholders[process[4]]}"
            )
        if key.endswith(":aggregation_sets"):
            for member, _ in entry["value"]:
                name("set", member.rpartition(":")[2])
        if key.startswith("asynq:schedulers:"):
            for scheduled in entry["value"]:
                name("entry", scheduled["fields"]["id"])
        day = re.search(r":(?:processed|failed):(\d{4}-\d\d-\d\d)$", key)
        if day is not None:
            placeholders[day[1]] = "<today>"
    tasks = {
        found[0] for key in entries for found in [_UUID.search(key.rpartition(":t:")[2])] if found and ":t:" in key
    }
    unnamed = tasks - placeholders.keys()
    if len(unnamed) == 1:
        placeholders[unnamed.pop()] = "<task:1>"
    return placeholders


def _substitute(value: Any, placeholders: Mapping[str, str]) -> Any:
    match value:
        case str():
            for text in sorted(placeholders, key=len, reverse=True):  # host:pid:id before id
                value = value.replace(text, placeholders[text])
            return value
        case list():
            return [_substitute(item, placeholders) for item in value]
        case dict():
            return {_substitute(key, placeholders): _substitute(item, placeholders) for key, item in value.items()}
        case _:
            return value


def same(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """In what the key spaces differ, a line each; 2 s in every offset and TTL do not matter."""
    return [*_differences("", expected, actual)]


def _differences(where: str, expected: Any, actual: Any) -> Iterator[str]:
    match expected, actual:
        case dict(), dict():
            yield from _different_items(where, expected, actual)
        case list(), list() if _is_sorted_set(expected) and _is_sorted_set(actual):
            yield from _different_items(where, dict(map(_member, expected)), dict(map(_member, actual)))
        case list(), list() if len(expected) == len(actual):
            for index, (wanted, found) in enumerate(zip(expected, actual, strict=True)):
                yield from _differences(f"{where}[{index}]", wanted, found)
        case _ if not _equal(where, expected, actual):
            yield f"{where}: expected {expected!r}, found {actual!r}"


def _different_items(where: str, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(expected.keys() | actual.keys()):
        inside = f"{where} > {key}" if where else key
        if key not in actual:
            yield f"{inside}: missing; expected {expected[key]!r}"
        elif key not in expected:
            yield f"{inside}: not expected; found {actual[key]!r}"
        elif not (key == "hex" and expected[key] is None):  # bytes that differ from run to run
            yield from _differences(inside, expected[key], actual[key])


def _is_sorted_set(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def _member(pair: list[Any]) -> tuple[str, Any]:
    """Of a sorted set: equal scores have no order of their own, and 2 s may change that of others."""
    return str(pair[0]), pair


def _equal(where: str, expected: Any, actual: Any) -> bool:
    if where.endswith("> ttl") and isinstance(expected, int) and isinstance(actual, int):
        return abs(expected - actual) <= TOLERANCE_SECONDS
    if isinstance(expected, str) and isinstance(actual, str):
        wanted, found = _NOW.fullmatch(expected), _NOW.fullmatch(actual)
        if wanted and found and wanted[1] == found[1]:
            first = int(wanted[2] or 0)
            last = int(wanted[3]) if wanted[3] else first
            return first - TOLERANCE_SECONDS <= int(found[2] or 0) <= last + TOLERANCE_SECONDS
        if "[<file>:<line>]" in expected:
            pattern = re.escape(expected).replace(re.escape("<file>:<line>"), r"[^\]]+:\d+")
            return re.fullmatch(pattern, actual, re.DOTALL) is not None
    return bool(expected == actual)
