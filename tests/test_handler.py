"""Handlers in all their forms, the mux and middleware."""

# ruff: noqa: D103  (handlers are named for their form)
from __future__ import annotations

import asyncio
import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
import pydantic
import pytest

from asynq_aio import _handler
from asynq_aio._context import Context, current_context
from asynq_aio._handler import Handler, ServeMux, compile_handler, is_sync
from asynq_aio._task import Payload, Task
from asynq_aio.errors import (
    ConfigError,
    HandlerNotFoundError,
    InvalidTaskError,
    PayloadError,
    SkipRetry,
    TaskCancelledError,
)
from asynq_aio.testing import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nowhere import Missing  # type: ignore[import-not-found]

    import asynq_aio._task as moved


@dataclass
class Image:
    src: str
    width: int = 100


class ImageDict(TypedDict):
    src: str


class ImageModel(pydantic.BaseModel):
    src: str


class ImageStruct(msgspec.Struct):
    src: str


@dataclass
class Unfit:
    what: complex


def context(**fields: Any) -> Context:
    """A context as a server makes it."""
    facts = {"task_id": "1", "queue": "default", "type": "x", "retried": 0, "max_retry": 25, "headers": {}}
    return Context(**{**facts, "deadline_unix": 2e9, **fields})


# -- forms


async def only_task(task: Task) -> object:
    return task.type


async def only_ctx(ctx: Context) -> object:
    return ctx.type


async def both(ctx: Context, task: Task) -> object:
    return ctx.type + task.type


async def swapped(task: Task, ctx: Context) -> object:
    return task.type + ctx.type


async def plain_task(t):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return t.type


async def plain_ctx(ctx):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return ctx.type + ctx.queue


async def plain_both(_, t):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return _.queue + t.type


async def with_default(task: Task, factor: int = 2) -> object:
    return task.type * factor


async def moved_import(ctx: Context, task: moved.Task) -> object:
    return ctx.type + task.type


async def moved_return(task: Task) -> Missing:
    return task.type


class Callables:
    async def __call__(self, task: Task) -> object:
        return task.type

    async def method(self, ctx: Context, task: Task) -> object:
        return ctx.type + task.type

    @staticmethod
    async def static(task: Task) -> object:
        return task.type


class Processes:
    async def process_task(self, ctx: Context, task: Task) -> object:
        return ctx.type + task.type


class ProcessesInThread:
    def process_task(self, task: Task) -> object:
        return task.type


def in_thread(task: Task) -> object:
    return task.type


def in_thread_with_ctx(ctx: Context, task: Task) -> object:
    return ctx.type + task.type


async def with_more(factor: int, task: Task) -> object:
    return task.type * factor


@pytest.mark.parametrize(
    ("handler", "returned"),
    [
        (only_task, "x"),
        (only_ctx, "x"),
        (both, "xx"),
        (swapped, "xx"),
        (plain_task, "x"),
        (plain_ctx, "xdefault"),
        (plain_both, "defaultx"),
        (with_default, "xx"),
        (moved_import, "xx"),
        (moved_return, "x"),
        (Callables(), "x"),
        (Callables().method, "xx"),
        (Callables.static, "x"),
        (Processes(), "xx"),
        (ProcessesInThread(), "x"),
        (in_thread, "x"),
        (in_thread_with_ctx, "xx"),
        (functools.partial(with_more, 3), "xxx"),
        (lambda task: task.type, "x"),
        (lambda ctx, task: only_task(task), "x"),
        (compile_handler(only_task), "x"),
    ],
)
async def test_forms(handler: Any, returned: str) -> None:
    """Every form of a handler gets what it asks for, and what it returns goes through."""
    assert await compile_handler(handler)(context(), Task("x")) == returned


@pytest.mark.parametrize(
    ("handler", "sync"), [(only_task, False), (in_thread, True), (ProcessesInThread(), True), (Callables(), False)]
)
def test_is_sync(handler: Any, sync: bool) -> None:
    """The compiled handler tells whether it runs in a thread, and has the name of the function."""
    compiled = compile_handler(handler)
    assert is_sync(compiled) is sync
    assert compiled.__name__


