"""What a JSON value must look like to become a Python value: the rules that typed getters and typed payloads share.

Strict, so that a wrong payload is seen where it arrives and not three calls later: a text is no number, `true` is no
number, a moment has a zone. The rules depend on the type alone, never on which libraries are installed; pydantic models
and msgspec structs are given to their own library, by their own rules.
"""

from __future__ import annotations

import base64
import binascii
import collections.abc
import dataclasses
import enum
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, Final, TypeGuard
from uuid import UUID

import orjson

from asynq_aio.errors import ConfigError, PayloadError

__all__ = [
    "Converter",
    "MismatchError",
    "converter_for",
    "describe",
    "is_model",
    "is_msgspec_struct",
    "is_pydantic_model",
    "name_of",
    "parse_duration",
    "parse_json",
    "to_bool",
    "to_datetime",
    "to_dict",
    "to_float",
    "to_int",
    "to_list",
    "to_str",
    "to_timedelta",
]

Converter = Callable[[object], object]
"""From a parsed JSON value to the Python value; raises MismatchError."""

_EXACT_FLOAT: Final = 2**53
"""The largest magnitude up to which every whole number is a float of its own; beyond it `3.0` may have been another."""

_SHOWN: Final = 40
"""Characters of a found text that an error repeats: enough to recognise it, too few to copy a payload into the log."""


class MismatchError(Exception):
    """A value is not what its type wants. `path` grows from the inside out as the error leaves the containers."""

    def __init__(self, wanted: str, found: str) -> None:
        super().__init__(wanted, found)
        self.wanted, self.found = wanted, found
        self.path: list[str] = []

    def inside(self, step: str) -> MismatchError:
        """Put one step in front of the path: `.name` or `[3]`."""
        self.path.insert(0, step)
        return self

    def as_payload_error(self) -> PayloadError:
        """The same as the error that users see; its key reads `items[2].price`."""
        return PayloadError("".join(self.path).removeprefix(".") or None, self.wanted, self.found)


def describe(value: object) -> str:
    """Say what a JSON value is, briefly: `the text 'abc'`, `the number 3.5`, `a list of 2`, `null`."""
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value if len(value) <= _SHOWN else value[:_SHOWN] + '...'!r}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case _:
            return type(value).__name__


def parse_json(payload: bytes, wanted: str) -> Any:  # noqa: ANN401  (JSON has no narrower type that is of use)
    """Parse the whole payload.

    Raises:
        PayloadError: empty, or not JSON; `wanted` goes into it.
    """
    if not payload:
        raise PayloadError(None, wanted, "no payload")
    try:
        return orjson.loads(memoryview(payload))  # a view, as orjson refuses subclasses of bytes
    except orjson.JSONDecodeError as exc:
        raise PayloadError(None, wanted, f"{len(payload)} bytes that are not JSON ({exc})") from exc


# --- scalars -------------------------------------------------------------------------------------------------------


