"""Enqueue options: what they may be, what they make of a task, and the texts in which a scheduler shows them.

The options of a task are defaults; those of the call win, one by one. Where None is the default of an option, None
given to the call takes back what the task had.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from asynq_aio._convert import parse_duration
from asynq_aio._task import OPTION_NAMES, TaskState, check_option_names
from asynq_aio._wire import keys
from asynq_aio._wire.limits import (
    DEFAULT_MAX_RETRY,
    DEFAULT_QUEUE,
    DEFAULT_TIMEOUT,
    INT32_MAX,
    LONGEST_DURATION_SECONDS,
)
from asynq_aio._wire.messages import TaskMessage
from asynq_aio.errors import ConfigError, InvalidTaskError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynq_aio._task import Task

__all__ = ["NewTask", "compose", "format_duration", "option_texts", "parse_option_text", "quote"]

logger = logging.getLogger("asynq_aio")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND_NS: Final = 1_000_000_000
_CALL_NAMES: Final = OPTION_NAMES | {"headers"}
_WHEN: Final = ("process_at", "process_in")


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task that is ready to be written."""

    message: TaskMessage
    state: TaskState
    """PENDING, SCHEDULED or AGGREGATING."""
    process_at_ns: int
    """Unix nanoseconds at which a scheduled task is due, else 0. The score is its whole seconds, cut off."""
    unique_ttl: int
    """Seconds that the lock of `message.unique_key` lives; 0: no lock. For a scheduled task the wait is in it."""


def compose(
    task: Task, options: Mapping[str, object], now_ns: int, *, new_id: Callable[[], str] | None = None
) -> NewTask:
    """The message that enqueueing this task with these options of the call writes; pure.

    Durations are rounded up to whole seconds, so that none becomes 0, which would mean "none". A task is scheduled if
    it is due after `now_ns` (Unix nanoseconds), else it joins its group, else it is pending.

    Raises:
        ConfigError: An option that is unknown, of the wrong type, out of its bounds, or contradicts another.
        InvalidTaskError: An ID, type or header that no message may have.
        TypeError: A header that is not text for text.
    Source:
        hibiken/asynq 0.26, client.go: composeOptions, Client.EnqueueContext
    """
    chosen = _merge(task.options, options)
    get = chosen.get
    queue = _queue(get("queue", DEFAULT_QUEUE))
    max_retry = _max_retry(get("max_retry", DEFAULT_MAX_RETRY))
    task_id = get("task_id")
    task_id = (new_id or _uuid4)() if task_id is None else _task_id(task_id)
    group = _group(get("group"))
    timeout = _whole_seconds("timeout", get("timeout"))
    deadline = _deadline(get("deadline_at"))
    if not timeout and not deadline:
        timeout = DEFAULT_TIMEOUT
    unique_ttl = _unique_ttl(get("unique_for"))
    due_ns = _due_ns(get("process_at"), get("process_in"), now_ns)
    _check_type(task.type)
    message = TaskMessage(
        type=task.type,
        payload=task.payload,
        id=task_id,
        queue=queue,
        retry=max_retry,
        timeout=timeout,
        deadline=deadline,
        unique_key=keys.unique(queue, task.type, task.payload if task.has_payload else None) if unique_ttl else "",
        retention=_whole_seconds("retention", get("retention", timedelta(0)), optional=False),
        group_key=group,
        headers=_headers(task.headers, get("headers")),
    )
    if due_ns > now_ns:
        if unique_ttl:
            unique_ttl = (due_ns - now_ns) // _SECOND_NS + unique_ttl
        return NewTask(message, TaskState.SCHEDULED, due_ns, unique_ttl)
    return NewTask(message, TaskState.AGGREGATING if group else TaskState.PENDING, 0, unique_ttl)


def _merge(of_task: Mapping[str, object], of_call: Mapping[str, object]) -> Mapping[str, object]:
    if not of_call:
        _check_when(of_task)
        return of_task
    if not of_call.keys() <= _CALL_NAMES:
        check_option_names(name for name in of_call if name != "headers")
    _check_when(of_call)
    if not of_task:
        return of_call
    _check_when(of_task)
    chosen = {**of_task, **of_call}
    if "process_in" in of_call:
        chosen["process_at"] = of_call.get("process_at")
    elif "process_at" in of_call:
        chosen["process_in"] = None
    return chosen


def _check_when(options: Mapping[str, object]) -> None:
    if options.get("process_at") is not None and options.get("process_in") is not None:
        raise ConfigError(
            f"process_at={options['process_at']!r} and process_in={options['process_in']!r} contradict each other:"
            " give one of them"
        )


