"""User code: handlers in their forms, the mux that finds the one for a type, and middleware around them.

Whatever form a handler has, registration compiles it into one: a call with context and task whose result is awaited.
What cannot work is refused there, when the program starts, not when the first task comes.
"""

# ruff: noqa: SLF001  (a mux talks to the muxes that include it)
from __future__ import annotations

import asyncio
import functools
import inspect
import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, Protocol, TypeVar, cast, get_args

import anyio
import anyio.lowlevel
import anyio.to_thread

from asynq_aio._context import Context
from asynq_aio._convert import converter_for, is_model, name_of
from asynq_aio._task import Task
from asynq_aio.errors import ConfigError, HandlerNotFoundError, PayloadError, SkipRetry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from asynq_aio._task import TaskOptions

__all__ = [
    "Handler",
    "HandlerFunction",
    "Middleware",
    "OnUnknown",
    "ServeMux",
    "TaskHandler",
    "compile_handler",
    "is_sync",
]

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="Middleware")
R_co = TypeVar("R_co", covariant=True)

Handler = Callable[[Context, Task], Awaitable[object]]
"""What every handler is compiled to. `is_sync` tells whether it runs in a thread."""

Middleware = Callable[[Context, Task, Handler], Awaitable[object]] | Callable[[Handler], Handler]
"""Code around a handler: `async def mw(ctx, task, call_next)`, or a function from handler to handler."""

OnUnknown = Literal["retry", "archive", "requeue"]
"""What happens to a task of a type that no pattern matches."""

_FORMS: Final = (
    "a handler is `async def h(task)`, `async def h(ctx)`, `async def h(ctx, task)`, `async def h(payload: Model)` or "
    "`async def h(ctx, payload: Model)`, where Model is a dataclass, a TypedDict, a pydantic model or a msgspec struct "
    "and the annotation is there; the same as plain `def` (runs in a thread); or an object with such a `process_task`"
)

_CONTEXT_NAMES: Final = frozenset({"ctx", "context"})
"""Parameters without annotation that have these names are the context."""

_CACHED_TYPES: Final = 1024
"""How many types a mux remembers the handler of; beyond it (producers make up types) it forgets all and looks anew."""


class TaskHandler(Protocol):
    """An object that handles tasks, in any of the forms of a handler."""

    @property
    def process_task(self) -> Callable[..., object]:
        """The handler."""
        ...


class Producer:
    """Makes the tasks that a decorated function handles: `resize.task(ResizeImage(...), queue="images")`."""

    __slots__ = ("_mux", "_pattern")

    def __init__(self, mux: ServeMux, pattern: str) -> None:
        self._mux, self._pattern = mux, pattern

    def __call__(
        self, payload: object = None, *, headers: Mapping[str, str] | None = None, **options: Unpack[TaskOptions]
    ) -> Task:
        """A task of this handler's type, with the prefix under which its mux is included.

        Raises:
            ConfigError: no option of this name; or the mux is included under several prefixes.
            InvalidTaskError: the payload has no JSON form.
        """
        return Task(self._mux.full_pattern(self._pattern), payload, headers=headers, **options)


class HandlerFunction(Protocol[P, R_co]):
    """A function as it was before `@mux.handler`, and the producer of its tasks."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function itself, as a test does."""
        ...

    @property
    def task(self) -> Producer:
        """Make a task for it."""
        ...


def is_sync(handler: Handler) -> bool:
    """Tell whether a compiled handler runs in a thread.

    Such a handler ends when its thread does, however it is cancelled: a thread cannot be stopped, it can only ask.
    """
    return getattr(handler, "is_sync", False)


# --- one handler ---------------------------------------------------------------------------------------------------