def to_int(value: object) -> int:
    """A whole number. `3.0` is one, as some JSON writers know only floats; `true` and `"3"` are not."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT_FLOAT:
        return int(value)
    raise MismatchError("a whole number", describe(value))


def to_float(value: object) -> float:
    """Any JSON number; `true` and `"3"` are none."""
    if type(value) is float or type(value) is int:
        return float(value)
    raise MismatchError("a number", describe(value))


def to_str(value: object) -> str:
    """A text; numbers are not made into one."""
    if isinstance(value, str):
        return value
    raise MismatchError("a text", describe(value))


def to_bool(value: object) -> bool:
    """`true` or `false`; neither 0 and 1 nor texts."""
    if isinstance(value, bool):
        return value
    raise MismatchError("true or false", describe(value))


def to_list(value: object) -> list[Any]:
    """A JSON array, as it is."""
    if isinstance(value, list):
        return value
    raise MismatchError("a list", describe(value))


def to_dict(value: object) -> dict[str, Any]:
    """A JSON object, as it is."""
    if isinstance(value, dict):
        return value
    raise MismatchError("an object", describe(value))


def to_datetime(value: object) -> datetime:
    """A moment from ISO 8601 with a zone (Go's RFC 3339 is that); the result is in UTC, cut off to microseconds."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is not None:
                return moment.astimezone(UTC)
        except (ValueError, OverflowError):
            pass  # told below, with what was found
    raise MismatchError('a moment in ISO 8601 with a zone, such as "2030-01-31T08:00:00Z"', describe(value))


def to_timedelta(value: object) -> timedelta:
    """A duration from a number of seconds, or from Go's text for one, such as `"1h30m"`."""
    try:
        if type(value) is float or type(value) is int:
            return timedelta(seconds=value)
        if isinstance(value, str):
            return parse_duration(value)
    except (ValueError, OverflowError):
        pass  # told below, with what was found
    raise MismatchError('a duration: seconds as a number, or a text such as "1h30m"', describe(value))


_NANOSECONDS: Final = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5, the micro sign, which Go writes
    "μs": 1_000,  # U+03BC, the Greek letter: Go reads both
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60 * 1_000_000_000,
    "h": 3_600 * 1_000_000_000,
}
_DURATION_PART: Final = re.compile(r"(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?(ns|us|µs|μs|ms|s|m|h)")


