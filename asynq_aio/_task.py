"""What flows: the task, its payload, and what a client is told about it."""

from __future__ import annotations

import base64
import difflib
import sys
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypedDict, TypeVar, Unpack, cast, overload

import orjson

from asynq_aio import _convert
from asynq_aio.errors import ConfigError, InvalidTaskError, PayloadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "OPTION_NAMES",
    "Payload",
    "Task",
    "TaskInfo",
    "TaskOptions",
    "TaskState",
    "check_option_names",
    "encode_payload",
]

T = TypeVar("T")
D = TypeVar("D")

_REQUIRED: Final = object()


class TaskState(StrEnum):
    """Where a task is; the words are Go's, and stand so in Redis."""

    ACTIVE = "active"
    """A worker is on it."""
    PENDING = "pending"
    """It waits for a worker."""
    SCHEDULED = "scheduled"
    """It waits for its time."""
    RETRY = "retry"
    """It failed and waits for its next attempt."""
    ARCHIVED = "archived"
    """It failed for good and is kept for people to look at."""
    COMPLETED = "completed"
    """It succeeded and is kept as long as its retention says."""
    AGGREGATING = "aggregating"
    """It waits in its group to become part of one larger task."""


class TaskOptions(TypedDict, total=False):
    """The options of an enqueue: given to the task they are defaults, given to `enqueue` they win, one by one.

    Their values are checked when the task is enqueued. Durations are rounded up to whole seconds, moments are aware.
    """

    max_retry: int
    """How often a failed task is tried again; default 25."""
    queue: str
    """The queue; default `default`."""
    task_id: str | None
    """The ID; default a new UUID. It stays taken while the task is in any state, archived and completed too."""
    timeout: timedelta | None
    """How long one attempt may take; 30 minutes where neither this nor `deadline_at` is given."""
    deadline_at: datetime | None
    """When all attempts must be over; the earlier of this and the timeout holds."""
    unique_for: timedelta | None
    """How long the lock holds that refuses a second task of equal type, payload and queue; at least 1 s."""
    process_at: datetime | None
    """When to process it; in the past means now."""
    process_in: timedelta | None
    """How long to wait before processing it; not together with `process_at`."""
    retention: timedelta
    """How long to keep the task and its result after success; default 0, not at all."""
    group: str | None
    """The group whose tasks are made into one by the server's aggregator."""


OPTION_NAMES: Final = frozenset(TaskOptions.__annotations__)
"""The names of all options."""


def check_option_names(names: Iterable[str]) -> None:
    """Refuse a keyword that is no option.

    Raises:
        ConfigError: names the first unknown one and the nearest right one.
    """
    for name in names:
        if name not in OPTION_NAMES:
            right = sorted({*OPTION_NAMES, "headers"})
            near = difflib.get_close_matches(name, right, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(right)}"
            raise ConfigError(f"unknown option {name!r}; {hint}")