def _uuid4() -> str:
    """A random UUID as text; three fifths of the cost of the module uuid."""
    bits = int.from_bytes(os.urandom(16), "big")
    digits = f"{bits & ~(0xF << 76) & ~(0b11 << 62) | 4 << 76 | 0b10 << 62:032x}"  # version 4, variant RFC 4122
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


# -- one option each: its type, its bounds


def _wrong_type(name: str, wanted: str, value: object) -> ConfigError:
    return ConfigError(f"option {name}: wanted {wanted}, not {value!r} ({type(value).__name__})")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, "a str", value)
    return value


def _fault_of(text: str) -> str | None:
    """Why no key or message may carry this text."""
    if "\0" in text:
        return "contains a NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"string field contains invalid UTF-8: a lone surrogate at position {error.start}"
    return None


def _queue(value: object) -> str:
    return _checked_queue(_text("queue", value))


@lru_cache(maxsize=4096)  # so that the warning comes once for each name; what is refused is refused each time
def _checked_queue(name: str) -> str:
    if not name.strip():
        raise ConfigError("queue name must contain one or more characters")
    if fault := _fault_of(name):
        raise ConfigError(f"option queue: {name!r}: {fault}")
    if name.startswith("}"):
        raise ConfigError(
            f"option queue: {name!r} begins with '}}': the hash tag of its keys would be empty, and they would lie in"
            " different slots of a cluster; choose another first character"
        )
    if "}" in name:
        logger.warning(
            "queue %r: its keys have the hash tag %r only, up to the first '}'; it shares its cluster slot with every"
            " queue whose name begins so",
            name,
            name.partition("}")[0],
        )
    return name


def _max_retry(value: object) -> int:
    if type(value) is not int:
        raise _wrong_type("max_retry", "an int", value)
    if not 0 <= value <= INT32_MAX:
        raise ConfigError(f"option max_retry: must be between 0 and {INT32_MAX}, not {value}")
    return value


def _task_id(value: object) -> str:
    text = _text("task_id", value)
    if not text.strip():
        raise InvalidTaskError("task ID cannot be empty")
    if fault := _fault_of(text):
        raise InvalidTaskError(f"option task_id: {text!r}: {fault}")
    return text


def _group(value: object) -> str:
    if value is None:
        return ""
    text = _text("group", value)
    if not text.strip():
        raise ConfigError("group key cannot be empty")
    if fault := _fault_of(text):
        raise ConfigError(f"option group: {text!r}: {fault}")
    return text


def _check_type(task_type: str) -> None:
    if fault := _fault_of(task_type):
        raise InvalidTaskError(f"task type {task_type!r}: {fault}")


def _duration(name: str, value: object) -> timedelta:
    if not isinstance(value, timedelta):
        example = value if isinstance(value, int | float) and not isinstance(value, bool) else 30
        raise _wrong_type(name, f"a timedelta, such as timedelta(seconds={example})", value)
    return value


def _whole_seconds(name: str, value: object, *, optional: bool = True) -> int:
    """Rounded up; 0 for none."""
    if value is None and optional:
        return 0
    duration = _duration(name, value)
    if duration.days < 0:
        raise ConfigError(f"option {name}: must not be negative, not {duration!r}")
    seconds = duration.days * 86_400 + duration.seconds + (duration.microseconds > 0)
    if seconds > LONGEST_DURATION_SECONDS:
        raise ConfigError(f"option {name}: must be at most {LONGEST_DURATION_SECONDS} s (292 years), not {duration!r}")
    return seconds


def _unique_ttl(value: object) -> int:
    if value is None:
        return 0
    if _duration("unique_for", value) < timedelta(seconds=1):
        raise ConfigError("Unique TTL cannot be less than 1s")
    return _whole_seconds("unique_for", value)


def _moment(name: str, value: object) -> datetime:
    if not isinstance(value, datetime):
        raise _wrong_type(name, "an aware datetime, such as datetime.now(UTC) + timedelta(hours=1)", value)
    if value.utcoffset() is None:
        raise ConfigError(
            f"option {name}: {value!r} has no time zone; write .replace(tzinfo=UTC) where it is UTC,"
            " .astimezone() where it is local time"
        )
    return value


def _unix_ns(moment: datetime) -> int:
    return _nanoseconds(moment - _EPOCH)


def _nanoseconds(duration: timedelta) -> int:
    return (duration.days * 86_400 + duration.seconds) * _SECOND_NS + duration.microseconds * 1_000


def _deadline(value: object) -> int:
    """Unix seconds, cut off; 0 for none."""
    if value is None:
        return 0
    moment = _moment("deadline_at", value)
    seconds = _unix_ns(moment) // _SECOND_NS
    if seconds <= 0:
        raise ConfigError(f"option deadline_at: must be after 1970, not {moment!r}; None is no deadline")
    return seconds


