"""A server's settings: true defaults, checked once, before any I/O, with a text that says what to do."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from asynq_aio import AsyncServer, ConfigError
from asynq_aio._server.config import ServerConfig

URI = "redis://127.0.0.1:1"


def test_defaults() -> None:
    """As Go's, where people know them."""
    config = ServerConfig()
    assert config.queues == {"default": 1}
    assert config.shutdown_timeout == timedelta(seconds=8)
    assert config.health_check_interval == timedelta(seconds=15)
    assert config.delayed_task_check_interval == timedelta(seconds=5)
    assert config.task_check_interval == timedelta(seconds=1)
    assert config.janitor_interval == timedelta(seconds=8)
    assert config.janitor_batch_size == 100
    assert config.max_recoveries == 3
    assert not config.strict_priority
    assert config.is_failure(ValueError())


def test_a_list_of_queues() -> None:
    """Names alone have a weight of 1 each, in their order; the setting does not change with what was handed in."""
    names = ["b", "a"]
    config = ServerConfig(queues=names)  # type: ignore[arg-type]
    names.append("c")
    assert list(config.queues.items()) == [("b", 1), ("a", 1)]
    weights = {"b": 2}
    config = ServerConfig(queues=weights)
    weights["c"] = 1
    assert config.queues == {"b": 2}
    with pytest.raises(TypeError):
        config.queues["d"] = 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"concurrency": 0}, "concurrency=0: expected a whole number of at least 1"),
        ({"concurrency": True}, "concurrency=True: expected a whole number"),
        ({"concurrency": 1.5}, "concurrency=1.5: expected a whole number"),
        ({"sync_concurrency": 0}, "sync_concurrency=0"),
        ({"janitor_batch_size": 0}, "janitor_batch_size=0"),
        ({"max_recoveries": -1}, "max_recoveries=-1: expected a whole number of at least 0"),
        ({"shutdown_timeout": 8}, "shutdown_timeout=8: expected a timedelta, such as timedelta(seconds=5)"),
        ({"shutdown_timeout": timedelta(-1)}, "expected a timedelta of at least zero"),
        ({"janitor_interval": timedelta(0)}, "expected a timedelta above zero"),
        ({"health_check_interval": timedelta(-1)}, "health_check_interval="),
        ({"queues": {}}, "queues is empty: expected at least one queue"),
        ({"queues": "default"}, "expected a mapping such as"),
        ({"queues": 5}, "expected a mapping such as"),
        ({"queues": {" ": 1}}, "queue name must contain one or more characters, found ' '"),
        ({"queues": {5: 1}}, "queue name must contain one or more characters, found 5"),
        ({"queues": {"}x": 1}}, "would spread its keys over the cluster"),
        ({"queues": {"a": 0}}, "weight of 'a' is 0: expected a whole number of at least 1"),
        ({"queues": {"a": "high"}}, "weight of 'a' is 'high'"),
        ({"queues": {"a": True}}, "weight of 'a' is True"),
        ({"retry_delay": 60}, "retry_delay=60: expected a callable"),
        ({"is_failure": None}, "is_failure=None: expected a callable"),
        ({"on_error": "log"}, "on_error='log': expected a callable or None"),
        ({"lifespan": 1}, "lifespan=1: expected a callable or None"),
        ({"on_health_check": 1}, "on_health_check=1: expected a callable or None"),
    ],
)
def test_what_cannot_be_right(setting: dict[str, Any], says: str) -> None:
    """The error names field, value and bound."""
    with pytest.raises(ConfigError) as raised:
        ServerConfig(**setting)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "setting",
    [{"shutdown_timeout": timedelta(0)}, {"max_recoveries": 0}, {"queues": {"a}b": 1}}, {"concurrency": 10_000}],
)
def test_what_is_at_the_bound(setting: dict[str, Any]) -> None:
    """Bounds belong to what is allowed."""
    config = ServerConfig(**setting)
    assert {name: getattr(config, name) for name in setting} == setting


async def test_settings_of_a_server() -> None:
    """Given one by one, or as a ServerConfig, never both; nothing is sent to make a server."""
    assert AsyncServer(URI, concurrency=7, queues=["a"]).config == ServerConfig(concurrency=7, queues={"a": 1})
    config = ServerConfig(concurrency=3)
    assert AsyncServer(URI, config=config).config is config
    with pytest.raises(ConfigError, match="config= holds every setting; give concurrency there"):
        AsyncServer(URI, concurrency=7, config=config)
    with pytest.raises(ConfigError, match="concurrency=0"):
        AsyncServer(URI, concurrency=0)
