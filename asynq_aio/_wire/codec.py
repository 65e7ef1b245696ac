"""Bytes <-> messages. The only module that knows protobuf.

The bytes are those of Go's encoder: fields in ascending order, zero values left out, timestamps always written. Go
writes map entries in random order; here they are sorted, so that equal messages have equal bytes.

Decoding skips what it does not know and takes the last of a repeated field, as Go does; it refuses text that is not
UTF-8, as Go does too. Zero bytes are a message whose fields are all empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as _Message
from google.protobuf.timestamp_pb2 import Timestamp as _Timestamp

from asynq_aio._wire import asynq_pb2 as pb
from asynq_aio._wire.messages import (
    SchedulerEnqueueEvent,
    SchedulerEntry,
    ServerInfo,
    TaskMessage,
    Timestamp,
    WorkerInfo,
)
from asynq_aio.errors import MessageDecodeError, MessageEncodeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import DataclassInstance

__all__ = [
    "clean_text",
    "decode_enqueue_event",
    "decode_scheduler_entry",
    "decode_server_info",
    "decode_task",
    "decode_worker_info",
    "encode_enqueue_event",
    "encode_scheduler_entry",
    "encode_server_info",
    "encode_task",
    "encode_worker_info",
]

_M = TypeVar("_M", bound=_Message)
_SHOWN_BYTES = 32
_parse_task = pb.TaskMessage.FromString  # looked up once: it stands on the way of every task


def clean_text(text: str) -> str:
    """The text with lone surrogates, which no message can carry, replaced by `?`. For texts of errors."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def encode_task(message: TaskMessage) -> bytes:
    """The value of field `msg`.

    Raises:
        MessageEncodeError: A text has a lone surrogate, a number does not fit, or a value has the wrong type.
    """
    try:
        encoded = pb.TaskMessage(
            type=message.type,
            payload=message.payload,
            id=message.id,
            queue=message.queue,
            retry=message.retry,
            retried=message.retried,
            error_msg=message.error_msg,
            timeout=message.timeout,
            deadline=message.deadline,
            unique_key=message.unique_key,
            last_failed_at=message.last_failed_at,
            retention=message.retention,
            completed_at=message.completed_at,
            group_key=message.group_key,
        )
        if message.headers:
            for key, value in sorted(message.headers.items()):
                encoded.headers.add(key=key, value=value)
    except (TypeError, ValueError) as error:
        _not_encodable(pb.TaskMessage, message, error)
    return encoded.SerializeToString()


def decode_task(data: bytes) -> TaskMessage:
    """The task in the value of field `msg`.

    A worker does this for every task. Making the dataclass is half of the cost, parsing and reading the fields the
    other half (measured with `timeit` on a message as `enqueue` writes it); headers add a third.

    Raises:
        MessageDecodeError: No such message, or a text that is not UTF-8.
    """
    try:
        parsed = _parse_task(data)
    except DecodeError as error:
        _not_decodable("TaskMessage", data, error)
    headers = parsed.headers
    return TaskMessage(
        parsed.type,
        parsed.payload,
        parsed.id,
        parsed.queue,
        parsed.retry,
        parsed.retried,
        parsed.error_msg,
        parsed.timeout,
        parsed.deadline,
        parsed.unique_key,
        parsed.last_failed_at,
        parsed.retention,
        parsed.completed_at,
        parsed.group_key,
        {header.key: header.value for header in headers} if headers else {},
    )


def encode_server_info(info: ServerInfo) -> bytes:
    """The value of a server's key.

    Raises:
        MessageEncodeError: As for `encode_task`.
    """
    try:
        encoded = pb.ServerInfo(
            host=info.host,
            pid=info.pid,
            server_id=info.server_id,
            concurrency=info.concurrency,
            strict_priority=info.strict_priority,
            status=info.status,
            start_time=_timestamp(info.start_time),
            active_worker_count=info.active_worker_count,
        )
        for name, priority in sorted(info.queues.items()):
            encoded.queues.add(key=name, value=priority)
    except (TypeError, ValueError) as error:
        _not_encodable(pb.ServerInfo, info, error)
    return encoded.SerializeToString()


def decode_server_info(data: bytes) -> ServerInfo:
    """The presence of a server.

    Raises:
        MessageDecodeError: As for `decode_task`.
    """
    parsed = _parse("ServerInfo", pb.ServerInfo.FromString, data)
    return ServerInfo(
        host=parsed.host,
        pid=parsed.pid,
        server_id=parsed.server_id,
        concurrency=parsed.concurrency,
        queues={queue.key: queue.value for queue in parsed.queues},
        strict_priority=parsed.strict_priority,
        status=parsed.status,
        start_time=_moment(parsed.start_time),
        active_worker_count=parsed.active_worker_count,
    )


def encode_worker_info(info: WorkerInfo) -> bytes:
    """A value of a server's hash of workers.

    Raises:
        MessageEncodeError: As for `encode_task`.
    """
    try:
        encoded = pb.WorkerInfo(
            host=info.host,
            pid=info.pid,
            server_id=info.server_id,
            task_id=info.task_id,
            task_type=info.task_type,
            task_payload=info.task_payload,
            queue=info.queue,
            start_time=_timestamp(info.start_time),
            deadline=_timestamp(info.deadline),
        )
    except (TypeError, ValueError) as error:
        _not_encodable(pb.WorkerInfo, info, error)
    return encoded.SerializeToString()


