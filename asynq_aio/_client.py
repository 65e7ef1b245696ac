"""A task enters: `Client`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal, cast, overload

from asynq_aio._broker.enqueue import Entry
from asynq_aio._door import Door
from asynq_aio._options import compose
from asynq_aio._outbox import Item, Outboxes, Ticket
from asynq_aio._task import Task, TaskInfo, TaskState
from asynq_aio._wire.codec import encode_task
from asynq_aio.errors import AsynqError, BrokerUnavailableError, EnqueueManyError, InvalidTaskError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from asynq_aio._broker.connect import RedisClient
    from asynq_aio._config import RedisConnOpt
    from asynq_aio._options import NewTask
    from asynq_aio._outbox import Outbox
    from asynq_aio._task import Payload, TaskOptions

__all__ = ["Client"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_SIZE_BESIDE_PAYLOAD: Final = 256
"""What a message has besides its payload, roughly; how much may wait is no exact number."""

_TURN: Final = 500
"""So many tasks `enqueue_many` makes ready before others have their turn in the event loop: about 10 ms."""

_PROBE: Final = Task("probe")


class Client:
    """Enqueues tasks. One object serves any number of concurrent callers of one event loop.

    `redis` says where: an option, a URI or a redis-py client, whose settings are copied; without one, what the
    environment (`ASYNQ_URI`) or the config file says, else 127.0.0.1:6379. Connects when first used. After a fork, the
    client of the parent may be used in the child, and begins anew there.

        async with Client("redis-cluster://127.0.0.1:7000") as client:
            await client.enqueue("email:welcome", {"user_id": 42}, queue="critical")

    Raises:
        ConfigError: `redis` cannot be right.
    """

    def __init__(self, redis: RedisConnOpt | str | RedisClient | None = None) -> None:
        self._door = Door(redis, "Client")
        self._outboxes: Outboxes | None = None
        self._calls = 0
        self._drained: asyncio.Event | None = None
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Client of {self._door.description}>"

    async def __aenter__(self) -> Self:
        self._door.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @overload
    async def enqueue(
        self, task: Task, /, *, headers: Mapping[str, str] | None = None, **options: Unpack[TaskOptions]
    ) -> TaskInfo: ...
    @overload
    async def enqueue(
        self,
        type: str,
        /,
        payload: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> TaskInfo: ...
    async def enqueue(
        self,
        task: Task | str,
        /,
        payload: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> TaskInfo:
        """Enqueue one task, given as such or as type and payload; what is returned stands in Redis.

        Options given here win over those of the task, one by one; headers are added to its headers. The tasks of one
        queue enter it in the order of the calls; calls that are made at the same time share round trips.

        A caller that is cancelled, by a timeout for instance, takes its task back if it has not been sent yet; else the
        task may exist or not.

        Raises:
            ConfigError, InvalidTaskError, TypeError: an option, the task, a header cannot be right; nothing was sent.
            MessageEncodeError: a text that no message can carry.
            TaskIDConflictError: the ID is taken in this queue.
            DuplicateTaskError: the unique lock is held.
            BrokerFullError, BrokerAuthError, BrokerError: Redis refused it; it is not enqueued.
            BrokerUnavailableError: out of reach until the deadline; where `sent` is true, the task may exist.
            RuntimeError: the client is closed, or belongs to another event loop.
        """
        outboxes = self._enter()
        self._calls += 1
        try:
            since = outboxes.loop.time()
            if isinstance(task, str):
                task = Task(task, payload)
            elif not isinstance(task, Task):
                raise InvalidTaskError(f"wanted a Task, or the type of one, not {task!r}")
            elif payload is not None:
                raise InvalidTaskError(f"{task!r} has its payload already; expected no other one beside it")
            chosen = _with_headers(options, headers)
            if "process_in" in chosen or "process_in" in task.options:
                await outboxes.clock_is_known()  # this due time is written from ours
            new = compose(task, chosen, outboxes.store.now_ns())
            outbox = outboxes.of(new.message.queue)
            ticket = Ticket(outboxes.loop)
            size = _SIZE_BESIDE_PAYLOAD + len(new.message.payload)
            if not outbox.reserve(size):
                await outbox.turn(size, since)
            item = _put(outbox, new, size, since, ticket, 0)
            ticket.settle()
            try:
                await ticket.done
            except asyncio.CancelledError:
                outbox.withdraw(item)
                raise
            if ticket.errors:
                raise ticket.errors[0]
            return _info(new)
        finally:
            self._leave()

    @overload
    async def enqueue_many(
        self,
        tasks: Iterable[Task | tuple[str, object]],
        *,
        return_exceptions: Literal[False] = False,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> list[TaskInfo]: ...
    @overload
    async def enqueue_many(
        self,
        tasks: Iterable[Task | tuple[str, object]],
        *,
        return_exceptions: Literal[True],
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> list[TaskInfo | AsynqError]: ...
    async def enqueue_many(
        self,
        tasks: Iterable[Task | tuple[str, object]],
        *,
        return_exceptions: bool = False,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> Sequence[TaskInfo | AsynqError]:
        """Enqueue many tasks, of one queue or several, in few round trips: up to 500 tasks of a queue in one.

        Each task is a Task, or (type, payload). The options are those of every task, as in `enqueue`. The tasks of a
        queue enter it in their order, those of other callers may come between them. Every task is tried, whatever
        becomes of the others; only after an outage up to the deadline, those that are still to come are given up too.
        Cancelling takes back what has not been sent.

        Returns:
            A TaskInfo for each task, in order; with `return_exceptions`, the error of a task in its place.
        Raises:
            EnqueueManyError: some were not enqueued; its `results` has a TaskInfo or an error for each task.
            ConfigError, InvalidTaskError, TypeError: an option for all cannot be right; nothing was sent.
            RuntimeError: the client is closed, or belongs to another event loop.
        """
        outboxes = self._enter()
        self._calls += 1
        try:
            results = await _enqueue_many(outboxes, list(tasks), _with_headers(options, headers))
        finally:
            self._leave()
        if not return_exceptions and any(isinstance(result, AsynqError) for result in results):
            raise EnqueueManyError(results)
        return results

    async def ping(self) -> None:
        """Return when Redis has answered; of a cluster, any node.

        Raises:
            BrokerUnavailableError: out of reach until the deadline.
            BrokerAuthError: it does not let us in.
            RuntimeError: the client is closed, or belongs to another event loop.
        """
        await self._door.enter().ping()

    async def aclose(self) -> None:
        """Let the calls that are under way end, then close the connections. New calls are refused at once.

        Takes as long as Redis takes to answer, at most until the callers' deadlines. Only what this client has opened
        is closed, never a redis-py client that was handed in. Cancelling it does not stop it.

        Raises:
            RuntimeError: the client belongs to another event loop.
        """
        store = self._door.close()
        if store is not None:
            loop = asyncio.get_running_loop()
            self._drained = asyncio.Event()
            if not self._calls:
                self._drained.set()
            self._closing = loop.create_task(self._close(self._drained))
        if self._closing is not None and not self._closing.done():
            await asyncio.shield(self._closing)

    async def _close(self, drained: asyncio.Event) -> None:
        try:
            await drained.wait()
            if self._outboxes is not None:
                await self._outboxes.aclose()
        finally:
            await self._door.store.aclose()

    def _enter(self) -> Outboxes:
        store = self._door.enter()
        outboxes = self._outboxes
        if outboxes is None or outboxes.store is not store:
            # The first use, or the first after a fork: then the callers that count were the parent's.
            self._outboxes = outboxes = Outboxes(store, asyncio.get_running_loop())
            self._calls = 0
        return outboxes

    def _leave(self) -> None:
        self._calls -= 1
        if not self._calls and self._drained is not None:
            self._drained.set()


def _with_headers(options: TaskOptions, headers: Mapping[str, str] | None) -> Mapping[str, object]:
    chosen = cast("dict[str, object]", options)
    if headers is not None:
        chosen["headers"] = headers
    return chosen


def _put(outbox: Outbox, new: NewTask, size: int, since: float, ticket: Ticket, place: int) -> Item:
    """Hand one task over, for which there is room."""
    try:
        entry = Entry(new, encode_task(new.message))
    except BaseException:
        outbox.release(size)
        raise
    item = Item(entry, size, since, ticket, place)
    outbox.put(item)
    return item


async def _enqueue_many(
    outboxes: Outboxes, tasks: Sequence[Task | tuple[str, object]], options: Mapping[str, object]
) -> list[TaskInfo | AsynqError]:
    compose(_PROBE, options, outboxes.store.now_ns())  # what is wrong for all is an error of the call
    if "process_in" in options or any("process_in" in task.options for task in tasks if isinstance(task, Task)):
        await outboxes.clock_is_known()
    ticket = Ticket(outboxes.loop)
    made: list[NewTask | AsynqError] = []
    items: list[tuple[Outbox, Item]] = []
    try:
        for place, task in enumerate(tasks):
            if place and place % _TURN == 0:
                await asyncio.sleep(0)
            try:
                new = compose(_task_of(task), options, outboxes.store.now_ns())
                items.append(await _put_one_of_many(outboxes, new, ticket, place))
            except (AsynqError, TypeError) as exc:
                made.append(exc if isinstance(exc, AsynqError) else InvalidTaskError(str(exc)))
            else:
                made.append(new)
        ticket.settle()
        await ticket.done
    except BaseException:
        ticket.done.cancel()
        for outbox, item in items:
            outbox.withdraw(item)
        raise
    results: list[TaskInfo | AsynqError] = []
    for place, new_or_error in enumerate(made):
        if isinstance(new_or_error, AsynqError):
            results.append(new_or_error)
            continue
        match ticket.errors.get(place):
            case None:
                results.append(_info(new_or_error))
            case AsynqError() as refused:
                results.append(refused)
            case fault_of_ours:
                raise fault_of_ours
    return results


async def _put_one_of_many(outboxes: Outboxes, new: NewTask, ticket: Ticket, place: int) -> tuple[Outbox, Item]:
    queue = new.message.queue
    if queue in ticket.outages:
        outage = ticket.outages[queue]
        raise BrokerUnavailableError(f"not tried, after the tasks before it: {outage}") from outage
    outbox = outboxes.of(queue)
    size = _SIZE_BESIDE_PAYLOAD + len(new.message.payload)
    since = outboxes.loop.time()
    if not outbox.reserve(size):
        try:
            await outbox.turn(size, since)
        except BrokerUnavailableError as exc:
            ticket.outages.setdefault(queue, exc)
            raise
    return outbox, _put(outbox, new, size, since, ticket, place)


def _task_of(given: object) -> Task:
    match given:
        case Task():
            return given
        case (str() as type, payload):
            return Task(type, payload)
    raise InvalidTaskError(f"wanted a Task or (type, payload), not {given!r}")


def _info(new: NewTask) -> TaskInfo:
    """What is known of a task that has just been enqueued."""
    message = new.message
    return TaskInfo(
        id=message.id,
        queue=message.queue,
        type=message.type,
        payload=cast("Payload", message.payload),
        headers=message.headers,
        state=new.state,
        max_retry=message.retry,
        timeout=timedelta(seconds=message.timeout) if message.timeout else None,
        deadline_at=_EPOCH + timedelta(seconds=message.deadline) if message.deadline else None,
        group=message.group_key or None,
        next_process_at=_EPOCH + timedelta(microseconds=new.process_at_ns // 1_000)
        if new.state is TaskState.SCHEDULED
        else None,
        retention=timedelta(seconds=message.retention),
    )
