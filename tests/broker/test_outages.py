"""What becomes of many callers when a server, a connection, or a right goes away under them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import subprocess
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio.to_thread
import pytest
import uvloop
from redis.exceptions import ResponseError

from asynq_aio._broker.embedded import EmbeddedRedis
from asynq_aio._broker.store import Store
from asynq_aio._config import RedisClientOpt, TLSOptions
from asynq_aio.errors import (
    BrokerAuthError,
    BrokerError,
    BrokerFullError,
    BrokerUnavailableError,
    OutcomeUnknownError,
)
from tests.broker.own_server import free_port
from tests.broker.scenes import COUNT, ONCE, Crowd, all_given_back, lua, until
from tests.servers import MASTER_NAME, own_cluster, own_sentinel, own_standalone

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import SentinelGroup, Version

CALLERS = 64

both = pytest.mark.parametrize("version", ["valkey9", "redis7"])


def crowd_of(store: Store, tag: str = "{q}") -> Crowd:
    """Callers of a script that recognises its repeat."""

    async def call(caller: int, token: str) -> str:
        reply = await store.run(ONCE, [f"{tag}:{caller}"], [token])
        return str(reply[0].decode())

    return Crowd(CALLERS, call)


def done_at(server: EmbeddedRedis, tag: str = "{q}") -> set[str]:
    """Every token that was executed."""
    return {token for caller in range(CALLERS) for token in server.execute("HKEYS", f"{tag}:{caller}")}


def fails_over(group: SentinelGroup) -> bool:
    """Whether the sentinel begins a failover; it wants to have heard from the replica first."""
    try:
        group.sentinels[0].execute("SENTINEL", "FAILOVER", MASTER_NAME)
    except ResponseError as exc:
        assert "NOGOODSLAVE" in str(exc)  # noqa: PT017
        return False
    return True


@both
async def test_connections_that_are_killed_all_the_time(version: Version) -> None:
    """CLIENT KILL again and again: no error where the script recognises its repeat, and every call was done."""
    async with own_standalone(version) as server, Store(server.uri) as store:
        crowd = crowd_of(store)
        for _ in range(40):
            await crowd.more(CALLERS // 2)
            server.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await crowd.more(CALLERS)
        await crowd.stop()
        await all_given_back(store)
        assert store.stats.dials > 20
        crowd.assert_right()
        assert done_at(server) == set(crowd.done)


def certificate(home: Path) -> None:
    """A self-signed one for loopback."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command, *names], cwd=home, check=True, capture_output=True)


