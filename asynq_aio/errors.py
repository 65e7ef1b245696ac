"""Every exception of asynq_aio.

    AsynqError
    ├── ConfigError                  a setting, option or address cannot be right
    ├── InvalidTaskError             this task cannot be enqueued
    ├── PayloadError                 the payload is not what the handler asked for
    ├── WireError                    bytes that no asynq program writes, or text that none can read
    │   ├── MessageDecodeError
    │   └── MessageEncodeError
    ├── AlreadyExistsError
    │   ├── DuplicateTaskError       the unique lock is held
    │   └── TaskIDConflictError      the ID is taken
    ├── NotFoundError
    │   ├── QueueNotFoundError
    │   └── TaskNotFoundError
    ├── PreconditionError
    │   ├── QueueNotEmptyError
    │   ├── QueueActiveError
    │   ├── QueuePausedError
    │   └── TaskStateError
    ├── EnqueueManyError             some tasks of a batch were refused
    ├── HandlerNotFoundError         no handler for this type
    ├── LeaseExpiredError            the task belongs to somebody else by now
    ├── TaskCancelledError           the attempt is over: cancelled, or past its deadline
    ├── ServerStateError
    │   └── ServerClosedError
    └── BrokerError                  Redis said no, or nothing
        ├── BrokerUnavailableError   out of reach until the deadline
        ├── BrokerAuthError          wrong password, unknown user, or not permitted
        ├── BrokerFullError          `maxmemory` is reached
        ├── NotReplicatedError       written, but on too few replicas
        └── OutcomeUnknownError      sent, and the reply was lost

`SkipRetry` and `RevokeTask` are verdicts of a handler, not errors; they stand outside the tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynq_aio._task import TaskInfo

__all__ = [
    "AlreadyExistsError",
    "AsynqError",
    "BrokerAuthError",
    "BrokerError",
    "BrokerFullError",
    "BrokerUnavailableError",
    "ConfigError",
    "DuplicateTaskError",
    "EnqueueManyError",
    "HandlerNotFoundError",
    "InvalidTaskError",
    "LeaseExpiredError",
    "MessageDecodeError",
    "MessageEncodeError",
    "NotFoundError",
    "NotReplicatedError",
    "OutcomeUnknownError",
    "PayloadError",
    "PreconditionError",
    "QueueActiveError",
    "QueueNotEmptyError",
    "QueueNotFoundError",
    "QueuePausedError",
    "RevokeTask",
    "ServerClosedError",
    "ServerStateError",
    "SkipRetry",
    "TaskCancelledError",
    "TaskIDConflictError",
    "TaskNotFoundError",
    "TaskStateError",
    "WireError",
]


class AsynqError(Exception):
    """Anything that asynq_aio reports."""


class ConfigError(AsynqError, ValueError):
    """A setting, an option or an address that cannot be right; raised before any I/O."""


class InvalidTaskError(AsynqError, ValueError):
    """A task that cannot be enqueued: blank type, blank ID, wrong header."""


class PayloadError(AsynqError, ValueError):
    """The payload is not what the handler asked for; names the key, what was wanted and what was found."""

    def __init__(self, key: str | None, wanted: str, found: str) -> None:
        super().__init__(key, wanted, found)  # args = the facts, so the error survives pickling
        self.key, self.wanted, self.found = key, wanted, found

    def __str__(self) -> str:
        where = "payload" if self.key is None else f"payload key {self.key!r}"
        return f"{where}: wanted {self.wanted}, found {self.found}"


class WireError(AsynqError):
    """What stands in Redis, or should go there, breaks the wire contract."""


class MessageDecodeError(WireError):
    """Bytes that are no message of this kind."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return f"cannot decode {self.kind}: {self.reason}"