async def takes_none() -> None: ...
async def takes_three(a: Context, b: Task, c: Image) -> None: ...
async def takes_keyword(task: Task, *, db: object) -> None: ...
async def takes_any(*args: object) -> None: ...
async def takes_two_tasks(a: Task, b: Task) -> None: ...
async def takes_task_and_payload(a: Task, b: Image) -> None: ...
async def takes_int(n: int) -> None: ...
async def takes_dict(n: dict[str, str]) -> None: ...
async def takes_optional(image: Image | None) -> None: ...
async def takes_unfit(unfit: Unfit) -> None: ...
async def takes_missing(m: Missing) -> None: ...
async def takes_no_type(m: 1 + None) -> None: ...  # type: ignore[valid-type]
async def generates(task: Task):  # type: ignore[no-untyped-def]  # noqa: ANN201
    yield task


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (None, r"^asynq: nil handler$"),
        (5, r"^5 \(int\) is no handler; a handler is `async def h\(task\)`"),
        (Processes, r"^Processes \(type\) is no handler"),
        (takes_none, r"^takes_none takes 0 required parameters; a handler is"),
        (takes_three, r"^takes_three takes 3 required parameters; a handler is"),
        (takes_keyword, r"^takes_keyword: nothing fills the keyword-only parameter 'db'; a handler is"),
        (takes_any, r"^takes_any takes 0 required parameters; a decorator that takes \*args keeps the signature by"),
        (takes_two_tasks, r"^takes_two_tasks: of two parameters one is the context"),
        (takes_task_and_payload, r"^takes_task_and_payload: of two parameters one is the context"),
        (takes_int, r"^takes_int: int as the type of 'n' is no model of a payload; a handler is"),
        (takes_dict, r"^takes_dict: dict\[str, str\] as the type of 'n' is no model"),
        (takes_optional, r"^takes_optional: .*Image | None as the type of 'image' is no model"),
        (takes_unfit, r"^takes_unfit: 'unfit' cannot be made from a payload: Unfit.what: complex has no JSON form"),
        (
            takes_missing,
            r"^takes_missing: the annotation 'Missing' of 'm' names nothing that is known .* import it at the",
        ),
        (takes_no_type, r"^takes_no_type: the annotation '1 \+ None' of 'm' is no type"),
        (generates, r"^generates is a generator"),
    ],
)
def test_what_is_no_handler(handler: Any, text: str) -> None:
    """What cannot work is refused at registration: what is wrong, and which forms there are."""
    with pytest.raises(ConfigError, match=text):
        ServeMux().handle("x", handler)


# -- typed payloads


async def dataclass_payload(image: Image) -> object:
    return image.src


async def dataclass_with_ctx(ctx: Context, image: Image) -> object:
    return image.src


async def payload_then_ctx(image: Image, ctx: Context) -> object:
    return image.src


def in_thread_payload(image: Image) -> object:
    return image.src


async def typed_dict(image: ImageDict) -> object:
    return image["src"]


async def pydantic_model(image: ImageModel) -> object:
    return image.src


async def msgspec_struct(ctx: Context, image: ImageStruct) -> object:
    return image.src


TYPED = [
    dataclass_payload,
    dataclass_with_ctx,
    payload_then_ctx,
    in_thread_payload,
    typed_dict,
    pydantic_model,
    msgspec_struct,
]


@pytest.mark.parametrize("handler", TYPED)
async def test_typed_payload(handler: Any) -> None:
    """A handler gets its payload as the model that it names."""
    assert await compile_handler(handler)(context(), Task("x", {"src": "a.png"})) == "a.png"


@pytest.mark.parametrize("handler", TYPED)
@pytest.mark.parametrize("wrong", [{"src": 5}, {}, b"", b"no JSON", []])
async def test_typed_payload_that_does_not_fit(handler: Any, wrong: object) -> None:
    """A payload that does not fit is not tried again; the verdict has the reason, and the PayloadError as its cause."""
    with pytest.raises(SkipRetry) as caught:
        await compile_handler(handler)(context(), Task("x", wrong))
    assert isinstance(caught.value.__cause__, PayloadError)
    assert str(caught.value) == str(caught.value.__cause__)
    assert str(caught.value).startswith("payload")


# -- threads


async def test_sync_handler_runs_in_a_thread_with_its_context() -> None:
    """A plain function runs outside of the loop's thread, and current_context() is known there."""

    def handler(ctx: Context) -> object:
        assert threading.current_thread() is not threading.main_thread()
        assert current_context() is ctx
        return anyio.from_thread.run(asyncio.sleep, 0, "from the loop")

    assert await run(handler, "x") == "from the loop"