@pytest.mark.parametrize("uvloop_too", [False, True], ids=["asyncio", "uvloop"])
def test_tls_connections_that_are_killed_all_the_time(tmp_path: Path, uvloop_too: bool) -> None:
    """The same through TLS, with a password, on both loops."""

    async def scene() -> None:
        certificate(tmp_path)
        tls = {
            "tls-cert-file": f"{tmp_path}/cert.pem",
            "tls-key-file": f"{tmp_path}/key.pem",
            "tls-ca-cert-file": f"{tmp_path}/cert.pem",
            "tls-auth-clients": "no",
        }
        port = free_port()
        async with own_standalone("redis7", settings={"tls-port": str(port), "requirepass": "pw", **tls}) as server:
            trusted = TLSOptions(ca_file=f"{tmp_path}/cert.pem")
            async with Store(RedisClientOpt(f"127.0.0.1:{port}", password="pw", tls=trusted)) as store:
                crowd = crowd_of(store)
                for _ in range(10):
                    await crowd.more(CALLERS // 2)
                    server.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await crowd.more(CALLERS)
                await crowd.stop()
                await all_given_back(store)
                crowd.assert_right()
                assert done_at(server) == set(crowd.done)

    (uvloop.run if uvloop_too else asyncio.run)(scene())


async def test_a_unix_socket_and_ipv6_serve_as_well() -> None:
    """By the path of a socket, and by an address with colons."""
    server = EmbeddedRedis(unix_socket=True, settings={"bind": "127.0.0.1 ::1"})
    async with server:
        for addr in (str(server.unix_socket), f"[::1]:{server.port}"):
            async with Store(RedisClientOpt(addr)) as store:
                crowd = crowd_of(store)
                await crowd.more(CALLERS)
                server.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await crowd.more(CALLERS)
                await crowd.stop()
                crowd.assert_right()
                async with store.waiter("list") as waiter, await store.subscribe("channel") as subscription:
                    assert not await waiter.wait(0.01)
                    await store.call("PUBLISH", "channel", "x", key=None)
                    assert await anext(subscription) == ("channel", b"x")


async def test_a_reply_that_is_lost_is_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    """A script that does not recognise its repeat is never repeated: it ran once or not at all, the caller is told."""
    caplog.set_level(logging.WARNING, "asynq_aio")
    async with own_standalone() as server, Store(server.uri) as store:

        async def call(caller: int, token: str) -> str:
            reply = await store.run(COUNT, [f"{{q}}:{caller}"], [token], repeatable=False)
            return str(reply[0].decode())

        crowd = Crowd(CALLERS, call)
        while len(crowd.errors) < CALLERS:
            await crowd.more(CALLERS // 2)
            server.execute("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await crowd.stop()
        assert {type(exc) for exc in crowd.errors} == {OutcomeUnknownError}
        assert "it may have run, or not" in str(crowd.errors[0])
        counts = [server.execute("HGETALL", f"{{q}}:{caller}") for caller in range(CALLERS)]
        assert {times for flat in counts for times in flat[1::2]} == {"1"}
        assert {token for flat in counts for token in flat[::2]} >= set(crowd.done)
    assert caplog.messages == []  # a connection that is back at once is no outage


async def test_callers_that_leave_do_no_harm() -> None:
    """Cancelled at any moment: those who stay get their own replies, on the one connection that there was."""
    async with own_standalone() as server, Store(server.uri) as store:
        crowd = crowd_of(store)
        leaving = 0
        for turn in range(400):
            child = asyncio.create_task(store.run(ONCE, ["{q}:leaving"], [str(turn)]))
            for _ in range(random.randrange(6)):
                await asyncio.sleep(0)
            child.cancel()
            leaving += (await asyncio.gather(child, return_exceptions=True))[0] is not None
        await crowd.more(CALLERS)
        await crowd.stop()
        assert leaving == 400
        crowd.assert_right()
        await all_given_back(store)
        assert store.stats.dials == 1


@both
async def test_a_server_that_stands_still(version: Version, caplog: pytest.LogCaptureFixture) -> None:
    """SIGSTOP beyond the reply timeout, then SIGCONT: callers wait, nothing is done twice; one line each in the log."""
    caplog.set_level(logging.WARNING, "asynq_aio")
    async with own_standalone(version) as server:
        options = RedisClientOpt(server.addr, read_timeout=timedelta(seconds=1.5))
        async with Store(options) as store:
            crowd = crowd_of(store)
            await crowd.more(CALLERS)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                await until(lambda: store.stats.lost >= CALLERS)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await crowd.more(CALLERS)
            await crowd.stop()
            crowd.assert_right()
            await all_given_back(store)
            assert done_at(server) == set(crowd.done)
    assert [message.partition(": ")[2] for message in caplog.messages[:1]] == [
        f"{server.addr}: no reply for 1 s; calls wait for it, up to 30 s each"
    ]
    assert len(caplog.messages) == 2
    assert "calls are answered again" in caplog.messages[1]


async def test_a_node_that_stands_still_holds_up_nobody_else() -> None:
    """One master of three is stopped: calls to the others go on, calls to it end at their deadline and say so."""
    async with own_cluster(masters=3, replicas=0) as cluster, Store(cluster.uri) as store:
        tags = {cluster.owner(slot): tag for tag, slot in (("{a}", 15495), ("{b}", 3300), ("{c}", 7365))}
        assert len(tags) == 3
        (still, tag), *others = tags.items()
        for each in tags.values():
            await store.run(ONCE, [f"{each}:first"], ["x"])
        os.kill(still.pid, signal.SIGSTOP)
        try:
            waiting = asyncio.create_task(store.run(ONCE, [f"{tag}:k"], ["x"], deadline=3))
            crowds = [crowd_of(store, other) for _, other in others]
            for crowd in crowds:
                await crowd.more(10 * CALLERS)
                await crowd.stop()
                crowd.assert_right()
            with pytest.raises(BrokerUnavailableError, match="did not answer once within 3 s") as caught:
                await waiting
            assert caught.value.sent
        finally:
            os.kill(still.pid, signal.SIGCONT)
        assert await store.run(ONCE, [f"{tag}:k2"], ["x"]) == [b"x", 1]
        await all_given_back(store)


@both
async def test_a_master_dies_and_its_replica_takes_over(version: Version, caplog: pytest.LogCaptureFixture) -> None:
    """No error for anybody: callers wait for the new master."""
    caplog.set_level(logging.WARNING, "asynq_aio")
    own = own_cluster(masters=3, replicas=1, version=version, node_timeout_ms=2000)
    async with own as cluster, Store(cluster.uri) as store:
        crowd = crowd_of(store)
        await crowd.more(CALLERS)
        master = cluster.owner(11_958)  # of {q}
        replica = cluster.replicas_of(master)[0]
        master.kill()
        await crowd.more(CALLERS)
        await crowd.stop()
        crowd.assert_right()
        await all_given_back(store)
        assert cluster.owner(11_958) is replica
    assert len(caplog.messages) == 2, caplog.messages
    assert f"{master.addr}: " in caplog.messages[0]
    assert f"{master.addr} is replaced" in caplog.messages[1]


@both
async def test_sentinels_name_another_master(version: Version) -> None:
    """A failover by the sentinels: the old master answers READONLY, the new one is asked for; no error."""
    async with own_sentinel(sentinels=1, replicas=1, version=version) as group, Store(group.uri) as store:
        crowd = crowd_of(store)
        await crowd.more(CALLERS)
        old = group.master()
        await until(lambda: fails_over(group))
        await until(lambda: group.master() is not old)
        new = [("127.0.0.1", group.master().port)]
        await until(lambda: [lane.address for lane in store.lanes] == new)
        await crowd.more(CALLERS)
        await crowd.stop()
        crowd.assert_right()
        await all_given_back(store)
        assert [lane.address for lane in store.lanes] == new


@both
async def test_a_sentinel_master_dies(version: Version) -> None:
    """The master is killed: callers wait until the sentinels have another one."""
    async with own_sentinel(sentinels=1, replicas=1, version=version) as group, Store(group.uri) as store:
        crowd = crowd_of(store)
        await crowd.more(CALLERS)
        group.master().kill()
        await crowd.more(CALLERS)
        await crowd.stop()
        crowd.assert_right()
        await all_given_back(store)


@both
async def test_a_restart_with_data_to_load(version: Version) -> None:
    """LOADING on a live lane is no error: callers wait until the data is there, and it is all there."""
    # A server that loads looks at its clients every 1,024 commands.
    slow = {"key-load-delay": "50", "appendfsync": "always"}
    async with own_standalone(version, appendonly=True, settings=slow) as server, Store(server.uri) as store:
        server.execute("EVAL", "for n = 1, 30000 do redis.call('SET', n, n) end", 0)
        crowd = crowd_of(store)
        await crowd.more(CALLERS)
        seen: list[str] = []

        judge = store._judge

        def spy(attempts: object, outcome: Exception) -> float:
            seen.append(f"{getattr(outcome, 'status_code', None)}")
            return judge(attempts, outcome)  # type: ignore[arg-type]

        store._judge = spy  # type: ignore[method-assign]
        await anyio.to_thread.run_sync(server.restart)
        await crowd.more(CALLERS)
        await crowd.stop()
        crowd.assert_right()
        assert "LOADING" in seen
        await all_given_back(store)
        assert done_at(server) == set(crowd.done)


@both
async def test_access_that_is_taken_away(version: Version) -> None:
    """NOAUTH in mid-life is an error at once, which says what to do; once access is back, the next call succeeds."""
    async with own_standalone(version) as server, Store(server.uri) as store:
        await store.run(ONCE, ["{q}"], ["before"])
        server.execute("CONFIG", "SET", "requirepass", "secret")
        await store.call("RESET", key=None)  # the lane's connection is nobody's from now on
        calls = [store.run(ONCE, ["{q}"], [str(n)]) for n in range(CALLERS)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(exc) for exc in errors} == {BrokerAuthError}
        assert "NOAUTH" in str(errors[0])
        assert "give a password" in str(errors[0])
        server.execute("CONFIG", "SET", "requirepass", "")
        assert await store.run(ONCE, ["{q}"], ["after"]) == [b"after", 1]
        await all_given_back(store)
        assert server.execute("HKEYS", "{q}") == ["before", "after"]


async def test_a_wrong_password() -> None:
    """An error at once, that names neither the password nor a deadline."""
    async with own_standalone(settings={"requirepass": "right"}) as server:
        async with Store(RedisClientOpt(server.addr, password="wr0ng")) as store:
            with pytest.raises(BrokerAuthError, match="check the user name and the password") as caught:
                await store.ping()
            assert "wr0ng" not in str(caught.value)
        async with Store(RedisClientOpt(server.addr, password="right")) as store:
            await store.ping()


async def test_a_command_that_the_user_may_not_run() -> None:
    """NOPERM is an error at once and says what to grant; the connection stays."""
    async with own_standalone() as server:
        server.execute("ACL", "SETUSER", "shy", "on", ">pw", "~asynq:*", "&*", "+@all", "-lpush")
        async with Store(RedisClientOpt(server.addr, username="shy", password="pw")) as store:
            with pytest.raises(BrokerAuthError, match=r"NOPERM.*lpush.*ACL SETUSER"):
                await store.call("LPUSH", "asynq:{q}", "x", key="asynq:{q}")
            await store.ping()


@both
async def test_a_server_that_is_full(version: Version) -> None:
    """A first write that needs memory is refused at once and nothing is written; what frees memory still works."""
    async with own_standalone(version) as server, Store(server.uri) as store:
        await store.call("SET", "{q}", "x", key="{q}")
        server.execute("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(BrokerFullError, match="nothing was written"):
            await store.run(COUNT, ["{q}:new"], ["x"])
        drain = lua("drain", "redis.call('DEL', KEYS[1]); return redis.call('INCR', KEYS[1])")
        assert await store.run(drain, ["{q}"], []) == 1
        await all_given_back(store)


@both
async def test_scripts_that_are_forgotten(version: Version) -> None:
    """SCRIPT FLUSH in mid-life: the source is sent again, and each call still runs once."""
    async with own_standalone(version) as server, Store(server.uri) as store:

        async def call(caller: int, token: str) -> str:
            reply = await store.run(COUNT, [f"{{q}}:{caller}"], [token], repeatable=False)
            return str(reply[0].decode())

        crowd = Crowd(CALLERS, call)
        for _ in range(20):
            await crowd.more(CALLERS)
            server.execute("SCRIPT", "FLUSH")
        await crowd.stop()
        crowd.assert_right()
        counts = [server.execute("HGETALL", f"{{q}}:{caller}") for caller in range(CALLERS)]
        assert {times for flat in counts for times in flat[1::2]} == {"1"}
        assert store.stats.repeats >= 20


async def test_nobody_is_there() -> None:
    """An address that nobody listens at: after the deadline, an error with the cause, and that nothing was sent."""
    async with own_standalone() as server:
        pass
    async with Store(RedisClientOpt(server.addr, deadline=timedelta(seconds=0.4))) as store:
        with pytest.raises(BrokerUnavailableError, match=r"within 0\.4 s: .*refused.*; nothing was sent") as caught:
            await store.ping()
        assert not caught.value.sent


async def test_a_server_that_comes_late() -> None:
    """Who calls before the server is there waits for it."""
    async with own_standalone() as server:
        pass
    async with Store(server.uri) as store:
        early = asyncio.create_task(store.run(ONCE, ["{q}"], ["x"]))
        await until(lambda: store.stats.repeats > 3)
        async with own_standalone(port=server.port):
            assert await early == [b"x", 1]


@both
async def test_a_script_that_runs_too_long(version: Version) -> None:
    """BUSY is waited out: the script that is in the way ends."""
    async with own_standalone(version, settings={"busy-reply-threshold": "20"}) as server, Store(server.uri) as store:
        spin = lua("spin", "local n = 0; while n < 3e7 do n = n + 1 end; return n")
        async with Store(server.uri) as other:
            spinning = asyncio.create_task(other.run(spin, ["{q}"], []))
            await store.ping()
            crowd = crowd_of(store)
            await spinning
            await crowd.more(CALLERS)
            await crowd.stop()
        crowd.assert_right()


async def test_an_error_of_redis_is_ours() -> None:
    """No exception of redis-py leaves the store."""
    async with own_standalone() as server, Store(server.uri) as store:
        await store.call("SET", "{q}", "x", key="{q}")
        with pytest.raises(BrokerError, match="LPUSH: WRONGTYPE"):
            await store.call("LPUSH", "{q}", "x", key="{q}")
        with pytest.raises(BrokerError, match=r"fails: .*a reason"):
            await store.run(lua("fails", "return redis.error_reply('MINE a reason')"), ["{q}"], [])
        reply = await store.run(lua("inner", "return {1, redis.pcall('LPUSH', KEYS[1], 1)}"), ["{q}"], [])
        assert reply[0] == 1
        assert isinstance(reply[1], Exception)