class Payload(bytes):
    """The bytes of a payload, and ways to read them as JSON; parsed once, when first asked.

    The getters want a JSON object. A key that is absent, or whose value is null, gives `default` where there is one.
    Anything else than what the getter promises raises a PayloadError that names the key, what was wanted and what was
    found. What `json`, `get_list` and `get_dict` return belongs to the payload: copy it before changing it.
    """

    _parsed: Any  # set when first parsed; a subclass of bytes can have no slots

    def json(self) -> Any:  # noqa: ANN401  (JSON has no narrower type that is of use)
        """The whole payload, parsed.

        Raises:
            PayloadError: there is no payload, or it is not JSON.
        """
        return self._parse("JSON")

    @overload
    def decode(self, model: type[T], /) -> T: ...
    @overload
    def decode(self, encoding: str = ..., errors: str = ...) -> str: ...
    def decode(self, encoding: object = "utf-8", errors: str = "strict") -> object:
        """The payload as an instance of a model: dataclass, TypedDict, pydantic model, msgspec struct, `list[int]` ...

        Dataclasses and TypedDicts are filled by the rules of the getters: nothing is guessed, unknown keys are ignored.
        Without a model, or with the name of an encoding, the text, as `bytes.decode` gives it.

        Raises:
            PayloadError: it does not fit the model; the key reads like `items[2].price`.
            ConfigError: the model holds a type that has no JSON form.
        """
        if isinstance(encoding, str):
            return super().decode(encoding, errors)
        convert = _convert.converter_for(encoding)
        value = self._parse(f"JSON for {_convert.name_of(encoding)}")
        try:
            return convert(value)
        except _convert.MismatchError as mismatch:
            raise mismatch.as_payload_error() from mismatch.__cause__

    @overload
    def get_int(self, key: str) -> int: ...
    @overload
    def get_int(self, key: str, default: D) -> int | D: ...
    def get_int(self, key: str, default: object = _REQUIRED) -> object:
        """A whole number; `3.0` is one, `3.5`, `true` and `"3"` are not."""
        return self._get(key, default, _convert.to_int)

    @overload
    def get_float(self, key: str) -> float: ...
    @overload
    def get_float(self, key: str, default: D) -> float | D: ...
    def get_float(self, key: str, default: object = _REQUIRED) -> object:
        """Any number; `true` and `"3"` are none."""
        return self._get(key, default, _convert.to_float)

    @overload
    def get_str(self, key: str) -> str: ...
    @overload
    def get_str(self, key: str, default: D) -> str | D: ...
    def get_str(self, key: str, default: object = _REQUIRED) -> object:
        """A text."""
        return self._get(key, default, _convert.to_str)

    @overload
    def get_bool(self, key: str) -> bool: ...
    @overload
    def get_bool(self, key: str, default: D) -> bool | D: ...
    def get_bool(self, key: str, default: object = _REQUIRED) -> object:
        """`true` or `false`; 0 and 1 are neither."""
        return self._get(key, default, _convert.to_bool)

    @overload
    def get_list(self, key: str) -> list[Any]: ...
    @overload
    def get_list(self, key: str, default: D) -> list[Any] | D: ...
    def get_list(self, key: str, default: object = _REQUIRED) -> object:
        """A list of anything."""
        return self._get(key, default, _convert.to_list)

    @overload
    def get_dict(self, key: str) -> dict[str, Any]: ...
    @overload
    def get_dict(self, key: str, default: D) -> dict[str, Any] | D: ...
    def get_dict(self, key: str, default: object = _REQUIRED) -> object:
        """An object of anything."""
        return self._get(key, default, _convert.to_dict)

    @overload
    def get_datetime(self, key: str) -> datetime: ...
    @overload
    def get_datetime(self, key: str, default: D) -> datetime | D: ...
    def get_datetime(self, key: str, default: object = _REQUIRED) -> object:
        """A moment, in UTC, from an ISO 8601 text with a zone; one without is refused."""
        return self._get(key, default, _convert.to_datetime)

    @overload
    def get_timedelta(self, key: str) -> timedelta: ...
    @overload
    def get_timedelta(self, key: str, default: D) -> timedelta | D: ...
    def get_timedelta(self, key: str, default: object = _REQUIRED) -> object:
        """A duration, from a number of seconds or Go's text for one, such as `"1h30m"`."""
        return self._get(key, default, _convert.to_timedelta)

    def _parse(self, wanted: str) -> Any:  # noqa: ANN401  (as for json)
        try:
            return self._parsed
        except AttributeError:
            self._parsed = parsed = _convert.parse_json(self, wanted)
            return parsed

    def _get(self, key: str, default: object, convert: _convert.Converter) -> object:
        values = self._parse("a JSON object")
        if not isinstance(values, dict):
            raise PayloadError(None, "a JSON object", _convert.describe(values))
        value = values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        try:
            return convert(value)
        except _convert.MismatchError as mismatch:
            found = mismatch.found if key in values else "no such key"
            raise PayloadError(key, mismatch.wanted, found) from None


def _encode_other(value: object) -> object:
    """What orjson does not know itself; each form is one that `Payload.decode` reads back."""
    match value:
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return str(value)
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(value).decode()  # as Go's encoding/json
        case set() | frozenset():
            return list(value)
    if _convert.is_pydantic_model(type(value)):
        return cast("Any", value).model_dump(mode="json")
    if _convert.is_msgspec_struct(type(value)):
        return sys.modules["msgspec"].to_builtins(value)
    raise TypeError(f"{type(value).__qualname__} has no JSON form")


