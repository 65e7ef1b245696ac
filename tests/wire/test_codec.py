"""Bytes <-> messages, against what Go wrote and against anything else."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynq_aio._wire import codec
from asynq_aio._wire.messages import (
    SchedulerEnqueueEvent,
    SchedulerEntry,
    ServerInfo,
    TaskMessage,
    Timestamp,
    WorkerInfo,
)
from asynq_aio.errors import MessageDecodeError, MessageEncodeError, WireError
from tests.wire import vectors

ROWS = vectors.load("messages.json")
DECODE = vectors.load("decode.json")["decode"]
ENCODE = vectors.load("decode.json")["encode"]

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=20)  # Hypothesis' texts have no surrogates
MOMENT = st.builds(Timestamp, INT64, INT32)
MESSAGES: dict[str, st.SearchStrategy[Any]] = {
    "TaskMessage": st.builds(
        TaskMessage,
        type=TEXT,
        payload=st.binary(max_size=300),
        id=TEXT,
        queue=TEXT,
        retry=INT32,
        retried=INT32,
        error_msg=TEXT,
        timeout=INT64,
        deadline=INT64,
        unique_key=TEXT,
        last_failed_at=INT64,
        retention=INT64,
        completed_at=INT64,
        group_key=TEXT,
        headers=st.dictionaries(TEXT, TEXT, max_size=4),
    ),
    "ServerInfo": st.builds(
        ServerInfo,
        host=TEXT,
        pid=INT32,
        server_id=TEXT,
        concurrency=INT32,
        queues=st.dictionaries(TEXT, INT32, max_size=4),
        strict_priority=st.booleans(),
        status=TEXT,
        start_time=MOMENT,
        active_worker_count=INT32,
    ),
    "WorkerInfo": st.builds(
        WorkerInfo,
        host=TEXT,
        pid=INT32,
        server_id=TEXT,
        task_id=TEXT,
        task_type=TEXT,
        task_payload=st.binary(max_size=50),
        queue=TEXT,
        start_time=MOMENT,
        deadline=MOMENT,
    ),
    "SchedulerEntry": st.builds(
        SchedulerEntry,
        id=TEXT,
        spec=TEXT,
        task_type=TEXT,
        task_payload=st.binary(max_size=50),
        enqueue_options=st.lists(TEXT.map("({}".format), max_size=3).map(tuple),
        next_enqueue_time=MOMENT,
        prev_enqueue_time=MOMENT,
    ),
    "SchedulerEnqueueEvent": st.builds(SchedulerEnqueueEvent, task_id=TEXT, enqueue_time=MOMENT),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_encodes_as_go(row: dict[str, Any]) -> None:
    """The bytes are Go's, with map entries sorted by key."""
    encode = vectors.CODECS[row["kind"]][1]
    assert encode(vectors.message(row["kind"], row["fields"])).hex() == row["proto_hex"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_decodes_what_go_wrote(row: dict[str, Any]) -> None:
    """Go's bytes give the fields that Go put in, with their types."""
    decoded = vectors.CODECS[row["kind"]][2](bytes.fromhex(row["proto_hex"]))
    assert decoded == vectors.message(row["kind"], row["fields"])


@pytest.mark.parametrize("row", [row for row in DECODE if "fields" in row], ids=lambda row: row["name"])
def test_decodes_what_go_decodes(row: dict[str, Any]) -> None:
    """Bytes that Go never writes, but reads, are read to the same fields."""
    decoded = vectors.CODECS[row["kind"]][2](bytes.fromhex(row["proto_hex"]))
    assert decoded == vectors.message(row["kind"], row["fields"])


@pytest.mark.parametrize("row", [row for row in DECODE if "error" in row], ids=lambda row: row["name"])
def test_refuses_what_go_refuses(row: dict[str, Any]) -> None:
    """Bytes that Go cannot read, text that is not UTF-8 among them, are an error that shows them."""
    with pytest.raises(MessageDecodeError) as caught:
        vectors.CODECS[row["kind"]][2](bytes.fromhex(row["proto_hex"]))
    assert str(caught.value).startswith("cannot decode TaskMessage: ")
    assert row["proto_hex"] in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


@pytest.mark.parametrize("row", ENCODE, ids=lambda row: row["name"])
def test_refuses_to_encode_what_go_refuses(row: dict[str, Any]) -> None:
    """Text that cannot be UTF-8 is an error with Go's words, and names the field."""
    name, message = {
        "type-that-is-not-utf8": ("type", TaskMessage(type="\udcff")),
        "error-message-that-is-not-utf8": ("error_msg", TaskMessage(error_msg="\ud800")),
        "header-value-that-is-not-utf8": ("headers", TaskMessage(headers={"k": "\udcff"})),
    }[row["name"]]
    with pytest.raises(MessageEncodeError, match=f"{row['error']}: {name} = "):
        codec.encode_task(message)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (TaskMessage(retry=2**31), "retry = 2147483648: Value out of range"),
        (TaskMessage(timeout=2**63), "timeout = 9223372036854775808: Value out of range"),
        (TaskMessage(headers={"\ud800": "v"}), "string field contains invalid UTF-8: headers = "),
        (TaskMessage(payload="text"), "payload = 'text': expected bytes"),  # type: ignore[arg-type]
        (TaskMessage(timeout=1.5), "timeout = 1.5: "),  # type: ignore[arg-type]
        (ServerInfo(queues={"q": 2**31}), "queues = {'q': 2147483648}: Value out of range"),
        (ServerInfo(start_time=Timestamp(2**63)), "start_time = Timestamp"),
        (WorkerInfo(pid=-(2**31) - 1), "pid = -2147483649: Value out of range"),
        (SchedulerEntry(spec="\ud800"), "string field contains invalid UTF-8: spec = "),
        (SchedulerEntry(enqueue_options=["MaxRetry"]), "option 'MaxRetry' has no '('"),
        (SchedulerEnqueueEvent(task_id="\ud800"), "string field contains invalid UTF-8: task_id = "),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value.partition(" = ")[0],
)
def test_names_the_field_that_cannot_be_encoded(message: vectors.Message, text: str) -> None:
    """A number is never wrapped, a text never mended in silence: the error says which field has what."""
    kind = type(message).__name__
    with pytest.raises(MessageEncodeError) as caught:
        vectors.CODECS[kind][1](message)
    assert str(caught.value).startswith(f"cannot encode {kind}: {text}")


