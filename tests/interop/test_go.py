"""Go's asynq and ours on the same Redis: clients, workers and inspectors of both, in both directions."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from asynq_aio import AsyncServer, Client, Context, DuplicateTaskError, Inspector, RevokeTask, SkipRetry, Task
from tests.interop.go_peer import GoClient, GoError, GoInspector, GoWorker
from tests.server.look import drained, until

if TYPE_CHECKING:
    from tests.servers import Servers

pytestmark = pytest.mark.timeout(180)

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
FUTURE = int(time.time()) + 86_400


def in_a_second(_retried: int, _exc: BaseException, _task: Task) -> timedelta:
    """A short retry delay."""
    return SECOND


def in_an_hour(_retried: int, _exc: BaseException, _task: Task) -> timedelta:
    """Retry so late that a test sees the task in `retry`."""
    return HOUR


# One task per option: as Go's client takes it, as ours does.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "task-id": ({}, {}),  # every task has one
    "max-retry": ({"max_retry": 7}, {"max_retry": 7}),
    "no-retry": ({"max_retry": 0}, {"max_retry": 0}),
    "timeout": ({"timeout_s": 90}, {"timeout": timedelta(seconds=90)}),
    "deadline": ({"deadline_unix": FUTURE}, {"deadline_at": datetime.fromtimestamp(FUTURE, UTC)}),
    "both": (
        {"deadline_unix": FUTURE, "timeout_s": 90},
        {"deadline_at": datetime.fromtimestamp(FUTURE, UTC), "timeout": timedelta(seconds=90)},
    ),
    "unique": ({"unique_s": 3600}, {"unique_for": HOUR}),
    "process-in": ({"process_in_s": 1}, {"process_in": SECOND}),
    "process-at": ({"process_at_unix": 1_000_000_000}, {"process_at": datetime.fromtimestamp(1_000_000_000, UTC)}),
    "retention": ({"retention_s": 3600}, {"retention": HOUR}),
    "header": ({"headers": {"trace": "1"}}, {"headers": {"trace": "1"}}),
    "headers": (
        {"headers": {"a": "", "": "b", "ключ": "ü\n", "x" * 300: "y" * 3000}},
        {"headers": {"a": "", "": "b", "ключ": "ü\n", "x" * 300: "y" * 3000}},
    ),
}
PAYLOADS: dict[str, bytes | None] = {
    "json": b'{"user_id":123,"name":"\xc3\xbc"}',
    "binary": bytes(range(256)) * 4,
    "empty": b"",
    "nothing": None,
    "large": b"x" * 2_000_000,
}


async def enqueue_all(queue: str, client: Client | GoClient) -> dict[str, tuple[str, bytes | None]]:
    """Every option and every payload, by either client; task ID -> (type, payload)."""
    sent: dict[str, tuple[str, bytes | None]] = {}
    for name, (go, python) in OPTIONS.items():
        payload = f'{{"option":"{name}"}}'.encode()
        sent[name] = (f"option:{name}", payload)
        if isinstance(client, GoClient):
            await client.enqueue(f"option:{name}", payload, queue=queue, task_id=name, **go)
        else:
            await client.enqueue(f"option:{name}", payload, queue=queue, task_id=name, **python)
    for name, data in PAYLOADS.items():
        sent[name] = (f"payload:{name}", data)
        if isinstance(client, GoClient):
            await client.enqueue(f"payload:{name}", data, queue=queue, task_id=name)
        else:
            await client.enqueue(f"payload:{name}", data, queue=queue, task_id=name)
    return sent


def expected_deadline(name: str, started: float) -> float:
    """When the attempt has to be over."""
    return {"timeout": started + 90, "both": started + 90, "deadline": FUTURE}.get(name, started + 1800)


async def test_python_works_what_go_enqueues(
    uri: str, queue: str, redis: Any, go_client: GoClient, go_inspector: GoInspector
) -> None:
    """Every option, header and byte of a payload arrives; so says Go's inspector of what is left."""
    seen: dict[str, tuple[Context, Task, float]] = {}

    async def handler(ctx: Context, task: Task) -> str:
        seen[ctx.task_id] = (ctx, task, time.time())
        return "by Python"

    sent = await enqueue_all(queue, go_client)
    async with AsyncServer(uri, queues=[queue]).running(handler):
        await until(lambda: len(seen) == len(sent))
        await drained(redis, queue)
    for name, (type, payload) in sent.items():
        ctx, task, started = seen[name]
        go = OPTIONS.get(name, ({}, {}))[0]
        assert (task.type, ctx.queue, ctx.type) == (type, queue, type)
        assert bytes(task.payload) == (payload or b"")
        assert dict(task.headers) == dict(ctx.headers) == go.get("headers", {})
        assert (ctx.retried, ctx.max_retry) == (0, go.get("max_retry", 25))
        assert abs(ctx.deadline_at.timestamp() - expected_deadline(name, started)) < 5
    info = await go_inspector.queue(queue)
    left = {state: info[state] for state in ("pending", "active", "scheduled", "retry", "archived", "completed")}
    assert left == {"pending": 0, "active": 0, "scheduled": 0, "retry": 0, "archived": 0, "completed": 1}
    assert (info["processed"], info["failed"]) == (len(sent), 0)
    kept = await go_inspector.task(queue, "retention")
    assert base64.b64decode(kept["result"]) == b'"by Python"'
    assert kept["retention_s"] == 3600
    assert abs(kept["completed_unix"] - time.time()) < 60


