"""Concurrent enqueue calls share round trips: an outbox per queue, one call to Redis in flight for each.

No timer. An idle outbox sends in the same turn of the event loop; what comes while a call is in flight waits for the
next one, and then leaves in calls of at most 500 tasks or 1 MiB, in the order in which it came.

Invariants:
    One call in flight per client and queue, with a number that rises: so Redis needs to remember only the last one, and
    knows a repeat (and a first copy that comes late) by its number. A call of which anything was sent is never split,
    joined or renumbered.
    A child of the client's own makes the call, never a caller: a caller that is cancelled takes only its own tasks out,
    and only those that have not been taken for a call.
    Nothing an outbox waits for lies in another queue: what is full or down elsewhere does not stop it.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import uuid
from collections import deque
from contextvars import Context
from typing import TYPE_CHECKING, Final

from asynq_aio._broker.enqueue import CALL_BYTES, CALL_TASKS, Entry, enqueue, register
from asynq_aio.errors import AsynqError, BrokerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from typing import Any

    from asynq_aio._broker.store import Store

__all__ = ["Item", "Outbox", "Outboxes", "Ticket"]

logger = logging.getLogger("asynq_aio")

WAITING_TASKS: Final = 10_000
"""Tasks that may wait in all outboxes of a client together."""

WAITING_BYTES: Final = 64 << 20
"""Bytes of payload that may wait."""

REGISTER_SECONDS: Final = 60.0
"""How often a queue in use is made known again: somebody may have deleted it meanwhile."""

REGISTER_AGAIN_SECONDS: Final = 5.0
"""The same, after a failure."""

PATIENCE_SECONDS: Final = 1.0
"""How long a queue's first tasks wait for what goes ahead of them, and `aclose` for what goes beside."""

OUTBOXES_KEPT: Final = 1_000
"""Beyond it, outboxes of queues that are not in use are dropped."""

_PARTS_OF_DEADLINE: Final = 16
"""Callers whose deadline is nearer than this part of it leave together: an outage is to be no storm of short calls."""


class Ticket:
    """What one call of `enqueue` or `enqueue_many` waits for.

    `left` counts its tasks without a verdict, and 1 while more may come. `errors` has the place and the error of each
    task that was refused; a place without one is enqueued.
    """

    __slots__ = ("done", "errors", "left", "outages")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.errors: dict[int, BaseException] = {}
        self.outages: dict[str, BrokerUnavailableError] = {}
        """By queue: the error with which this call has met an outage already."""
        self.left = 1

    def settle(self) -> None:
        """One less to wait for."""
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


class Item:
    """One task in an outbox; `since` is when its caller came, by the loop's clock."""

    __slots__ = ("entry", "gone", "place", "since", "size", "taken", "ticket")

    def __init__(self, entry: Entry, size: int, since: float, ticket: Ticket, place: int) -> None:
        self.entry = entry
        self.size = size
        self.since = since
        self.ticket = ticket
        self.place = place
        self.taken = False
        self.gone = False

    def settle(self, queue: str, error: BaseException | None) -> None:
        """Its verdict is there."""
        ticket = self.ticket
        if error is not None:
            ticket.errors[self.place] = error
            if isinstance(error, BrokerUnavailableError):
                ticket.outages[queue] = error
        ticket.settle()


class Outboxes:
    """All outboxes of one client in one process, and the room that they share."""

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop) -> None:
        self.store = store
        self.loop = loop
        self.client_id = uuid.uuid4().hex  # of the operating system's randomness: never the same on two sides of a fork
        self.numbers = itertools.count(1)
        self.senders: set[asyncio.Task[None]] = set()
        self.beside: set[asyncio.Task[None]] = set()
        """Children whose success nobody depends on."""
        self.clock = self.spawn(store.ready())
        self.tasks = 0
        self.bytes = 0
        self.crowded: dict[Outbox, None] = {}
        """Those at which callers wait for room, in the order in which they became so."""
        self._of: dict[str, Outbox] = {}

    def of(self, queue: str) -> Outbox:
        """The outbox of this queue."""
        found = self._of.get(queue)
        if found is None:
            if len(self._of) >= OUTBOXES_KEPT:
                self._drop_idle()
            found = self._of[queue] = Outbox(queue, self)
        return found

    def _drop_idle(self) -> None:
        now = self.loop.time()
        for queue in [queue for queue, outbox in self._of.items() if outbox.is_idle and outbox.register_at <= now]:
            del self._of[queue]

    def admit(self) -> None:
        """There is room again: let in who waits for it, one of each queue at a time."""
        crowded = list(self.crowded)
        while crowded:
            crowded = [outbox for outbox in crowded if outbox.admit_next()]

    async def clock_is_known(self) -> None:
        """Wait until our clock has been compared with Redis'; where that fails or hangs, ours is believed."""
        if not self.clock.done():
            await asyncio.wait((self.clock,), timeout=PATIENCE_SECONDS)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A child whose success nobody depends on. Its context is empty: it belongs to no caller's trace."""
        child = self.loop.create_task(work, context=Context())
        self.beside.add(child)
        child.add_done_callback(self.beside.discard)
        return child

    async def aclose(self) -> None:
        """Wait until the calls in flight have ended; what hangs beside them is given up."""
        while self.senders:
            await asyncio.wait(self.senders)
        if self.beside:
            _, hanging = await asyncio.wait(self.beside, timeout=PATIENCE_SECONDS)
            for child in hanging:
                child.cancel()
            if hanging:
                await asyncio.wait(hanging)


