"""Names of keys, and their cluster slots."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynq_aio._task import TaskState
from asynq_aio._wire import keys
from tests.wire import vectors

QUEUES = vectors.load("keys.json")[:-1]
GLOBAL = vectors.load("keys.json")[-1]


def made(row: dict[str, Any]) -> dict[str, str]:
    """Our names for the roles of one row."""
    queue, group = row["queue"], row["group"]
    day = keys.day(datetime.fromisoformat(row["day"]).timestamp())
    return {
        "prefix": keys.prefix(queue),
        "task": keys.task(queue, row["task_id"]),
        "pending": keys.pending(queue),
        "active": keys.active(queue),
        "scheduled": keys.scheduled(queue),
        "retry": keys.retry(queue),
        "archived": keys.archived(queue),
        "lease": keys.lease(queue),
        "completed": keys.completed(queue),
        "paused": keys.paused(queue),
        "processed_total": keys.processed(queue),
        "failed_total": keys.failed(queue),
        "processed_day": keys.processed_on(queue, day),
        "failed_day": keys.failed_on(queue, day),
        "group": keys.group(queue, group),
        "aggregation_set": keys.aggregation_set(queue, group, row["set_id"]),
        "groups": keys.groups(queue),
        "aggregation_sets": keys.aggregation_sets(queue),
    }


@pytest.mark.parametrize("row", QUEUES, ids=lambda row: row["queue"])
def test_names_of_a_queue_are_go_s(row: dict[str, Any]) -> None:
    """Every role has Go's name, for queues that are hard on hash tags too; days are those of UTC."""
    assert made(row) == row["keys"]


def test_names_of_no_queue_are_go_s() -> None:
    """Global keys and the keys of a process have Go's names."""
    host, pid, server_id = GLOBAL["host"], GLOBAL["pid"], GLOBAL["server_id"]
    assert {
        "servers": keys.SERVERS,
        "workers": keys.WORKERS,
        "schedulers": keys.SCHEDULERS,
        "queues": keys.QUEUES,
        "cancel_channel": keys.CANCEL_CHANNEL,
        "server": keys.server(host, pid, server_id),
        "server_workers": keys.workers(host, pid, server_id),
        "scheduler_entries": keys.scheduler(GLOBAL["scheduler_id"]),
        "scheduler_history": keys.scheduler_history(GLOBAL["entry_id"]),
    } == GLOBAL["global"]
    assert keys.semaphore("scope") == "asynq:sema:scope"


@pytest.mark.parametrize("row", QUEUES, ids=lambda row: row["queue"])
def test_slots_are_those_of_redis(row: dict[str, Any]) -> None:
    """The slot is the one Redis answered; all keys share it unless the tag is empty."""
    assert keys.queue_slot(row["queue"]) == keys.slot(row["keys"]["pending"]) == row["pending_slot"]
    ours = [
        keys.enqueue_ledger(row["queue"], "client"),
        keys.fence(row["queue"], "server"),
        keys.ghost(row["queue"]),
        keys.unique(row["queue"], "t", None),
        *keys.tasks(row["queue"], ["a", "b"]),
    ]
    slots = {keys.slot(name) for name in [*row["keys"].values(), *ours]}
    assert (len(slots) == 1) is row["all_in_one_slot"]


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("asynq:queues", 3477),
        ("asynq:servers", 15197),
        ("asynq:workers", 7864),
        ("asynq:schedulers", 4669),
        ("123456789", 0x31C3),  # the check value of CRC-16/XMODEM
        ("asynq:{images}:pending", 9450),
        ("asynq:{webhooks}:pending", 4418),
        ("asynq:{notifications}:pending", 16340),
        (b"asynq:{default}:t:1", 5718),
        ("", 0),
    ],
)
def test_slots_of_single_keys(key: str | bytes, slot: int) -> None:
    """Keys with and without a tag, as text and as bytes."""
    assert keys.slot(key) == slot


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        ("a{}b", "a{}b"),  # an empty tag is none
        ("a{b", "a{b"),  # so is an open one
        ("}a{b}c", "{b}"),
        ("{{b}}c", "{{b}"),
        ("a{b}{c}", "{b}"),  # the first tag counts
        ("a{}{b}", "a{}{b}"),  # even if it is empty
    ],
)
def test_rules_of_the_hash_tag(key: str, hashed: str) -> None:
    """The tag is what stands between the first brace and the next closing one, unless that is nothing."""
    tag = hashed[1:-1] if hashed.startswith("{") else None
    whole = keys.slot(f"{{{tag}}}") if tag else keys.slot(hashed.replace("{", "").replace("}", ""))
    assert (keys.slot(key) == whole) is bool(tag)


@given(st.text(st.characters(exclude_characters="{}", codec="utf-8"), min_size=1), st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_all_keys_of_a_queue_share_a_slot(queue: str, task_id: str) -> None:
    """Whatever the name of the queue and the ID: one slot."""
    assert keys.slot(keys.task(queue, task_id)) == keys.queue_slot(queue) == keys.slot(f"{{{queue}}}")


UNIQUE = vectors.load("unique_keys.json")


@pytest.mark.parametrize("queue", sorted({row["queue"] for row in UNIQUE}))
def test_locks_are_go_s(queue: str) -> None:
    """Every lock has Go's name; no payload and an empty one have different locks."""
    rows = [row for row in UNIQUE if row["queue"] == queue]
    for row in rows:
        payload = None if row["payload_hex"] is None else bytes.fromhex(row["payload_hex"])
        assert keys.unique(queue, row["type"], payload) == row["unique_key"]
        assert row["unique_key"].startswith(keys.unique_prefix(queue))


@pytest.mark.parametrize(
    ("payload", "digest"),
    [
        (None, ""),
        (b"", "d41d8cd98f00b204e9800998ecf8427e"),
        (b"x", "9dd4e461268c8034f5c8564e155c67a6"),
    ],
)
def test_locks_of_the_contract(payload: bytes | None, digest: str) -> None:
    """The three locks that the wire contract spells out."""
    assert keys.unique("q", "ty", payload) == f"asynq:{{q}}:unique:ty:{digest}"


def test_the_container_of_a_state() -> None:
    """Six states have a container; the seventh has one for each group, and is refused as the unknown are."""
    for state in set(TaskState) - {TaskState.AGGREGATING}:
        assert keys.of_state("q", state) == f"asynq:{{q}}:{state.value}"
    for unfit in ("aggregating", "lease"):
        with pytest.raises(ValueError, match=f"no container for state '{unfit}'; expected one of active, archived"):
            keys.of_state("q", unfit)


def test_prefixes_are_what_the_names_begin_with() -> None:
    """Scripts put names together from the prefix and the rest."""
    assert keys.task("q", "id") == keys.task_prefix("q") + "id" == keys.prefix("q") + "t:id"
    assert keys.group("q", "g") == keys.group_prefix("q") + "g"
    assert keys.tasks("q", ["a", "b"]) == [keys.task("q", "a"), keys.task("q", "b")]