def decode_worker_info(data: bytes) -> WorkerInfo:
    """A task that a server works on.

    Raises:
        MessageDecodeError: As for `decode_task`.
    """
    parsed = _parse("WorkerInfo", pb.WorkerInfo.FromString, data)
    return WorkerInfo(
        host=parsed.host,
        pid=parsed.pid,
        server_id=parsed.server_id,
        task_id=parsed.task_id,
        task_type=parsed.task_type,
        task_payload=parsed.task_payload,
        queue=parsed.queue,
        start_time=_moment(parsed.start_time),
        deadline=_moment(parsed.deadline),
    )


def encode_scheduler_entry(entry: SchedulerEntry) -> bytes:
    """An element of a scheduler's list.

    Raises:
        MessageEncodeError: As for `encode_task`; or an option has no `(`, at which Go's reader panics.
    """
    for option in entry.enqueue_options:
        if "(" not in option:
            raise MessageEncodeError("SchedulerEntry", f"option {option!r} has no '('; wanted a text as 'MaxRetry(3)'")
    try:
        encoded = pb.SchedulerEntry(
            id=entry.id,
            spec=entry.spec,
            task_type=entry.task_type,
            task_payload=entry.task_payload,
            enqueue_options=entry.enqueue_options,
            next_enqueue_time=_timestamp(entry.next_enqueue_time),
            prev_enqueue_time=_timestamp(entry.prev_enqueue_time),
        )
    except (TypeError, ValueError) as error:
        _not_encodable(pb.SchedulerEntry, entry, error)
    return encoded.SerializeToString()


def decode_scheduler_entry(data: bytes) -> SchedulerEntry:
    """What a scheduler enqueues, and when.

    Raises:
        MessageDecodeError: As for `decode_task`.
    """
    parsed = _parse("SchedulerEntry", pb.SchedulerEntry.FromString, data)
    return SchedulerEntry(
        id=parsed.id,
        spec=parsed.spec,
        task_type=parsed.task_type,
        task_payload=parsed.task_payload,
        enqueue_options=tuple(parsed.enqueue_options),
        next_enqueue_time=_moment(parsed.next_enqueue_time),
        prev_enqueue_time=_moment(parsed.prev_enqueue_time),
    )


def encode_enqueue_event(event: SchedulerEnqueueEvent) -> bytes:
    """A member of an entry's history.

    Raises:
        MessageEncodeError: As for `encode_task`.
    """
    try:
        encoded = pb.SchedulerEnqueueEvent(task_id=event.task_id, enqueue_time=_timestamp(event.enqueue_time))
    except (TypeError, ValueError) as error:
        _not_encodable(pb.SchedulerEnqueueEvent, event, error)
    return encoded.SerializeToString()


def decode_enqueue_event(data: bytes) -> SchedulerEnqueueEvent:
    """When an entry has enqueued what.

    Raises:
        MessageDecodeError: As for `decode_task`.
    """
    parsed = _parse("SchedulerEnqueueEvent", pb.SchedulerEnqueueEvent.FromString, data)
    return SchedulerEnqueueEvent(task_id=parsed.task_id, enqueue_time=_moment(parsed.enqueue_time))


def _parse(kind: str, parse: Callable[[bytes], _M], data: bytes) -> _M:
    try:
        return parse(data)
    except DecodeError as error:
        _not_decodable(kind, data, error)


def _timestamp(moment: Timestamp) -> _Timestamp:
    """A message even for 1970, whose fields are all zero: Go's older decoders refuse an entry without it."""
    return _Timestamp(seconds=moment.seconds, nanos=moment.nanos)


def _moment(timestamp: _Timestamp) -> Timestamp:
    return Timestamp(timestamp.seconds, timestamp.nanos)


def _as_protobuf(value: object) -> object:
    match value:
        case Timestamp():
            return _timestamp(value)
        case Mapping():
            return [{"key": key, "value": item} for key, item in value.items()]
        case _:
            return value


def _not_decodable(kind: str, data: bytes, error: DecodeError) -> NoReturn:
    reason = str(error).rpartition(": ")[2]  # protobuf's text is "Error parsing message with type '...': <reason>"
    shown = data[:_SHOWN_BYTES].hex() + ("..." if len(data) > _SHOWN_BYTES else "")
    raise MessageDecodeError(kind, f"{reason} ({len(data)} bytes: {shown})") from error


def _not_encodable(kind: type[_Message], message: DataclassInstance, cause: Exception) -> NoReturn:
    """Say which field it is, by trying each alone: protobuf names the value at best."""
    reason = str(cause)
    for field in fields(message):
        value = getattr(message, field.name)
        try:
            kind(**{field.name: _as_protobuf(value)})
        except UnicodeEncodeError:
            reason = f"string field contains invalid UTF-8: {field.name} = {value!r}"
            break
        except (TypeError, ValueError) as error:
            reason = f"{field.name} = {value!r}: {error}"
            break
    raise MessageEncodeError(kind.__name__, reason) from cause
