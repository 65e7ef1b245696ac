"""One connection for many calls, on a real server, stopped (SIGSTOP) where a test wants to see them in flight."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import hiredis
import pytest
import uvloop
from redis.exceptions import ResponseError

from asynq_aio._broker import lanes
from asynq_aio._broker.connect import settings_of
from asynq_aio._broker.lanes import MAX_BYTES, MAX_CALLS, Call, Lane, NotSent, ReplyLost, Watch, dial
from asynq_aio._broker.store import Store
from tests.broker.scenes import ONCE, Crowd, until
from tests.servers import own_standalone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from asynq_aio._broker.embedded import EmbeddedRedis

FAR = 1e9
"""A deadline that no test lives to see, in seconds of the loop's clock."""


def pack(*command: str | bytes | int) -> bytes:
    """As Redis reads it."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    """One for this file."""
    from asynq_aio._broker.embedded import EmbeddedRedis

    made = EmbeddedRedis()
    made.start()
    yield made
    go_on(made)
    made.stop()


def stop(server: EmbeddedRedis) -> None:
    """No replies from now on."""
    os.kill(server.pid, signal.SIGSTOP)


def go_on(server: EmbeddedRedis) -> None:
    """All that are due."""
    os.kill(server.pid, signal.SIGCONT)


class Ends(list[Exception | None]):
    """Why lanes ended, and which stalled."""

    def __init__(self) -> None:
        super().__init__()
        self.stalled: list[Lane] = []


@asynccontextmanager
async def open_lane(
    server: EmbeddedRedis, *, reply_timeout: float = 5.0, **options: Any
) -> AsyncIterator[tuple[Lane, Ends]]:
    """A lane to the server, and what it says when it ends."""
    settings = settings_of(server.uri)
    ends = Ends()
    watch = Watch(reply_timeout, ends.stalled.append)
    address = (server.host, server.port)
    lane = Lane(address, lambda: dial(settings, address), watch, lambda _, cause: ends.append(cause), **options)
    try:
        yield lane, ends
    finally:
        if server.running:
            go_on(server)
        lane.end(None)
        watch.stop()
        await asyncio.wait([lane.closed])


async def replies(calls: list[Call]) -> list[Any]:
    """In order; errors too."""
    return [await call.reply for call in calls]


async def test_calls_of_one_turn_share_a_write(server: EmbeddedRedis) -> None:
    """A thousand calls, a few reads by the server."""
    async with open_lane(server) as (lane, _):
        await lane.send(pack("PING"), FAR).reply
        before = int(server.execute("INFO", "stats").partition("total_reads_processed:")[2].split()[0])
        answers = await replies([lane.send(pack("ECHO", str(n)), FAR) for n in range(1000)])
        after = int(server.execute("INFO", "stats").partition("total_reads_processed:")[2].split()[0])
    assert answers == [str(n).encode() for n in range(1000)]
    assert after - before < 20


async def test_an_error_is_the_reply_of_its_own_call(server: EmbeddedRedis) -> None:
    """Errors, nil, arrays with errors in them: each goes to whoever asked."""
    async with open_lane(server) as (lane, ends):
        first, second, third, fourth = await replies(
            [lane.send(pack(*command), FAR) for command in (("NONSENSE",), ("GET", "no"), ("ECHO", "x"), ("INCR",))]
        )
        assert isinstance(first, ResponseError)
        assert (second, third) == (None, b"x")
        assert isinstance(fourth, ResponseError)
        assert ends == []


async def test_who_leaves_before_the_write_is_not_sent(server: EmbeddedRedis) -> None:
    """A call that is cancelled in the turn in which it was made is never sent; a later one's reply is eaten."""
    async with open_lane(server) as (lane, ends):
        await lane.send(pack("SET", "left", 0), FAR).reply
        early = lane.send(pack("INCR", "left"), FAR)
        early.reply.cancel()
        assert await lane.send(pack("GET", "left"), FAR).reply == b"0"
        assert not early.written
        late = lane.send(pack("INCR", "left"), FAR)
        await until(lambda: late.written)
        late.reply.cancel()
        assert await lane.send(pack("GET", "left"), FAR).reply == b"1"
        assert (lane.in_flight, ends) == ((0, 0), [])


async def test_calls_in_flight_are_bounded(server: EmbeddedRedis) -> None:
    """Calls beyond the bound wait unsent, and all are answered when room is made."""
    async with open_lane(server) as (lane, _):
        await lane.send(pack("PING"), FAR).reply
        stop(server)
        calls = [lane.send(pack("ECHO", n), FAR) for n in range(3 * MAX_CALLS)]
        await until(lambda: lane.in_flight[0] == MAX_CALLS)
        assert [call.written for call in calls] == [True] * MAX_CALLS + [False] * 2 * MAX_CALLS
        go_on(server)
        assert await replies(calls) == [str(n).encode() for n in range(3 * MAX_CALLS)]
        assert lane.in_flight == (0, 0)


async def test_bytes_in_flight_are_bounded(server: EmbeddedRedis) -> None:
    """The same by bytes; one call alone may be larger than the bound."""
    value = b"x" * 200_000
    async with open_lane(server) as (lane, _):
        await lane.send(pack("PING"), FAR).reply
        stop(server)
        calls = [lane.send(pack("SETEX", "b", 60, value), FAR) for _ in range(100)]
        await until(lambda: lane.in_flight[0] > 0)
        assert 1 < lane.in_flight[0] <= MAX_BYTES // len(value)
        huge = lane.send(pack("SETEX", "b", 60, b"x" * (MAX_BYTES + 1)), FAR)
        last = lane.send(pack("STRLEN", "b"), FAR)
        go_on(server)
        assert set(await replies([*calls, huge])) == {b"OK"}
        assert await last.reply == MAX_BYTES + 1


