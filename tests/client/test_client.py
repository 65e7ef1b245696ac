"""What `enqueue` and `enqueue_many` leave in Redis, on every topology."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from asynq_aio import (
    AsynqError,
    Client,
    ConfigError,
    DuplicateTaskError,
    EnqueueManyError,
    InvalidTaskError,
    MessageEncodeError,
    Task,
    TaskIDConflictError,
    TaskInfo,
    TaskState,
)
from asynq_aio._wire import keys
from asynq_aio._wire.codec import encode_task
from asynq_aio._wire.messages import TaskMessage
from tests.client.conftest import message_of, pending_ids

ONE = pytest.mark.parametrize("topology", ["standalone-valkey9"], indirect=True)


async def test_the_defaults_are_those_of_go(client: Client, redis: Any, queue: str) -> None:
    """25 retries, 30 minutes, no retention, a random ID; the queue is known to every inspector."""
    info = await client.enqueue("email:welcome", {"user_id": 42}, queue=queue)
    assert info == TaskInfo(
        id=info.id,
        queue=queue,
        type="email:welcome",
        payload=info.payload,
        timeout=timedelta(minutes=30),
        max_retry=25,
        state=TaskState.PENDING,
    )
    assert info.payload.get_int("user_id") == 42
    message = await message_of(redis, queue, info.id)
    assert (message.type, message.payload, message.queue, message.retry, message.timeout, message.retention) == (
        "email:welcome",
        b'{"user_id":42}',
        queue,
        25,
        1800,
        0,
    )
    assert await pending_ids(redis, queue) == [info.id]
    assert await redis.sismember(keys.QUEUES, queue)


async def test_every_option_arrives(client: Client, redis: Any, queue: str) -> None:
    """Each of them stands in the message, the hash, its set and its lock, and in the TaskInfo."""
    deadline = datetime(2033, 5, 18, 3, 33, 20, tzinfo=UTC)
    due = datetime.now(UTC).replace(microsecond=250_000) + timedelta(hours=1)
    scheduled = await client.enqueue(
        "report",
        b"\x00raw",
        queue=queue,
        task_id="first",
        max_retry=3,
        timeout=timedelta(seconds=89.5),
        deadline_at=deadline.astimezone(timezone(timedelta(hours=5))),
        unique_for=timedelta(minutes=10),
        process_at=due,
        retention=timedelta(hours=24),
        headers={"trace": "ä"},
    )
    assert (scheduled.id, scheduled.state, scheduled.next_process_at) == ("first", TaskState.SCHEDULED, due)
    assert (scheduled.max_retry, scheduled.timeout, scheduled.deadline_at) == (3, timedelta(seconds=90), deadline)
    assert (scheduled.retention, scheduled.headers) == (timedelta(days=1), {"trace": "ä"})
    message = await message_of(redis, queue, "first")
    assert (message.retry, message.timeout, message.deadline, message.retention) == (3, 90, 2_000_000_000, 86_400)
    assert (message.payload, dict(message.headers)) == (b"\x00raw", {"trace": "ä"})
    assert await redis.zscore(keys.scheduled(queue), "first") == int(due.timestamp())
    lock = keys.unique(queue, "report", b"\x00raw")
    assert message.unique_key == lock
    assert await redis.get(lock) == b"first"
    assert 600 + 3500 < await redis.ttl(lock) <= 600 + 3600  # the wait until it is due is in it

    grouped = await client.enqueue("report", queue=queue, group="g")
    assert (grouped.state, grouped.group, grouped.next_process_at) == (TaskState.AGGREGATING, "g", None)
    assert await redis.zscore(keys.group(queue, "g"), grouped.id) is not None

    before = datetime.now(UTC)
    later = await client.enqueue("report", queue=queue, process_in=timedelta(seconds=100))
    assert later.next_process_at is not None
    assert timedelta(seconds=99) < later.next_process_at - before < timedelta(seconds=160)
    assert later.state is TaskState.SCHEDULED


async def test_options_of_the_call_win_one_by_one(client: Client, redis: Any, queue: str) -> None:
    """What the call does not name stays as the task has it; headers are added."""
    task = Task("t", {"a": 1}, headers={"a": "1", "b": "1"}, queue=queue, max_retry=3, process_in=timedelta(hours=1))
    info = await client.enqueue(task, max_retry=7, process_in=None, headers={"b": "2"})
    assert (info.queue, info.max_retry, info.state) == (queue, 7, TaskState.PENDING)
    assert (await message_of(redis, queue, info.id)).headers == {"a": "1", "b": "2"}
    assert (task.options["max_retry"], task.headers) == (3, {"a": "1", "b": "1"})


async def test_a_taken_id_is_refused(client: Client, redis: Any, queue: str) -> None:
    """With the names in the error; the unique lock that it took on its way is given back (F4)."""
    await client.enqueue("t", queue=queue, task_id="x")
    with pytest.raises(TaskIDConflictError, match="task ID conflicts") as caught:
        await client.enqueue("t", {"other": 1}, queue=queue, task_id="x", unique_for=timedelta(hours=1))
    assert (caught.value.queue, caught.value.task_id) == (queue, "x")
    await client.enqueue("t", {"other": 1}, queue=queue, unique_for=timedelta(hours=1))


async def test_a_duplicate_names_who_holds_the_lock(client: Client, queue: str) -> None:
    """A second task of the same type, payload and queue is refused while the lock lives."""
    first = await client.enqueue("t", {"a": 1}, queue=queue, unique_for=timedelta(hours=1))
    with pytest.raises(DuplicateTaskError, match="task already exists") as caught:
        await client.enqueue("t", {"a": 1}, queue=queue, unique_for=timedelta(hours=1))
    assert caught.value.holder_id == first.id
    assert caught.value.unique_key == keys.unique(queue, "t", b'{"a":1}')


async def test_each_task_of_many_has_its_own_verdict(client: Client, redis: Any, queue: str) -> None:
    """Refusals of Redis and of ours stand in their places; all others are enqueued, in order."""
    lock = timedelta(hours=1)
    tasks: list[Any] = [
        Task("a", task_id="1"),
        Task("a", task_id="1"),
        ("b", {"n": 1}),
        Task("u", unique_for=lock, task_id="holder"),
        Task("u", unique_for=lock),
        ("c", object()),
        ("  ", None),
        "no task",
        Task("d", max_retry=-1),
        Task("g", group="g", task_id="in group"),
        Task("s", process_in=timedelta(hours=1), task_id="later"),
        Task("e\ud800", task_id="lone surrogate"),
        ("last", None),
    ]
    with pytest.raises(EnqueueManyError, match=r"7 of 13 tasks .*; the first: task ID conflicts") as caught:
        await client.enqueue_many(tasks, queue=queue)
    kinds = [type(result) for result in caught.value.results]
    assert kinds == [
        TaskInfo,
        TaskIDConflictError,
        TaskInfo,
        TaskInfo,
        DuplicateTaskError,
        InvalidTaskError,
        InvalidTaskError,
        InvalidTaskError,
        ConfigError,
        TaskInfo,
        TaskInfo,
        InvalidTaskError,
        TaskInfo,
    ]
    infos = [result for result in caught.value.results if isinstance(result, TaskInfo)]
    assert await pending_ids(redis, queue) == [info.id for info in infos if info.state is TaskState.PENDING]
    duplicate = caught.value.results[4]
    assert isinstance(duplicate, DuplicateTaskError)
    assert duplicate.holder_id == "holder"

    again: list[TaskInfo | AsynqError] = await client.enqueue_many(
        [Task("a", task_id="1"), Task("a")], queue=queue, return_exceptions=True
    )
    assert [type(result) for result in again] == [TaskIDConflictError, TaskInfo]


async def test_many_tasks_of_many_queues(client: Client, redis: Any, queue: str) -> None:
    """Each queue gets its own, in order; each info stands in its task's place."""
    queues = [f"{queue}-{n}" for n in range(5)]
    tasks = [Task("t", {"n": n}, queue=queues[n % 5]) for n in range(1205)]
    infos = await client.enqueue_many(tasks)
    assert [(info.queue, info.payload.get_int("n")) for info in infos] == [(queues[n % 5], n) for n in range(1205)]
    for n, name in enumerate(queues):
        assert await pending_ids(redis, name) == [info.id for info in infos[n::5]]


