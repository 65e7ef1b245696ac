"""How a server works: one frozen dataclass, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from asynq_aio._backoff import default_retry_delay
from asynq_aio.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from contextlib import AbstractAsyncContextManager

    from asynq_aio._context import Context
    from asynq_aio._task import Task

    RetryDelay = Callable[[int, BaseException, Task], timedelta]
    ErrorHandler = Callable[[Context, Task, BaseException], Awaitable[None] | None]
    HealthCheck = Callable[[BaseException | None], Awaitable[None] | None]
    Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

__all__ = ["ServerConfig"]

_DEFAULT_CONCURRENCY = 100


def _no_failure_is_none(exc: BaseException) -> bool:  # noqa: ARG001  (the signature of is_failure)
    return True


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Everything about a server but its Redis and its handlers.

    Raises:
        ConfigError: a value is out of bounds; names the field, the value and the bound.
    """

    concurrency: int = _DEFAULT_CONCURRENCY
    """How many handlers run at once."""
    queues: Mapping[str, int] = field(default_factory=lambda: {"default": 1})
    """Queue -> weight; a list of names gives each the weight 1."""
    strict_priority: bool = False
    """Always the highest weight first, equal ones as listed; else weights are shares."""
    retry_delay: RetryDelay = default_retry_delay
    """(retried so far, error, task) -> how long to wait before the next attempt."""
    is_failure: Callable[[BaseException], bool] = _no_failure_is_none
    """False: the task is tried again without counting it as a failure."""
    on_error: ErrorHandler | None = None
    """Called with every error of a handler, before the task changes its state."""
    lifespan: Lifespan | None = None
    """Entered before the first task, left after the last; what it yields is `ctx.state`."""
    shutdown_timeout: timedelta = timedelta(seconds=8)
    """How long running handlers may go on at shutdown; then they are cancelled, their tasks go back to the queue."""
    on_health_check: HealthCheck | None = None
    """Called each `health_check_interval` with None, or with the error that Redis gave."""
    health_check_interval: timedelta = timedelta(seconds=15)
    delayed_task_check_interval: timedelta = timedelta(seconds=5)
    """At least this often the forwarder looks for due tasks: ours are announced, those of Go programs are not."""
    task_check_interval: timedelta = timedelta(seconds=1)
    """How often a queue is asked that has no waiter of its own: beyond 32 queues."""
    janitor_interval: timedelta = timedelta(seconds=8)
    janitor_batch_size: int = 100
    """How many expired tasks one call deletes."""
    sync_concurrency: int = 40
    """How many handlers that are no coroutines run at once, each on a thread."""
    max_recoveries: int = 3
    """How often a task may come back from a server that died on it; then it is archived."""

    def __post_init__(self) -> None:
        """Check every field."""
        _at_least("concurrency", self.concurrency, 1)
        _at_least("janitor_batch_size", self.janitor_batch_size, 1)
        _at_least("sync_concurrency", self.sync_concurrency, 1)
        _at_least("max_recoveries", self.max_recoveries, 0)
        _duration("shutdown_timeout", self.shutdown_timeout, zero=True)
        for name in ("health_check_interval", "delayed_task_check_interval", "task_check_interval", "janitor_interval"):
            _duration(name, getattr(self, name))
        object.__setattr__(self, "queues", MappingProxyType(_queues(self.queues)))
        for name in ("retry_delay", "is_failure"):
            if not callable(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a callable")
        for name in ("on_error", "lifespan", "on_health_check"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name}={value!r}: expected a callable or None")


def _at_least(name: str, value: object, bound: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < bound:
        raise ConfigError(f"{name}={value!r}: expected a whole number of at least {bound}")


def _duration(name: str, value: object, *, zero: bool = False) -> None:
    if not isinstance(value, timedelta):
        raise ConfigError(f"{name}={value!r}: expected a timedelta, such as timedelta(seconds=5)")
    if value < timedelta(0) or (not zero and not value):
        raise ConfigError(f"{name}={value!r}: expected a timedelta {'of at least' if zero else 'above'} zero")


def _queues(queues: object) -> dict[str, int]:
    if isinstance(queues, str) or not isinstance(queues, Mapping | Sequence):
        wanted = 'a mapping such as {"critical": 6, "default": 3}, or a list of names'
        raise ConfigError(f"queues={queues!r}: expected {wanted}")
    weights = dict(queues) if isinstance(queues, Mapping) else dict.fromkeys(queues, 1)
    if not weights:
        raise ConfigError("queues is empty: expected at least one queue to take tasks from")
    for name, weight in weights.items():
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"queues: queue name must contain one or more characters, found {name!r}")
        if name.startswith("}"):
            raise ConfigError(
                f"queues: {name!r} begins with '}}', which would spread its keys over the cluster; choose another name"
            )
        if not isinstance(weight, int) or isinstance(weight, bool) or weight < 1:
            raise ConfigError(f"queues: weight of {name!r} is {weight!r}: expected a whole number of at least 1")
    return weights
