"""Task, Payload and the rules by which JSON becomes Python values."""

from __future__ import annotations

import copy
import enum
import pickle
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, NotRequired, Optional, Required, TypedDict
from uuid import UUID

import msgspec
import orjson
import pydantic
import pydantic.dataclasses
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynq_aio._convert import parse_duration
from asynq_aio._task import OPTION_NAMES, Payload, Task, TaskInfo, TaskState
from asynq_aio.errors import ConfigError, InvalidTaskError, PayloadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nowhere import Missing  # type: ignore[import-not-found]

ID = UUID("8c1b5c1e-1111-4222-8333-123456789abc")
UserID = NewType("UserID", int)


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    name: str
    price: Decimal = Decimal(1)


class Address(TypedDict):
    city: str
    zip: NotRequired[str]


class Loose(TypedDict, total=False):
    a: Required[int]
    b: Annotated[Required[int], "both"]
    c: int


@dataclass
class Order:
    id: UUID
    at: datetime
    items: list[Item]
    by_name: dict[str, Item] = field(default_factory=dict)
    first: Item | None = None
    old: Optional[Item] = None  # noqa: UP045  (the old way to write it)
    color: Color = Color.RED
    level: Level = Level.LOW
    wait: timedelta = timedelta(0)
    day: date | None = None
    hour: time | None = None
    raw: bytes = b""
    size: Literal["s", "m"] = "s"
    pair: tuple[int, str] | None = None
    many: tuple[int, ...] = ()
    tags: set[str] = field(default_factory=set)
    address: Address | None = None
    user: UserID | None = None
    noted: Annotated[float, "in meters"] = 0.0
    number: int | str = 0
    anything: Any = None
    made: int = field(init=False, default=7)


@dataclass
class Node:
    value: int
    next: Node | None = None


@dataclass
class Positive:
    n: int

    def __post_init__(self) -> None:
        """Refuse what is below 1."""
        if self.n < 1:
            raise ValueError("n must be positive")


class Model(pydantic.BaseModel):
    n: int = pydantic.Field(ge=1)
    at: datetime | None = None
    parts: list[Item] = []


@pydantic.dataclasses.dataclass
class Checked:
    n: int = pydantic.Field(ge=1)


class Struct(msgspec.Struct):
    n: int
    items: list[Item] = []


@dataclass
class Holder:
    model: Model
    struct: Struct | None = None


def payload(value: object) -> Payload:
    """The payload that has this value as JSON."""
    return Payload(orjson.dumps(value))


# -- getters