async def test_go_works_what_python_enqueues(
    server: Servers, queue: str, redis: Any, client: Client, go_inspector: GoInspector
) -> None:
    """Every option, header and byte of a payload arrives at a Go worker; batches and single calls alike."""
    sent = await enqueue_all(queue, client)
    infos = await client.enqueue_many(
        [Task("batch:x", b"%d" % n, headers={"n": str(n)}) for n in range(50)], queue=queue
    )
    async with GoWorker(server, {queue: 1}) as worker:
        await until(lambda: sum(event["event"] == "end" for event in worker.events) == len(sent) + 50)
        await drained(redis, queue)
    starts = {event["id"]: event for event in worker.events if event["event"] == "start"}
    for name, (type, payload) in sent.items():
        event = starts[name]
        go = OPTIONS.get(name, ({}, {}))[0]
        assert (event["type"], event["queue"], event["retried"]) == (type, queue, 0)
        assert base64.b64decode(event["payload"] or b"") == (payload or b"")
        assert event.get("headers", {}) == go.get("headers", {})
        assert event["max_retry"] == go.get("max_retry", 25)
        assert abs(event["deadline_unix"] - expected_deadline(name, time.time())) < 60
    for n, task in enumerate(infos):
        assert base64.b64decode(starts[task.id]["payload"]) == b"%d" % n
        assert starts[task.id]["headers"] == {"n": str(n)}
    info = await go_inspector.queue(queue)
    assert (info["size"], info["completed"]) == (1, 1)
    assert (info["processed"], info["failed"]) == (len(sent) + 50, 0)


async def test_both_clients_leave_the_same(
    queue: str, client: Client, go_client: GoClient, go_inspector: GoInspector
) -> None:
    """To Go's inspector a task of ours looks as its own does, option by option."""
    theirs, ours = f"{queue}-go", f"{queue}-python"
    await enqueue_all(theirs, go_client)
    await enqueue_all(ours, client)
    await go_client.enqueue("grouped", b"g", queue=theirs, task_id="grouped", group="g")
    await client.enqueue("grouped", b"g", queue=ours, task_id="grouped", group="g")
    await go_client.enqueue("later", b"g", queue=theirs, task_id="later", group="g", process_in_s=3600)
    await client.enqueue("later", b"g", queue=ours, task_id="later", group="g", process_in=HOUR)
    for name in [*OPTIONS, *PAYLOADS, "grouped", "later"]:
        one, other = await go_inspector.task(theirs, name), await go_inspector.task(ours, name)
        for moment in ("next_process_unix",):
            assert abs(one.pop(moment) - other.pop(moment)) <= 30, name
        assert one.pop("queue").removesuffix("go") == other.pop("queue").removesuffix("python")
        assert one == other, name
    assert {theirs, ours} <= set(await go_inspector.ask(ask="queues"))