async def test_sync_handler_that_hides_a_coroutine() -> None:
    """What a decorator hid is awaited all the same, and never lost."""

    def handler(task: Task) -> Awaitable[object]:
        return only_task(task)

    assert await run(handler, "x") == "x"


async def test_limiter_bounds_the_threads() -> None:
    """No more threads run at once than the limiter of the server allows."""
    limiter = anyio.CapacityLimiter(2)
    barrier, running, most = threading.Barrier(2), 0, 0
    lock = threading.Lock()

    def handler(task: Task) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait(10)  # two are here at once, or this fails
        with lock:
            running -= 1

    compiled = compile_handler(handler)
    await asyncio.gather(*(compiled(context(sync_limiter=limiter), Task("x")) for _ in range(6)))
    assert most == 2
    assert limiter.borrowed_tokens == 0


class Blocker:
    """A plain handler that waits in its thread until it is let go."""

    def __init__(self, ending: Callable[[Context], object]) -> None:
        self.ending, self.entered, self.go = ending, threading.Event(), threading.Event()

    def process_task(self, ctx: Context) -> object:
        self.entered.set()
        assert self.go.wait(10)
        return self.ending(ctx)


async def cancel_in_thread(blocker: Blocker) -> asyncio.Future[object]:
    """Cancel it twice while it is in its thread; it must be there still afterwards, and its place taken."""
    limiter = anyio.CapacityLimiter(1)
    ctx = context(sync_limiter=limiter)
    child = asyncio.ensure_future(compile_handler(blocker)(ctx, Task("x")))
    await anyio.to_thread.run_sync(blocker.entered.wait, 10)
    for _ in range(2):
        ctx.end("context canceled")
        child.cancel()
        await asyncio.wait([child], timeout=0.01)
        assert not child.done()
        assert limiter.borrowed_tokens == 1
    blocker.go.set()
    await asyncio.wait([child])
    assert limiter.borrowed_tokens == 0
    return child


async def test_cancelled_thread_that_gives_up() -> None:
    """A cancelled handler keeps its place until its thread ends; where that gave up, it counts as cancelled."""
    assert (await cancel_in_thread(Blocker(lambda ctx: ctx.raise_if_cancelled()))).cancelled()


async def test_cancelled_thread_that_finishes() -> None:
    """What a thread returns after its cancellation is not thrown away: the server judges it."""
    assert (await cancel_in_thread(Blocker(lambda ctx: ctx.cancelled))).result() is True


async def test_cancelled_thread_that_returns_a_coroutine() -> None:
    """A coroutine that comes too late is closed, and the handler counts as cancelled."""
    assert (await cancel_in_thread(Blocker(only_ctx))).cancelled()


async def test_anyio_cancellation_waits_for_the_thread() -> None:
    """Cancellation by a scope of anyio's waits for the thread too, without spinning."""
    blocker = Blocker(lambda ctx: ctx.raise_if_cancelled())
    ctx = context()
    turns = 0

    async def let_go() -> None:
        nonlocal turns
        await anyio.to_thread.run_sync(blocker.entered.wait, 10)
        ctx.end("context canceled")
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            for turns in range(3):  # noqa: B007  (three turns of the loop in which it must not end)
                await asyncio.sleep(0)
        blocker.go.set()

    async def call() -> None:
        with pytest.raises(asyncio.CancelledError):
            await compile_handler(blocker)(ctx, Task("x"))
        assert turns == 2

    async with anyio.create_task_group() as group:
        group.start_soon(let_go)
        group.start_soon(call)


async def test_cancelled_while_it_waits_for_a_thread() -> None:
    """One that has no thread yet is cancelled at once and never starts."""
    limiter = anyio.CapacityLimiter(1)
    blocker, second = Blocker(lambda ctx: None), Blocker(lambda ctx: None)
    first = asyncio.ensure_future(compile_handler(blocker)(context(sync_limiter=limiter), Task("x")))
    await anyio.to_thread.run_sync(blocker.entered.wait, 10)
    waiting = asyncio.ensure_future(compile_handler(second)(context(sync_limiter=limiter), Task("x")))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    blocker.go.set()
    await first
    assert not second.entered.is_set()