async def test_nothing_is_nothing(client: Client) -> None:
    """An empty list of tasks makes no call."""
    assert await client.enqueue_many([]) == []


async def test_order_within_a_queue_is_call_order(client: Client, redis: Any, queue: str) -> None:
    """Also for more callers at once than one call may carry, with plain and unique tasks among each other."""
    count = itertools.count()

    async def enqueue() -> None:
        n = next(count)
        await client.enqueue(
            "t", {"n": n}, queue=queue, task_id=str(n), unique_for=timedelta(hours=1) if n % 3 else None
        )

    await asyncio.gather(*(enqueue() for _ in range(1100)))
    assert await pending_ids(redis, queue) == [str(n) for n in range(1100)]


@pytest.mark.parametrize("odd", ["with space", "UPPER", "a:b:c", "größe", "{braces}", "a}b", "*?[x]", "\n", "é" * 200])
@pytest.mark.parametrize("topology", ["standalone-redis7", "cluster-valkey9"], indirect=True)
async def test_odd_queue_names(client: Client, redis: Any, queue: str, odd: str) -> None:
    """A name may be any text; it is used as it is."""
    name = f"{queue}{odd}"
    info = await client.enqueue("t", queue=name, unique_for=timedelta(hours=1))
    assert await pending_ids(redis, name) == [info.id]
    assert (await message_of(redis, name, info.id)).queue == name
    assert await redis.sismember(keys.QUEUES, name)


