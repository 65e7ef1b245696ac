"""Enqueue options: what they make of a task, what is refused, and their texts."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynq_aio._options import NewTask, compose, format_duration, option_texts, parse_option_text, quote
from asynq_aio._task import Task, TaskState
from asynq_aio._wire import codec, keys
from asynq_aio._wire.messages import TaskMessage
from asynq_aio.errors import ConfigError, InvalidTaskError
from tests.wire import vectors

NOW = 1_700_000_000_250_000_000
"""Unix nanoseconds, a quarter past a second."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
AT = EPOCH + timedelta(seconds=1_700_000_000, milliseconds=250)
"""NOW as a datetime."""
SECOND = 1_000_000_000


def made(options: Mapping[str, object] | None = None, task: Task | None = None) -> NewTask:
    """What enqueueing gives at NOW, with the ID `id`."""
    return compose(task or Task("t", b"p"), options or {}, NOW, new_id=lambda: "id")


# -- what a task becomes


def test_defaults_are_go_s() -> None:
    """Nothing asked for: queue `default`, 25 retries, 30 minutes, no lock, at once."""
    expected = TaskMessage(type="t", payload=b"p", id="id", queue="default", retry=25, timeout=1800)
    assert made() == NewTask(expected, TaskState.PENDING, 0, 0)


def test_every_option_arrives() -> None:
    """Each option stands in its field, in the unit of the wire."""
    new = made(
        {
            "max_retry": 3,
            "queue": "low",
            "task_id": "mine",
            "timeout": timedelta(seconds=30),
            "deadline_at": datetime(2030, 1, 5, 7, 8, 9, 999_999, tzinfo=UTC),
            "unique_for": timedelta(minutes=1),
            "process_in": timedelta(seconds=10),
            "retention": timedelta(hours=1),
            "group": "g",
            "headers": {"k": "v"},
        }
    )
    assert new.message == TaskMessage(
        type="t",
        payload=b"p",
        id="mine",
        queue="low",
        retry=3,
        timeout=30,
        deadline=1_893_827_289,
        unique_key=keys.unique("low", "t", b"p"),
        retention=3600,
        group_key="g",
        headers={"k": "v"},
    )
    assert (new.state, new.process_at_ns, new.unique_ttl) == (TaskState.SCHEDULED, NOW + 10 * SECOND, 70)


def test_messages_equal_go_s() -> None:
    """The golden messages that Go's client composed, composed here."""
    rows = {row["name"]: row for row in vectors.load("messages.json")}
    cases: dict[str, dict[str, object]] = {
        "task/enqueue-default": {},
        "task/enqueue-unique": {"unique_for": timedelta(minutes=1)},
        "task/enqueue-no-retry": {"max_retry": 0},
    }
    for name, options in cases.items():
        fields = rows[name]["fields"]
        task = Task(fields["type"], bytes.fromhex(fields["payload_hex"]))
        given_ids: dict[str, object] = {"queue": fields["queue"], "task_id": fields["id"]}
        assert codec.encode_task(made(given_ids | options, task).message).hex() == rows[name]["proto_hex"], name


def test_ids_are_random_uuids() -> None:
    """Without an ID a task gets a UUID of version 4 in Go's form, another each time."""
    ids = [compose(Task("t"), {}, NOW).message.id for _ in range(100)]
    assert len(set(ids)) == 100
    for text in ids:
        parsed = uuid.UUID(text)
        assert (str(parsed), parsed.version, parsed.variant) == (text, 4, uuid.RFC_4122)


def test_options_of_the_call_win_one_by_one() -> None:
    """What the call does not say stays as the task has it."""
    task = Task("t", queue="low", max_retry=3, retention=timedelta(seconds=5))
    message = made({"max_retry": 7}, task).message
    assert (message.queue, message.retry, message.retention) == ("low", 7, 5)
    assert dict(task.options) == {"queue": "low", "max_retry": 3, "retention": timedelta(seconds=5)}