async def test_gos_inspector_reads_every_state_of_ours(  # noqa: PLR0915  (seven states, each with all its fields)
    uri: str, queue: str, client: Client, go_inspector: GoInspector
) -> None:
    """Seven states, the server and its running task: no error, no empty field."""
    working = asyncio.Event()
    go_on = asyncio.Event()

    async def handler(ctx: Context, task: Task) -> bytes | None:
        match task.type:
            case "active":
                working.set()
                await go_on.wait()
            case "retry":
                raise ValueError("it went wrong")
            case "archived":
                await ctx.result.write(b"half")
                raise SkipRetry("never again")
        return b"result"

    options: dict[str, Any] = {
        "queue": queue,
        "headers": {"h": "1"},
        "timeout": timedelta(minutes=5),
        "retention": HOUR,
    }
    for state in ("retry", "archived", "completed", "active"):
        await client.enqueue(state, {"is": state}, task_id=state, max_retry=9, **options)
    server = AsyncServer(uri, queues={queue: 3}, concurrency=7, strict_priority=True, retry_delay=in_an_hour)
    async with server.running(handler):
        await working.wait()
        await until(lambda: server.stats.processed == 3)
        server.stop()
        await client.enqueue("pending", {"is": "pending"}, task_id="pending", max_retry=9, **options)
        await client.enqueue(
            "scheduled", {"is": "scheduled"}, task_id="scheduled", max_retry=9, process_in=HOUR, **options
        )
        await client.enqueue(
            "aggregating", {"is": "aggregating"}, task_id="aggregating", max_retry=9, group="g", **options
        )
        heartbeater = server._heartbeater
        assert heartbeater is not None
        await heartbeater.run_once()
        now = time.time()
        for state in ("active", "pending", "scheduled", "retry", "archived", "completed", "aggregating"):
            found = await go_inspector.task(queue, state)
            assert [found] == [
                task | {"next_process_unix": found["next_process_unix"]}
                for task in await go_inspector.list(queue, state, "g")
            ]
            assert (found["id"], found["queue"], found["type"], found["state"]) == (state, queue, state, state)
            assert base64.b64decode(found["payload"]) == f'{{"is":"{state}"}}'.encode()
            assert (found["headers"], found["max_retry"], found["timeout_s"]) == ({"h": "1"}, 9, 300)
            assert found["retention_s"] == 3600
            assert not found["is_orphaned"]
            assert found["group"] == ("g" if state == "aggregating" else "")
            failed = state in ("retry", "archived")
            assert found["retried"] == (1 if state == "retry" else 0)
            assert found["last_error"] == {"retry": "it went wrong", "archived": "never again"}.get(state, "")
            assert (abs(found["last_failed_unix"] - now) < 60) == failed
            due = {"pending": 0, "scheduled": 3600, "retry": 3600}.get(state)
            assert abs(found["next_process_unix"] - (0 if due is None else now + due)) < 60
            assert (abs(found["completed_unix"] - now) < 60) == (state == "completed")
            result = {"completed": b"result", "archived": b"half"}.get(state, b"")
            assert base64.b64decode(found["result"] or b"") == result
        info = await go_inspector.queue(queue)
        assert [info[state] for state in ("pending", "active", "scheduled", "retry", "archived", "completed")] == [
            1
        ] * 6
        assert (info["aggregating"], info["groups"], info["size"]) == (1, 1, 7)
        assert (info["processed"], info["failed"], info["processed_total"], info["failed_total"]) == (3, 2, 3, 2)
        assert info["latency_s"] < 60
        assert info["memory"] > 0
        (shown,) = [entry for entry in await go_inspector.ask(ask="servers") if queue in entry["queues"]]
        assert (shown["id"], shown["host"], shown["pid"]) == (server.server_id, server.host, server.pid)
        assert (shown["concurrency"], shown["queues"], shown["strict"]) == (7, {queue: 3}, True)
        assert shown["status"] == "stopped"
        assert abs(shown["started_unix"] - now) < 120
        (worker,) = shown["workers"]
        assert (worker["id"], worker["type"], worker["queue"]) == ("active", "active", queue)
        assert base64.b64decode(worker["payload"]) == b'{"is":"active"}'
        assert abs(worker["started_unix"] - now) < 120
        assert 100 < worker["deadline_unix"] - now < 400
        go_on.set()