@pytest.mark.parametrize(
    ("getter", "value", "wanted"),
    [
        (Payload.get_int, 3, 3),
        (Payload.get_int, 3.0, 3),
        (Payload.get_int, -(2**63), -(2**63)),
        (Payload.get_float, 3, 3.0),
        (Payload.get_float, 3.5, 3.5),
        (Payload.get_str, "", ""),
        (Payload.get_bool, False, False),
        (Payload.get_list, [1, "a"], [1, "a"]),
        (Payload.get_dict, {"a": {}}, {"a": {}}),
        (Payload.get_datetime, "2030-01-31T08:00:00Z", datetime(2030, 1, 31, 8, tzinfo=UTC)),
        (Payload.get_datetime, "2030-01-31T08:00:00+02:00", datetime(2030, 1, 31, 6, tzinfo=UTC)),
        (Payload.get_datetime, "2030-01-31T08:00:00.123456789Z", datetime(2030, 1, 31, 8, 0, 0, 123456, tzinfo=UTC)),
        (Payload.get_timedelta, 90, timedelta(seconds=90)),
        (Payload.get_timedelta, 0.5, timedelta(milliseconds=500)),
        (Payload.get_timedelta, "1h30m", timedelta(hours=1, minutes=30)),
    ],
)
def test_getter_gives_its_type(getter: Callable[[Payload, str], object], value: object, wanted: object) -> None:
    """A getter gives a value of exactly the type that it names."""
    found = getter(payload({"k": value}), "k")
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("getter", "value", "text"),
    [
        (Payload.get_int, True, "payload key 'k': wanted a whole number, found true"),
        (Payload.get_int, 3.5, "payload key 'k': wanted a whole number, found the number 3.5"),
        (Payload.get_int, 1e300, "payload key 'k': wanted a whole number, found the number 1e+300"),
        (Payload.get_int, "3", "payload key 'k': wanted a whole number, found the text '3'"),
        (Payload.get_int, None, "payload key 'k': wanted a whole number, found null"),
        (Payload.get_float, False, "payload key 'k': wanted a number, found false"),
        (Payload.get_float, "x" * 50, f"payload key 'k': wanted a number, found the text '{'x' * 40}...'"),
        (Payload.get_str, 3, "payload key 'k': wanted a text, found the number 3"),
        (Payload.get_bool, 1, "payload key 'k': wanted true or false, found the number 1"),
        (Payload.get_list, {}, "payload key 'k': wanted a list, found an object"),
        (Payload.get_dict, [1, 2], "payload key 'k': wanted an object, found a list of 2"),
        (
            Payload.get_datetime,
            "2030-01-31T08:00:00",
            (
                "payload key 'k': wanted a moment in ISO 8601 with a zone, such as \"2030-01-31T08:00:00Z\", "
                "found the text '2030-01-31T08:00:00'"
            ),
        ),
        (
            Payload.get_timedelta,
            "soon",
            (
                "payload key 'k': wanted a duration: seconds as a number, or a text such as \"1h30m\", "
                "found the text 'soon'"
            ),
        ),
    ],
)
def test_getter_refuses_another_type(getter: Callable[[Payload, str], object], value: object, text: str) -> None:
    """A value of another type is refused, and the error names the key, what was wanted and what was found."""
    with pytest.raises(PayloadError) as caught:
        getter(payload({"k": value}), "k")
    assert str(caught.value) == text
    assert caught.value.key == "k"
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize("value", ["0001-01-01T00:00:00+01:00", "now", "", 5])
def test_get_datetime_refuses_what_is_no_moment(value: object) -> None:
    """What is no moment, or is none in UTC, is a PayloadError, never another exception."""
    with pytest.raises(PayloadError, match="wanted a moment"):
        payload({"k": value}).get_datetime("k")


@pytest.mark.parametrize("value", [True, 1e300, "1e300h", "9" * 30 + "h", "", "1", "1h30", [], -1e300])
def test_get_timedelta_refuses_what_is_no_duration(value: object) -> None:
    """What is no duration, or a longer one than a timedelta holds, is a PayloadError."""
    with pytest.raises(PayloadError, match="wanted a duration"):
        payload({"k": value}).get_timedelta("k")


def test_default_is_for_what_is_absent_or_null() -> None:
    """The default stands for a key that is absent or null, not for a wrong value."""
    data = payload({"null": None, "wrong": "x"})
    assert data.get_int("absent", default=5) == 5
    assert data.get_int("absent", None) is None
    assert data.get_str("null", default="none") == "none"
    with pytest.raises(PayloadError, match="payload key 'wrong'"):
        data.get_int("wrong", default=5)


def test_absent_key_without_default() -> None:
    """Without a default an absent key is told apart from null."""
    with pytest.raises(PayloadError, match=r"^payload key 'to': wanted a whole number, found no such key$"):
        payload({}).get_int("to")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "payload: wanted a JSON object, found no payload"),
        (b"[1]", "payload: wanted a JSON object, found a list of 1"),
        (b'"x"', "payload: wanted a JSON object, found the text 'x'"),
        (b"hello", "payload: wanted a JSON object, found 5 bytes that are not JSON ("),
        (b"\xff\xfe", "payload: wanted a JSON object, found 2 bytes that are not JSON ("),
    ],
)
def test_getter_on_what_is_no_json_object(raw: bytes, text: str) -> None:
    """A payload that is no JSON, or no object, says so."""
    with pytest.raises(PayloadError) as caught:
        Payload(raw).get_int("to")
    assert str(caught.value).startswith(text)
    assert caught.value.key is None


def test_payload_is_parsed_once() -> None:
    """The payload is parsed when first asked, and never again."""
    data = payload({"a": [1]})
    assert data.json() is data.json()
    assert data.get_list("a") is data.json()["a"]


def test_payload_is_bytes() -> None:
    """A Payload is equal to its bytes, can be copied and pickled, and decodes to text like any bytes."""
    data = payload({"ä": 1})
    assert data == '{"ä":1}'.encode()
    assert copy.deepcopy(data) == pickle.loads(pickle.dumps(data)) == data
    assert data.decode() == data.decode("utf-8", "strict") == data.decode(encoding="utf-8") == '{"ä":1}'