def test_none_takes_back_what_the_task_had() -> None:
    """None is the default of these options, so giving it means the default."""
    task = Task(
        "t",
        task_id="x",
        timeout=timedelta(seconds=3),
        deadline_at=AT,
        unique_for=timedelta(seconds=3),
        process_in=timedelta(seconds=3),
        group="g",
    )
    names = ("task_id", "timeout", "deadline_at", "unique_for", "process_in", "group")
    assert made(dict.fromkeys(names), task) == made({}, Task("t"))


def test_headers_are_merged() -> None:
    """Headers of the call are laid over those of the task, which stay as they are."""
    task = Task("t", headers={"a": "1", "b": "1"})
    assert made({"headers": {"b": "2", "c": "2"}}, task).message.headers == {"a": "1", "b": "2", "c": "2"}
    assert made({"headers": None}, task).message.headers == task.headers == {"a": "1", "b": "1"}


# -- when


@pytest.mark.parametrize(
    ("options", "due_ns"),
    [
        ({"process_in": timedelta(microseconds=1)}, NOW + 1000),
        ({"process_in": timedelta(milliseconds=1500)}, NOW + 1_500_000_000),
        ({"process_at": AT + timedelta(microseconds=1)}, NOW + 1000),
        ({"process_at": datetime(2030, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))}, 1_893_456_000 * SECOND),
        ({"process_at": datetime.max.replace(tzinfo=UTC)}, 253_402_300_799_999_999_000),
    ],
)
def test_later_means_scheduled(options: dict[str, object], due_ns: int) -> None:
    """A due time after now is kept to the nanosecond, also in a group."""
    new = made(options)
    assert (new.state, new.process_at_ns) == (TaskState.SCHEDULED, due_ns)
    grouped = made(options | {"group": "g"})
    assert (grouped.state, grouped.message.group_key) == (TaskState.SCHEDULED, "g")


@pytest.mark.parametrize(
    "options",
    [
        {"process_in": timedelta(0)},
        {"process_in": timedelta(days=-1)},
        {"process_in": timedelta.min},
        {"process_at": AT},
        {"process_at": datetime.min.replace(tzinfo=UTC)},
        {"process_in": None, "process_at": None},
    ],
)
def test_not_later_means_now(options: dict[str, object]) -> None:
    """A due time that is not after now is no due time."""
    assert made(options) == made()
    assert made(options | {"group": "g"}).state is TaskState.AGGREGATING
    assert made(options | {"group": "g"}).process_at_ns == 0


def test_both_due_times_in_one_place_contradict_each_other() -> None:
    """In one call, or in one task: nobody can say which was meant."""
    both = {"process_in": timedelta(seconds=1), "process_at": AT}
    with pytest.raises(ConfigError, match=r"process_at=.* and process_in=.* contradict each other: give one of them"):
        made(both)
    with pytest.raises(ConfigError, match="contradict each other"):
        made({}, Task("t", process_in=timedelta(seconds=1), process_at=AT))
    with pytest.raises(ConfigError, match="contradict each other"):
        made({"queue": "low"}, Task("t", process_in=timedelta(seconds=1), process_at=AT))


def test_either_due_time_replaces_what_the_task_had() -> None:
    """The call's due time counts, whichever way the task's was given."""
    in_hour, at_day = timedelta(hours=1), AT + timedelta(days=1)
    assert made({"process_in": in_hour}, Task("t", process_at=at_day)).process_at_ns == NOW + 3600 * SECOND
    assert made({"process_at": at_day}, Task("t", process_in=in_hour)).process_at_ns == NOW + 86_400 * SECOND
    assert made({"process_in": None}, Task("t", process_at=at_day)).state is TaskState.PENDING
    assert made({"process_at": None}, Task("t", process_in=in_hour)).state is TaskState.PENDING
    assert made({"process_at": None, "process_in": in_hour}, Task("t", process_at=at_day)).process_at_ns == (
        NOW + 3600 * SECOND
    )