async def test_both_workers_on_one_queue(  # noqa: PLR0915  (one scene, and its whole account)
    server: Servers, uri: str, queue: str, redis: Any, client: Client, go_client: GoClient, go_inspector: GoInspector
) -> None:
    """Tasks of both clients with failures, retries, verdicts and panics: each ends where it should, counted once."""
    ends: Counter[str] = Counter()

    async def handler(ctx: Context, task: Task) -> bytes | None:
        word = task.type.partition(":")[0]
        await asyncio.sleep(0.005)
        match word:
            case "fail":
                raise ValueError("failed by the Python worker")
            case "flaky" if ctx.retried < 2:
                raise ValueError(f"attempt {ctx.retried + 1} failed by the Python worker")
            case "panic":
                raise RuntimeError("of the Python worker")
            case "skip":
                raise SkipRetry("skipped by the Python worker")
            case "revoke":
                raise RevokeTask
        ends[task.type] += 1
        return b"by the Python worker" if word == "result" else None

    n = 143  # of each kind, by each client
    kinds = ("sleep", "flaky", "fail", "skip", "revoke", "panic", "result")
    ids: dict[str, set[str]] = {kind: set() for kind in kinds}
    for at in range(n):
        for kind in kinds:
            header = {"n": str(at), "kind": kind}
            theirs = await go_client.enqueue(
                f"{kind}:go", b"%d" % at, queue=queue, max_retry=2, retention_s=3600, headers=header
            )
            ours = await client.enqueue(
                f"{kind}:python", b"%d" % at, queue=queue, max_retry=2, retention=HOUR, headers=header
            )
            ids[kind] |= {theirs["id"], ours.id}

    python = AsyncServer(uri, queues=[queue], concurrency=5, retry_delay=in_a_second)
    async with GoWorker(server, {queue: 1}, concurrency=5) as go, python.running(handler):

        async def finished() -> bool:
            info = await go_inspector.queue(queue)
            return not any(info[state] for state in ("pending", "active", "scheduled", "retry"))

        await until(finished, pause=0.1)
        await drained(redis, queue)

    completed = {task["id"]: task for task in await go_inspector.list(queue, "completed")}
    archived = {task["id"]: task for task in await go_inspector.list(queue, "archived")}
    assert set(completed) == ids["sleep"] | ids["flaky"] | ids["result"]
    assert set(archived) == ids["fail"] | ids["skip"] | ids["panic"]
    for task_id in ids["flaky"]:
        assert completed[task_id]["retried"] == 2
    for task_id in ids["fail"] | ids["panic"]:
        assert archived[task_id]["retried"] == 2
    for task_id in ids["skip"]:
        assert archived[task_id]["retried"] == 0
        assert archived[task_id]["last_error"].startswith("skipped by the ")
    results = {base64.b64decode(completed[task_id]["result"]) for task_id in ids["result"]}
    assert results == {b"by the Python worker", b"by the Go worker"}
    for task in [*completed.values(), *archived.values()]:
        kind, _, _ = task["type"].partition(":")
        assert task["headers"] == {"n": base64.b64decode(task["payload"]).decode(), "kind": kind}
    info = await go_inspector.queue(queue)
    attempts = 2 * n * (1 + 3 + 3 + 1 + 1 + 3 + 1)
    failures = 2 * n * (2 + 3 + 1 + 3)
    assert (info["processed"], info["failed"]) == (attempts, failures)
    assert python.stats.lost == 0
    by_go = sum(event["event"] == "start" for event in go.events)
    assert by_go + python.stats.processed == attempts
    assert by_go > attempts // 20, "both have worked"
    assert python.stats.processed > attempts // 20, "both have worked"


async def completed(inspector: GoInspector, queue: str, task_id: str) -> None:
    """Wait until Go says so."""

    async def holds() -> bool:
        return bool((await inspector.task(queue, task_id))["state"] == "completed")

    await until(holds)