def test_the_vectors_of_the_contract() -> None:
    """The four messages that the wire contract spells out."""
    task = TaskMessage(
        type="ty",
        payload=b"\0\1",
        headers={"k": ""},
        id="id",
        queue="q",
        retry=25,
        retried=1,
        error_msg="e",
        last_failed_at=11,
        timeout=8,
        deadline=9,
        unique_key="u",
        group_key="g",
        retention=12,
        completed_at=13,
    )
    assert codec.encode_task(task).hex() == (
        "0a027479120200011a026964220171281930013a016540084809520175580b600c680d7201677a050a016b1200"
    )
    assert codec.encode_task(TaskMessage(type="ty", id="id", queue="q")).hex() == "0a0274791a026964220171"
    entry = SchedulerEntry(id="e", spec="* * * * *", task_type="t", next_enqueue_time=Timestamp(100, 5))
    assert codec.encode_scheduler_entry(entry).hex() == (
        "0a016512092a202a202a202a202a1a01743204086410053a0b088092b8c398feffffff01"
    )
    info = ServerInfo(
        host="h", pid=1, server_id="s", concurrency=10, queues={"a": 0}, status="active", start_time=Timestamp()
    )
    assert codec.encode_server_info(info).hex() == "0a016810011a0173200a2a050a016110003a066163746976654200"


@pytest.mark.parametrize("kind", vectors.CODECS)
def test_a_timestamp_that_is_absent_reads_as_1970(kind: str) -> None:
    """Zero bytes are an empty message; "never" is only what says so."""
    decoded = vectors.CODECS[kind][2](b"")
    moments = [value for name in decoded.__slots__ if isinstance(value := getattr(decoded, name), Timestamp)]
    assert all(moment == Timestamp(0, 0) for moment in moments)


@pytest.mark.parametrize("kind", vectors.CODECS)
def test_what_is_encoded_comes_back(kind: str) -> None:
    """Every message that can be encoded decodes to an equal one, and equal messages have equal bytes."""
    _, encode, decode = vectors.CODECS[kind]

    @given(MESSAGES[kind])
    @settings(max_examples=60, deadline=None)
    def round_trip(message: Any) -> None:
        data = encode(message)
        decoded = decode(data)
        assert decoded == message
        assert encode(decoded) == data

    round_trip()


@pytest.mark.parametrize("kind", vectors.CODECS)
def test_any_bytes_are_a_message_or_a_decode_error(kind: str) -> None:
    """Nothing that may stand in Redis raises anything else: random bytes, and bytes that were right once."""
    _, encode, decode = vectors.CODECS[kind]

    @given(st.binary(max_size=80), MESSAGES[kind], st.integers(0, 200), st.binary(max_size=3))
    @settings(max_examples=150, deadline=None)
    def attempt(noise: bytes, message: Any, at: int, wedge: bytes) -> None:
        good = encode(message)
        for data in (noise, good[:at], good[:at] + wedge + good[at:], good[:at] + wedge + good[at + len(wedge) :]):
            try:
                decoded = decode(data)
            except MessageDecodeError:
                continue
            if isinstance(decoded, SchedulerEntry) and not all("(" in text for text in decoded.enqueue_options):
                continue  # read, but not written
            assert decode(encode(decoded)) == decoded

    attempt()


def test_deep_nesting_is_a_decode_error() -> None:
    """Unknown groups, one within the other, end at the parser's limit and not in a crash."""
    with pytest.raises(MessageDecodeError):
        codec.decode_task(b"\x93\x03" * 10_000)


@given(st.text(st.characters(exclude_categories=()), max_size=30))
@settings(max_examples=100, deadline=None)
def test_clean_text_can_be_encoded(text: str) -> None:
    """Any text of an error can be written once it is clean; one that was right stays as it is."""
    cleaned = codec.clean_text(text)
    assert codec.decode_task(codec.encode_task(TaskMessage(error_msg=cleaned))).error_msg == cleaned
    assert len(cleaned) == len(text)
    if not any("\ud800" <= char <= "\udfff" for char in text):
        assert cleaned == text


def test_wire_errors_are_one_family() -> None:
    """One `except WireError` catches both directions."""
    assert issubclass(MessageDecodeError, WireError)
    assert issubclass(MessageEncodeError, WireError)