# -- durations


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (timedelta(microseconds=1), 1),
        (timedelta(milliseconds=500), 1),
        (timedelta(seconds=1), 1),
        (timedelta(seconds=1, microseconds=1), 2),
        (timedelta(days=106_751), 106_751 * 86_400),
    ],
)
def test_durations_are_rounded_up(duration: timedelta, seconds: int) -> None:
    """No duration becomes 0, which would mean "none", and none becomes shorter."""
    assert made({"timeout": duration}).message.timeout == seconds
    assert made({"retention": duration}).message.retention == seconds
    if duration >= timedelta(seconds=1):
        assert made({"unique_for": duration}).unique_ttl == seconds


def test_no_timeout_means_30_minutes_unless_there_is_a_deadline() -> None:
    """A timeout of zero is none; a deadline alone is enough."""
    assert made({"timeout": timedelta(0)}).message.timeout == 1800
    assert made({"timeout": None}).message.timeout == 1800
    only_deadline = made({"deadline_at": AT + timedelta(seconds=9)}).message
    assert (only_deadline.timeout, only_deadline.deadline) == (0, 1_700_000_009)
    both = made({"deadline_at": AT, "timeout": timedelta(seconds=5)}).message
    assert (both.timeout, both.deadline) == (5, 1_700_000_000)


# -- the unique lock


def test_the_lock_is_of_queue_type_and_payload() -> None:
    """Other options do not matter; no payload and an empty one differ."""
    unique: dict[str, object] = {"unique_for": timedelta(seconds=1)}
    locks = {
        name: made(unique | options, task).message.unique_key
        for name, task, options in [
            ("none", Task("t"), {}),
            ("empty", Task("t", b""), {}),
            ("bytes", Task("t", b"{}"), {"queue": "low"}),
            ("json", Task("t", {}, headers={"k": "v"}), {"queue": "low", "task_id": "other"}),
        ]
    }
    assert locks == {
        "none": "asynq:{default}:unique:t:",
        "empty": "asynq:{default}:unique:t:d41d8cd98f00b204e9800998ecf8427e",
        "bytes": "asynq:{low}:unique:t:99914b932bd37a50b983c5e7c90ae93b",
        "json": "asynq:{low}:unique:t:99914b932bd37a50b983c5e7c90ae93b",
    }
    assert made({}).message.unique_key == ""


@pytest.mark.parametrize(
    ("options", "ttl"),
    [
        ({}, 600),
        ({"group": "g"}, 600),
        ({"process_in": timedelta(seconds=100)}, 700),
        ({"process_in": timedelta(seconds=99, milliseconds=999)}, 699),
        ({"process_at": AT + timedelta(milliseconds=10)}, 600),
        ({"process_at": AT - timedelta(days=1)}, 600),
    ],
)
def test_the_wait_is_in_the_ttl(options: dict[str, object], ttl: int) -> None:
    """The lock of a scheduled task lives from now until the TTL after its due time, in whole seconds, cut off."""
    assert made({"unique_for": timedelta(seconds=600)} | options).unique_ttl == ttl