def encode_payload(payload: object) -> Payload:
    """The bytes that go over the wire: bytes-like as they are, anything else as JSON, None as none at all.

    Raises:
        InvalidTaskError: something in it has no JSON form.
    """
    match payload:
        case Payload():
            return payload
        case None:
            return Payload()
        case bytes() | bytearray() | memoryview():
            return Payload(payload)
    try:
        return Payload(orjson.dumps(payload, default=_encode_other))
    except orjson.JSONEncodeError as exc:
        raise InvalidTaskError(
            f"payload cannot be written as JSON: {exc.__cause__ or exc}; pass bytes to send it as it is"
        ) from exc


class Task:
    """A piece of work: what kind, with which data, and how it wants to be enqueued.

    `payload` is sent as it is where it is bytes, as JSON where it is anything else (dataclass, datetime, UUID, pydantic
    model, msgspec struct ...), and not at all where it is None. `headers` are texts for texts. The options are those of
    `TaskOptions`. A task does not change; one object may be enqueued many times.

    Raises:
        InvalidTaskError: the type is blank, or the payload has no JSON form.
        ConfigError: no option of this name; the text has the nearest right one.
        TypeError: a header that is not text for text.
    """

    __slots__ = ("has_payload", "headers", "options", "payload", "type")

    type: str
    payload: Payload
    has_payload: bool
    """Whether there is one: None and `b""` look alike on the wire, but their unique locks differ."""
    headers: Mapping[str, str]
    options: Mapping[str, object]

    def __init__(
        self,
        type: str,
        payload: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[TaskOptions],
    ) -> None:
        _check_type(type)
        if options:
            check_option_names(options)
        if headers:
            _check_headers(headers)
        self.type = type
        self.has_payload = payload is not None
        self.payload = encode_payload(payload)
        self.headers = dict(headers) if headers else {}
        self.options = cast("Mapping[str, object]", options)

    @classmethod
    def received(cls, type: str, payload: bytes, headers: Mapping[str, str]) -> Task:
        """The task that a server has from Redis; nothing is checked or copied, as it came through a client's checks."""
        self = cls.__new__(cls)
        self.type = type
        self.payload = Payload(payload)
        self.has_payload = bool(payload)
        self.headers = headers
        self.options = {}
        return self

    def __repr__(self) -> str:
        shown = f", {bytes(self.payload)!r}" if self.has_payload else ""
        headers = f", headers={dict(self.headers)!r}" if self.headers else ""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Task({self.type!r}{shown}{headers}{options})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Task):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash((self.type, self.payload))


def _check_type(name: object) -> None:
    if not (isinstance(name, str) and name.strip()):
        raise InvalidTaskError("task typename cannot be empty")  # Go's text


def _check_headers(headers: Mapping[Any, Any]) -> None:
    for name, value in headers.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(
                f"headers: wanted text for text, found {type(name).__name__} for {type(value).__name__} at {name!r}"
            )


@dataclass(frozen=True, slots=True, repr=False)
class TaskInfo:
    """What is known about a task that stands in Redis; a picture of one moment, it does not change with the task."""

    id: str
    queue: str
    type: str
    payload: Payload = field(default_factory=Payload)
    headers: Mapping[str, str] = field(default_factory=dict)
    state: TaskState = TaskState.PENDING
    max_retry: int = 25
    retried: int = 0
    """Failed attempts so far."""
    last_error: str | None = None
    last_failed_at: datetime | None = None
    timeout: timedelta | None = None
    deadline_at: datetime | None = None
    group: str | None = None
    next_process_at: datetime | None = None
    """When a scheduled task is due, or the next attempt of one in retry; None in every other state."""
    is_orphaned: bool = False
    """Active, but the lease has run out: its worker is gone, and recovery will take the task up."""
    retention: timedelta = timedelta(0)
    completed_at: datetime | None = None
    result_data: bytes | None = None
    """What the handler wrote or returned; None where there is nothing."""
    pending_since: datetime | None = None
    lease_expires_at: datetime | None = None

    def __repr__(self) -> str:
        """What says something: the fields that are not at their default, and the state."""
        shown = [f"{self.id!r}, queue={self.queue!r}, type={self.type!r}, state={self.state.value!r}"]
        for spec in fields(self)[3:]:
            value = getattr(self, spec.name)
            default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
            if spec.name != "state" and value != default:
                shown.append(f"{spec.name}={bytes(value) if spec.name == 'payload' else value!r}")
        return f"TaskInfo({', '.join(shown)})"