# -- durations


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("0", 0),
        ("-0", 0),
        ("1h30m", 5_400_000_000),
        ("-1.5s", -1_500_000),
        ("+5s", 5_000_000),
        ("1.s", 1_000_000),
        (".5s", 500_000),
        ("100us", 100),
        ("100µs", 100),
        ("100μs", 100),  # the Greek letter, which Go reads too
        ("1500ns", 1),
        ("1h1h", 7_200_000_000),
        ("2562047h47m16.854775807s", 9_223_372_036_854_775),
    ],
)
def test_parse_duration_reads_what_go_reads(text: str, microseconds: int) -> None:
    """Every form of Go's time.ParseDuration is read, to the microsecond."""
    assert parse_duration(text) == timedelta(microseconds=microseconds)


@pytest.mark.parametrize("text", ["", "-", "1", "1 h", "h", ".s", "1x", "--1s", "1h 30m", "1d", " 1s", "1s\n", "٣s"])
def test_parse_duration_refuses_what_go_refuses(text: str) -> None:
    """What Go does not read is an error that shows the text."""
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


# -- models


def test_decode_fills_a_dataclass() -> None:
    """All that a dataclass may hold is read back from the JSON that a task makes of it."""
    order = Order(
        id=ID,
        at=datetime(2030, 1, 31, 8, 0, 0, 5, tzinfo=timezone(timedelta(hours=2))),
        items=[Item(name="a", price=Decimal("1.10")), Item(name="b")],
        by_name={"c": Item(name="c")},
        first=Item(name="d"),
        wait=timedelta(minutes=1, milliseconds=5),
        day=date(2030, 1, 31),
        hour=time(8, 30),
        raw=b"\x00\xff",
        size="m",
        pair=(1, "x"),
        many=(1, 2, 3),
        tags={"x", "y"},
        address={"city": "Ulm"},
        user=UserID(5),
        noted=2.5,
        number="five",
        anything={"a": [None]},
    )
    assert Task("order", order).payload.decode(Order) == order


def test_decode_uses_defaults_and_ignores_unknown_keys() -> None:
    """What is absent has its default, what is unknown is ignored, and a field with init=False is not filled."""
    data = {"id": str(ID), "at": "2030-01-31T08:00:00Z", "items": [], "later": 1, "made": 9}
    order = payload(data).decode(Order)
    assert order == Order(ID, datetime(2030, 1, 31, 8, tzinfo=UTC), [])
    assert order.made == 7


@pytest.mark.parametrize(
    ("change", "key", "wanted", "found"),
    [
        ({"id": "x"}, "id", "a UUID", "the text 'x'"),
        ({"items": [{"name": "a"}, {"name": 5}]}, "items[1].name", "a text", "the number 5"),
        ({"items": [{}]}, "items[0].name", "a value, as Item has no default for it", "no such key"),
        ({"items": ["a"]}, "items[0]", "an object for Item", "the text 'a'"),
        (
            {"by_name": {"k": {"name": "a", "price": "x"}}},
            "by_name['k'].price",
            "a decimal number, or a text of one",
            "the text 'x'",
        ),
        (
            {"by_name": {"k": {"name": "a", "price": "NaN"}}},
            "by_name['k'].price",
            "a decimal number, or a text of one",
            "the text 'NaN'",
        ),
        ({"first": 5}, "first", "an object for Item", "the number 5"),
        ({"color": "blue"}, "color", "one of 'red'", "the text 'blue'"),
        ({"level": True}, "level", "one of 1", "true"),
        ({"size": "l"}, "size", "one of 's', 'm'", "the text 'l'"),
        ({"pair": [1]}, "pair", "a list of 2", "a list of 1"),
        ({"pair": [1, 2]}, "pair[1]", "a text", "the number 2"),
        ({"many": [1, "x"]}, "many[1]", "a whole number", "the text 'x'"),
        ({"day": "2030"}, "day", 'a date, such as "2030-01-31"', "the text '2030'"),
        ({"hour": 8}, "hour", 'a time of day, such as "08:30:00"', "the number 8"),
        ({"raw": "%%"}, "raw", "bytes as Base64", "the text '%%'"),
        ({"address": {}}, "address.city", "a value, as Address has no default for it", "no such key"),
        ({"number": None}, "number", "a whole number or a text", "null"),
        (
            {"at": "2030-01-31T08:00:00"},
            "at",
            'a moment in ISO 8601 with a zone, such as "2030-01-31T08:00:00Z"',
            "the text '2030-01-31T08:00:00'",
        ),
    ],
)
def test_decode_names_what_does_not_fit(change: dict[str, object], key: str, wanted: str, found: str) -> None:
    """The error names the path of the value, what was wanted there and what was found."""
    data = {"id": str(ID), "at": "2030-01-31T08:00:00Z", "items": [], **change}
    with pytest.raises(PayloadError) as caught:
        payload(data).decode(Order)
    assert (caught.value.key, caught.value.wanted, caught.value.found) == (key, wanted, found)