# -- what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"queue": ""}, "queue name must contain one or more characters"),
        ({"queue": " \t\n"}, "queue name must contain one or more characters"),
        ({"group": ""}, "group key cannot be empty"),
        ({"group": "  "}, "group key cannot be empty"),
        ({"unique_for": timedelta(0)}, "Unique TTL cannot be less than 1s"),
        ({"unique_for": timedelta(seconds=-5)}, "Unique TTL cannot be less than 1s"),
        ({"unique_for": timedelta(microseconds=999_999)}, "Unique TTL cannot be less than 1s"),
    ],
)
def test_refuses_in_go_s_words(options: dict[str, object], text: str) -> None:
    """Where Go has a text for it, it is ours too."""
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        made(options)
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        made({}, Task("t", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("task_id", ["", " ", "\n\t"])
def test_refuses_a_blank_id(task_id: str) -> None:
    """An ID of nothing is no ID; Go's words."""
    with pytest.raises(InvalidTaskError, match=r"^task ID cannot be empty$"):
        made({"task_id": task_id})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_retry": -1}, "option max_retry: must be between 0 and 2147483647, not -1"),
        ({"max_retry": 2**31}, "option max_retry: must be between 0 and 2147483647, not 2147483648"),
        ({"timeout": timedelta(seconds=-1)}, "option timeout: must not be negative, not datetime.timedelta("),
        ({"retention": timedelta(microseconds=-1)}, "option retention: must not be negative, not datetime.timedelta("),
        ({"timeout": timedelta.max}, "option timeout: must be at most 9223372036 s (292 years), not "),
        ({"retention": timedelta.max}, "option retention: must be at most 9223372036 s (292 years), not "),
        ({"unique_for": timedelta.max}, "option unique_for: must be at most 9223372036 s (292 years), not "),
        ({"process_in": timedelta.max}, "option process_in: must be at most 9223372036 s (292 years), not "),
        ({"deadline_at": EPOCH}, "option deadline_at: must be after 1970, not datetime.datetime(1970, "),
        ({"queue": "}q"}, "option queue: '}q' begins with '}': the hash tag of its keys would be empty"),
        ({"queue": "a\0b"}, "option queue: 'a\\x00b': contains a NUL character"),
        ({"group": "\0"}, "option group: '\\x00': contains a NUL character"),
        ({"queue": "a\ud800"}, "option queue: 'a\\ud800': string field contains invalid UTF-8: a lone surrogate"),
        ({"group": "\udfff"}, "option group: '\\udfff': string field contains invalid UTF-8: a lone surrogate"),
    ],
)
def test_refuses_what_is_out_of_bounds(options: dict[str, object], text: str) -> None:
    """The error names the option, the bound and the value."""
    with pytest.raises(ConfigError) as caught:
        made(options)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("queue", None, "wanted a str, not None (NoneType)"),
        ("queue", b"low", "wanted a str, not b'low' (bytes)"),
        ("queue", ["low"], "wanted a str, not ['low'] (list)"),
        ("max_retry", None, "wanted an int, not None (NoneType)"),
        ("max_retry", True, "wanted an int, not True (bool)"),
        ("max_retry", 3.0, "wanted an int, not 3.0 (float)"),
        ("max_retry", "3", "wanted an int, not '3' (str)"),
        ("task_id", 7, "wanted a str, not 7 (int)"),
        ("group", 7, "wanted a str, not 7 (int)"),
        ("timeout", 90, "wanted a timedelta, such as timedelta(seconds=90), not 90 (int)"),
        ("timeout", 1.5, "wanted a timedelta, such as timedelta(seconds=1.5), not 1.5 (float)"),
        ("timeout", "90s", "wanted a timedelta, such as timedelta(seconds=30), not '90s' (str)"),
        ("retention", None, "wanted a timedelta, such as timedelta(seconds=30), not None (NoneType)"),
        ("unique_for", True, "wanted a timedelta, such as timedelta(seconds=30), not True (bool)"),
        ("process_in", 5, "wanted a timedelta, such as timedelta(seconds=5), not 5 (int)"),
        ("process_at", 5, "wanted an aware datetime, such as datetime.now(UTC) + timedelta(hours=1), not 5 (int)"),
        (
            "deadline_at",
            timedelta(1),
            (
                "wanted an aware datetime, such as datetime.now(UTC) + timedelta(hours=1), "
                "not datetime.timedelta(days=1) (timedelta)"
            ),
        ),
    ],
)
def test_refuses_wrong_types(name: str, value: object, text: str) -> None:
    """The error names the option, what is wanted, and what it got, with its type."""
    with pytest.raises(ConfigError, match=f"^{re.escape(f'option {name}: {text}')}$"):
        made({name: value})