def _due_ns(process_at: object, process_in: object, now_ns: int) -> int:
    """Unix nanoseconds; what is not after now means now."""
    if process_in is not None:
        delay = _duration("process_in", process_in)
        if delay.days < 0:
            return now_ns
        _whole_seconds("process_in", delay)  # for its upper bound
        return now_ns + _nanoseconds(delay)
    if process_at is not None:
        return _unix_ns(_moment("process_at", process_at))
    return now_ns


def _headers(of_task: Mapping[str, str], of_call: object) -> Mapping[str, str]:
    headers = of_task if of_call is None else {**of_task, **_text_pairs(of_call)}
    for name, value in headers.items():
        if not (name.isascii() and value.isascii()):
            try:
                name.encode()
                value.encode()
            except UnicodeEncodeError as error:
                raise InvalidTaskError(
                    f"header {name!r}: {value!r}: string field contains invalid UTF-8: a lone surrogate"
                ) from error
    return headers


def _text_pairs(headers: object) -> Mapping[str, str]:
    if not isinstance(headers, Mapping):
        raise TypeError(f"headers: wanted a mapping of str to str, not {headers!r} ({type(headers).__name__})")
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"headers: wanted str for str, not {value!r} for {name!r}")
    return headers


# -- the texts of Go's options, as they stand in SchedulerEntry.enqueue_options


_GO_NAMES: Final = {
    "max_retry": "MaxRetry",
    "queue": "Queue",
    "task_id": "TaskID",
    "timeout": "Timeout",
    "deadline_at": "Deadline",
    "unique_for": "Unique",
    "process_at": "ProcessAt",
    "process_in": "ProcessIn",
    "retention": "Retention",
    "group": "Group",
    "headers": "Header",
}
_OUR_NAMES: Final = {go: ours for ours, go in _GO_NAMES.items()}
_WEEKDAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_OPTION: Final = re.compile(r"(\w+)\((.*)\)", re.DOTALL)
_INTEGER: Final = re.compile(r"[+-]?[0-9]+")
_ZONE_NAME: Final = re.compile(r"[A-Za-z]{3,5}|[+-][0-9]{2}(?:[0-9]{2})?")
_UNIX_DATE: Final = re.compile(
    rf"(?:{'|'.join(_WEEKDAYS)}) (?P<month>{'|'.join(_MONTHS)}) (?P<day>[ 0-9][0-9])"
    r" (?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
    r" (?P<zone>[A-Za-z]{3,5}|(?P<sign>[+-])(?P<hours>[0-9]{2})(?P<minutes>[0-9]{2})?) (?P<year>[0-9]{4})"
)
_QUOTES: Final = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    "\\": r"\\",
    '"': r"\"",
}
_ESCAPE: Final = rb'\\(?:x([0-9A-Fa-f]{2})|([0-3][0-7]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([abfnrtv\\"]))'
_ESCAPES: Final = re.compile(_ESCAPE)
_QUOTED: Final = re.compile(rb'"((?:[^"\\\n]|' + _ESCAPE + rb')*)"')
_UNESCAPED: Final = {text[1:].encode(): char.encode() for char, text in _QUOTES.items()}
_HTML: Final = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def option_texts(options: Mapping[str, object]) -> list[str]:
    """The options as a scheduler entry shows them, in their order; those that are None are not given.

    Exactly Go's texts, which Go's tools read. Go cannot read a queue name with `)`, a task ID or a group.

    Raises:
        ConfigError: An option that is unknown or of the wrong type. Bounds are the business of `compose`.
    Source:
        hibiken/asynq 0.26, client.go: the String methods of the options
    """
    check_option_names(name for name in options if name != "headers")
    texts = []
    for name, value in options.items():
        if value is None:
            continue
        if name == "headers":
            texts += [f"Header({_json_pair(*pair)})" for pair in _text_pairs(value).items()]
        else:
            texts.append(f"{_GO_NAMES[name]}({_argument(name, value)})")
    return texts


def parse_option_text(text: str) -> tuple[str, object] | None:
    """The option's name and value; None where the text is none that `option_texts` or Go writes.

    Reads what Go's reader loses too: parentheses in names, task IDs, groups, numeric zones. A zone that is only a name
    counts as UTC, as in Go where the zone is not the reader's own.
    """
    match = _OPTION.fullmatch(text)
    name = _OUR_NAMES.get(match[1]) if match else None
    if match is None or name is None:
        return None
    argument = match[2]
    try:
        value = _parse_argument(name, argument)
    except (ValueError, OverflowError):  # of no form that the option has, or a moment or duration that does not exist
        return None
    return None if value is None else (name, value)


