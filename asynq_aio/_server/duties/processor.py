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
    from collections.abc import Coroutine
    from typing import Any

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
# A claim that has not been answered by then must not keep more slots from the other queues, seconds.
_LATE = 0.1
# A claim waits so long for a node that is away or a slot that moves, seconds: a lease that it writes is not older. Then
# the queue is asked without keeping slots, and the slots of a claim whose reply was lost are given to others, too.
_PATIENCE = 2.0
# What a lost claim took is worked on if it is found by then, seconds; nobody else can have taken it so soon.
FRESH_SECONDS = 10.0


class _Queue:
    """What the processor knows of one queue."""

    __slots__ = ("again", "asked", "claiming", "late", "name", "owed", "pause", "paused", "ready", "watch")

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
        self.late = False
        """The claim under way has not been answered in time: no slots are drawn for this queue meanwhile."""
        self.watch = asyncio.Event()
        """Set while the queue is not ready: the watcher waits for a task."""
        self.pause = 0.0
        """Seconds until the next peek, after one that woke us for nothing."""


class Processor:
    """Draws a queue for each free slot, claims for all drawn slots of a queue at once, hands the tasks to the executor.

    One claim is under way per queue; claims of different queues go side by side. A claim answers *tasks*, *empty*,
    *paused* or that the slot is moving; only *empty* lets the watcher block on the list. `pump` is the only place that
    gives slots away: it runs when a slot or a queue becomes free.

    Invariant: handlers, slots asked for and slots kept for lost claims are never more than the concurrency. A queue
    that cannot be reached keeps slots from the others for at most two seconds.
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
        self._open: dict[Claim, int] = {}
        """Claims under way, and lost ones that are not adopted yet -> slots kept for what a lost one took."""
        self._children: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        self._over = False
        self._failure: asyncio.Future[None] = self._loop.create_future()

    # -- life

    async def run(self) -> None:
        """Take tasks until cancelled or stopped; raises what a child died of."""
        self._taking = True
        for at, queue in enumerate(self._queues.values()):
            self._watcher(self._poll(queue) if at >= _MOST_WAITERS else self._watch(queue))
        try:
            self.pump()
            await asyncio.shield(self._failure)
        finally:
            self._taking = False
            self._over = True
            for watcher in self._watchers:
                watcher.cancel()
            await asyncio.gather(*self._watchers, return_exceptions=True)

    def stop(self) -> None:
        """Take no more tasks; those that run go on."""
        self._taking = False

    async def until_idle(self) -> None:
        """Wait until there is nothing to do: every queue empty or paused, nothing running, all written."""
        while True:
            while not self._idle():
                self._changed.clear()
                await self._changed.wait()
            # What the last handlers have enqueued may not have come to the watchers yet.
            waiting = [queue for queue in self._queues.values() if not queue.paused and await self._has_tasks(queue)]
            if not waiting and self._idle():
                return
            for queue in waiting:
                self._ready(queue)

    async def _has_tasks(self, queue: _Queue) -> bool:
        name = keys.pending(queue.name)
        while True:
            try:
                return bool(await self._store.call("EXISTS", name, key=name))
            except BrokerUnavailableError as exc:
                logger.warning("queue %s: it is not known whether it is empty: %s", queue.name, exc)
            except BrokerError as exc:
                logger.error("queue %s: it is not known whether it is empty: %s", queue.name, exc)  # noqa: TRY400
                return False

    def _idle(self) -> bool:
        if self._executor.running or self._syncer.unwritten or self._open:
            return False
        return all(
            not queue.claiming and (queue.paused or not (queue.ready or queue.again)) for queue in self._queues.values()
        )

    async def drain(self, seconds: float, *, patience: float) -> None:
        """Let the running handlers end, at most so long; then cancel them, and their tasks go back to the queue.

        Meanwhile claims come home; `patience`: how long to look for what a lost one took, seconds.
        """
        self._taking = False
        coming = self._loop.create_task(self._bring_claims_home(patience))
        try:
            try:
                async with asyncio.timeout(seconds):
                    while self._executor.running:
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                await self._abort()
            await coming
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def _abort(self) -> None:
        running = [attempt for attempt in self._holdings if attempt.child is not None]
        logger.warning("shutdown timeout: %d handlers are cancelled, their tasks go back to the queue", len(running))
        for attempt in reversed(running):  # the one that began first is pushed last, and taken first
            self._executor.end(attempt, End.SHUTDOWN)
        children = [attempt.child for attempt in running if attempt.child is not None]
        if children:
            await asyncio.wait(children, timeout=_CLEANUP)
        for attempt in reversed(running):
            if attempt.child is None:
                continue
            # asyncio.run() would wait for it, for ever; here all has been tried.
            asyncio.tasks._unregister_task(attempt.child)  # noqa: SLF001  (described for those who extend asyncio)
            if not attempt.settled:
                logger.error(
                    "task %r of queue %s: its handler ignores its cancellation; the task goes back all the same",
                    attempt.lease.task_id,
                    attempt.lease.queue,
                )
                self._executor.requeue(attempt)

    async def _bring_claims_home(self, patience: float) -> None:
        """No claim may stay under way: what it takes would belong to a server that is gone."""
        claiming = [queue.claiming for queue in self._queues.values() if queue.claiming]
        if claiming:
            _, late = await asyncio.wait(claiming, timeout=min(_PATIENCE + 0.5, patience))
            for child in late:
                child.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        adoptions = list(self._children)
        if self._open and adoptions:
            _, late = await asyncio.wait(adoptions, timeout=patience)
            for child in late:
                child.cancel()
            await asyncio.gather(*late, return_exceptions=True)
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
        free = self._free()
        queues = self._queues.values()
        ready = [queue.name for queue in queues if queue.ready and not queue.late]
        if free > 0 and ready:
            drawn = {ready[0]: free} if self._weighted is None else self._weighted.draw(ready, free)
            for name, slots in drawn.items():
                self._queues[name].owed += slots
        for queue in queues:
            if queue.owed and queue.claiming is None:
                if queue.ready:
                    queue.asked, queue.owed = queue.owed, 0
                    queue.claiming = self._child(self._claim(queue, queue.asked))
                else:
                    queue.owed = 0  # empty after all: its slots are drawn again
                    self.freed()

    def _free(self) -> int:
        """Slots that nobody has, and that are kept for nobody."""
        given = sum(queue.asked + queue.owed for queue in self._queues.values()) + sum(self._open.values())
        return self._config.concurrency - self._executor.running - given

    # -- claims

    async def _claim(self, queue: _Queue, n: int) -> None:
        self._claims_sent += 1
        claim = dequeue.new_claim(self._store, queue.name, self._server, self._claims_sent)
        sent = self._store.clock.monotonic()
        self._open[claim] = 0
        lost = False
        late = self._loop.call_later(_LATE, self._late, queue)
        try:
            status, tasks = await dequeue.claim(self._store, claim, n, deadline=_PATIENCE)
        except OutcomeUnknownError:
            lost = True
        except BrokerUnavailableError:  # nothing was sent
            del self._open[claim]
            self._reach_later(queue)
        except BrokerError as exc:
            del self._open[claim]
            logger.error("queue %s: cannot take tasks: %s", queue.name, exc)  # noqa: TRY400
            self._again(queue, jittered(5.0))
        except asyncio.CancelledError:
            lost = True
            raise
        else:
            del self._open[claim]
            self._took(queue, claim, sent, n, status, tasks)
        finally:
            late.cancel()
            queue.claiming = None
            queue.late = False
            queue.asked = 0
            if lost:
                self._open[claim] = n
                self._reach_later(queue)
                self._child(self._adopt(claim, sent))
            self.freed()

    def _late(self, queue: _Queue) -> None:
        """Other queues may have what was drawn for this one."""
        queue.late = True
        queue.owed = 0
        self.freed()

    def _took(self, queue: _Queue, claim: Claim, sent: float, n: int, status: Status, tasks: list[Claimed]) -> None:
        queue.paused = status == "paused"
        if status == "tasks":
            queue.pause = 0.0
            self._begin(claim, tasks, sent, n)
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

    def _begin(self, claim: Claim, tasks: list[Claimed], sent: float, room: int) -> None:
        """Start as many of them as there is room for; the rest, and all where no more are taken, go back."""
        if not self._taking:
            room = 0
        for task in reversed(tasks[room:]):  # the oldest is pushed last, and taken first
            self._executor.requeue(self._executor.hold(claim, task.task_id, sent))
        if room:
            self._executor.start(claim, tasks[:room], sent)

    async def _adopt(self, claim: Claim, sent: float) -> None:
        """Find out what a claim took whose reply was lost; never gives up while the server lives."""
        pause = 0.0
        letting_go = self._loop.call_later(_PATIENCE, self._let_go, claim)
        try:
            while True:
                try:
                    whole, tasks = await dequeue.adopt(self._store, claim)
                except BrokerError as exc:
                    logger.warning("queue %s: what claim %d took is not known yet: %s", claim.queue, claim.number, exc)
                    whole, tasks = False, []
                fresh = [task for task in reversed(tasks) if not self._holds(claim, task)]
                if fresh:
                    logger.info(
                        "queue %s: the reply to a claim was lost; its %d tasks are found", claim.queue, len(fresh)
                    )
                    self._open[claim] = 0  # the slots kept for them are free now
                    # An old lease may be another's any moment: the script that gives the task back asks whose it is.
                    old = self._store.clock.monotonic() - sent > FRESH_SECONDS
                    self._begin(claim, fresh, sent, 0 if old else max(0, self._free()))
                if whole:
                    break
                pause = min(max(0.02, pause * 2), _LONGEST_PAUSE)
                await asyncio.sleep(jittered(pause))
        finally:
            letting_go.cancel()
        del self._open[claim]
        self.freed()

    def _let_go(self, claim: Claim) -> None:
        """Nobody can tell what it took, and the queues that can be reached need the slots."""
        self._open[claim] = 0
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

    def _reach_later(self, queue: _Queue) -> None:
        """Not until a claim would be answered; meanwhile it keeps no slot from the others."""
        queue.ready, queue.again = False, True
        self._changed.set()
        if not self._over:
            self._watcher(self._reach(queue))

    async def _reach(self, queue: _Queue) -> None:
        while True:
            try:
                await dequeue.reach(self._store, queue.name, self._server)
            except BrokerError:  # the door has logged the outage
                await asyncio.sleep(jittered(_LONGEST_PAUSE))
            else:
                break
        self._ready(queue)

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

    def _child(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """It claims or adopts: it is brought home at the end."""
        child = self._loop.create_task(coroutine)
        self._children.add(child)
        child.add_done_callback(self._child_ended)
        return child

    def _watcher(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """It waits for a queue, and has no end of its own."""
        watcher = self._loop.create_task(coroutine)
        self._watchers.add(watcher)
        watcher.add_done_callback(self._child_ended)

    def _child_ended(self, child: asyncio.Task[None]) -> None:
        self._children.discard(child)
        self._watchers.discard(child)
        if child.cancelled():
            return
        error = child.exception()
        if error is None:
            return
        if self._over or self._failure.done():
            logger.critical("a child of the processor has died", exc_info=error)
        else:
            self._failure.set_exception(error)