@pytest.mark.parametrize("name", ["deadline_at", "process_at"])
def test_refuses_a_naive_datetime(name: str) -> None:
    """A moment without a zone is refused, and the error says what to write instead."""
    naive = datetime(2030, 1, 5, 7, 8)  # noqa: DTZ001  (what the test is about)
    with pytest.raises(ConfigError) as caught:
        made({name: naive})
    assert str(caught.value) == (
        f"option {name}: datetime.datetime(2030, 1, 5, 7, 8) has no time zone; write .replace(tzinfo=UTC) where it is"
        " UTC, .astimezone() where it is local time"
    )
    assert made({name: naive.replace(tzinfo=UTC)}) == made({name: naive.replace(tzinfo=ZoneInfo("UTC"))})
    made({name: naive.astimezone()})


@pytest.mark.parametrize(
    ("name", "text"),
    [("que", "did you mean 'queue'?"), ("header", "did you mean 'headers'?"), ("x", "the options are deadline_at, ")],
)
def test_refuses_unknown_options(name: str, text: str) -> None:
    """A name that is none gets the nearest right one, or all of them."""
    with pytest.raises(ConfigError, match=f"^unknown option '{name}'; {re.escape(text)}"):
        made({name: 1})


@pytest.mark.parametrize(
    ("task", "options", "text"),
    [
        (Task("a\0"), {}, "task type 'a\\x00': contains a NUL character"),
        (Task("\ud800"), {}, "task type '\\ud800': string field contains invalid UTF-8: a lone surrogate"),
        (Task("t"), {"task_id": "\0"}, "option task_id: '\\x00': contains a NUL character"),
        (Task("t"), {"task_id": "é\udc80"}, "option task_id: 'é\\udc80': string field contains invalid UTF-8"),
        (Task("t", headers={"k": "\ud800"}), {}, "header 'k': '\\ud800': string field contains invalid UTF-8"),
        (Task("t"), {"headers": {"\ud800": "v"}}, "header '\\ud800': 'v': string field contains invalid UTF-8"),
    ],
)
def test_refuses_what_no_message_can_carry(task: Task, options: dict[str, object], text: str) -> None:
    """What Go could not encode, or not name a key with, is refused before any I/O."""
    with pytest.raises(InvalidTaskError) as caught:
        made(options, task)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"k": 1}, "headers: wanted str for str, not 1 for 'k'"),
        ({1: "v"}, "headers: wanted str for str, not 'v' for 1"),
        ([("k", "v")], "headers: wanted a mapping of str to str, not [('k', 'v')] (list)"),
    ],
)
def test_refuses_headers_that_are_not_text(headers: object, text: str) -> None:
    """A TypeError, as where a task is made."""
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        made({"headers": headers})


def test_a_brace_inside_a_queue_name_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """A later `}` cuts the hash tag short, which works: it is said once for each name."""
    name = f"a}}{uuid.uuid4()}"
    with caplog.at_level(logging.WARNING, logger="asynq_aio"):
        for _ in range(3):
            assert made({"queue": name}).message.queue == name
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        f"queue {name!r}: its keys have the hash tag 'a' only, up to the first '}}'"
    ]


TEXTS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
DURATIONS = st.timedeltas(timedelta(seconds=1), timedelta(days=106_000))
MOMENTS = st.datetimes(datetime(1971, 1, 1), datetime(9990, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001  (Hypothesis wants them naive)
OPTIONS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "max_retry": st.integers(0, 2**31 - 1),
        "queue": TEXTS.filter(lambda name: "}" not in name),
        "task_id": TEXTS,
        "timeout": DURATIONS,
        "deadline_at": MOMENTS,
        "unique_for": DURATIONS,
        "process_in": DURATIONS,
        "retention": DURATIONS,
        "group": TEXTS,
        "headers": st.dictionaries(TEXTS, TEXTS, max_size=3),
    },
)