@pytest.mark.parametrize("model", [int | float | None, float | int | None, UUID | str | int, str | int | UUID])
@pytest.mark.parametrize("value", [3, 3.0])
def test_decode_of_a_union_does_not_depend_on_its_order(model: Any, value: float) -> None:
    """A number stays what it is where both kinds may come."""
    found: Any = payload(value).decode(model)
    assert found == 3
    assert type(found) is (type(value) if float in model.__args__ else int)


@pytest.mark.parametrize("model", [UUID | str | None, str | UUID | None])
def test_decode_of_a_union_with_texts(model: Any) -> None:
    """What has a stricter form than text is tried first."""
    assert payload(str(ID)).decode(model) == ID
    assert payload("x").decode(model) == "x"
    assert payload(None).decode(model) is None
    with pytest.raises(PayloadError, match="wanted null or a UUID or a text, found the number 5"):
        payload(5).decode(model)


def test_decode_of_a_recursive_dataclass() -> None:
    """A dataclass may hold itself."""
    assert payload({"value": 1, "next": {"value": 2}}).decode(Node) == Node(1, Node(2))
    with pytest.raises(PayloadError, match=r"payload key 'next.value'"):
        payload({"value": 1, "next": {"value": "2"}}).decode(Node)


def test_decode_asks_the_dataclass_itself() -> None:
    """What __post_init__ refuses does not fit, with its text and itself as the cause."""
    with pytest.raises(
        PayloadError, match="payload: wanted a valid Positive, found ValueError: n must be positive"
    ) as caught:
        payload({"n": 0}).decode(Positive)
    assert isinstance(caught.value.__cause__, ValueError)


def test_decode_of_no_json() -> None:
    """What is empty or no JSON names the model that was wanted."""
    with pytest.raises(PayloadError, match=r"^payload: wanted JSON for Positive, found no payload$"):
        Payload(b"").decode(Positive)
    with pytest.raises(PayloadError, match=r"^payload: wanted JSON for Positive, found 1 bytes that are not JSON"):
        Payload(b"x").decode(Positive)


def test_decode_of_a_typed_dict_and_of_plain_types() -> None:
    """A TypedDict gives a dict of what it declares; plain types may be asked for too."""
    assert payload({"city": "Ulm", "more": 1}).decode(Address) == {"city": "Ulm"}
    assert payload({"a": 1, "b": 2}).decode(Loose) == {"a": 1, "b": 2}
    with pytest.raises(PayloadError, match="payload key 'b': wanted a value"):
        payload({"a": 1}).decode(Loose)
    assert payload([1, 2]).decode(list[int]) == [1, 2]
    assert payload({str(ID): 1}).decode(dict[UUID, float]) == {ID: 1.0}
    with pytest.raises(PayloadError, match=r"payload key '\[1\]': wanted a whole number"):
        payload([1, "2"]).decode(list[int])


def test_decode_of_pydantic() -> None:
    """A pydantic model is made by pydantic, by its own rules; its first complaint is ours."""
    assert payload({"n": "5", "parts": [{"name": "a"}]}).decode(Model) == Model(n=5, parts=[Item(name="a")])
    assert payload({"n": 5}).decode(Checked) == Checked(n=5)
    with pytest.raises(PayloadError) as caught:
        payload({"n": 0, "at": "x"}).decode(Model)
    assert caught.value.key == "n"
    assert caught.value.wanted == "a valid Model: Input should be greater than or equal to 1 (and 1 more)"
    assert caught.value.found == "the number 0"
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)
    with pytest.raises(PayloadError, match="payload key 'n': wanted a valid Checked"):
        payload({"n": 0}).decode(Checked)