async def test_cancel_from_the_other_side(
    server: Servers, uri: str, queue: str, client: Client, go_inspector: GoInspector
) -> None:
    """Go's inspector stops a handler of ours, our inspector one of Go's; the task is retried, and then done."""
    started = asyncio.Event()

    async def handler(ctx: Context, _task: Task) -> None:
        started.set()
        if ctx.retried == 0:
            await asyncio.Event().wait()

    ours = await client.enqueue("wait", queue=queue, retention=HOUR)
    async with AsyncServer(uri, queues=[queue], retry_delay=in_a_second).running(handler):
        await started.wait()
        await go_inspector.ask(ask="cancel", id=ours.id)

        await completed(go_inspector, queue, ours.id)
    found = await go_inspector.task(queue, ours.id)
    assert (found["retried"], found["last_error"]) == (1, "context canceled")

    theirs = await client.enqueue("wait", queue=queue, retention=HOUR)
    async with GoWorker(server, {queue: 1}) as worker, Inspector(uri) as inspector:
        await worker.started(theirs.id)
        await inspector.cancel(theirs.id)
        await completed(go_inspector, queue, theirs.id)
    found = await go_inspector.task(queue, theirs.id)
    assert (found["retried"], found["last_error"]) == (1, "context canceled")


async def test_unique_locks_hold_on_both_sides(
    server: Servers, uri: str, queue: str, redis: Any, client: Client, go_client: GoClient
) -> None:
    """A lock of one side refuses the other's duplicate, and is released by whichever side is done with the task."""
    done = asyncio.Event()

    async def handler(_task: Task) -> None:
        done.set()

    theirs = await go_client.enqueue("u", b"same", queue=queue, unique_s=3600)
    with pytest.raises(DuplicateTaskError) as refused:
        await client.enqueue("u", b"same", queue=queue, unique_for=HOUR)
    assert refused.value.holder_id == theirs["id"]
    async with AsyncServer(uri, queues=[queue]).running(handler):
        await done.wait()
        await drained(redis, queue)

    ours = await client.enqueue("u", b"same", queue=queue, unique_for=HOUR)
    with pytest.raises(GoError, match="task already exists"):
        await go_client.enqueue("u", b"same", queue=queue, unique_s=3600)
    with pytest.raises(GoError, match="task ID conflicts"):
        await go_client.enqueue("other", b"x", queue=queue, task_id=ours.id)
    async with GoWorker(server, {queue: 1}) as worker:
        await worker.started(ours.id)
        await drained(redis, queue)
    await go_client.enqueue("u", b"same", queue=queue, unique_s=3600)


async def test_go_steers_our_queues(
    uri: str, queue: str, redis: Any, client: Client, go_inspector: GoInspector
) -> None:
    """What Go's inspector does to our tasks and queues is obeyed: pause, run, archive, delete."""
    done: list[str] = []

    async def handler(ctx: Context, task: Task) -> None:
        done.append(ctx.task_id)
        if task.type == "fails" and ctx.retried == 0:
            raise ValueError("once")

    server = AsyncServer(uri, queues=[queue], retry_delay=in_an_hour)
    async with server.running(handler):
        await client.enqueue("fails", queue=queue, task_id="retried")
        await client.enqueue("x", queue=queue, task_id="scheduled", process_in=timedelta(minutes=30, milliseconds=250))
        await client.enqueue("x", queue=queue, task_id="deleted", process_in=HOUR)
        await client.enqueue("x", queue=queue, task_id="archived", process_in=HOUR, unique_for=HOUR)
        await until(lambda: server.stats.retried == 1)
        await drained(redis, queue)
        await go_inspector.ask(ask="run", queue=queue, id="retried")
        await go_inspector.ask(ask="run", queue=queue, id="scheduled")
        await until(lambda: done == ["retried", "retried", "scheduled"])
        await drained(redis, queue)
        await go_inspector.ask(ask="delete", queue=queue, id="deleted")
        await go_inspector.ask(ask="archive", queue=queue, id="archived")
        assert (await go_inspector.task(queue, "archived"))["state"] == "archived"
        await go_inspector.ask(ask="run", queue=queue, id="archived")
        await until(lambda: done[-1] == "archived")
        await drained(redis, queue)

        await go_inspector.ask(ask="pause", queue=queue)
        await client.enqueue("x", queue=queue, task_id="paused")
        assert (await go_inspector.queue(queue))["paused"]
        await go_inspector.ask(ask="unpause", queue=queue)
        await until(lambda: done[-1] == "paused")
        await drained(redis, queue)
    info = await go_inspector.queue(queue)
    assert (info["size"], info["processed"], info["failed"]) == (0, 5, 1)