class MessageEncodeError(WireError, ValueError):
    """A value that no message can carry, such as a lone surrogate in a text field."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason

    def __str__(self) -> str:
        return f"cannot encode {self.kind}: {self.reason}"


class AlreadyExistsError(AsynqError):
    """The task is there already."""


class DuplicateTaskError(AlreadyExistsError):
    """The unique lock is held; `holder_id` is the ID of the task that holds it."""

    def __init__(self, unique_key: str, holder_id: str | None) -> None:
        super().__init__(unique_key, holder_id)
        self.unique_key, self.holder_id = unique_key, holder_id

    def __str__(self) -> str:
        return f"task already exists: {self.unique_key} is held by task {self.holder_id}"


class TaskIDConflictError(AlreadyExistsError):
    """The ID is taken by a task in any state, archived and completed ones included."""

    def __init__(self, queue: str, task_id: str) -> None:
        super().__init__(queue, task_id)
        self.queue, self.task_id = queue, task_id

    def __str__(self) -> str:
        return f"task ID conflicts with another task: {self.task_id!r} in queue {self.queue!r}"


class NotFoundError(AsynqError, LookupError):
    """There is no such thing."""


class QueueNotFoundError(NotFoundError):
    """No queue of this name."""

    def __init__(self, queue: str) -> None:
        super().__init__(queue)
        self.queue = queue

    def __str__(self) -> str:
        return f"queue not found: {self.queue!r}"


class TaskNotFoundError(NotFoundError):
    """No task with this ID in this queue."""

    def __init__(self, queue: str, task_id: str) -> None:
        super().__init__(queue, task_id)
        self.queue, self.task_id = queue, task_id

    def __str__(self) -> str:
        return f"task not found: {self.task_id!r} in queue {self.queue!r}"


class PreconditionError(AsynqError):
    """The queue or task is not in a state that allows this."""


class QueueNotEmptyError(PreconditionError):
    """The queue still has tasks."""

    def __init__(self, queue: str) -> None:
        super().__init__(queue)
        self.queue = queue

    def __str__(self) -> str:
        return f"queue is not empty: {self.queue!r}"


class QueueActiveError(PreconditionError):
    """Tasks of this queue are being worked on."""

    def __init__(self, queue: str) -> None:
        super().__init__(queue)
        self.queue = queue

    def __str__(self) -> str:
        return f"cannot remove queue with active tasks: {self.queue!r}"


class QueuePausedError(PreconditionError):
    """The queue is paused already, or is not paused."""

    def __init__(self, queue: str, *, paused: bool) -> None:
        super().__init__(queue)
        self.queue, self.paused = queue, paused

    def __str__(self) -> str:
        return f"queue {self.queue!r} is {'already' if self.paused else 'not'} paused"

    def __reduce__(self) -> tuple[object, ...]:
        return _queue_paused, (self.queue, self.paused)


def _queue_paused(queue: str, paused: bool) -> QueuePausedError:  # noqa: FBT001  (pickle passes by position)
    return QueuePausedError(queue, paused=paused)


class TaskStateError(PreconditionError):
    """The task is in `state`; the operation wants it in `wanted`."""

    def __init__(self, task_id: str, state: str, wanted: str) -> None:
        super().__init__(task_id, state, wanted)
        self.task_id, self.state, self.wanted = task_id, state, wanted

    def __str__(self) -> str:
        return f"task {self.task_id!r} is {self.state}; wanted: {self.wanted}"


class EnqueueManyError(AsynqError):
    """Some tasks of a batch were refused; the others are enqueued.

    `results` has one entry for each task, in order: a TaskInfo, or the error of that task.
    """

    def __init__(self, results: Sequence[TaskInfo | AsynqError]) -> None:
        super().__init__(results)
        self.results = list(results)

    @property
    def errors(self) -> list[AsynqError]:
        """The errors alone, in order."""
        return [result for result in self.results if isinstance(result, AsynqError)]

    def __str__(self) -> str:
        errors = self.errors
        first = f"; the first: {errors[0]}" if errors else ""
        return f"{len(errors)} of {len(self.results)} tasks were not enqueued{first}"


class HandlerNotFoundError(NotFoundError):
    """No handler is registered for this type."""

    def __init__(self, task_type: str) -> None:
        super().__init__(task_type)
        self.task_type = task_type

    def __str__(self) -> str:
        return f'handler not found for task "{self.task_type}"'  # wire.md 8.2: Go tools show this text


class LeaseExpiredError(AsynqError):
    """The lease of the task ran out; another server may work on it by now."""

    def __str__(self) -> str:
        return "asynq: task lease expired"  # wire.md 8.2


class TaskCancelledError(AsynqError):
    """The attempt is over: it was cancelled, or its deadline has passed."""


class ServerStateError(AsynqError):
    """The server is not in a state that allows this."""


class ServerClosedError(ServerStateError):
    """A server that was shut down does not start again; make a new one."""

    def __str__(self) -> str:
        return "asynq: Server closed"


class BrokerError(AsynqError):
    """Redis refused a command."""


class BrokerUnavailableError(BrokerError):
    """Redis was out of reach until the deadline; the text says what was in the way.

    `sent` tells whether anything had been sent: if not, nothing was changed.
    """

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent


class BrokerAuthError(BrokerError):
    """Wrong password, unknown user, or a command that this user is not permitted to run."""


class BrokerFullError(BrokerError):
    """Redis has reached `maxmemory`; nothing was written."""


class NotReplicatedError(BrokerError):
    """The task is enqueued, but fewer replicas than asked for have confirmed it."""

    def __init__(self, info: object, wanted: int, confirmed: int) -> None:
        super().__init__(info, wanted, confirmed)
        self.info, self.wanted, self.confirmed = info, wanted, confirmed

    def __str__(self) -> str:
        return f"enqueued, but only {self.confirmed} of {self.wanted} replicas have confirmed it"


class OutcomeUnknownError(BrokerError):
    """The command was sent and its reply was lost: it may have run, or not."""


class SkipRetry(Exception):  # noqa: N818  (a verdict, not an error)
    """Raise it, or chain from it, to archive the task at once."""

    def __str__(self) -> str:
        return super().__str__() or "skip retry for the task"  # wire.md 8.2


class RevokeTask(Exception):  # noqa: N818  (a verdict, not an error)
    """Raise it, or chain from it, to drop the task: neither retried nor archived nor kept."""

    def __str__(self) -> str:
        return super().__str__() or "revoke task"  # wire.md 8.2