def test_decode_of_msgspec() -> None:
    """A msgspec struct is made by msgspec; the path in its complaint is ours."""
    assert payload({"n": 5, "items": [{"name": "a"}]}).decode(Struct) == Struct(5, [Item(name="a")])
    with pytest.raises(PayloadError) as caught:
        payload({"n": 5, "items": [{"name": 1}]}).decode(Struct)
    assert (caught.value.key, caught.value.wanted) == ("items[0].name", "a valid Struct")
    assert caught.value.found == "Expected `str`, got `int`"


def test_decode_of_models_inside_a_dataclass() -> None:
    """Models of both libraries may stand inside a dataclass."""
    holder = Holder(Model(n=5), Struct(1))
    assert Task("x", holder).payload.decode(Holder) == holder
    with pytest.raises(PayloadError, match=r"payload key 'model\.n'"):
        payload({"model": {"n": 0}}).decode(Holder)


def test_decode_refuses_a_type_without_json_form() -> None:
    """A type that cannot come from JSON is an error of the program, not of the payload, and says which field it is."""

    class Odd:
        pass

    @dataclass
    class Inner:
        odd: dict[int, str]

    Inner.__annotations__["odd"] = dict[int, str]

    @dataclass
    class Outer:
        inner: Inner

    Outer.__annotations__["inner"] = Inner
    with pytest.raises(
        ConfigError, match=r"Outer.inner: .*Inner.odd: keys of dict\[int, str\]: the keys of a JSON object"
    ):
        payload({}).decode(Outer)
    with pytest.raises(ConfigError, match="Odd has no JSON form that is known here; supported are dataclasses"):
        payload({}).decode(Odd)


@dataclass
class WithMissing:
    m: Missing


@dataclass
class WithInitVar:
    n: InitVar[int]


@dataclass
class Ambiguous:
    one: Item | Positive


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (WithMissing, "WithMissing: the annotation 'Missing' names nothing in .*test_task; import it there"),
        (WithInitVar, "WithInitVar: a dataclass with an InitVar cannot be made from JSON"),
        (Ambiguous, "Ambiguous.one: .* two kinds of object cannot be told apart"),
    ],
)
def test_decode_refuses_a_dataclass_that_cannot_work(model: type, text: str) -> None:
    """A dataclass that no JSON can fill without guessing is refused, whatever the payload."""
    with pytest.raises(ConfigError, match=text):
        payload({}).decode(model)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_whatever_comes_is_a_payload_error(value: object) -> None:
    """No JSON value makes a getter or a model raise anything but a PayloadError."""
    data = payload({"k": value, "id": value, "at": value, "items": value, "n": value})
    for getter in (Payload.get_int, Payload.get_float, Payload.get_datetime, Payload.get_timedelta, Payload.get_dict):
        try:
            getter(data, "k")
        except PayloadError as exc:
            assert str(exc)  # noqa: PT017  (any other exception fails the test by itself)
    for model in (Order, Model, Struct, Positive, Node):
        for bytes_ in (data, payload(value)):
            try:
                bytes_.decode(model)
            except PayloadError as exc:
                assert str(exc)  # noqa: PT017  (as above)


# -- Task


@pytest.mark.parametrize(
    ("given_payload", "raw"),
    [
        (None, b""),
        (b"\x00\xff", b"\x00\xff"),
        (bytearray(b"x"), b"x"),
        (memoryview(b"x"), b"x"),
        ({"to": 123, "from": 456}, b'{"to":123,"from":456}'),
        ("text", b'"text"'),
        ([1, None, True], b"[1,null,true]"),
        (Item(name="a", price=Decimal("1.10")), b'{"name":"a","price":"1.10"}'),
        (
            {"at": datetime(2030, 1, 31, 8, tzinfo=UTC), "id": ID},
            f'{{"at":"2030-01-31T08:00:00+00:00","id":"{ID}"}}'.encode(),
        ),
        ({"wait": timedelta(seconds=1.5), "raw": b"\x00"}, b'{"wait":1.5,"raw":"AA=="}'),
        (Model(n=1), b'{"n":1,"at":null,"parts":[]}'),
        (Struct(1, [Item(name="a")]), b'{"n":1,"items":[{"name":"a","price":"1"}]}'),
        (Holder(Model(n=1)), b'{"model":{"n":1,"at":null,"parts":[]},"struct":null}'),
    ],
)
def test_payload_encoding(given_payload: object, raw: bytes) -> None:
    """Bytes go as they are, None as nothing, anything else as JSON."""
    task = Task("x", given_payload)
    assert task.payload == raw
    assert type(task.payload) is Payload
    assert task.has_payload is (given_payload is not None)