def compile_handler(handler: Callable[..., object] | TaskHandler) -> Handler:
    """Make a handler of any form callable with context and task.

    Raises:
        ConfigError: it has none of the forms; the text says what is wrong with it and which forms there are.
    """
    if isinstance(handler, ServeMux) or (isinstance(handler, FunctionType) and hasattr(handler, "is_sync")):
        return cast("Handler", handler)  # compiled already
    if handler is None:
        raise ConfigError("asynq: nil handler")  # Go's text
    function = cast("Callable[..., object]", getattr(handler, "process_task", handler))
    if isinstance(handler, type) or not callable(function):
        raise ConfigError(f"{_name(handler)} ({type(handler).__name__}) is no handler; {_FORMS}")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise ConfigError(f"{_name(handler)} is a generator, which is no handler; {_FORMS}")
    arguments = _arguments(function)
    sync = not _is_async(function)
    compiled = _threaded(function, arguments) if sync else _awaited(cast("_Coroutine", function), arguments)
    # Not functools.wraps: its __wrapped__ would show the signature of the function, which is not that of a Handler.
    compiled.__name__, compiled.__qualname__, compiled.__doc__ = _name(function), _name(function), function.__doc__
    vars(compiled)["is_sync"] = sync
    return compiled


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _is_async(function: Callable[..., object]) -> bool:
    """Tell whether calling it gives a coroutine; also of partials, and objects whose `__call__` is async."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004  (asked what it is, not whether it is there)


_Coroutine = Callable[..., Awaitable[object]]

_Argument = Literal["context", "task"] | Callable[[Task], object]
"""What one parameter of a handler gets: the context, the task, or what is made of the payload."""


def _awaited(function: _Coroutine, arguments: list[_Argument]) -> Handler:
    """Adapt a coroutine function; the common forms cost no coroutine more than the function itself."""
    match arguments:
        case ["context", "task"]:
            return lambda ctx, task: function(ctx, task)  # noqa: PLW0108  (one of ours, as it gets attributes)
        case ["task", "context"]:
            return lambda ctx, task: function(task, ctx)
        case ["task"]:
            return lambda _ctx, task: function(task)
        case ["context"]:
            return lambda ctx, _task: function(ctx)

    async def handle(ctx: Context, task: Task) -> object:
        return await function(*_values(arguments, ctx, task))

    return handle


def _threaded(function: Callable[..., object], arguments: list[_Argument]) -> Handler:
    """Adapt a plain function; it runs in a thread of anyio's, with the context variables of the child that awaits it.

    Cancellation does not reach a thread. So the child waits until the thread ends, and with it the slot of the worker
    and the place in the limiter are taken as long as the work goes on; `ctx.cancelled` asks the function to give up.
    What it returns all the same is returned, for the server to judge; an error of a cancelled one is the cancellation.
    """

    async def handle(ctx: Context, task: Task) -> object:
        values = _values(arguments, ctx, task)
        exits: list[BaseException] = []

        def run() -> object:
            ctx.raise_if_cancelled()
            try:
                return function(*values)
            except (SystemExit, KeyboardInterrupt) as exc:  # asyncio would end the loop with what its child raises
                exits.append(exc)
                return None

        cancelled: asyncio.CancelledError | None = None
        async with ctx.sync_limiter or anyio.to_thread.current_default_thread_limiter():
            # A child of its own, with a limiter of its own: asyncio's cancel() would else end the wait inside of anyio,
            # which then gives back the place while the thread runs on.
            thread = asyncio.ensure_future(anyio.to_thread.run_sync(run, limiter=anyio.CapacityLimiter(1)))
            with anyio.CancelScope(shield=True):  # against anyio's cancellation, which comes again at each turn
                while not thread.done():
                    try:
                        await asyncio.wait([thread])
                    except asyncio.CancelledError as exc:
                        cancelled = exc
        if cancelled is None:
            if exits:
                raise exits[0]
            if not thread.cancelled() and thread.exception() is not None:
                await anyio.lowlevel.checkpoint_if_cancelled()
            result = thread.result()
            return await result if inspect.isawaitable(result) else result  # a decorator hid a coroutine function
        if exits or thread.cancelled() or thread.exception() is not None:
            raise cancelled
        result = thread.result()
        if inspect.iscoroutine(result):
            result.close()
            raise cancelled
        return result

    return handle


def _values(arguments: list[_Argument], ctx: Context, task: Task) -> list[object]:
    values: list[object] = []
    for argument in arguments:
        match argument:
            case "context":
                values.append(ctx)
            case "task":
                values.append(task)
            case decode:
                values.append(decode(task))
    return values


def _payload_as(model: Any) -> Callable[[Task], object]:  # noqa: ANN401  (a class, or a TypedDict: no common type)
    converter_for(model)  # refuses what cannot work, now

    def decode(task: Task) -> object:
        try:
            return task.payload.decode(model)
        except PayloadError as exc:
            raise SkipRetry(str(exc)) from exc  # no later attempt can find another payload

    return decode


def _arguments(function: Callable[..., object]) -> list[_Argument]:
    """Find out, from names and annotations, what a handler wants of the context, the task and the payload."""
    name = _name(function)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{name} does not tell its parameters ({exc}); {_FORMS}") from exc
    wanted: list[inspect.Parameter] = []
    for parameter in parameters:
        match parameter.kind:
            case parameter.VAR_POSITIONAL | parameter.VAR_KEYWORD:
                continue
            case parameter.KEYWORD_ONLY if parameter.default is parameter.empty:
                raise ConfigError(f"{name}: nothing fills the keyword-only parameter {parameter.name!r}; {_FORMS}")
            case parameter.POSITIONAL_ONLY | parameter.POSITIONAL_OR_KEYWORD if parameter.default is parameter.empty:
                wanted.append(parameter)
    if not 1 <= len(wanted) <= 2:
        variadic = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        hint = "; a decorator that takes *args keeps the signature by functools.wraps" if variadic else ""
        raise ConfigError(f"{name} takes {len(wanted)} required parameters{hint}; {_FORMS}")
    arguments = [_argument(function, name, parameter, last=parameter is wanted[-1]) for parameter in wanted]
    if len(arguments) == 2 and sum(argument == "context" for argument in arguments) != 1:
        raise ConfigError(f"{name}: of two parameters one is the context and one the task or its payload; {_FORMS}")
    return arguments


def _argument(function: Callable[..., object], name: str, parameter: inspect.Parameter, *, last: bool) -> _Argument:
    annotation = parameter.annotation
    if annotation is parameter.empty:
        if parameter.name in _CONTEXT_NAMES or not last:
            return "context"
        return "task"
    hint = _resolve(function, name, parameter.name, annotation)
    if typing.get_origin(hint) is typing.Annotated:
        hint = get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, Context):
        return "context"
    if hint is Task:
        return "task"
    if not is_model(hint):
        raise ConfigError(
            f"{name}: {name_of(hint)} as the type of {parameter.name!r} is no model of a payload; {_FORMS}"
        )
    try:
        return _payload_as(hint)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {parameter.name!r} cannot be made from a payload: {exc}") from exc


def _resolve(function: Callable[..., object], name: str, parameter: str, annotation: object) -> object:
    """What an annotation stands for, each by itself: one that handlers do not need may name what is not imported."""
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    plain = inspect.unwrap(plain)
    plain = getattr(plain, "__func__", plain)
    if not hasattr(plain, "__globals__"):
        plain = type(plain).__call__
    try:
        closure = inspect.getclosurevars(plain).nonlocals if plain.__closure__ else {}
        hints = typing.get_type_hints(
            SimpleNamespace(__annotations__={parameter: annotation}),
            plain.__globals__,
            {**closure},
            include_extras=True,
        )
    except NameError as exc:
        # Linters move imports that only annotations need under `if TYPE_CHECKING`: ours are known by their names.
        match str(annotation).strip("'\"").rpartition(".")[2]:
            case "Context":
                return Context
            case "Task":
                return Task
        raise ConfigError(
            f"{name}: the annotation {annotation!r} of {parameter!r} names nothing that is known when the handler is "
            f"registered ({exc}); define or import it at the top of the module, outside of `if TYPE_CHECKING`"
        ) from exc
    except (TypeError, SyntaxError, AttributeError) as exc:
        raise ConfigError(f"{name}: the annotation {annotation!r} of {parameter!r} is no type ({exc})") from exc
    return hints[parameter]


# --- many handlers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    handler: Handler
    muxes: tuple[ServeMux, ...]
    """Whose middleware is around it, the innermost first: the mux it is registered with, then those that include it."""


class ServeMux:
    """Finds the handler for the type of a task: the pattern equal to it, else the longest pattern that it begins with.

    `image:` and `image:res` both match `image:resize`; no separator is needed, there are no wildcards.

    `on_unknown` says what becomes of a task that no pattern matches: `"retry"` fails it, as Go does; `"archive"`
    archives it at once; `"requeue"` leaves it to servers that know its type: the server that asks puts it back, which
    counts as no failure.
    """

    def __init__(self, *, on_unknown: OnUnknown = "retry") -> None:
        if on_unknown not in get_args(OnUnknown):
            raise ConfigError(f"on_unknown={on_unknown!r}; expected one of {', '.join(map(repr, get_args(OnUnknown)))}")
        self.on_unknown: Final = on_unknown
        self._entries: dict[str, _Entry] = {}
        self._longest_first: list[str] | None = []
        self._middleware: list[Middleware] = []
        self._parents: list[tuple[ServeMux, str]] = []
        self._not_found: Handler | None = None
        self._found: dict[str, tuple[Handler, str]] = {}  # the composed handlers of the types met so far

    @property
    def patterns(self) -> list[str]:
        """The patterns in the order of their registration, those of included muxes with their prefix."""
        return list(self._entries)

    # -- registration

    def handler(self, pattern: str) -> Callable[[Callable[P, R]], HandlerFunction[P, R]]:
        """Register the function below for a pattern; it stays what it was and gains `.task(payload, **options)`.

        Raises:
            ConfigError: as for `handle`.
        """
        if callable(pattern):
            raise ConfigError('asynq: invalid pattern: write @mux.handler("the:type"), with the type of the task')
        self._check_pattern(pattern)

        def register(function: Callable[P, R]) -> HandlerFunction[P, R]:
            self.handle(pattern, function)
            if not isinstance(
                getattr(function, "task", None), Producer
            ):  # of several patterns the innermost makes tasks
                try:
                    function.task = Producer(self, pattern)  # type: ignore[attr-defined]
                except AttributeError as exc:
                    raise ConfigError(
                        f"{_name(function)} takes no attribute; use mux.handle({pattern!r}, ...)"
                    ) from exc
            return cast("HandlerFunction[P, R]", function)

        return register

    def handle(self, pattern: str, handler: Callable[..., object] | TaskHandler) -> None:
        """Register a handler, in any of its forms, or another mux, for a pattern.

        Raises:
            ConfigError: the pattern is blank or has a handler; or this is no handler, with the reason.
        """
        self._check_pattern(pattern)
        compiled = compile_handler(handler)
        self._check_free(pattern)
        self._add(pattern, compiled, ())

    def include(self, other: ServeMux, prefix: str = "") -> None:
        """Take over all handlers of another mux, with its middleware inside of ours; also those it gets later.

        Its `not_found` and `on_unknown` stay its own.

        Raises:
            ConfigError: a pattern is taken; or the muxes would include each other.
        """
        if not isinstance(other, ServeMux):
            raise ConfigError(f"include wants a ServeMux, found {type(other).__name__}; a handler goes to handle()")
        if other._is_above(self):
            raise ConfigError("a ServeMux cannot include itself, directly or through others")
        for pattern in other._entries:
            self._check_free(prefix + pattern)
        other._parents.append((self, prefix))
        for pattern, entry in other._entries.items():
            self._add(prefix + pattern, entry.handler, entry.muxes)

    def use(self, *middleware: Middleware) -> None:
        """Put code around every handler and around "not found"; the first registered is the outermost.

        Each is `async def mw(ctx, task, call_next)`, which awaits `call_next(ctx, task)`, or a function that takes a
        handler and returns one.

        Raises:
            ConfigError: it has neither form.
        """
        for one in middleware:
            _check_middleware(one)
        self._middleware.extend(middleware)
        self._forget()

    def middleware(self, function: M) -> M:
        """Register the function below as middleware, as `use` does."""
        self.use(function)
        return function

    @property
    def not_found(self) -> Handler | None:
        """What handles a task that no pattern matches; None: what `on_unknown` says."""
        return self._not_found

    @not_found.setter
    def not_found(self, handler: Callable[..., object] | TaskHandler | None) -> None:
        self._not_found = None if handler is None else compile_handler(handler)
        self._forget()

    # -- look-up

    def match(self, type: str) -> tuple[Handler, str]:
        """The handler for a type, with its middleware, and the pattern that matched; "not found" has the pattern ""."""
        found = self._found.get(type)
        if found is None:
            if len(self._found) >= _CACHED_TYPES:
                self._found.clear()
            found = self._found[type] = self._find(type)
        return found

    def compose(self) -> None:
        """Put all middleware around all handlers now, so that one that cannot work shows before the first task.

        Raises:
            ConfigError: a middleware did not return a handler. What it raises itself goes through.
        """
        for pattern in self._entries:
            self.match(pattern)

    async def __call__(self, ctx: Context, task: Task) -> object:
        """Handle a task; what its handler returns or raises goes through.

        Raises:
            HandlerNotFoundError: no pattern matches and there is no `not_found`; SkipRetry with `on_unknown="archive"`.
        """
        return await self.match(task.type)[0](ctx, task)

    async def process_task(self, ctx: Context, task: Task) -> object:
        """The same by the name that Go gives it."""
        return await self.match(task.type)[0](ctx, task)

    def full_pattern(self, pattern: str) -> str:
        """The pattern with the prefixes under which this mux is included.

        Raises:
            ConfigError: included under several.
        """
        names = self._full_patterns(pattern)
        if len(names) > 1:
            raise ConfigError(
                f"{pattern!r} is included as {', '.join(map(repr, sorted(names)))}; "
                "make the task by its name: Task(type, payload)"
            )
        return names.pop()

    def _find(self, type: str) -> tuple[Handler, str]:
        pattern, entry = type, self._entries.get(type)
        if entry is None:
            if self._longest_first is None:
                self._longest_first = sorted(self._entries, key=len, reverse=True)
            pattern = next((prefix for prefix in self._longest_first if type.startswith(prefix)), "")
            entry = self._entries.get(pattern) or _Entry(self._not_found or self._unknown, (self,))
        handler = composed = entry.handler
        for mux in entry.muxes:
            for middleware in reversed(mux._middleware):
                composed = _wrap(middleware, composed)
        if composed is not handler:
            vars(composed)["is_sync"] = is_sync(handler)
        return composed, pattern

    async def _unknown(self, _ctx: Context, task: Task) -> object:
        error = HandlerNotFoundError(task.type)
        if self.on_unknown == "archive":
            raise SkipRetry(str(error)) from error
        raise error

    # -- the parts of registration

    def _check_pattern(self, pattern: object) -> None:
        if not (isinstance(pattern, str) and pattern.strip()):
            raise ConfigError(f"asynq: invalid pattern: wanted a text that is not blank, found {pattern!r}")

    def _check_free(self, pattern: str) -> None:
        if pattern in self._entries:
            raise ConfigError(f"asynq: multiple registrations for {pattern}")
        for parent, prefix in self._parents:
            parent._check_free(prefix + pattern)

    def _add(self, pattern: str, handler: Handler, muxes: tuple[ServeMux, ...]) -> None:
        self._entries[pattern] = _Entry(handler, (*muxes, self))
        self._longest_first = None
        self._found.clear()
        for parent, prefix in self._parents:
            parent._add(prefix + pattern, handler, (*muxes, self))

    def _forget(self) -> None:
        self._found.clear()
        for parent, _ in self._parents:
            parent._forget()

    def _is_above(self, mux: ServeMux) -> bool:
        return mux is self or any(self._is_above(parent) for parent, _ in mux._parents)

    def _full_patterns(self, pattern: str) -> set[str]:
        if not self._parents:
            return {pattern}
        return {name for parent, prefix in self._parents for name in parent._full_patterns(prefix + pattern)}


def _check_middleware(middleware: object) -> None:
    forms = "middleware is `async def mw(ctx, task, call_next)`, or `def mw(handler)` that returns a handler"
    if not callable(middleware):
        raise ConfigError(f"{middleware!r} is not callable; {forms}")
    match _arity(middleware), _is_async(middleware):
        case (3, True) | (1, False):
            return
        case 3, False:
            raise ConfigError(f"{_name(middleware)} has three parameters and is not `async def`; {forms}")
        case 1, True:
            raise ConfigError(f"{_name(middleware)} has one parameter and is `async def`; {forms}")
        case arity, _:
            raise ConfigError(f"{_name(middleware)} takes {arity} required parameters; {forms}")


def _arity(function: Callable[..., object]) -> int:
    """The number of parameters that must be given by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{_name(function)} does not tell its parameters ({exc})") from exc
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _wrap(middleware: Middleware, handler: Handler) -> Handler:
    if _arity(middleware) == 3:
        around = cast("Callable[[Context, Task, Handler], Awaitable[object]]", middleware)
        return lambda ctx, task: around(ctx, task, handler)
    wrapped = cast("Callable[[Handler], Handler]", middleware)(handler)
    if not callable(wrapped):
        raise ConfigError(f"middleware {_name(middleware)} returned {wrapped!r}; expected a handler")
    return lambda ctx, task: wrapped(ctx, task)  # noqa: PLW0108  (one of ours, as it gets attributes)
