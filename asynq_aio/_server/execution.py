"""One task: deadline -> context -> handler -> outcome."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from asynq_aio._broker import results
from asynq_aio._broker.finish import Archive, Requeue
from asynq_aio._broker.leases import Lease
from asynq_aio._context import Context, bind
from asynq_aio._server import outcome as outcomes
from asynq_aio._task import Task, encode_payload
from asynq_aio._wire import codec
from asynq_aio._wire.limits import DEFAULT_TIMEOUT
from asynq_aio.errors import (
    AsynqError,
    HandlerNotFoundError,
    InvalidTaskError,
    LeaseExpiredError,
    MessageDecodeError,
    RevokeTask,
    SkipRetry,
    TaskCancelledError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import anyio

    from asynq_aio._broker.dequeue import Claim, Claimed
    from asynq_aio._broker.finish import Outcome
    from asynq_aio._broker.store import Store
    from asynq_aio._client import Client
    from asynq_aio._handler import Handler
    from asynq_aio._server.config import ServerConfig
    from asynq_aio._server.lease import Holdings
    from asynq_aio._wire.messages import TaskMessage

__all__ = ["Attempt", "End", "Executor", "ServerStats"]

logger = logging.getLogger("asynq_aio.server")

# After its cancellation a handler has this long to clean up, seconds; then the outcome is written without it.
_GRACE = 1.0
# The end of the year 9999: a later deadline, which a peer may write, fits into no timestamp that others read.
_LATEST_UNIX = 253_402_300_799.0


class End(Enum):
    """Why an attempt was ended from outside; the value is what Go's tools show as the task's error (wire.md 8.2)."""

    DEADLINE = "context deadline exceeded"
    CANCELLED = "context canceled"
    LEASE = "asynq: task lease expired"
    SHUTDOWN = "the server shuts down"


@dataclass(slots=True)
class ServerStats:
    """What a server has done since its start."""

    succeeded: int = 0
    retried: int = 0
    archived: int = 0
    revoked: int = 0
    requeued: int = 0
    lost: int = 0
    """Outcomes that came too late: the task was somebody else's, or gone."""
    recovered: int = 0
    """Tasks of other servers that this one has put back."""

    @property
    def processed(self) -> int:
        """Attempts that came to an end by themselves."""
        return self.succeeded + self.retried + self.archived + self.revoked


class Attempt:
    """A task that this server has taken, until its outcome is final."""

    __slots__ = (
        "begun",
        "child",
        "context",
        "deadline_unix",
        "ended",
        "lease",
        "message",
        "renewed",
        "settled",
        "started_ns",
        "task",
        "timer",
    )

    def __init__(self, lease: Lease, renewed: float) -> None:
        self.lease = lease
        self.renewed = renewed
        """Monotonic seconds when the claim, or the last extension that succeeded, was sent."""
        self.message: TaskMessage | None = None
        self.task: Task | None = None
        self.context: Context | None = None
        self.child: asyncio.Task[None] | None = None
        """The running handler; None: there is none yet, or none any more."""
        self.begun = False
        """The child has had its first turn."""
        self.timer: asyncio.TimerHandle | None = None
        self.started_ns = 0
        self.deadline_unix = 0.0
        self.ended: End | None = None
        self.settled = False
        """Its outcome is on its way, or nobody wants it."""