async def test_ended_before_its_thread_starts() -> None:
    """A task that is over when its thread starts is not worked on."""
    ctx = context()
    ctx.end("context canceled")
    blocker = Blocker(lambda ctx: None)
    with pytest.raises(TaskCancelledError, match="context canceled"):
        await compile_handler(blocker)(ctx, Task("x"))
    assert not blocker.entered.is_set()


async def test_error_of_a_thread() -> None:
    """What a plain handler raises is raised."""

    def handler(task: Task) -> None:
        raise KeyError(task.type)

    with pytest.raises(KeyError, match="x"):
        await run(handler, "x")


# -- the mux


def named(name: str) -> Callable[[Task], Awaitable[str]]:
    """A handler that returns its name."""

    async def handler(task: Task) -> str:
        return name

    return handler


@pytest.mark.parametrize(
    ("type_", "pattern"),
    [
        ("image:resize", "image:resize"),
        ("image:resize:big", "image:resize"),
        ("image:restore", "image:res"),
        ("image:", "image:"),
        ("image:crop", "image:"),
        ("imag", "i"),
        ("Image:resize", ""),
        ("", ""),
        ("email", ""),
    ],
)
async def test_match(type_: str, pattern: str) -> None:
    """The pattern equal to the type wins, else the longest one that it begins with; separators mean nothing."""
    mux = ServeMux()
    for name in ("image:", "image:resize", "i", "image:res"):
        mux.handle(name, named(name))
    handler, found = mux.match(type_)
    assert found == pattern
    if pattern:
        assert await handler(context(), Task("x")) == pattern
    assert mux.match(type_)[0] is handler  # composed once
    assert mux.patterns == ["image:", "image:resize", "i", "image:res"]


async def test_not_found() -> None:
    """A type that no pattern matches fails by default, with Go's text."""
    mux = ServeMux()
    with pytest.raises(HandlerNotFoundError, match=r'^handler not found for task "x"$'):
        await mux(context(), Task("x"))
    mux.not_found = named("not found")
    assert await mux(context(), Task("x")) == "not found"
    assert mux.match("x")[1] == ""
    mux.not_found = None
    with pytest.raises(HandlerNotFoundError):
        await mux.process_task(context(), Task("x"))


async def test_on_unknown() -> None:
    """An unknown type is archived at once where the mux says so; another word is refused."""
    with pytest.raises(SkipRetry, match=r'^handler not found for task "x"$') as caught:
        await ServeMux(on_unknown="archive")(context(), Task("x"))
    assert isinstance(caught.value.__cause__, HandlerNotFoundError)
    assert ServeMux(on_unknown="requeue").on_unknown == "requeue"
    word: Any = "drop"
    with pytest.raises(ConfigError, match="on_unknown='drop'; expected one of 'retry', 'archive', 'requeue'"):
        ServeMux(on_unknown=word)


@pytest.mark.parametrize("pattern", ["", "  ", None, 5])
def test_blank_pattern(pattern: Any) -> None:
    """A pattern is a text that is not blank."""
    with pytest.raises(ConfigError, match=r"^asynq: invalid pattern: wanted a text that is not blank, found"):
        ServeMux().handle(pattern, only_task)
    with pytest.raises(ConfigError, match=r"^asynq: invalid pattern"):
        ServeMux().handler(pattern)


def test_second_registration() -> None:
    """A pattern has one handler."""
    mux = ServeMux()
    mux.handle("x", only_task)
    with pytest.raises(ConfigError, match=r"^asynq: multiple registrations for x$"):
        mux.handle("x", both)


def test_decorator_without_its_pattern() -> None:
    """The decorator without parentheses says how it is written."""
    mux: Any = ServeMux()
    with pytest.raises(ConfigError, match=r'write @mux.handler\("the:type"\)'):

        @mux.handler  # type: ignore[untyped-decorator]
        async def handler(task: Task) -> None: ...


async def test_patterns_added_later_are_found() -> None:
    """A type that was looked up before is looked up anew when a pattern comes."""
    mux = ServeMux()
    mux.handle("a", named("a"))
    assert mux.match("ab")[1] == "a"
    mux.handle("ab", named("ab"))
    assert await mux.match("ab")[0](context(), Task("ab")) == "ab"