class Outbox:
    """The tasks of one client that wait for one queue, and the child that sends them."""

    def __init__(self, queue: str, owner: Outboxes) -> None:
        self.queue = queue
        self.waiting: deque[Item] = deque()
        self.tasks = 0
        """Tasks that wait here or have been promised room."""
        self.bytes = 0
        self.callers: deque[tuple[asyncio.Future[None], int, float]] = deque()
        """Who waits for room, and who was let in a moment ago: (turn, bytes wanted, since)."""
        self.register_at = float("-inf")
        self._owner = owner
        self._sender: asyncio.Task[None] | None = None
        self._registration: asyncio.Task[None] | None = None
        self._known = False
        self._warned = False

    @property
    def is_idle(self) -> bool:
        """Nothing is here and nothing goes on."""
        return not (self.tasks or self.callers or self._sender or self._registration)

    # -- room

    def reserve(self, size: int) -> bool:
        """Take room for one task of `size` bytes; False: wait for a `turn`."""
        return not self.callers and self._reserve(size)

    def _reserve(self, size: int) -> bool:
        owner = self._owner
        if (
            (owner.tasks < WAITING_TASKS and owner.bytes + size <= WAITING_BYTES)
            or not self.tasks  # however large it is, and however full the others are
            or (self.tasks < CALL_TASKS and self.bytes + size <= CALL_BYTES)
        ):
            owner.tasks += 1
            owner.bytes += size
            self.tasks += 1
            self.bytes += size
            return True
        return False

    def release(self, size: int) -> None:
        """Give back the room of one task."""
        self._release(size)
        if self._owner.crowded:
            self._owner.admit()

    def _release(self, size: int) -> None:
        owner = self._owner
        owner.tasks -= 1
        owner.bytes -= size
        self.tasks -= 1
        self.bytes -= size

    async def turn(self, size: int, since: float) -> None:
        """Wait for room, in the order in which the callers came; it is reserved then.

        Raises:
            BrokerUnavailableError: what is ahead could not be sent until the caller's deadline.
        """
        waiter: asyncio.Future[None] = self._owner.loop.create_future()
        caller = (waiter, size, since)
        self.callers.append(caller)
        self._owner.crowded[self] = None
        try:
            await waiter
        except BaseException:
            self._leave_line(caller)
            if not waiter.cancelled() and waiter.exception() is None:  # let in, and cancelled before it came to run
                self._release(size)
            self._owner.admit()
            raise
        # Until here the caller stood in line, or one who came later could have passed it between its turn and now.
        self._leave_line(caller)

    def _leave_line(self, caller: tuple[asyncio.Future[None], int, float]) -> None:
        self.callers.remove(caller)
        if not self.callers:
            self._owner.crowded.pop(self, None)

    def admit_next(self) -> bool:
        """Let in the first caller that waits; False where nobody waits, or there is no room."""
        for waiter, size, _ in self.callers:
            if not waiter.done():
                if not self._reserve(size):
                    return False
                waiter.set_result(None)
                return True
        return False

    # -- what callers do

    def put(self, item: Item) -> None:
        """Send this with the next call; its room is reserved."""
        item.ticket.left += 1
        self.waiting.append(item)
        if self._sender is None:
            owner = self._owner
            self._sender = owner.loop.create_task(self._send(), context=Context())
            owner.senders.add(self._sender)

    def withdraw(self, item: Item) -> None:
        """Its caller has left; a task that has been taken for a call stays in it."""
        if not item.taken and not item.gone:
            item.gone = True
            self.release(item.size)

    # -- the child that sends

    async def _send(self) -> None:
        batch: list[Item] = []
        try:
            while batch := self._take():
                await self._prepare()
                await self._deliver(batch)
        except asyncio.CancelledError:  # only when the event loop itself comes to its end
            for item in self.waiting:
                self.withdraw(item)
            for item in (*batch, *self.waiting):
                item.ticket.done.cancel()
            raise
        finally:
            if self._sender is not None:
                self._owner.senders.discard(self._sender)
                self._sender = None

    def _take(self) -> list[Item]:
        """The next call's tasks."""
        batch: list[Item] = []
        size = 0
        waiting = self.waiting
        while waiting and len(batch) < CALL_TASKS:
            item = waiting[0]
            if not item.gone:
                size += len(item.entry.encoded)
                if size > CALL_BYTES and batch:
                    break
                item.taken = True
                self._release(item.size)
                batch.append(item)
            waiting.popleft()
        if self._owner.crowded:
            self._owner.admit()
        return batch

    async def _deliver(self, batch: list[Item]) -> None:
        """Make this call, and repeat it as long as somebody waits for it.

        Every caller waits until its own deadline. So the nearest one bounds the call; who has reached it leaves with
        the error, and for the others the same call is made again.
        """
        owner = self._owner
        store, loop = owner.store, owner.loop
        entries = [item.entry for item in batch]
        number = next(owner.numbers)
        shortest = store.deadline / _PARTS_OF_DEADLINE
        present = batch
        sent = False
        while present:
            waited = loop.time() - min(item.since for item in present)
            # None spares the store a timer for each call, and is exact enough for those who have just come.
            deadline = None if waited < shortest else max(shortest, store.deadline - waited)
            try:
                verdicts = await enqueue(
                    store,
                    self.queue,
                    entries,
                    client_id=owner.client_id,
                    number=number,
                    deadline=deadline,
                )
            except BrokerUnavailableError as exc:
                sent = sent or exc.sent
                over = loop.time() - store.deadline + shortest
                self._fail([item for item in present if item.since <= over], exc, sent=sent)
                self._expire(over, exc)
                present = [item for item in present if item.since > over]
                if not sent:  # Redis has not seen this call: what is left of it may go with others
                    self._put_back(present)
                    return
            except Exception as exc:  # noqa: BLE001  (refused by Redis, or a fault of ours: the callers are told)
                self._fail(present, exc)
                return
            else:
                gone = set(batch).difference(present)
                for item, verdict in zip(batch, verdicts, strict=True):
                    if item not in gone:
                        item.settle(self.queue, verdict)
                return

    def _fail(self, items: Sequence[Item], error: Exception, *, sent: bool = False) -> None:
        for item in items:
            item.settle(self.queue, _copy(error, sent=sent) if len(items) > 1 else _as(error, sent=sent))

    def _expire(self, over: float, error: BrokerUnavailableError) -> None:
        """Those who wait behind a call that could not be made, and came before `over`, wait no longer."""
        expired = [item for item in self.waiting if not item.gone and item.since <= over]
        for item in expired:
            item.gone = True
            self._release(item.size)
        self._fail(expired, error)
        for waiter, _, since in self.callers:
            if since <= over and not waiter.done():
                waiter.set_exception(_copy(error, sent=False))

    def _put_back(self, items: Sequence[Item]) -> None:
        for item in reversed(items):
            if not item.ticket.done.done():
                item.taken = False
                self.tasks += 1
                self.bytes += item.size
                self._owner.tasks += 1
                self._owner.bytes += item.size
                self.waiting.appendleft(item)

    # -- registration

    async def _prepare(self) -> None:
        """Ahead of the first tasks: know Redis' clock, and make the queue known. Later the latter goes beside them.

        Neither decides about the tasks: both may hang at another node than theirs.
        """
        owner = self._owner
        ahead: list[asyncio.Task[None]] = []
        if not owner.clock.done():
            ahead.append(owner.clock)
        if owner.loop.time() >= self.register_at and self._registration is None:
            self._registration = owner.spawn(self._make_known())
            if not self._known:
                ahead.append(self._registration)
        if ahead:
            await asyncio.wait(ahead, timeout=PATIENCE_SECONDS)

    async def _make_known(self) -> None:
        loop = self._owner.loop
        try:
            await register(self._owner.store, self.queue)
        except AsynqError as exc:
            self.register_at = loop.time() + REGISTER_AGAIN_SECONDS
            logger.log(
                logging.DEBUG if self._warned else logging.WARNING,
                "queue %r could not be registered, so that no list of queues may show it; its tasks are enqueued all"
                " the same, and it is tried again with later ones: %s",
                self.queue,
                exc,
            )
            self._warned = True
        else:
            self._known = True
            self._warned = False
            self.register_at = loop.time() + REGISTER_SECONDS
        finally:
            self._registration = None


def _as(error: Exception, *, sent: bool) -> Exception:
    """The error as it is, unless an earlier try had sent something."""
    return _copy(error, sent=sent) if isinstance(error, BrokerUnavailableError) and error.sent != sent else error


def _copy(error: Exception, *, sent: bool) -> Exception:
    """One of its own for each caller: raising one object in many places mixes up their tracebacks."""
    if isinstance(error, BrokerUnavailableError):
        mine: Exception = BrokerUnavailableError(str(error), sent=sent)
    else:
        mine = copy.copy(error)
    mine.__cause__ = error
    return mine
