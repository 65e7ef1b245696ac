"""What this server holds: the attempts it runs, and the leases it has to keep until Redis knows what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asynq_aio._server.execution import Attempt

__all__ = ["Holdings"]


class Holdings:
    """Every task that this server has taken and whose outcome is not final, by queue and ID.

    Invariant: a task enters with its claim and leaves when Redis has said *written* or *lost*, or at the server's end;
    so the heartbeater extends the lease of a finished task, too, while its outcome waits for Redis.
    """

    def __init__(self) -> None:
        self._by_queue: dict[str, dict[str | bytes, Attempt]] = {}

    def add(self, attempt: Attempt) -> None:
        """A task was claimed."""
        self._by_queue.setdefault(attempt.lease.queue, {})[attempt.lease.task_id] = attempt

    def discard(self, attempt: Attempt) -> None:
        """Its outcome is final."""
        held = self._by_queue.get(attempt.lease.queue)
        # Lost and claimed again by this very server, the ID stands for the newer attempt.
        if held is not None and held.get(attempt.lease.task_id) is attempt:
            del held[attempt.lease.task_id]

    def get(self, queue: str, task_id: str | bytes) -> Attempt | None:
        """The attempt at this task, if it is ours."""
        held = self._by_queue.get(queue)
        return held.get(task_id) if held else None

    def find(self, task_id: str) -> Iterator[Attempt]:
        """Attempts at tasks of this ID, of any queue: a cancellation names no queue."""
        for held in self._by_queue.values():
            attempt = held.get(task_id)
            if attempt is not None:
                yield attempt

    def by_queue(self) -> Iterator[tuple[str, list[Attempt]]]:
        """(queue, its attempts) of each queue that has any."""
        for queue, held in self._by_queue.items():
            if held:
                yield queue, list(held.values())

    def __len__(self) -> int:
        return sum(map(len, self._by_queue.values()))

    def __iter__(self) -> Iterator[Attempt]:
        for held in self._by_queue.values():
            yield from held.values()
