"""`SyncClient`: the same client for code that has no event loop."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import redis as redis_py

from asynq_aio import EnqueueManyError, SyncClient, Task, TaskIDConflictError, TaskInfo, TaskState
from asynq_aio._wire import keys
from tests.client.test_lifecycle import run_script
from tests.servers import Servers

ONE = pytest.mark.parametrize("topology", ["standalone-valkey9"], indirect=True)


def look(server: Servers) -> Any:
    """A synchronous client to look with."""
    if server.is_cluster:
        return redis_py.RedisCluster(host="127.0.0.1", port=server.ports[0], protocol=2)
    return redis_py.Redis(host="127.0.0.1", port=server.ports[0], protocol=2)


def test_all_methods(server: Servers, queue: str) -> None:
    """Options, results and errors are those of Client."""
    with SyncClient(server.uri) as client:
        client.ping()
        info = client.enqueue("t", {"a": 1}, queue=queue, task_id="x", max_retry=3)
        assert (info.id, info.max_retry, info.state) == ("x", 3, TaskState.PENDING)
        assert client.enqueue(Task("t", queue=queue), process_in=timedelta(hours=1)).state is TaskState.SCHEDULED
        with pytest.raises(TaskIDConflictError):
            client.enqueue("t", queue=queue, task_id="x")
        infos = client.enqueue_many((("t", n) for n in range(600)), queue=queue)
        assert len(infos) == 600
        with pytest.raises(EnqueueManyError):
            client.enqueue_many([Task("t", task_id="x")], queue=queue)
        mixed = client.enqueue_many([Task("t", task_id="x"), Task("t")], queue=queue, return_exceptions=True)
        assert [type(result) for result in mixed] == [TaskIDConflictError, TaskInfo]
    with look(server) as redis:
        assert redis.llen(keys.pending(queue)) == 602
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.enqueue("t")


@ONE
def test_threads_share_one(server: Servers, queue: str) -> None:
    """And all of them share one event loop, in one thread."""
    before = threading.active_count()
    with SyncClient(server.uri) as one, SyncClient(server.uri) as other, ThreadPoolExecutor(16) as threads:
        infos = list(threads.map(lambda n: (one, other)[n % 2].enqueue("t", n, queue=queue), range(400)))
        assert len({info.id for info in infos}) == 400
        assert threading.active_count() <= before + 16 + 1
    with look(server) as redis:
        assert redis.llen(keys.pending(queue)) == 400


@ONE
async def test_a_running_event_loop_is_not_stopped(server: Servers, queue: str) -> None:
    """There it refuses, and says what to use; in a thread beside the loop it works."""
    client = SyncClient(server.uri)
    with pytest.raises(RuntimeError, match="use Client there, or call it in another thread"):
        client.enqueue("t", queue=queue)
    info = await asyncio.to_thread(client.enqueue, "t", queue=queue)
    assert info.queue == queue
    await asyncio.to_thread(client.close)


@ONE
def test_it_survives_a_fork(server: Servers, queue: str) -> None:
    """The child gets a loop, a client id and connections of its own, and garbage is collected in peace there."""
    said = run_script(
        """
        import gc, os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of 3.12: fork() beside a thread is what this is about
        from asynq_aio import SyncClient

        uri, queue = sys.argv[1:]
        client = SyncClient(uri)
        client.enqueue("t", queue=queue, task_id="before")
        children = []
        for n in range(3):
            child = os.fork()
            if not child:
                client.enqueue("t", queue=queue, task_id=f"child-{n}")
                print(client._client._outboxes.client_id, flush=True)
                client.close()
                gc.collect()
                os._exit(0)
            children.append(child)
        client.enqueue("t", queue=queue, task_id="after")
        print(client._client._outboxes.client_id, flush=True)
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        client.close()
        """,
        server.uri,
        queue,
    )
    assert len(set(said)) == 4
    with look(server) as redis:
        ids = {task_id.decode() for task_id in redis.lrange(keys.pending(queue), 0, -1)}
    assert ids == {"before", "after", "child-0", "child-1", "child-2"}


@ONE
def test_the_end_of_the_process_closes_what_is_open(server: Servers, queue: str) -> None:
    """A script that never closes ends at once, without a warning; so does the child of its fork."""
    script = """
        import os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from asynq_aio import SyncClient

        uri, queue, forks = sys.argv[1:]
        client = SyncClient(uri)
        print(client.enqueue("t", queue=queue).queue, flush=True)
        if forks == "yes" and (child := os.fork()):
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    assert run_script(script, server.uri, queue, "no") == [queue]
    assert run_script(script, server.uri, queue, "yes") == [queue]


@ONE
def test_an_interrupt_leaves_no_caller_behind(server: Servers, queue: str) -> None:
    """Ctrl-C while Redis does not answer ends the wait at once; nobody is left in the loop who waits for the call."""
    said = run_script(
        """
        import os, signal, sys, threading
        from asynq_aio import SyncClient
        from asynq_aio._broker.store import Fault

        uri, queue = sys.argv[1:]
        with SyncClient(uri) as client:
            client.ping()
            store = client._client._door.store
            tried = threading.Event()
            def hook(name, keys):
                if name == "enqueue":
                    tried.set()
                    return Fault.NOT_SENT
            store.faults = hook
            threading.Thread(target=lambda: (tried.wait(), os.kill(os.getpid(), signal.SIGINT))).start()
            try:
                client.enqueue("t", queue=queue)
            except KeyboardInterrupt:
                print("interrupted")
            store.faults = None  # what had been taken for a call goes
        print(client._client._calls)
        """,
        server.uri,
        queue,
    )
    assert said == ["interrupted", "0"]
