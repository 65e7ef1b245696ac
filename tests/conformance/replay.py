"""Plays the scenes of `tests/golden/states` by our own public API: `Client`, `AsyncServer`, `Inspector`.

What a scene has Go's Inspector do in its setup is done by plain commands, those of Go's scripts. Where a scene waits,
the clock of the programs is set back instead: what was done then is due now.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis.asyncio

from asynq_aio import (
    AsyncServer,
    AsynqError,
    Client,
    ConfigError,
    Context,
    DuplicateTaskError,
    Inspector,
    InvalidTaskError,
    RevokeTask,
    SkipRetry,
    Task,
    TaskIDConflictError,
    TaskInfo,
)
from asynq_aio._broker.store import Store
from asynq_aio._server.config import ServerConfig
from tests import keyspace
from tests.clock import MovedClock
from tests.server import look

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tests.servers import Servers

__all__ = ["SCENES", "Replay", "later", "scene"]

_STATES = Path(__file__).parent.parent / "golden" / "states"
SCENES = sorted(path.stem for path in _STATES.glob("*.json"))

_PATIENCE = 20.0

_REFUSALS: dict[str, tuple[type[AsynqError], ...]] = {
    "task_id_conflict": (TaskIDConflictError,),
    "duplicate_task": (DuplicateTaskError,),
    "invalid": (ConfigError, InvalidTaskError),
}
# How long before its end a scene was prepared, or its server started, seconds; by the word in which it waits.
_WAITS = {"forwarded": 2.0, "deleted": 2.0, "second heartbeat": 5.0}


def scene(name: str) -> dict[str, Any]:
    """The scene in this file."""
    found: dict[str, Any] = json.loads((_STATES / f"{name}.json").read_text(encoding="utf-8"))
    return found


# What a scene may be about today, and what it is about when the rest of the Inspector, the aggregation and the
# scheduler are there.
_OPERATIONS = {"enqueue", "serve", "cancel_processing"}
_LATER = re.compile(
    r"schedule|aggregation_check|(un)?pause_queue|delete_queue|update_task_payload"
    r"|(run|archive|delete)_(task|all_\w+_tasks)|list_\w+_tasks"
)


def later(played: Mapping[str, Any]) -> str | None:
    """The operation by which a scene belongs to a later part of the system; None: it is replayed today."""
    operations: list[str] = [played["op"]] + [
        step["op"] for step in played["setup"] if step["op"] == "aggregation_check"
    ]
    if any(name.startswith("group_") for name in played["args"].get("config", ())):
        operations.append("aggregation_check")
    for operation in operations:
        if operation not in _OPERATIONS:
            if not _LATER.fullmatch(operation):
                raise ValueError(f"{played['name']}: nobody has said to what {operation!r} belongs")
            return operation
    return None


class Replay:
    """Plays one scene on an empty Redis and gives back what it has come to."""

    def __init__(self, servers: Servers, looker: Any) -> None:
        self._servers = servers
        self._redis = looker
        self._clock = MovedClock()
        self._names: dict[str, str] = {}
        self._found: dict[str, Any] = {}

    async def play(self, played: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """In what results and errors differ, a line each, and the key space at the end."""
        until = played["args"].get("until", "")
        self._clock.behind = next((seconds for word, seconds in _WAITS.items() if word in until), 0.0)
        differences: list[str] = []
        async with Client(self._servers.uri) as client:
            client._door.store = Store(self._servers.uri, clock=self._clock)
            for number, step in enumerate(played["setup"], 1):
                differences += [f"step {number}: {line}" for line in await self._step(client, step, last=False)]
            if "second heartbeat" not in until:
                self._clock.behind = 0.0
            differences += await self._step(client, played, last=True)
        return differences, self._found or await self._dump()

    async def _dump(self) -> dict[str, Any]:
        return await keyspace.dump(self._redis, now=self._clock.time_ns() / 1e9, names=self._names)

    async def _step(self, client: Client, step: Mapping[str, Any], *, last: bool) -> list[str]:
        arguments = step["args"]
        match step["op"]:
            case "enqueue":
                return await self._enqueue(client, step)
            case "serve":
                await self._serve(arguments, last=last)
            case "cancel_processing":
                return await self._cancel(arguments["id"], step["published"])
            case "run_task":
                await self._run_task(arguments["queue"], arguments["id"])
            case "pause_queue":
                await self._redis.set(
                    f"asynq:{{{arguments['queue']}}}:paused", int(self._clock.time_ns() / 1e9), nx=True
                )
            case unknown:
                raise NotImplementedError(unknown)
        return []

    # -- enqueue

    async def _enqueue(self, client: Client, step: Mapping[str, Any]) -> list[str]:
        arguments = step["args"]
        expected_error = step.get("error")
        before = self._clock.time_ns() / 1e9
        try:
            payload = None if arguments["payload_hex"] is None else bytes.fromhex(arguments["payload_hex"])
            options: Any = self._options(arguments["options"])
            info = await client.enqueue(arguments["type"], payload, headers=arguments["headers"], **options)
        except (AsynqError, ValueError) as exc:
            if expected_error is None:
                return [f"error: expected none, found {exc!r}"]
            right = isinstance(exc, _REFUSALS[expected_error["kind"]]) and str(exc).startswith(
                expected_error["message"]
            )
            return [] if right else [f"error: expected {expected_error}, found {exc!r}"]
        if info.id != arguments["options"].get("task_id"):
            self._names[info.id] = f"<task:{len(self._names) + 1}>"
        if expected_error is not None:
            return [f"error: expected {expected_error}, found none"]
        if not step.get("result"):
            return []
        return keyspace.same({"result": step["result"]}, {"result": self._shown(info, before)})

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for name, value in given.items():
            match name:
                case "timeout_s" | "process_in_s" | "retention_s":
                    options[name.removesuffix("_s")] = timedelta(seconds=value)
                case "unique_s":
                    options["unique_for"] = timedelta(seconds=value)
                case "deadline":
                    options["deadline_at"] = self._moment(value)
                case "process_at":
                    options[name] = self._moment(value)
                case _:
                    options[name] = value
        return options

    def _moment(self, text: str) -> datetime:
        offset = re.fullmatch(r"now([+-]\d+)?", text)
        assert offset is not None, text
        return datetime.fromtimestamp(int(self._clock.time_ns() / 1e9) + int(offset[1] or 0), UTC)

    def _shown(self, info: TaskInfo, now: float) -> dict[str, Any]:
        """A TaskInfo in the shape of the recordings."""

        def moment(at: datetime | None) -> str | None:
            return None if at is None else keyspace._offset(int(at.timestamp()) - int(now))

        return {
            "id": self._names.get(info.id, info.id),
            "queue": info.queue,
            "type": info.type,
            "payload_hex": info.payload.hex(),
            "headers": dict(info.headers),
            "state": str(info.state),
            "max_retry": info.max_retry,
            "retried": info.retried,
            "last_err": info.last_error or "",
            "last_failed_at": moment(info.last_failed_at),
            "timeout_s": int(info.timeout.total_seconds()) if info.timeout else 0,
            "deadline": moment(info.deadline_at),
            "group": info.group or "",
            # For a pending task Go says "now"; parity.md 4: it is no stored fact, so ours is None.
            "next_process_at": "now" if info.state == "pending" else moment(info.next_process_at),
            "is_orphaned": info.is_orphaned,
            "retention_s": int(info.retention.total_seconds()),
            "completed_at": moment(info.completed_at),
            "result_hex": None if info.result_data is None else info.result_data.hex(),
        }

    # -- what Go's Inspector does

    async def _run_task(self, queue: str, task_id: str) -> None:
        """RDB.runTaskCmd of a task in retry, or in its group."""
        prefix = f"asynq:{{{queue}}}:"
        group = await self._redis.hget(f"{prefix}t:{task_id}", "group")
        state = (await self._redis.hget(f"{prefix}t:{task_id}", "state")).decode()
        if state == "aggregating":
            assert await self._redis.zrem(f"{prefix}g:{group.decode()}", task_id) == 1
            if not await self._redis.zcard(f"{prefix}g:{group.decode()}"):
                await self._redis.srem(f"{prefix}groups", group)
        else:
            assert await self._redis.zrem(prefix + state, task_id) == 1
        await self._redis.lpush(f"{prefix}pending", task_id)
        await self._redis.hset(f"{prefix}t:{task_id}", "state", "pending")

    async def _cancel(self, task_id: str, published: list[dict[str, str]]) -> list[str]:
        node = redis.asyncio.Redis(host="127.0.0.1", port=self._servers.ports[0], protocol=2)
        async with node, node.pubsub() as listener:
            await listener.subscribe(*{message["channel"] for message in published})
            await listener.get_message(timeout=_PATIENCE)  # subscribed
            async with Inspector(self._servers.uri) as inspector:
                await inspector.cancel(task_id)
            heard = await listener.get_message(timeout=_PATIENCE)
        found = heard and [{"channel": heard["channel"].decode(), "message": heard["data"].decode()}]
        return [] if found == published else [f"published: expected {published}, found {found}"]

    # -- serve

    async def _serve(self, arguments: Mapping[str, Any], *, last: bool) -> None:
        until = arguments["until"]
        if until.startswith("killed"):
            await self._kill(arguments["config"], until)
            return
        server = AsyncServer(self._servers.uri, config=_config(arguments["config"]))
        server._store = Store(self._servers.uri, clock=self._clock)
        handler = _Handler(arguments["handler"])
        match until:
            case "the handler has returned and the server has shut down":
                await self._until_returned(server, handler)
            case "100 ms later, shut down":
                async with server.running(handler):
                    await asyncio.sleep(0.1)  # in which nothing is to happen
            case _ if until.startswith("dumped") or "heartbeat" in until:
                await self._until_dumped(server, handler, until)
            case _ if until.endswith(", then shut down"):
                async with server.running(handler):
                    ends = self._ends[until.removesuffix(", then shut down")]
                    await look.until(lambda: ends(self), pause=0.002)
            case unknown:
                raise NotImplementedError(unknown)
        handler.assert_called_as_said()
        assert last or not self._found

    async def _until_returned(self, server: AsyncServer, handler: _Handler) -> None:
        if "shutdown timeout" in handler.words:  # the tasks that are left would keep a burst from its end
            async with server.running(handler):
                await handler.started.wait()
            return
        async with asyncio.TaskGroup() as group:
            running = group.create_task(server.run(handler, burst=True))
            if "cancel_processing" in handler.words:
                await handler.started.wait()
                async with Inspector(self._servers.uri) as inspector:
                    while not running.done():  # the server may not be listening yet
                        await inspector.cancel("t1")
                        await asyncio.wait([running], timeout=0.02)

    async def _until_dumped(self, server: AsyncServer, handler: _Handler, until: str) -> None:
        async with server.running(handler):
            if "handler runs" in until:
                await handler.started.wait()
                if "writes" in handler.words:
                    await handler.wrote.wait()
            heartbeater = server._heartbeater
            assert heartbeater is not None
            await look.until(lambda: heartbeater.seen_at is not None, pause=0.002)
            if "second heartbeat" in until:
                if "stopped" in until:
                    server.stop()
                else:
                    await look.until(lambda: server.running_tasks == 2, pause=0.002)
                self._clock.behind = 0.0
                await heartbeater.run_once()
            if until.startswith("shut down"):
                return
            self._found = await self._dump()
            handler.release.set()

    async def _kill(self, config: Mapping[str, Any], until: str) -> None:
        """What a Go server leaves that is killed while it works; ours leaves its name, too, and is not waited for."""
        (queue,) = config["queues"]
        prefix = f"asynq:{{{queue}}}:"
        ended_ago = re.search(r"ended (\d+) seconds before", until)
        assert ended_ago is not None
        task_id = (await self._redis.rpoplpush(f"{prefix}pending", f"{prefix}active")).decode()
        await self._redis.hset(f"{prefix}t:{task_id}", "state", "active")
        await self._redis.hdel(f"{prefix}t:{task_id}", "pending_since")
        await self._redis.zadd(f"{prefix}lease", {task_id: int(time.time()) - int(ended_ago[1])})

    # -- how scenes end

    async def _all_forwarded(self) -> bool:
        now = time.time()
        due = [await self._redis.zcount(f"asynq:{{default}}:{state}", 0, now) for state in ("scheduled", "retry")]
        return due == [0, 0]

    async def _first_deleted(self) -> bool:
        return not await self._redis.exists("asynq:{default}:t:t1")

    async def _recovered(self) -> bool:
        return not await self._redis.exists("asynq:{default}:lease")

    _ends: Mapping[str, Callable[[Replay], Awaitable[bool]]] = {
        "everything that is due has been forwarded": _all_forwarded,
        "the scheduled task has been forwarded": _all_forwarded,
        "the first task has been deleted": _first_deleted,
        "the task has been recovered": _recovered,
        "the task has been archived": _recovered,
    }


def _config(given: Mapping[str, Any]) -> ServerConfig:
    settings: dict[str, Any] = {}
    for name, value in given.items():
        match name:
            case "retry_delay_s":
                settings["retry_delay"] = lambda _retried, _exc, _task, seconds=value: timedelta(seconds=seconds)
            case "is_failure":
                assert value == "always false"
                settings["is_failure"] = lambda _exc: False
            case _ if name.endswith("_s"):
                settings[name.removesuffix("_s")] = timedelta(seconds=value)
            case _:
                settings[name] = value
    return ServerConfig(**settings)


@dataclass
class _Handler:
    """Does what the scene says in words."""

    words: str
    started: asyncio.Event = field(default_factory=asyncio.Event)
    wrote: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    async def process_task(self, ctx: Context, _task: Task) -> None:
        """Handle one task."""
        self.calls[ctx.task_id] += 1
        self.started.set()
        words = self.words
        result = re.match(r'writes the result ("(?:.*?)"|\{.*\}) and ', words)
        if result is not None:
            text = result[1]
            await ctx.result.write((json.loads(text) if text.startswith('"') else text).encode())
            self.wrote.set()
            words = words[result.end() :]
        match words:
            case "returns nil":
                return
            case "runs until after the dump":
                await self.release.wait()
            case "runs longer than the shutdown timeout":
                await asyncio.Event().wait()
            case _ if words.startswith("waits for its context"):
                await asyncio.Event().wait()
            case _:
                raise _error(words)

    def assert_called_as_said(self) -> None:
        """Whether it was called at all is part of the scene."""
        assert bool(self.calls) == (self.words != "not called"), f"{self.words}: {dict(self.calls)}"


def _error(words: str) -> BaseException:
    if words == "returns an error that wraps RevokeTask":
        return RevokeTask()
    if words == "returns an error with the text ff (hex)":
        return ValueError(b"\xff".decode(errors="surrogateescape"))
    repeated = re.fullmatch(r'returns an error: "(.*)" (\d+) times', words)
    if repeated is not None:
        return ValueError(repeated[1] * int(repeated[2]))
    text = re.search(r'"(.*)"', words)
    assert text is not None, words
    kind = SkipRetry if words.endswith("wraps SkipRetry") else RuntimeError
    return kind(text[1])