async def test_large_payloads(client: Client, redis: Any, queue: str) -> None:
    """Payloads that no call can share, and some that no small call can carry, arrive whole and in order."""
    sizes = [3 << 20, 700_000, 700_000, 10, 1 << 20, 10]
    infos = await client.enqueue_many([("t", bytes([n]) * size) for n, size in enumerate(sizes)], queue=queue)
    assert await pending_ids(redis, queue) == [info.id for info in infos]
    for n, (size, info) in enumerate(zip(sizes, infos, strict=True)):
        assert (await message_of(redis, queue, info.id)).payload == bytes([n]) * size


@ONE
async def test_a_dataclass_is_json(client: Client, queue: str) -> None:
    """What has a JSON form is sent in it; what has none is refused, before anything is sent."""

    @dataclass
    class Resize:
        src: str
        width: int

    info = await client.enqueue("images:resize", Resize("a.png", 20), queue=queue)
    assert info.payload == b'{"src":"a.png","width":20}'
    with pytest.raises(InvalidTaskError, match="JSON"):
        await client.enqueue("images:resize", object(), queue=queue)


@ONE
@pytest.mark.parametrize(
    ("wrong", "options", "error", "text"),
    [
        ("t", {"max_retires": 3}, ConfigError, "unknown option 'max_retires'; did you mean 'max_retry'"),
        ("t", {"queue": "  "}, ConfigError, "queue name must contain one or more characters"),
        ("t", {"task_id": ""}, InvalidTaskError, "task ID cannot be empty"),
        ("t", {"group": " "}, ConfigError, "group key cannot be empty"),
        ("t", {"unique_for": timedelta(milliseconds=5)}, ConfigError, "Unique TTL cannot be less than 1s"),
        ("t", {"process_at": datetime(2030, 1, 1)}, ConfigError, "no time zone"),  # noqa: DTZ001
        ("t", {"process_at": datetime.now(UTC), "process_in": timedelta(1)}, ConfigError, "contradict each other"),
        ("t", {"timeout": 30}, ConfigError, r"wanted a timedelta, such as timedelta\(seconds=30\)"),
        ("t", {"headers": {"a": 1}}, TypeError, "headers"),
        ("", {}, InvalidTaskError, "task typename cannot be empty"),
        (None, {}, InvalidTaskError, "wanted a Task, or the type of one, not None"),
        (Task("t"), {"payload": {}}, InvalidTaskError, "has its payload already"),
    ],
)
async def test_what_cannot_be_right_is_said_before_anything_is_sent(
    client: Client, redis: Any, queue: str, wrong: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """The text says what was wrong and what to do."""
    with pytest.raises(error, match=text):
        await client.enqueue(wrong, **{"queue": queue, **options})
    assert not await redis.exists(keys.pending(queue))
    assert client._door.store.stats.calls <= 3  # a ping and two looks at the clock


@ONE
async def test_options_that_are_wrong_for_all_are_an_error_of_the_call(client: Client, redis: Any, queue: str) -> None:
    """Not of each task: nothing is tried."""
    with pytest.raises(ConfigError, match="did you mean 'retention'"):
        await client.enqueue_many([("a", 1), ("b", 2)], retenton=timedelta(1), queue=queue)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="headers"):
        await client.enqueue_many([("a", 1)], headers={"a": 1}, queue=queue)  # type: ignore[dict-item]
    assert not await redis.exists(keys.pending(queue))


@ONE
async def test_a_message_that_cannot_be_written_touches_no_neighbour(
    client: Client, redis: Any, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoding error is the verdict of one task, and its room is given back."""

    def refuse(message: TaskMessage) -> bytes:
        if message.id == "bad":
            raise MessageEncodeError("TaskMessage", "a test wants it so")
        return encode_task(message)

    monkeypatch.setattr("asynq_aio._client.encode_task", refuse)
    results = await client.enqueue_many(
        [Task("t", task_id="a"), Task("t", task_id="bad"), Task("t", task_id="b")], queue=queue, return_exceptions=True
    )
    assert [type(result) for result in results] == [TaskInfo, MessageEncodeError, TaskInfo]
    with pytest.raises(MessageEncodeError):
        await client.enqueue("t", queue=queue, task_id="bad")
    assert await pending_ids(redis, queue) == ["a", "b"]
    assert client._outboxes is not None
    assert (client._outboxes.tasks, client._outboxes.bytes) == (0, 0)