@given(OPTIONS)
@settings(max_examples=200, deadline=None)
def test_what_is_composed_can_be_encoded(options: dict[str, Any]) -> None:
    """Options that pass the checks make a message that every program can read."""
    new = made(options)
    assert codec.decode_task(codec.encode_task(new.message)) == new.message
    assert new.message.timeout or new.message.deadline
    assert bool(new.unique_ttl) is bool(new.message.unique_key) is ("unique_for" in options)
    assert (new.process_at_ns > NOW) is (new.state is TaskState.SCHEDULED)


# -- texts


VECTORS = vectors.load("options.json")
ZONES = {"UTC": UTC, "JST": ZoneInfo("Asia/Tokyo"), "+0530": timezone(timedelta(hours=5, minutes=30))}


def _golden_option(row: dict[str, Any]) -> tuple[str, object]:
    """Our name and value of a golden row."""
    name, arg = row["option"], row["arg"]
    if name.endswith("_s"):
        return {"unique_s": "unique_for"}.get(name, name.removesuffix("_s")), timedelta(seconds=arg)
    if name in {"deadline", "process_at"}:
        zone = next(zone for text, zone in ZONES.items() if f" {text} " in row["text"])
        moment = datetime.fromisoformat(arg).astimezone(zone)
        return {"deadline": "deadline_at"}.get(name, name), moment
    if isinstance(arg, dict):
        return name, bytes.fromhex(arg["hex"]).decode("utf-8", "surrogateescape")
    return name, arg


@pytest.mark.parametrize("row", VECTORS["text"], ids=lambda row: row["text"])
def test_texts_are_go_s(row: dict[str, Any]) -> None:
    """Each option has Go's text, and the text is read back to it."""
    name, value = _golden_option(row)
    assert option_texts({name: value}) == [row["text"]]
    parsed = parse_option_text(row["text"])
    assert parsed is not None
    assert parsed[0] == name
    assert option_texts(dict([parsed])) == [row["text"]]


@pytest.mark.parametrize("row", VECTORS["durations"], ids=lambda row: row["text"])
def test_durations_are_go_s(row: dict[str, Any]) -> None:
    """Go's text for a duration, to the nanosecond."""
    assert format_duration(row["ns"]) == row["text"]
    parsed = parse_option_text(f"Timeout({row['text']})")
    assert parsed is not None
    assert parsed[1] == (1 if row["ns"] >= 0 else -1) * timedelta(microseconds=abs(row["ns"]) // 1000)


@pytest.mark.parametrize("row", VECTORS["quoted"], ids=lambda row: row["quoted"])
def test_quotes_are_go_s(row: dict[str, Any]) -> None:
    """Go's quoted string, and back."""
    assert quote(row["string"]) == row["quoted"]
    assert parse_option_text(f"Queue({row['quoted']})") == ("queue", row["string"])


# Go's reader loses these; ours reads them.
OURS_READS = {
    'Queue("a)b")': ("queue", "a)b"),
    'Queue("(parens)")': ("queue", "(parens)"),
    'TaskID("id-1")': ("task_id", "id-1"),
    'Group("g 1")': ("group", "g 1"),
}


@pytest.mark.parametrize("row", VECTORS["read_back"], ids=lambda row: row["text"])
def test_reads_what_go_reads(row: dict[str, Any]) -> None:
    """Each text gives the value that Go's reader gives, and prints as it does there; what Go loses is named above."""
    parsed = parse_option_text(row["text"])
    if row.get("ignored"):
        assert parsed == OURS_READS.get(row["text"])
        return
    assert parsed is not None
    assert option_texts(dict([parsed])) == [row["text_again"]]
    match row["value"]:
        case {"ns": nanoseconds}:
            assert parsed[1] == timedelta(microseconds=nanoseconds / 1000)
        case {"unix": seconds}:
            assert isinstance(parsed[1], datetime)
            assert parsed[1].timestamp() == seconds
        case value:
            assert parsed[1] == value


def test_headers_have_a_text_each() -> None:
    """JSON as Go writes it: compact, not ASCII only, `<>&` escaped; and back, parentheses included."""
    texts = option_texts({"headers": {"k": 'v")', "ü": "<&>\n"}, "queue": None})
    assert texts == ['Header(["k","v\\")"])', 'Header(["ü","\\u003c\\u0026\\u003e\\n"])']
    assert [parse_option_text(text) for text in texts] == [("headers", {"k": 'v")'}), ("headers", {"ü": "<&>\n"})]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MaxRetry",
        "MaxRetry(3",
        "MaxRetry(3) ",
        "MaxRetry(\uff13)",
        "max_retry(3)",
        'Queue("a"b")',
        'Queue("a\nb")',
        'Queue("\\q")',
        'Queue("\\ud800")',
        'Queue("\\U00110000")',
        "Timeout()",
        "Timeout(1x)",
        "Timeout(99999999999999h)",
        "Deadline(Sat Feb 30 07:08:09 UTC 2030)",
        "Deadline(Sat Jan  5 07:08:09 +9999 2030)",
        "Deadline(Sat Jan 5 07:08:09 UTC 2030)",
        "Deadline(2030-01-05T07:08:09Z)",
        "Header(k=v)",
        'Header(["k"])',
        'Header(["k",1])',
        'Header({"k":"v"})',
    ],
)
def test_what_is_no_option_text(text: str) -> None:
    """Text that no program writes gives nothing, and no error."""
    assert parse_option_text(text) is None