def parse_duration(text: str) -> timedelta:
    """Read a duration as Go's `time.ParseDuration` does: `1h30m`, `-1.5s`, `300ms`, `0`; cut off to microseconds.

    Raises:
        ValueError: not of that form.
        OverflowError: more than a timedelta holds.
    """
    sign, rest = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    if rest == "0":
        return timedelta(0)
    nanoseconds, end = 0, 0
    while part := _DURATION_PART.match(rest, end):
        whole, fraction, unit = part[1], part[2] or "", _NANOSECONDS[part[3]]
        nanoseconds += int(whole or 0) * unit + int(fraction or 0) * unit // 10 ** len(fraction)
        end = part.end()
    if not end or end != len(rest):
        raise ValueError(f'not a duration: {text!r}; expected a text such as "1h30m", "1.5s" or "300ms"')
    return sign * timedelta(microseconds=nanoseconds // 1_000)


def _to_any(value: object) -> object:
    return value


def _to_none(value: object) -> None:
    if value is not None:
        raise MismatchError("null", describe(value))


def _to_decimal(value: object) -> Decimal:
    if type(value) is int or type(value) is float or isinstance(value, str):
        try:
            number = Decimal(str(value))  # by the text: 1.1 shall stay 1.1
            if number.is_finite():
                return number
        except InvalidOperation:
            pass  # told below, with what was found
    raise MismatchError("a decimal number, or a text of one", describe(value))


def _to_date(value: object) -> date:
    if isinstance(value, str):
        try:
            return date.fromisoformat(value)
        except ValueError:
            pass  # told below, with what was found
    raise MismatchError('a date, such as "2030-01-31"', describe(value))


def _to_time(value: object) -> time:
    if isinstance(value, str):
        try:
            return time.fromisoformat(value)
        except ValueError:
            pass  # told below, with what was found
    raise MismatchError('a time of day, such as "08:30:00"', describe(value))


def _to_uuid(value: object) -> UUID:
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass  # told below, with what was found
    raise MismatchError("a UUID", describe(value))


def _to_bytes(value: object) -> bytes:
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            pass  # told below, with what was found
    raise MismatchError("bytes as Base64", describe(value))


_SCALARS: Final[Mapping[object, Converter]] = {
    Any: _to_any,
    object: _to_any,
    None: _to_none,
    types.NoneType: _to_none,
    bool: to_bool,
    int: to_int,
    float: to_float,
    str: to_str,
    bytes: _to_bytes,
    Decimal: _to_decimal,
    datetime: to_datetime,
    date: _to_date,
    time: _to_time,
    timedelta: to_timedelta,
    UUID: _to_uuid,
    list: to_list,
    dict: to_dict,
}

_TRANSPARENT: Final = frozenset(
    {typing.Annotated, typing.Required, typing.NotRequired, typing.Final, getattr(typing, "ReadOnly", typing.Final)}
)
"""What stands around a type without changing what its values look like; `ReadOnly` came with Python 3.13."""

SUPPORTED: Final = (
    "dataclasses, TypedDict, pydantic models, msgspec structs; in their fields also bool, int, float, str, "
    "bytes (Base64), Decimal, datetime, date, time, timedelta, UUID, Enum, Literal, list, tuple, set, frozenset, dict, "
    "`X | None` and Any"
)


# --- what is which -------------------------------------------------------------------------------------------------


def is_pydantic_model(model: object) -> TypeGuard[type]:
    """Tell whether this is a class of pydantic's: a BaseModel, or a dataclass that pydantic checks.

    Whoever has such a class has imported pydantic; so it is looked up, never imported.
    """
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or not isinstance(model, type):
        return False
    return issubclass(model, pydantic.BaseModel) or "__pydantic_validator__" in vars(model)


def is_msgspec_struct(model: object) -> TypeGuard[type]:
    """Tell whether this is a struct of msgspec's."""
    msgspec = sys.modules.get("msgspec")
    return msgspec is not None and isinstance(model, type) and issubclass(model, msgspec.Struct)


def is_model(model: object) -> bool:
    """Tell whether a handler may ask for its payload in this type."""
    return (
        (isinstance(model, type) and dataclasses.is_dataclass(model))
        or typing.is_typeddict(model)
        or is_pydantic_model(model)
        or is_msgspec_struct(model)
    )


def name_of(model: object) -> str:
    """The name of a type as a person writes it."""
    return model.__qualname__ if isinstance(model, type) and not typing.get_args(model) else str(model)


# --- composed types ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def converter_for(model: object) -> Converter:
    """Make the converter of a type; looked at once, so that a type that cannot work is refused before any task comes.

    Raises:
        ConfigError: the type, or one inside it, has no JSON form that we know; or an annotation names nothing.
    """
    return _Builder().build(model)


class _Builder:
    """Builds the converters of one type and of all types in it; knows those under construction, for recursive types."""

    def __init__(self) -> None:
        self._objects: dict[object, _Object] = {}

    def build(self, model: object) -> Converter:
        try:
            if model in _SCALARS:
                return _SCALARS[model]
        except TypeError:  # unhashable: Annotated or Literal over a list; told apart below
            pass
        if is_pydantic_model(model):
            return _pydantic(model)
        if is_msgspec_struct(model):
            return _msgspec(model)
        if isinstance(model, type) and issubclass(model, enum.Enum):
            return _enum(model)
        if isinstance(model, typing.NewType):
            return self.build(model.__supertype__)
        if is_model(model):
            return self._object(model)
        if hasattr(model, "__value__"):  # `type X = ...` of Python 3.12
            return self.build(model.__value__)
        return self._generic(model, typing.get_origin(model) or model, typing.get_args(model))

    def _generic(self, model: object, origin: object, args: tuple[Any, ...]) -> Converter:
        if origin in _TRANSPARENT and args:
            return self.build(args[0])
        if origin is typing.Literal:
            return _literal(args)
        if origin is typing.Union or origin is types.UnionType:
            return self._union(model, args)
        if origin in {list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection}:
            return _items(list, self.build(args[0] if args else Any))
        if origin in {set, collections.abc.Set}:
            return _items(set, self.build(args[0] if args else Any))
        if origin is frozenset:
            return _items(frozenset, self.build(args[0] if args else Any))
        if origin is tuple:
            if not args or (len(args) == 2 and args[1] is Ellipsis):  # tuple[X, ...]
                return _items(tuple, self.build(args[0] if args else Any))
            return _tuple([self.build(arg) for arg in args])
        if origin in {dict, collections.abc.Mapping, collections.abc.MutableMapping}:
            key, value = args or (str, Any)
            if not (key in {str, UUID, Any} or (isinstance(key, type) and issubclass(key, enum.Enum))):
                raise ConfigError(
                    f"keys of {name_of(model)}: the keys of a JSON object are texts; use str, UUID or an Enum"
                )
            return _mapping(self.build(key), self.build(value))
        raise ConfigError(f"{name_of(model)} has no JSON form that is known here; supported are {SUPPORTED}")

    def _union(self, model: object, args: tuple[Any, ...]) -> Converter:
        if sum(is_model(arg) for arg in args) > 1:
            raise ConfigError(
                f"{model}: two kinds of object cannot be told apart; use one, or a discriminated union of pydantic's"
            )
        # Python holds `str | UUID` and `UUID | str` for equal, so order must not matter: what fits any text comes last.
        kinds = sorted((arg for arg in args if arg is not types.NoneType), key=lambda arg: (arg is str, arg is bytes))
        members = [self.build(kind) for kind in kinds]
        if len(members) == 1:
            return _optional(members[0])
        numbers = {kind: _SCALARS[kind] for kind in kinds if kind in {int, float}}  # each stays what it is
        return _first_of(members, numbers, allow_none=types.NoneType in args)

    def _object(self, model: Any) -> _Object:  # noqa: ANN401  (a dataclass or a TypedDict: no common type)
        if model in self._objects:
            return self._objects[model]
        made = self._objects[model] = _Object(model)
        try:
            hints = typing.get_type_hints(model, localns={model.__name__: model}, include_extras=True)
        except NameError as exc:
            raise ConfigError(
                f"{name_of(model)}: the annotation {exc.name!r} names nothing in "
                f"{model.__module__}; import it there, outside of `if TYPE_CHECKING`"
            ) from exc
        if typing.is_typeddict(model):
            names, required = list(hints), {name for name in hints if _is_required(model, name, hints[name])}
        else:
            if any(type(hint) is dataclasses.InitVar for hint in hints.values()):
                raise ConfigError(
                    f"{name_of(model)}: a dataclass with an InitVar cannot be made from JSON; use a field"
                )
            fields = [field for field in dataclasses.fields(model) if field.init]
            names = [field.name for field in fields]
            no_default = dataclasses.MISSING
            required = {f.name for f in fields if f.default is no_default and f.default_factory is no_default}
        for name in names:
            try:
                made.fields.append((name, f".{name}", self.build(hints[name]), name in required))
            except ConfigError as exc:
                raise ConfigError(f"{name_of(model)}.{name}: {exc}") from exc
        return made


def _is_required(model: Any, name: str, hint: object) -> bool:  # noqa: ANN401  (no type for a TypedDict class)
    """Tell whether a TypedDict must have this key; its own __required_keys__ does not see into annotations as text."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin = typing.get_origin(hint)
    return origin is typing.Required or (origin is not typing.NotRequired and name in model.__required_keys__)


class _Object:
    """Converts a JSON object into a dataclass or a TypedDict; keys that it does not know are ignored, as Go does."""

    def __init__(self, model: Callable[..., object]) -> None:
        self.model = model
        self.fields: list[tuple[str, str, Converter, bool]] = []  # name, step of the path, converter, required

    def __call__(self, value: object) -> object:
        if not isinstance(value, dict):
            raise MismatchError(f"an object for {name_of(self.model)}", describe(value))
        found: dict[str, object] = {}
        for name, step, convert, required in self.fields:
            if name in value:
                try:
                    found[name] = convert(value[name])
                except MismatchError as mismatch:
                    raise mismatch.inside(step) from mismatch.__cause__
            elif required:
                raise MismatchError(f"a value, as {name_of(self.model)} has no default for it", "no such key").inside(
                    step
                )
        try:
            return self.model(**found)
        except (ValueError, TypeError) as exc:  # what a __post_init__ says
            raise MismatchError(f"a valid {name_of(self.model)}", f"{type(exc).__name__}: {exc}") from exc


def _optional(convert: Converter) -> Converter:
    return lambda value: None if value is None else convert(value)


def _first_of(members: list[Converter], exact: Mapping[type, Converter], *, allow_none: bool) -> Converter:
    def convert(value: object) -> object:
        if value is None and allow_none:
            return None
        if type(value) in exact:
            return exact[type(value)](value)
        wanted = ["null"] if allow_none else []
        for member in members:
            try:
                return member(value)
            except MismatchError as mismatch:
                wanted.append(mismatch.wanted)
        raise MismatchError(" or ".join(wanted), describe(value))

    return convert


def _items(build: Callable[[list[object]], object], convert: Converter) -> Converter:
    def convert_items(value: object) -> object:
        items: list[object] = []
        for item in to_list(value):
            try:
                items.append(convert(item))
            except MismatchError as mismatch:
                raise mismatch.inside(f"[{len(items)}]") from mismatch.__cause__
        try:
            return build(items)
        except TypeError as exc:  # a set of lists
            raise MismatchError("hashable items", f"{exc}") from exc

    return convert_items


def _tuple(members: list[Converter]) -> Converter:
    def convert(value: object) -> object:
        values = to_list(value)
        if len(values) != len(members):
            raise MismatchError(f"a list of {len(members)}", describe(value))
        items: list[object] = []
        for member, item in zip(members, values, strict=True):
            try:
                items.append(member(item))
            except MismatchError as mismatch:
                raise mismatch.inside(f"[{len(items)}]") from mismatch.__cause__
        return tuple(items)

    return convert


def _mapping(convert_key: Converter, convert_value: Converter) -> Converter:
    def convert(value: object) -> object:
        made: dict[object, object] = {}
        for key, item in to_dict(value).items():
            try:
                made[convert_key(key)] = convert_value(item)
            except MismatchError as mismatch:
                raise mismatch.inside(f"[{key!r}]") from mismatch.__cause__
        return made

    return convert


def _literal(values: tuple[object, ...]) -> Converter:
    def convert(value: object) -> object:
        for literal in values:
            if type(literal) is type(value) and literal == value:
                return literal
        raise MismatchError("one of " + ", ".join(map(repr, values)), describe(value))

    return convert


def _enum(model: type[enum.Enum]) -> Converter:
    def convert(value: object) -> object:
        try:
            if not isinstance(value, bool) or any(type(member.value) is bool for member in model):
                return model(value)  # the value only: a bool must not become the member of 1
        except ValueError:
            pass  # told below, with what was found
        raise MismatchError("one of " + ", ".join(repr(member.value) for member in model), describe(value))

    return convert


def _pydantic(model: type) -> Converter:
    pydantic = sys.modules["pydantic"]
    adapter = pydantic.TypeAdapter(model)

    def convert(value: object) -> object:
        try:
            # By way of JSON: pydantic's rules for JSON (texts as dates, lists as sets) differ from those for Python.
            return adapter.validate_json(orjson.dumps(value))
        except pydantic.ValidationError as exc:
            first, more = exc.errors()[0], exc.error_count() - 1
            said = f"{first['msg']}{f' (and {more} more)' if more else ''}"
            mismatch = MismatchError(f"a valid {name_of(model)}: {said}", describe(first["input"]))
            mismatch.path = [f".{step}" if isinstance(step, str) else f"[{step}]" for step in first["loc"]]
            raise mismatch from exc

    return convert


def _msgspec(model: type) -> Converter:
    msgspec = sys.modules["msgspec"]

    def convert(value: object) -> object:
        try:
            return msgspec.json.decode(orjson.dumps(value), type=model)
        except msgspec.ValidationError as exc:
            said, _, where = str(exc).partition(" - at `$")
            mismatch = MismatchError(f"a valid {name_of(model)}", said)
            mismatch.path = [where.rstrip("`")] if where else []
            raise mismatch from exc

    return convert