class Executor:
    """Runs the handler for each claimed task and hands the outcomes on."""

    def __init__(
        self,
        store: Store,
        handler: Handler,
        config: ServerConfig,
        holdings: Holdings,
        stats: ServerStats,
        *,
        put: Callable[[Attempt, Outcome], None],
        freed: Callable[[], None],
        client: Callable[[], Client],
        sync_limiter: anyio.CapacityLimiter,
    ) -> None:
        self._store = store
        self._handler = handler
        self._config = config
        self._holdings = holdings
        self._stats = stats
        self._put = put
        self._freed = freed
        self._client = client
        self._sync_limiter = sync_limiter
        self._loop = asyncio.get_running_loop()
        self._late: set[asyncio.Task[None]] = set()
        """Calls of on_error for handlers that ignore their cancellation."""
        self.running = 0
        """Handlers that run; each has a slot."""
        self.state: Any = None
        """What the server's lifespan yielded."""

    # -- in

    def start(self, claim: Claim, claimed: list[Claimed], sent: float) -> None:
        """Begin to work on what a claim took; `sent` is when it was sent, monotonic seconds."""
        now_ns = self._store.now_ns()
        debug = logger.isEnabledFor(logging.DEBUG)
        for task_id, encoded, pending_since_ns in claimed:
            attempt = self.hold(claim, task_id, sent)
            try:
                message = codec.decode_task(encoded)
            except MessageDecodeError as exc:
                logger.error("task %r of queue %r is archived: %s", task_id, claim.queue, exc)  # noqa: TRY400
                self._stats.archived += 1
                self._put(attempt, Archive(attempt.lease, encoded, str(exc)))
                continue
            attempt.message = message
            attempt.task = Task.received(message.type, message.payload, message.headers)
            attempt.started_ns = now_ns
            attempt.deadline_unix = deadline_unix(message, now_ns)
            attempt.context = self._context(attempt, message, pending_since_ns)
            self.running += 1
            attempt.child = self._loop.create_task(self._run(attempt, attempt.context, attempt.task, message))
            left = attempt.deadline_unix - now_ns / 1e9
            attempt.timer = self._loop.call_later(max(0.0, left), self.end, attempt, End.DEADLINE)
            if debug:
                logger.debug("task %s (%s) of queue %s starts", message.id, message.type, claim.queue)
        self._freed()  # of the slots that undecodable messages did not need

    def hold(self, claim: Claim, task_id: bytes, sent: float) -> Attempt:
        """This task is ours now, whatever becomes of it."""
        try:
            name: str | bytes = task_id.decode()
        except UnicodeDecodeError:
            name = task_id
        attempt = Attempt(Lease(claim.queue, name, claim.owner, claim.expires_unix), sent)
        self._holdings.add(attempt)
        return attempt

    def _context(self, attempt: Attempt, message: TaskMessage, pending_since_ns: bytes) -> Context:
        lease = attempt.lease
        return Context(
            task_id=message.id,
            queue=lease.queue,
            type=message.type,
            retried=message.retried,
            max_retry=message.retry,
            headers=message.headers,
            deadline_unix=attempt.deadline_unix,
            enqueued_ns=int(pending_since_ns) if pending_since_ns.isdigit() else None,
            lease_expires_unix=lambda: lease.expires_unix,
            write_result=lambda data: results.write(self._store, lease.queue, message.id, data),
            client=self._client,
            state=self.state,
            sync_limiter=self._sync_limiter,
            now=self._store.now,
        )

    # -- the attempt

    async def _run(self, attempt: Attempt, context: Context, task: Task, message: TaskMessage) -> None:
        result: object = None
        error: BaseException | None = None
        attempt.begun = True
        try:
            if attempt.ended is None and attempt.deadline_unix * 1e9 <= attempt.started_ns:
                attempt.ended = End.DEADLINE
            if attempt.ended is None:
                bind(context)
                result = await self._handler(context, task)
        except BaseException as exc:  # noqa: BLE001  (whatever a handler raises is its task's outcome, SystemExit too)
            error = exc
        if attempt.timer is not None:
            attempt.timer.cancel()
        if not attempt.settled:
            try:
                await self._settle(attempt, context, task, message, result, error)
            except BaseException:  # the slot must come back, and the lease rule takes the task
                logger.exception("task %s (%s): its outcome cannot be made", message.id, message.type)
                self._drop(attempt)
        attempt.child = None
        self.running -= 1
        self._freed()

    async def _settle(
        self,
        attempt: Attempt,
        context: Context,
        task: Task,
        message: TaskMessage,
        result: object,
        error: BaseException | None,
    ) -> None:
        """Decide what becomes of the task, and hand it to the syncer."""
        ended = attempt.ended
        if ended is End.SHUTDOWN:
            self.requeue(attempt)
            return
        if ended is not None:
            error = _end_error(ended, error)
        elif isinstance(error, asyncio.CancelledError):  # of its own making
            error = _end_error(End.CANCELLED, error)
        if error is None:
            encoded = self._encode_result(message, result)
            self._settled(attempt, outcomes.succeeded(message, attempt.lease, encoded, int(self._store.now())))
            self._stats.succeeded += 1
            if logger.isEnabledFor(logging.DEBUG):
                took_ms = (self._store.now_ns() - attempt.started_ns) / 1e6
                logger.debug(
                    "task %s (%s) of queue %s is done, %.1f ms", message.id, message.type, context.queue, took_ms
                )
            return
        context.end(outcomes.error_text(error))
        await self._call_on_error(context, task, error)
        if attempt.settled:  # meanwhile the lease was lost, or the grace ran out
            return
        if ended is End.LEASE:
            self._drop(attempt)
            return
        self._fail(attempt, task, message, error)

    def _fail(self, attempt: Attempt, task: Task, message: TaskMessage, error: BaseException) -> None:
        now_ns = self._store.now_ns()
        if isinstance(error, HandlerNotFoundError) and getattr(self._handler, "on_unknown", None) == "requeue":
            outcome: Outcome = outcomes.left_to_others(message, attempt.lease, error, now_ns)
        else:
            outcome = outcomes.failed(message, attempt.lease, error, task, self._config, now_ns)
        self._settled(attempt, outcome)
        names = (message.id, message.type, message.queue, outcomes.error_text(error))
        # Our own errors say everything; of the handler's, people want to see where they come from.
        trace = None if isinstance(error, AsynqError | SkipRetry | RevokeTask) else error
        match outcome:
            case Archive():
                self._stats.archived += 1
                logger.warning("task %s (%s) of queue %s is archived: %s", *names, exc_info=trace)
            case _ if outcomes.is_verdict(error, RevokeTask):
                self._stats.revoked += 1
                logger.info("task %s (%s) of queue %s is revoked: %s", *names)
            case _:
                self._stats.retried += 1
                logger.info("task %s (%s) of queue %s will be retried: %s", *names, exc_info=trace)

    def _encode_result(self, message: TaskMessage, result: object) -> bytes | None:
        if result is None or message.retention <= 0:
            return None
        try:
            return bytes(encode_payload(result))
        except InvalidTaskError as exc:
            # The work is done: a retry would do it twice.
            logger.error("task %s (%s) is done, but its result is lost: %s", message.id, message.type, exc)  # noqa: TRY400
            return None

    async def _call_on_error(self, context: Context, task: Task, error: BaseException) -> None:
        if self._config.on_error is None:
            return
        bind(context)
        try:
            answer = self._config.on_error(context, task, error)
            if inspect.isawaitable(answer):
                await answer
        except BaseException:  # SystemExit too; and a cancellation that comes now comes too late: the handler is done
            logger.exception("on_error raised; the task's outcome is not changed by it")

    # -- ended from outside

    def end(self, attempt: Attempt, reason: End) -> None:
        """End a running attempt: its handler is cancelled, and after a second the task goes on without it."""
        child = attempt.child
        if child is None or attempt.ended is not None or attempt.settled:
            return
        attempt.ended = reason
        if attempt.context is not None:
            attempt.context.end(reason.value)
        if attempt.begun:  # else asyncio would throw before the first line of `_run`, and nothing would end the attempt
            child.cancel(reason.value)
        if reason is not End.SHUTDOWN:  # the drain has a limit of its own
            attempt.timer = self._loop.call_later(_GRACE, self._give_up, attempt)

    def _give_up(self, attempt: Attempt) -> None:
        """The handler ignores its cancellation: the outcome goes without it, the slot stays taken while it runs."""
        if attempt.child is None or attempt.settled:
            return
        message, task, context, ended = attempt.message, attempt.task, attempt.context, attempt.ended
        if message is None or task is None or context is None or ended is None:
            return
        logger.warning(
            "task %s (%s) of queue %s: its handler goes on %g s after it was cancelled (%s); its slot stays taken",
            message.id,
            message.type,
            message.queue,
            _GRACE,
            ended.value,
        )
        error = _end_error(ended, None)
        if self._config.on_error is not None:
            late = self._loop.create_task(self._call_on_error(context, task, error))
            self._late.add(late)
            late.add_done_callback(self._late.discard)
        if ended is End.LEASE:
            self._drop(attempt)
        else:
            self._fail(attempt, task, message, error)

    def lose(self, attempt: Attempt) -> None:
        """Its lease is lost: somebody else has the task by now, and what this handler does counts no more."""
        self.end(attempt, End.LEASE)

    def requeue(self, attempt: Attempt) -> None:
        """Back to the head of its queue; also for a task that was claimed and never began."""
        if not attempt.settled:
            self._stats.requeued += 1
            self._settled(attempt, Requeue(attempt.lease))

    def _settled(self, attempt: Attempt, outcome: Outcome) -> None:
        attempt.settled = True
        self._put(attempt, outcome)

    def _drop(self, attempt: Attempt) -> None:
        attempt.settled = True
        self._stats.lost += 1
        self._holdings.discard(attempt)


def deadline_unix(message: TaskMessage, now_ns: int) -> float:
    """When the attempt must be over: the earlier of timeout and deadline; 30 minutes where a message has neither.

    Source:
        hibiken/asynq 0.26, processor.go: computeDeadline
    """
    now = now_ns / 1e9
    by_timeout = now + message.timeout if message.timeout > 0 else math.inf
    by_deadline = float(message.deadline) if message.deadline > 0 else math.inf
    earlier = min(by_timeout, by_deadline)
    if earlier is math.inf or earlier == math.inf:
        logger.error("task %s has neither timeout nor deadline; %d s hold", message.id, DEFAULT_TIMEOUT)
        return now + DEFAULT_TIMEOUT
    return min(earlier, _LATEST_UNIX)


def _end_error(reason: End, cause: BaseException | None) -> BaseException:
    error = LeaseExpiredError() if reason is End.LEASE else TaskCancelledError(reason.value)
    error.__cause__ = cause if not isinstance(cause, asyncio.CancelledError) else None
    return error
