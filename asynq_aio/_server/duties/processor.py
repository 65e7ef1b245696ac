"""Takes tasks out of pending, as many as there are free slots, and bounds the workers."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from asynq_aio._backoff import jittered
from asynq_aio._broker import dequeue
from asynq_aio._server.execution import End
from asynq_aio._server.priority import Weighted, strict_order
from asynq_aio._wire import keys
from asynq_aio.errors import BrokerError, BrokerUnavailableError, OutcomeUnknownError

if TYPE_CHECKING:
    from asynq_aio._broker.dequeue import Claim, Claimed, Status
    from asynq_aio._broker.store import Store
    from asynq_aio._broker.waits import Waiter
    from asynq_aio._server.config import ServerConfig
    from asynq_aio._server.duties.syncer import Syncer
    from asynq_aio._server.execution import Executor
    from asynq_aio._server.lease import Holdings

__all__ = ["Processor"]

logger = logging.getLogger("asynq_aio.server")

# A queue with a waiter of its own costs a connection; more queues than this are polled.
_MOST_WAITERS = 32
# A paused queue is looked at this often, seconds; a blocking peek would answer at once.
_PAUSED_LOOK = 2.0
# After a peek that woke us for nothing, others took the task: this long until the next one, seconds, doubling.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 0.5
# How long cancelled handlers may take to clean up at shutdown, seconds.
_CLEANUP = 2.0
# How long a claim that is under way at shutdown may take to come home, seconds; then it is adopted.
_CLAIM_HOME = 1.0


class _Queue:
    """What the processor knows of one queue."""

    __slots__ = ("again", "asked", "claiming", "name", "owed", "pause", "paused", "ready", "watch")

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = True
        """It may have tasks. If not, its watcher waits for one."""
        self.again = False
        """It is asked again after a while; nobody knows whether it has tasks."""
        self.paused = False
        self.asked = 0
        """Slots that the claim under way may fill."""
        self.owed = 0
        """Slots that were drawn for this queue while a claim was under way; the next claim asks for them."""
        self.claiming: asyncio.Task[None] | None = None
        self.watch = asyncio.Event()
        """Set while the queue is not ready: the watcher waits for a task."""
        self.pause = 0.0
        """Seconds until the next peek, after one that woke us for nothing."""


class Processor:
    """Draws a queue for each free slot, claims for all drawn slots of a queue at once, hands the tasks to the executor.

    One claim is under way per queue; claims of different queues go side by side. A claim answers *tasks*, *empty*,
    *paused* or that the slot is moving; only *empty* lets the watcher block on the list. `pump` is the only place that
    gives slots away: it runs when a slot or a queue becomes free, never on a timer.
    """

    def __init__(
        self, store: Store, config: ServerConfig, server: str, executor: Executor, syncer: Syncer, holdings: Holdings
    ) -> None:
        self._store = store
        self._config = config
        self._server = server
        self._executor = executor
        self._syncer = syncer
        self._holdings = holdings
        self._queues = {name: _Queue(name) for name in strict_order(config.queues)}
        self._weighted = None if config.strict_priority else Weighted(config.queues)
        self._loop = asyncio.get_running_loop()
        self._claims_sent = 0
        self._taking = False
        self._pumping = False
        self._changed = asyncio.Event()
        self._open: set[Claim] = set()
        """Claims under way, and those whose reply was lost and that nobody has adopted yet."""
        self._lost_slots = 0
        """Slots that the tasks of lost claims may need."""
        self._children: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = self._loop.create_future()

    # -- life

    async def run(self) -> None:
        """Take tasks until cancelled or stopped; raises what a child died of."""
        self._taking = True
        watchers = [
            self._child(self._poll(queue) if at >= _MOST_WAITERS else self._watch(queue))
            for at, queue in enumerate(self._queues.values())
        ]
        try:
            self.pump()
            await asyncio.shield(self._failure)
        finally:
            self._taking = False
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    def stop(self) -> None:
        """Take no more tasks; those that run go on."""
        self._taking = False

    async def until_idle(self) -> None:
        """Wait until there is nothing to do: every queue empty or paused, nothing running, all written."""
        while not self._idle():
            self._changed.clear()
            await self._changed.wait()

    def _idle(self) -> bool:
        if self._executor.running or self._syncer.unwritten or self._open:
            return False
        return all(
            not queue.claiming and (queue.paused or not (queue.ready or queue.again)) for queue in self._queues.values()
        )

    async def drain(self, seconds: float) -> None:
        """Let the running handlers end, at most so long; then cancel them, and their tasks go back to the queue."""
        self._taking = False
        await self._bring_claims_home()
        try:
            async with asyncio.timeout(seconds):
                while self._executor.running:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            await self._abort()

    async def _abort(self) -> None:
        running = [attempt for attempt in self._holdings if attempt.child is not None]
        logger.warning("shutdown timeout: %d handlers are cancelled, their tasks go back to the queue", len(running))
        for attempt in running:
            self._executor.end(attempt, End.SHUTDOWN)
        children = [attempt.child for attempt in running if attempt.child is not None]
        if children:
            await asyncio.wait(children, timeout=_CLEANUP)
        for attempt in reversed(running):  # the one that began first is pushed last, and taken first
            if attempt.child is not None and not attempt.settled:
                logger.error(
                    "task %r of queue %s: its handler ignores its cancellation; the task goes back all the same",
                    attempt.lease.task_id,
                    attempt.lease.queue,
                )
                self._executor.requeue(attempt)

    async def _bring_claims_home(self) -> None:
        """No claim may stay under way: what it takes would belong to a server that is gone."""
        claiming = [queue.claiming for queue in self._queues.values() if queue.claiming]
        if claiming:
            _, late = await asyncio.wait(claiming, timeout=_CLAIM_HOME)
            for child in late:
                child.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        adoptions = [child for child in self._children if not child.done()]
        if self._open and adoptions:
            await asyncio.wait(adoptions, timeout=self._store.deadline)
        for claim in self._open:
            logger.error("queue %s: what claim %d took is not known; its lease will run out", claim.queue, claim.number)

    # -- slots

    def freed(self) -> None:
        """A slot, a queue or room for outcomes has become free: look again in the next turn of the loop."""
        self._changed.set()
        if not self._pumping and self._taking:
            self._pumping = True
            self._loop.call_soon(self.pump)

    def pump(self) -> None:
        """Give every free slot to a queue that may have tasks."""
        self._pumping = False
        if not self._taking or not self._syncer.room:
            return
        queues = self._queues.values()
        given = sum(queue.asked + queue.owed for queue in queues) + self._lost_slots
        free = self._config.concurrency - self._executor.running - given
        if self._weighted is None:
            first = next((queue for queue in queues if queue.ready), None)
            if first is not None and free > 0:
                first.owed += free
        elif free > 0:
            ready = [queue.name for queue in queues if queue.ready]
            if ready:
                for name, slots in self._weighted.draw(ready, free).items():
                    self._queues[name].owed += slots
        for queue in queues:
            if queue.owed and queue.claiming is None:
                if queue.ready:
                    queue.asked, queue.owed = queue.owed, 0
                    queue.claiming = self._child(self._claim(queue, queue.asked))
                else:
                    queue.owed = 0  # empty after all: its slots are drawn again
                    self.freed()

    # -- claims

    async def _claim(self, queue: _Queue, n: int) -> None:
        self._claims_sent += 1
        claim = dequeue.new_claim(self._store, queue.name, self._server, self._claims_sent)
        sent = self._store.clock.monotonic()
        self._open.add(claim)
        lost = False
        try:
            status, tasks = await dequeue.claim(self._store, claim, n)
        except OutcomeUnknownError:
            lost = True
        except BrokerUnavailableError as exc:
            lost = exc.sent
            if not lost:
                self._open.discard(claim)
            self._again(queue, jittered(_LONGEST_PAUSE))
        except BrokerError as exc:
            self._open.discard(claim)
            logger.error("queue %s: cannot take tasks: %s", queue.name, exc)  # noqa: TRY400
            self._again(queue, jittered(5.0))
        except asyncio.CancelledError:
            lost = True
            raise
        else:
            self._open.discard(claim)
            self._took(queue, claim, sent, n, status, tasks)
        finally:
            queue.claiming = None
            queue.asked = 0
            if lost:
                self._lost_slots += n
                self._child(self._adopt(claim, n, sent))
            self.freed()

    def _took(self, queue: _Queue, claim: Claim, sent: float, n: int, status: Status, tasks: list[Claimed]) -> None:
        queue.paused = status == "paused"
        if status == "tasks":
            queue.pause = 0.0
            self._begin(claim, tasks, sent)
            full = sum(len(task.encoded) for task in tasks) >= dequeue.REPLY_BYTES // 2  # cut off by size, perhaps
            if len(tasks) < n and not full and tasks:
                self._empty(queue)
        elif status == "empty":
            queue.pause = min(max(_SHORTEST_PAUSE, queue.pause * 2), _LONGEST_PAUSE)
            self._empty(queue)
        elif status == "paused":
            self._again(queue, _PAUSED_LOOK)
        elif status == "tryagain":
            self._again(queue, jittered(0.05))

    def _begin(self, claim: Claim, tasks: list[Claimed], sent: float) -> None:
        if self._taking:
            self._executor.start(claim, tasks, sent)
            return
        for task in reversed(tasks):  # stopped meanwhile; the oldest is pushed last, and taken first
            self._executor.requeue(self._executor.hold(claim, task.task_id, sent))

    async def _adopt(self, claim: Claim, n: int, sent: float) -> None:
        """Find out what a claim took whose reply was lost; never gives up while the server lives."""
        pause = 0.0
        while True:
            try:
                whole, tasks = await dequeue.adopt(self._store, claim)
            except BrokerError as exc:
                logger.warning("queue %s: what claim %d took is not known yet: %s", claim.queue, claim.number, exc)
                whole, tasks = False, []
            fresh = [task for task in tasks if not self._holds(claim, task)]
            if fresh:
                logger.info("queue %s: the reply to a claim was lost; its %d tasks are found", claim.queue, len(fresh))
                self._begin(claim, fresh, sent)
            if whole:
                break
            pause = min(max(0.02, pause * 2), _LONGEST_PAUSE)
            await asyncio.sleep(jittered(pause))
        self._open.discard(claim)
        self._lost_slots -= n
        self.freed()

    def _holds(self, claim: Claim, task: Claimed) -> bool:
        try:
            task_id: str | bytes = task.task_id.decode()
        except UnicodeDecodeError:
            task_id = task.task_id
        attempt = self._holdings.get(claim.queue, task_id)
        return attempt is not None and attempt.lease.owner == claim.owner

    # -- wake-up

    def _empty(self, queue: _Queue) -> None:
        queue.ready = False
        queue.watch.set()
        self._changed.set()

    def _again(self, queue: _Queue, seconds: float) -> None:
        """Not now; ask this queue again after so many seconds."""
        queue.ready, queue.again = False, True
        self._changed.set()
        self._loop.call_later(seconds, self._ready, queue)

    def _ready(self, queue: _Queue) -> None:
        queue.ready, queue.again = True, False
        self.freed()

    async def _watch(self, queue: _Queue) -> None:
        """While the queue is empty, wait for a task without asking again and again."""
        waiter: Waiter = self._store.waiter(keys.pending(queue.name))
        try:
            while True:
                await queue.watch.wait()
                if queue.pause:
                    await asyncio.sleep(jittered(queue.pause))
                if await waiter.wait(10.0):
                    queue.watch.clear()
                    self._ready(queue)
        finally:
            await waiter.aclose()

    async def _poll(self, queue: _Queue) -> None:
        """The same for a queue that has no connection of its own."""
        seconds = self._config.task_check_interval.total_seconds()
        name = keys.pending(queue.name)
        while True:
            await queue.watch.wait()
            await asyncio.sleep(jittered(1.5 * seconds, 2 / 3))
            try:
                there = await self._store.call("EXISTS", name, key=name)
            except BrokerError:
                continue  # the door has logged the outage
            if there:
                queue.watch.clear()
                self._ready(queue)

    # -- children

    def _child(self, coroutine: object) -> asyncio.Task[None]:
        child: asyncio.Task[None] = self._loop.create_task(coroutine)  # type: ignore[arg-type]
        self._children.add(child)
        child.add_done_callback(self._child_ended)
        return child

    def _child_ended(self, child: asyncio.Task[None]) -> None:
        self._children.discard(child)
        if child.cancelled() or self._failure.done():
            return
        error = child.exception()
        if error is not None:
            self._failure.set_exception(error)
