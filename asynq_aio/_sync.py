"""`SyncClient`: the client for code without an event loop, such as Django views and scripts.

The same `Client` underneath, in an event loop that runs in a thread of its own: one for all SyncClients of the process.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Literal, TypeVar, overload

import anyio
from anyio.from_thread import BlockingPortal

from asynq_aio._client import Client

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from asynq_aio._broker.connect import RedisClient
    from asynq_aio._config import RedisConnOpt
    from asynq_aio._task import Task, TaskInfo, TaskOptions
    from asynq_aio.errors import AsynqError

__all__ = ["SyncClient"]

T = TypeVar("T")

_EXIT_SECONDS: Final = 5.0
"""How long the end of the process waits for the connections to be closed."""


class _Thread:
    """The process' event loop for synchronous callers, started when first needed.

    The portal is opened by the thread itself: `anyio.from_thread.start_blocking_portal` leaves a generator with the
    caller, which, collected in the child of a fork, would wait there for a thread that the child does not have.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._thread: threading.Thread | None = None
        self.clients: set[Client] = set()
        """Those that have been used and not been closed."""

    def portal(self) -> BlockingPortal:
        with self._lock:
            if self._portal is None:
                started: Future[BlockingPortal] = Future()
                self._thread = threading.Thread(target=self._run, args=(started,), name="asynq-aio", daemon=True)
                self._thread.start()
                self._portal = started.result()
                atexit.register(self._exit)
            return self._portal

    @staticmethod
    def _run(started: Future[BlockingPortal]) -> None:
        async def serve() -> None:
            async with BlockingPortal() as portal:
                started.set_result(portal)
                await portal.sleep_until_stopped()

        try:
            anyio.run(serve)
        except BaseException as exc:
            if started.done():
                raise
            started.set_exception(exc)

    def _exit(self) -> None:
        """Close what is still open. All threads but daemons have ended by now: nobody waits for a task any more."""
        portal, thread = self._portal, self._thread
        if portal is None or thread is None:
            return

        async def stop() -> None:
            with anyio.move_on_after(_EXIT_SECONDS):
                for client in list(self.clients):
                    await client.aclose()
            await portal.stop(cancel_remaining=True)

        portal.start_task_soon(stop)
        thread.join(2 * _EXIT_SECONDS)

    def after_fork(self) -> None:
        """In the child: the thread has stayed with the parent, and so has whoever held the lock."""
        atexit.unregister(self._exit)
        self._begin()


_thread: Final = _Thread()  # a process has one; there is no object that could own it
os.register_at_fork(after_in_child=_thread.after_fork)


class SyncClient:
    """Enqueues tasks from synchronous code. One object serves all threads; after a fork it goes on by itself.

    The methods are those of `Client`, with the same options and errors, and block until Redis has answered. In a thread
    whose event loop is running they refuse: they would stop it. An interrupted call (Ctrl-C) is cancelled.

        with SyncClient("redis://127.0.0.1:6379") as client:
            client.enqueue("email:welcome", {"user_id": 42})

    Raises:
        ConfigError: `redis` cannot be right.
    """

    __slots__ = ("_client",)

    def __init__(self, redis: RedisConnOpt | str | RedisClient | None = None) -> None:
        self._client = Client(redis)

    def __repr__(self) -> str:
        return f"<Sync{repr(self._client)[1:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @overload
    def enqueue(
        self, task: Task, /, *, headers: Mapping[str, str] | None = None, **options: Unpack[TaskOptions]
    ) -> TaskInfo: ...
    @overload
    def enqueue(
        self,
        type: str,
        /,
        payload: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> TaskInfo: ...
    def enqueue(
        self,
        task: Task | str,
        /,
        payload: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> TaskInfo:
        """As `Client.enqueue`."""
        call = functools.partial(self._client.enqueue, task, payload, headers=headers, **options)
        return self._call(call)

    @overload
    def enqueue_many(
        self,
        tasks: Iterable[Task | tuple[str, object]],
        *,
        return_exceptions: Literal[False] = False,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> list[TaskInfo]: ...
    @overload
    def enqueue_many(
        self,
        tasks: Iterable[Task | tuple[str, object]],
        *,
        return_exceptions: Literal[True],
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> list[TaskInfo | AsynqError]: ...
    def enqueue_many(
        self,
        tasks: Iterable[Task | tuple[str, object]],
        *,
        return_exceptions: bool = False,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> Sequence[TaskInfo | AsynqError]:
        """As `Client.enqueue_many`. The iterable is read in the caller's thread."""
        call = functools.partial(
            self._client.enqueue_many, list(tasks), return_exceptions=return_exceptions, headers=headers, **options
        )
        return self._call(call)

    def ping(self) -> None:
        """As `Client.ping`."""
        self._call(self._client.ping)

    def close(self) -> None:
        """As `Client.aclose`."""
        self._call(self._client.aclose)
        _thread.clients.discard(self._client)

    def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise RuntimeError(
                "SyncClient blocks, and the event loop of this thread is running: use Client there, or call it in"
                " another thread, by asyncio.to_thread for instance"
            )
        portal = _thread.portal()
        _thread.clients.add(self._client)
        future = portal.start_task_soon(call)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt, not an error of the call: that one has ended
            raise