def test_zones_with_and_without_a_name() -> None:
    """A named zone keeps its name, another one is an offset, which is read as what it is."""
    summer = datetime(2030, 7, 1, 12, tzinfo=ZoneInfo("America/New_York"))
    west = datetime(2030, 7, 1, 12, tzinfo=timezone(-timedelta(hours=3, minutes=30)))
    assert option_texts({"process_at": summer}) == ["ProcessAt(Mon Jul  1 12:00:00 EDT 2030)"]
    assert option_texts({"process_at": west}) == ["ProcessAt(Mon Jul  1 12:00:00 -0330 2030)"]
    assert parse_option_text("ProcessAt(Mon Jul  1 12:00:00 -0330 2030)") == ("process_at", west)


def test_texts_refuse_wrong_types() -> None:
    """An entry's options are checked for their types too."""
    with pytest.raises(ConfigError, match=r"^option timeout: wanted a timedelta"):
        option_texts({"timeout": 5})
    with pytest.raises(ConfigError, match=r"^option max_retry: wanted an int"):
        option_texts({"max_retry": "5"})
    with pytest.raises(ConfigError, match=r"^unknown option 'retries'"):
        option_texts({"retries": 5})


@given(OPTIONS)
@settings(max_examples=200, deadline=None)
def test_texts_come_back(options: dict[str, Any]) -> None:
    """Whatever the options, their texts are read back to them: moments in whole seconds, as Go's format has them."""
    options |= {name: value.replace(microsecond=0) for name, value in options.items() if isinstance(value, datetime)}
    texts = option_texts(options)
    assert all("(" in text for text in texts)
    read: dict[str, Any] = {}
    for text in texts:
        parsed = parse_option_text(text)
        assert parsed is not None, text
        name, value = parsed
        read[name] = (
            {**read[name], **value} if name == "headers" and name in read and isinstance(value, dict) else value
        )
    assert read == {name: value for name, value in options.items() if value != {}}


@given(st.text(st.characters(exclude_categories=()), max_size=40), st.sampled_from(["", "Queue", "Timeout", "Header"]))
@settings(max_examples=200, deadline=None)
def test_any_text_is_an_option_or_none(text: str, name: str) -> None:
    """Nothing that a scheduler entry may hold raises."""
    parse_option_text(text)
    parse_option_text(f"{name}({text})")
    assert quote(text).startswith('"')
