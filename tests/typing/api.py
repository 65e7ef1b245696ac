"""What users write, for `mypy --strict`: it is checked, never run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict, assert_type

from asynq_aio import Context, Handler, Payload, ServeMux, Task, TaskInfo, TaskState, current_context
from asynq_aio.testing import run


@dataclass
class Image:
    """A payload."""

    src: str


class Mail(TypedDict):
    """Another."""

    to: int


mux = ServeMux(on_unknown="archive")


@mux.handler("images:resize")
async def resize(ctx: Context, image: Image) -> str:
    """A typed handler with its context."""
    ctx.logger.info("resizing %s", image.src)
    await ctx.result.write({"src": image.src})
    assert_type(ctx.deadline_at, datetime)
    assert_type(ctx.remaining, timedelta)
    assert_type(ctx.cancelled, bool)
    assert_type(current_context(), Context)
    return image.src


@mux.handler("mail")
async def mail(task: Task) -> None:
    """A handler that reads its payload by the getters."""
    payload = task.payload
    assert_type(payload, Payload)
    assert_type(payload.get_int("to"), int)
    assert_type(payload.get_int("to", default=None), int | None)
    assert_type(payload.get_str("from", "nobody"), str)
    assert_type(payload.get_float("f"), float)
    assert_type(payload.get_bool("b", default=False), bool)
    assert_type(payload.get_list("l"), list[Any])
    assert_type(payload.get_dict("d"), dict[str, Any])
    assert_type(payload.get_datetime("at"), datetime)
    assert_type(payload.get_timedelta("wait", default=None), timedelta | None)
    assert_type(payload.decode(Image), Image)
    assert_type(payload.decode(Mail), Mail)
    assert_type(payload.decode(list[int]), list[int])
    assert_type(payload.decode(), str)


@mux.handler("report")
def report(ctx: Context) -> int:
    """A handler that runs in a thread."""
    ctx.raise_if_cancelled()
    return 1


class Sends:
    """An object that handles tasks."""

    async def process_task(self, ctx: Context, task: Task) -> None:
        """Handle one."""


mux.handle("send", Sends())
mux.handle("plain", mail)
mux.not_found = mail


@mux.middleware
async def timed(ctx: Context, task: Task, call_next: Handler) -> object:
    """Middleware that awaits the next."""
    return await call_next(ctx, task)


def as_go_does(handler: Handler) -> Handler:
    """Middleware from handler to handler."""

    async def around(ctx: Context, task: Task) -> object:
        return await handler(ctx, task)

    return around


mux.use(as_go_does, timed)
mux.include(ServeMux(), prefix="billing:")


async def calls() -> None:
    """Decorated functions keep their types and make their tasks."""
    assert_type(await resize(current_context(), Image("a")), str)
    assert_type(report(current_context()), int)
    plain: Callable[[Task], Awaitable[None]] = mail
    await plain(mail.task({"to": 1}, queue="low", process_in=timedelta(minutes=5)))
    assert_type(resize.task(Image("a"), headers={"k": "v"}), Task)
    assert_type(await run(mux, "images:resize", {"src": "a"}), Any)
    await resize(Image("a"))  # type: ignore[call-arg, arg-type]
    resize.task(Image("a"), max_retries=3)  # type: ignore[call-arg]
    Task("x", None, process_at=datetime.now(UTC), retention=timedelta(days=1), unique_for=None)
    Task("x", queue=5)  # type: ignore[arg-type]
    Task("x", quue="low")  # type: ignore[call-arg]


def look(info: TaskInfo) -> timedelta | None:
    """A TaskInfo is typed through and through."""
    return info.timeout if info.state is TaskState.ACTIVE else info.retention