def _argument(name: str, value: object) -> str:
    match name:
        case "max_retry":
            if not isinstance(value, int):
                raise _wrong_type(name, "an int", value)
            return str(max(0, value))  # Go takes a negative count as 0
        case "queue" | "task_id" | "group":
            return quote(_text(name, value))
        case "deadline_at" | "process_at":
            return _unix_date(_moment(name, value))
        case _:
            return format_duration(_nanoseconds(_duration(name, value)))


def _parse_argument(name: str, argument: str) -> object:
    match name:
        case "max_retry":
            return max(0, int(argument)) if _INTEGER.fullmatch(argument) else None
        case "queue" | "task_id" | "group":
            return _unquote(argument)
        case "deadline_at" | "process_at":
            return _parse_unix_date(argument)
        case "headers":
            return _parse_json_pair(argument)
        case _:
            return parse_duration(argument)


def format_duration(nanoseconds: int) -> str:
    """Go's text: `1h30m0s`, `1.5s`, `250ms`.

    Source:
        Go, time.Duration.String
    """
    sign, left = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    if left == 0:
        return "0s"
    if left < _SECOND_NS:
        unit, size = ("ns", 1) if left < 1_000 else ("µs", 1_000) if left < 1_000_000 else ("ms", 1_000_000)
        return f"{sign}{_decimal(left, size)}{unit}"
    minutes, left = divmod(left, 60 * _SECOND_NS)
    hours, minutes_left = divmod(minutes, 60)
    before = f"{hours}h{minutes_left}m" if hours else f"{minutes_left}m" if minutes else ""
    return f"{sign}{before}{_decimal(left, _SECOND_NS)}s"


def _decimal(value: int, unit: int) -> str:
    """`value / unit`, exactly; `unit` is a power of ten."""
    whole, rest = divmod(value, unit)
    return f"{whole}.{rest:0{len(str(unit)) - 1}}".rstrip("0") if rest else str(whole)


def quote(text: str) -> str:
    r"""Go's text for a string: `"tab\t"`, `"\u00a0"`; `"\xff"` for a byte that `surrogateescape` has kept.

    Source:
        Go, strconv.Quote
    """
    return '"' + "".join(_QUOTES.get(char) or (char if char.isprintable() else _escape(char)) for char in text) + '"'


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    if 0xD800 <= code <= 0xDFFF:
        low_bytes = 0xDC80 <= code <= 0xDCFF
        raw = bytes([code - 0xDC00]) if low_bytes else char.encode("utf-8", "surrogatepass")
        return "".join(f"\\x{byte:02x}" for byte in raw)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _unquote(text: str) -> str | None:
    match = _QUOTED.fullmatch(text.encode("utf-8", "surrogateescape"))
    if match is None:
        return None
    return _ESCAPES.sub(_unescape, match[1]).decode("utf-8", "surrogateescape")


def _unescape(match: re.Match[bytes]) -> bytes:
    hexadecimal, octal, short, long, char = match.groups()
    if char:
        return _UNESCAPED[char]
    if short or long:
        return chr(int(short or long, 16)).encode()
    return bytes([int(hexadecimal, 16) if hexadecimal else int(octal, 8)])


def _unix_date(moment: datetime) -> str:
    """`Sat Jan  5 07:08:09 UTC 2030`, in the moment's own zone; by hand, since strftime follows the locale."""
    zone = moment.tzname() or ""
    if not _ZONE_NAME.fullmatch(zone):
        minutes = int((moment.utcoffset() or timedelta(0)).total_seconds() / 60)
        zone = f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}{abs(minutes) % 60:02}"
    day = f"{_WEEKDAYS[moment.weekday()]} {_MONTHS[moment.month - 1]} {moment.day:2}"
    return f"{day} {moment.hour:02}:{moment.minute:02}:{moment.second:02} {zone} {moment.year:04}"


def _parse_unix_date(text: str) -> datetime | None:
    match = _UNIX_DATE.fullmatch(text)
    if match is None:
        return None
    offset = timedelta(hours=int(match["hours"] or 0), minutes=int(match["minutes"] or 0))
    zone = timezone(-offset if match["sign"] == "-" else offset) if match["sign"] else timezone(offset, match["zone"])
    return datetime(
        int(match["year"]),
        _MONTHS.index(match["month"]) + 1,
        int(match["day"]),
        int(match["hour"]),
        int(match["minute"]),
        int(match["second"]),
        tzinfo=zone,
    )


def _json_pair(name: str, value: str) -> str:
    """A JSON array as Go's encoding/json writes it."""
    return json.dumps([name, value], ensure_ascii=False, separators=(",", ":")).translate(_HTML)


def _parse_json_pair(text: str) -> dict[str, str] | None:
    match json.loads(text):
        case [str(name), str(value)]:
            return {name: value}
        case _:
            return None