def test_types_made_up_by_producers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of types is bounded."""
    monkeypatch.setattr(_handler, "_CACHED_TYPES", 10)
    mux = ServeMux()
    for n in range(100):
        mux.match(f"x{n}")
    assert len(mux._found) <= 10


# -- decorated functions


def test_decorated_function_stays_what_it_was() -> None:
    """The decorator gives back the very function, and a producer of its tasks with it."""
    mux = ServeMux()

    async def resize(image: Image) -> None: ...

    decorated = mux.handler("images:resize")(resize)
    assert decorated is resize
    assert decorated.task(Image("a"), queue="images", headers={"k": "v"}) == Task(
        "images:resize", Image("a"), queue="images", headers={"k": "v"}
    )
    with pytest.raises(ConfigError, match="unknown option 'max_retries'; did you mean 'max_retry'"):
        decorated.task(Image("a"), max_retries=3)  # type: ignore[call-arg]
    with pytest.raises(InvalidTaskError):
        decorated.task(object())


async def test_function_for_two_patterns() -> None:
    """A function may serve several patterns; its tasks have the type nearest to it."""
    mux = ServeMux()

    @mux.handler("b")
    @mux.handler("a")
    async def handler(task: Task) -> str:
        return task.type

    assert handler.task() == Task("a")
    assert await run(mux, "b") == "b"


def test_decorator_on_what_takes_no_attribute() -> None:
    """A method cannot gain `.task`; the error says what to call instead."""
    with pytest.raises(ConfigError, match=r"Callables.method takes no attribute; use mux.handle\('x', ...\)"):
        ServeMux().handler("x")(Callables().method)


# -- middleware


def recording(name: str, log: list[str]) -> Any:
    """Middleware in the form with call_next that notes when it is entered and left."""

    async def middleware(ctx: Context, task: Task, call_next: Handler) -> object:
        log.append(f"{name} in")
        try:
            return await call_next(ctx, task)
        finally:
            log.append(f"{name} out")

    return middleware


def factory(name: str, log: list[str]) -> Any:
    """The same in Go's form."""

    def middleware(handler: Handler) -> Handler:
        log.append(f"{name} made")

        async def around(ctx: Context, task: Task) -> object:
            log.append(f"{name} in")
            return await handler(ctx, task)

        return around

    return middleware


async def test_middleware_order_and_composition() -> None:
    """The first registered is the outermost, in both forms, and a handler is wrapped once, not per task."""
    log: list[str] = []
    mux = ServeMux()
    mux.use(recording("a", log), factory("b", log))
    mux.middleware(recording("c", log))
    mux.handle("x", named("x"))
    assert await run(mux, "x") == "x"
    assert log == ["b made", "a in", "b in", "c in", "c out", "a out"]
    log.clear()
    await run(mux, "x")
    assert "b made" not in log


async def test_middleware_around_not_found() -> None:
    """Middleware sees unknown types too, by either way."""
    log: list[str] = []
    mux = ServeMux()
    mux.use(recording("a", log))
    with pytest.raises(HandlerNotFoundError):
        await run(mux, "x")
    mux.not_found = named("none")
    assert await run(mux, "x") == "none"
    assert log == ["a in", "a out"] * 2


async def test_middleware_added_later() -> None:
    """Middleware that comes after the first task holds from then on."""
    log: list[str] = []
    mux = ServeMux()
    mux.handle("x", named("x"))
    await run(mux, "x")
    mux.use(recording("a", log))
    await run(mux, "x")
    assert log == ["a in", "a out"]


async def test_middleware_may_change_what_goes_through() -> None:
    """Middleware may give another task on, and return another result."""

    async def middleware(ctx: Context, task: Task, call_next: Handler) -> object:
        return [await call_next(ctx, Task("y", task.payload))]

    mux = ServeMux()
    mux.use(middleware)
    mux.handle("x", only_task)
    assert await run(mux, "x") == ["y"]


def test_middleware_keeps_the_mark_of_sync_handlers() -> None:
    """A plain handler is known as one through its middleware."""
    mux = ServeMux()
    mux.use(recording("a", []))
    mux.handle("sync", in_thread)
    mux.handle("async", only_task)
    assert is_sync(mux.match("sync")[0])
    assert not is_sync(mux.match("async")[0])


async def three_sync(a: object, b: object) -> None: ...
def sync_three(ctx: Context, task: Task, call_next: Handler) -> None: ...
async def async_one(handler: Handler) -> None: ...