def test_payload_without_json_form_is_refused() -> None:
    """What has no JSON form is refused when the task is made, with its type."""
    with pytest.raises(
        InvalidTaskError, match="payload cannot be written as JSON: object has no JSON form; pass bytes"
    ):
        Task("x", {"a": object()})
    with pytest.raises(InvalidTaskError, match="payload cannot be written as JSON: Dict key must be str"):
        Task("x", {1: 2})


@pytest.mark.parametrize("name", ["", " ", "\t\n", None, 5])
def test_blank_type_is_refused(name: Any) -> None:
    """A task has a type."""
    with pytest.raises(InvalidTaskError, match=r"^task typename cannot be empty$"):
        Task(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_retries", "did you mean 'max_retry'?"),
        ("deadline", "did you mean 'deadline_at'?"),
        ("header", "did you mean 'headers'?"),
        ("unique", "did you mean 'unique_for'?"),
        ("colour", "the options are deadline_at, group, headers, max_retry, process_at"),
    ],
)
def test_unknown_option_is_refused(name: str, hint: str) -> None:
    """An option that does not exist is refused, with the nearest one that does."""
    options: dict[str, Any] = {name: 1}
    with pytest.raises(ConfigError) as caught:
        Task("x", **options)
    assert str(caught.value).startswith(f"unknown option {name!r}; {hint}")


def test_options_are_kept() -> None:
    """The options of a task are those that it was given, and all ten are known."""
    assert Task("x", queue="low", max_retry=3).options == {"queue": "low", "max_retry": 3}
    assert Task("x").options == {}
    assert len(OPTION_NAMES) == 10


@pytest.mark.parametrize("headers", [{"k": 1}, {1: "v"}, {"k": None}, {"k": b"v"}])
def test_headers_are_text_for_text(headers: Any) -> None:
    """A header that is not text for text is a TypeError that names it."""
    with pytest.raises(TypeError, match="headers: wanted text for text, found"):
        Task("x", headers=headers)


def test_headers_are_copied() -> None:
    """A later change of the mapping does not change the task."""
    headers = {"k": "v"}
    task = Task("x", headers=headers)
    headers["k"] = "w"
    assert task.headers == {"k": "v"}


def test_tasks_compare_by_what_they_are() -> None:
    """Two tasks are equal when all that they carry is; no payload and an empty one differ."""
    assert Task("x", {"a": 1}, queue="low") == Task("x", b'{"a":1}', queue="low")
    assert Task("x", None) != Task("x", b"")
    assert Task("x", queue="low") != Task("x")
    assert Task("x") != "x"
    assert len({Task("x"), Task("x"), Task("y")}) == 2
    assert repr(Task("x", b"1", headers={"k": "v"}, queue="low")) == "Task('x', b'1', headers={'k': 'v'}, queue='low')"
    assert pickle.loads(pickle.dumps(Task("x", [1], queue="low"))) == Task("x", [1], queue="low")


def test_received_task() -> None:
    """What a server makes of a message is a Task like any other."""
    assert Task.received("x", b"[1]", {"k": "v"}) == Task("x", [1], headers={"k": "v"})
    assert Task.received("x", b"", {}) == Task("x")


def test_task_info_defaults() -> None:
    """A TaskInfo needs only its identity, and is frozen."""
    info = TaskInfo("1", "default", "x")
    assert (info.payload, info.headers, info.state, info.max_retry) == (b"", {}, TaskState.PENDING, 25)
    assert str(info.state) == "pending"
    with pytest.raises(AttributeError):
        info.retried = 5  # type: ignore[misc]
