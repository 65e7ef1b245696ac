"""Which node owns a slot: the only file that knows standalone, Sentinel and Cluster apart.

A map from slots to the addresses of masters: one entry for a single server, 16,384 in a cluster. MOVED corrects one
entry; a refresh asks a node and replaces the map in one step. A refresh is single flight, uses a connection of its own,
asks the nodes under suspicion last, and backs off while it learns nothing new. It never raises to a caller and never
closes a lane: a call that is in flight elsewhere has nothing to do with it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from asynq_aio._broker.lanes import dial
from asynq_aio._config import join_address
from asynq_aio._wire.keys import slot as slot_of
from asynq_aio.errors import AsynqError, BrokerAuthError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from redis.asyncio.connection import AbstractConnection
    from redis.exceptions import MovedError

    from asynq_aio._broker.connect import ConnectionSettings
    from asynq_aio._config import Address

__all__ = ["Topology", "auth_error", "cause_text", "is_refusal", "node_name"]

_log = logging.getLogger("asynq_aio.broker")

SLOTS: Final = 16_384

_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 1.0

_ANSWER_SECONDS: Final = 2.0
"""A node that has not told its map by then is left for the next one."""


class Topology:
    """The owner of each slot, as far as it is known."""

    def __init__(self, settings: ConnectionSettings, on_change: Callable[[], None]) -> None:
        self.refreshes = 0
        """How often a map was asked for."""
        self.trouble: Exception = ConnectionError("no node has been asked yet")
        """Why the last refresh learnt nothing; an AsynqError if no later one can do better."""
        self._settings = settings
        self._on_change = on_change
        self.is_cluster = settings.kind == "cluster"
        self._owners: list[Address | None] = [None] * (SLOTS if self.is_cluster else 1)
        self._masters: tuple[Address, ...] = ()
        self._replicas: tuple[Address, ...] = ()
        self._suspects: set[Address] = set()
        self._refreshing: asyncio.Task[None] | None = None
        self._closed = False
        self._pause = 0.0
        self._last_pass = -math.inf
        if settings.kind == "standalone":
            self._owners[0] = settings.seeds[0]
            self._masters = tuple(settings.seeds)

    @property
    def masters(self) -> tuple[Address, ...]:
        """Every known owner of a slot."""
        return self._masters

    def owner(self, key: str | bytes) -> Address | None:
        """The node to ask for this key; None: nobody knows yet."""
        return self._owners[slot_of(key)] if self.is_cluster else self._owners[0]

    def any_master(self, avoid: Address | None = None) -> Address | None:
        """Some node, a trusted one and not `avoid` where there is a choice; None: nobody knows yet."""
        good = [address for address in self._masters if address not in self._suspects and address != avoid]
        choice = good or self._masters
        return random.choice(choice) if choice else None

    def resolve(self, error: MovedError | Any, answered: Address) -> Address:
        """The address that a MOVED or ASK reply points at; without a host it is that of the node that answered."""
        host = str(error.host)
        return self._settings.remap(answered[0] if host in {"", "?"} else host, int(error.port))

    def moved(self, error: MovedError, answered: Address) -> None:
        """Believe a MOVED reply for its one slot; a node that is new here means that more has changed.

        Raises:
            ConfigError: these are the settings of a single server, and it is a node of a cluster.
        """
        if not self.is_cluster:
            raise ConfigError(_not_single(self._settings, answered))
        address = self.resolve(error, answered)
        self._owners[error.slot_id] = address
        if address not in self._masters:
            self._masters = (*self._masters, address)
            self.refresh()

    def suspect(self, address: Address) -> None:
        """Ask this node last."""
        self._suspects.add(address)

    def trust(self, address: Address) -> None:
        """It has answered."""
        self._suspects.discard(address)

    async def refreshed(self) -> None:
        """Wait for a refresh, the one under way or a new one. Never raises; a caller that leaves does not stop it."""
        self.refresh()
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])  # which, unlike a shield, does not raise when that one is stopped

    def refresh(self) -> None:
        """Ask for the map, unless somebody does already, or it cannot change."""
        if self._closed or self._settings.kind == "standalone":
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh(), name="topology refresh")

    async def aclose(self) -> None:
        """Stop a refresh that is under way; there is none after this one."""
        self._closed = True
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        quiet = loop.time() - self._last_pass
        if quiet < self._pause:
            await asyncio.sleep(self._pause - quiet)
        elif quiet > 2 * _LONGEST_PAUSE_SECONDS:
            self._pause = 0.0
        self.refreshes += 1
        news = False
        try:
            if self.is_cluster:
                news = await self._ask_around()
            else:
                news = self._replace([await self._settings.discover_master()], ())
        except Exception as exc:  # noqa: BLE001  (a refresh never raises; who finds no owner raises this)
            self.trouble = auth_error(exc, self._settings.seeds[0]) if is_refusal(exc) else exc.with_traceback(None)
            _log.debug("%s: no news of the topology: %s", self._settings.description, exc)
        finally:
            self._last_pass = loop.time()
        self._pause = 0.0 if news else min(_LONGEST_PAUSE_SECONDS, max(_FIRST_PAUSE_SECONDS, self._pause * 2))

    async def _ask_around(self) -> bool:
        """Ask one node after another, until one tells a map; whether it is a new one."""
        trouble: Exception = ConnectionError("no node is known")
        for address in self._candidates():
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    reply = await self._ask(address)
                owners, replicas = self._read_map(reply, address)
            except (RedisError, OSError, RuntimeError) as exc:
                self._suspects.add(address)
                refusal = _refusal(exc, address)
                # What forbids every further try is worth more than what a later one might mend.
                if refusal is not None or not isinstance(trouble, AsynqError):
                    trouble = refusal or RedisConnectionError(cause_text(exc, address))
                continue
            self._suspects.discard(address)
            if any(owners):
                self.trouble = ConnectionError("no node owns the slot")
                return self._replace(owners, replicas)
            trouble = ConnectionError(f"{node_name(address)} knows no owner of any slot")
        raise trouble

    def _candidates(self) -> list[Address]:
        known = list(self._masters) + list(self._replicas)
        random.shuffle(known)
        every = dict.fromkeys([*known, *self._settings.seeds])
        return sorted(every, key=self._suspects.__contains__)

    async def _ask(self, address: Address) -> Any:
        connection: AbstractConnection = await dial(self._settings, address)
        try:
            await connection.send_command("CLUSTER", "SLOTS", check_health=False)
            return await connection.read_response(timeout=math.inf, disconnect_on_error=False)
        finally:
            await connection.disconnect(nowait=True)

    def _read_map(self, reply: Any, answered: Address) -> tuple[list[Address | None], set[Address]]:
        """From CLUSTER SLOTS: [first, last, [host, port, id ...] of the master, the same of each replica] per range."""
        owners: list[Address | None] = [None] * SLOTS
        replicas: set[Address] = set()
        for first, last, *nodes in reply:
            addresses = [self._announced(node, answered) for node in nodes]
            owners[first : last + 1] = [addresses[0]] * (last - first + 1)
            replicas.update(addresses[1:])
        return owners, replicas

    def _announced(self, node: Sequence[Any], answered: Address) -> Address:
        host = (node[0] or b"").decode()
        return self._settings.remap(answered[0] if host in {"", "?"} else host, int(node[1]))

    def _replace(self, owners: Sequence[Address | None], replicas: set[Address] | tuple[()]) -> bool:
        if owners == self._owners:
            return False
        self._owners = list(owners)
        self._masters = tuple(dict.fromkeys(address for address in owners if address is not None))
        self._replicas = tuple(replicas)
        self._on_change()
        return True


def _refusal(exc: Exception, address: Address) -> AsynqError | None:
    """The error to end with at once, where asking again is of no use."""
    match exc:
        case _ if is_refusal(exc):
            return auth_error(exc, address)
        case ResponseError() if "cluster support disabled" in str(exc):
            return ConfigError(
                f"{node_name(address)} is a single Redis server, not a node of a cluster: "
                "expected RedisClientOpt, or a URI that begins with redis://"
            )
    return None


def is_refusal(exc: BaseException) -> bool:
    """Whether Redis wants another user or password, or will not let this one do that."""
    return isinstance(exc, (AuthenticationError, AuthorizationError, NoPermissionError))


def auth_error(exc: Exception, address: Address) -> BrokerAuthError:
    """What Redis said, and what to do about it."""
    code = getattr(exc, "status_code", None) or ""
    if isinstance(exc, NoPermissionError):
        hint = "grant this user the command and the keys and channels asynq:* (ACL SETUSER)"
    elif code == "NOAUTH":
        hint = "give a password, and a user name if it is not 'default', in the connection option or the URI"
    else:
        hint = "check the user name and the password in the connection option or the URI"
    return BrokerAuthError(
        f"Redis at {node_name(address)} refused access: {code} {exc}".replace(":  ", ": ") + f"; {hint}"
    )


def _not_single(settings: ConnectionSettings, address: Address) -> str:
    given = "RedisFailoverClientOpt" if settings.kind == "sentinel" else "RedisClientOpt"
    return (
        f"{node_name(address)} is a node of a Redis Cluster, but the settings are those of a single server ({given}): "
        "expected RedisClusterClientOpt, or a URI that begins with redis-cluster://"
    )


def cause_text(cause: Exception, address: Address | None) -> str:
    """The cause in words, with the node in front."""
    text = str(cause) or type(cause).__name__
    refused = cause.__context__
    if isinstance(refused, ConnectionError) and refused.errno:
        text = os.strerror(refused.errno)  # asyncio's own text is "Connect call failed (...)"
    node = "" if address is None else node_name(address)
    return text if node in text else f"{node}: {text}"


def node_name(address: Address) -> str:
    """The address for people: `host:port`, or the path of a Unix socket."""
    host, port = address
    return join_address(host, port) if port else host