@pytest.mark.parametrize(
    ("middleware", "text"),
    [
        (None, "None is not callable; middleware is `async def mw"),
        (three_sync, "three_sync takes 2 required parameters; middleware is"),
        (sync_three, "sync_three has three parameters and is not `async def`; middleware is"),
        (async_one, "async_one has one parameter and is `async def`; middleware is"),
        (max, "max does not tell its parameters"),
    ],
)
def test_what_is_no_middleware(middleware: Any, text: str) -> None:
    """What has neither form is refused at once."""
    with pytest.raises(ConfigError, match=text):
        ServeMux().use(middleware)


def test_middleware_that_returns_no_handler() -> None:
    """compose() shows before the first task that a middleware does not work."""
    mux = ServeMux()
    mux.use(lambda handler: None)  # type: ignore[arg-type]
    mux.handle("x", only_task)
    with pytest.raises(ConfigError, match="returned None; expected a handler"):
        mux.compose()


# -- include


async def test_include() -> None:
    """Included handlers have the prefix, their own middleware inside of ours; also what comes after the include."""
    log: list[str] = []
    outer, inner = ServeMux(), ServeMux()
    inner.handle("charge", named("charge"))
    outer.include(inner, prefix="billing:")
    outer.use(recording("outer", log))
    assert await run(outer, "billing:charge") == "charge"
    assert log == ["outer in", "outer out"]
    inner.use(recording("inner", log))
    inner.handle("refund", named("refund"))
    log.clear()
    assert await run(outer, "billing:refund:all") == "refund"
    assert log == ["outer in", "inner in", "inner out", "outer out"]
    assert outer.patterns == ["billing:charge", "billing:refund"]
    assert inner.patterns == ["charge", "refund"]


async def test_include_in_an_included_mux() -> None:
    """Prefixes add up over several levels."""
    top, middle, leaf = ServeMux(), ServeMux(), ServeMux()
    top.include(middle, prefix="a:")
    middle.include(leaf, prefix="b:")

    @leaf.handler("c")
    async def handler(task: Task) -> str:
        return task.type

    assert await run(top, handler.task()) == "a:b:c"


def test_include_conflicts() -> None:
    """A pattern that is taken above is refused, whenever it comes, and nothing is half-registered."""
    outer, inner = ServeMux(), ServeMux()
    outer.handle("a:x", only_task)
    inner.handle("x", only_task)
    with pytest.raises(ConfigError, match=r"^asynq: multiple registrations for a:x$"):
        outer.include(inner, prefix="a:")
    assert outer.patterns == ["a:x"]
    late = ServeMux()
    outer.include(late, prefix="a:")
    with pytest.raises(ConfigError, match=r"^asynq: multiple registrations for a:x$"):
        late.handle("x", only_task)
    assert late.patterns == []


def test_include_of_itself() -> None:
    """Muxes cannot include each other, and only muxes can be included."""
    a, b = ServeMux(), ServeMux()
    a.include(b, prefix="b:")
    for mux in (a, b):
        with pytest.raises(ConfigError, match="cannot include itself"):
            b.include(a)
        with pytest.raises(ConfigError, match="cannot include itself"):
            mux.include(mux)
    other: Any = only_task
    with pytest.raises(ConfigError, match="include wants a ServeMux, found function"):
        a.include(other)


def test_producer_of_a_mux_under_several_prefixes() -> None:
    """Where the type of a task is not certain, the producer says so instead of choosing."""
    eu, us, inner = ServeMux(), ServeMux(), ServeMux()

    @inner.handler("x")
    async def handler(task: Task) -> None: ...

    assert handler.task().type == "x"
    eu.include(inner, prefix="eu:")
    assert handler.task().type == "eu:x"
    us.include(inner, prefix="us:")
    with pytest.raises(ConfigError, match=r"'x' is included as 'eu:x', 'us:x'; make the task by its name"):
        handler.task()


async def test_mux_as_a_handler() -> None:
    """A mux may handle a pattern of another; it sees the whole type."""
    outer, inner = ServeMux(), ServeMux()
    inner.handle("a:b", named("a:b"))
    outer.handle("a:", inner)
    assert await run(outer, "a:b") == "a:b"


def test_payload_of_a_task_is_a_payload() -> None:
    """What the handlers get has the typed getters."""
    assert isinstance(Task("x", {}).payload, Payload)