async def test_asking_is_a_reply_of_its_own(server: EmbeddedRedis) -> None:
    """ASKING and the command are adjacent, and only the command's reply is given."""
    async with open_lane(server) as (lane, _):
        calls = [lane.send(pack("ECHO", n), FAR, asking=n % 2 == 0) for n in range(10)]
        assert await replies(calls) == [str(n).encode() for n in range(10)]


async def test_an_end_settles_everything(server: EmbeddedRedis) -> None:
    """What was written may have run, what was not has not; the owner hears of it once."""
    async with open_lane(server) as (lane, ends):
        await lane.send(pack("PING"), FAR).reply
        stop(server)
        calls = [lane.send(pack("PING"), FAR) for _ in range(MAX_CALLS + 10)]
        await until(lambda: calls[0].written)
        lane.end(ValueError("enough"))
        lane.end(ValueError("twice"))
        go_on(server)
        outcomes = await replies(calls)
        assert [type(outcome) for outcome in outcomes] == [ReplyLost] * MAX_CALLS + [NotSent] * 10
        assert str(outcomes[0].args[0]) == "enough"
        assert [str(cause) for cause in ends] == ["enough"]
        assert not lane.busy


async def test_a_dial_that_fails_has_sent_nothing() -> None:
    """Every call that waited for the connection is NotSent, with the cause."""
    async with own_standalone() as gone:
        server = gone
    async with open_lane(server) as (lane, ends):
        outcomes = await replies([lane.send(pack("PING"), FAR) for _ in range(10)])
        assert {type(outcome) for outcome in outcomes} == {NotSent}
        assert len(ends) == 1
        assert not lane.connected


async def test_a_connection_that_the_server_closes(server: EmbeddedRedis) -> None:
    """An idle lane notices it too."""
    async with open_lane(server) as (lane, ends):
        client = await lane.send(pack("CLIENT", "ID"), FAR).reply
        server.execute("CLIENT", "KILL", "ID", client)
        await until(lambda: lane.ended)
        assert len(ends) == 1


async def test_retire_answers_first(server: EmbeddedRedis) -> None:
    """A lane that is not needed any more closes behind its last reply; an idle one at once."""
    async with open_lane(server) as (lane, ends):
        calls = [lane.send(pack("ECHO", n), FAR) for n in range(5000)]
        lane.retire()
        assert await replies(calls) == [str(n).encode() for n in range(5000)]
        await asyncio.wait([lane.closed])
        assert ends == [None]
    async with open_lane(server) as (lane, ends):
        await lane.send(pack("PING"), FAR).reply
        lane.retire()
        assert (lane.ended, ends) == (True, [None])


async def test_a_lane_without_replies_stalls_and_ends(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """First it is suspected, once; past the reply timeout it ends, and its calls are settled."""
    monkeypatch.setattr(lanes, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(lanes, "STALL_SECONDS", 0.05)
    async with open_lane(server, reply_timeout=0.2) as (lane, ends):
        await lane.send(pack("PING"), FAR).reply
        stop(server)
        calls = [lane.send(pack("PING"), FAR) for _ in range(3)]
        outcomes = await replies(calls)
        go_on(server)
        assert {type(outcome) for outcome in outcomes} == {ReplyLost}
        assert ends.stalled == [lane]
        assert [str(cause) for cause in ends] == ["no reply for 0.2 s"]


async def test_a_loop_that_stood_still_is_not_the_lanes_fault(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler blocks the loop for longer than the reply timeout: the replies lie there, and the lane lives."""
    monkeypatch.setattr(lanes, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(lanes, "STALL_SECONDS", 0.1)
    async with open_lane(server, reply_timeout=0.2) as (lane, ends):
        await lane.send(pack("PING"), FAR).reply
        for _ in range(3):
            call = lane.send(pack("ECHO", "x"), FAR)
            await until(lambda call=call: call.written)  # type: ignore[misc]
            time.sleep(0.4)  # the point of it
            assert await call.reply == b"x"
        assert (ends, ends.stalled) == ([], [])


async def test_a_call_past_its_deadline_is_settled(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reply is eaten when it comes, and the next call gets its own."""
    monkeypatch.setattr(lanes, "TICK_SECONDS", 0.01)
    async with open_lane(server) as (lane, ends):
        await lane.send(pack("PING"), FAR).reply
        stop(server)
        now = asyncio.get_running_loop().time()
        outcome = await lane.send(pack("ECHO", "late"), now + 0.03).reply
        assert isinstance(outcome, ReplyLost)
        following = lane.send(pack("ECHO", "next"), FAR)
        go_on(server)
        assert await following.reply == b"next"
        assert ends == []


def test_the_same_on_uvloop(server: EmbeddedRedis) -> None:
    """Connections killed and callers cancelled, on the loop that closes the connection of a cancelled sender."""

    async def scene() -> None:
        async with Store(server.uri) as store:

            async def call(caller: int, token: str) -> str:
                reply = await store.run(ONCE, [f"uv:{caller}"], [token])
                return str(reply[0].decode())

            crowd = Crowd(64, call)
            for turn in range(300):
                child = asyncio.create_task(store.run(ONCE, ["uv:leaving"], [str(turn), b"x" * 50_000]))
                for _ in range(random.randrange(6)):
                    await asyncio.sleep(0)
                child.cancel()
                await asyncio.gather(child, return_exceptions=True)
            assert store.stats.dials == 1
            for _ in range(20):
                await crowd.more(32)
                server.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await crowd.more(64)
            await crowd.stop()
            crowd.assert_right()

    uvloop.run(scene())
