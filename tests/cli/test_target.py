"""From `app:mux` to a mux or a server: every way in which it can be wrong has an answer that helps."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asynq_aio import AsyncServer, ServeMux
from asynq_aio.cli.output import CommandError
from asynq_aio.cli.target import load

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.cli.conftest import Command


@pytest.fixture
def here(command: Command, monkeypatch: pytest.MonkeyPatch) -> Generator[Command]:
    """In the directory of the program; what it imports is forgotten afterwards."""
    monkeypatch.chdir(command.directory)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield command
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(command.directory) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.mark.parametrize("target", ["app:mux", "app:make", "app:make_later"])
async def test_a_mux_and_what_returns_one(here: Command, target: str) -> None:
    """A mux, a function, or a coroutine function; the current directory is importable."""
    server, mux = await load(target).resolve()
    assert server is None
    assert "email:welcome" in mux.patterns


async def test_a_server_works_the_mux_of_its_module(here: Command) -> None:
    """The handlers of a server are the one mux that is there, under however many names."""
    here.write(
        "from app import mux\nfrom asynq_aio import AsyncServer\nserver = AsyncServer('a:1')\nother = mux\n", "one.py"
    )
    server, mux = await load("one:server").resolve()
    assert isinstance(server, AsyncServer)
    assert isinstance(mux, ServeMux)
    here.write("from asynq_aio import AsyncServer\nserver = AsyncServer('a:1')\n", "none.py")
    with pytest.raises(CommandError, match="module none has no ServeMux for it"):
        await load("none:server").resolve()
    here.write(
        "from asynq_aio import AsyncServer, ServeMux\na, b = ServeMux(), ServeMux()\nserver = AsyncServer('a:1')\n",
        "two.py",
    )
    with pytest.raises(CommandError, match="has several ServeMuxes: a, b"):
        await load("two:server").resolve()


async def test_an_attribute_of_an_attribute(here: Command) -> None:
    """Dots go down: of a package, and of an object."""
    here.write("class Tasks:\n    from app import mux\n", "shop/tasks.py")
    assert (await load("shop.tasks:Tasks.mux").resolve())[1].patterns


@pytest.mark.parametrize(
    ("target", "message", "hint", "code"),
    [
        ("app", "names no handlers; expected module:attribute, such as app:mux", "did you mean app:mux?", 2),
        ("app.py", "names no handlers", "did you mean app:mux?", 2),
        (":mux", "names no handlers", "did you mean app:mux?", 2),
        ("app:", "names no handlers", "did you mean app:mux?", 2),
        ("./app.py:mux", "is a file; expected the name of a module", "did you mean app:mux?", 2),
        ("shop/tasks.py:make", "is a file", "did you mean shop.tasks:make?", 2),
        ("ap:mux", "there is no module 'ap'", "did you mean app?", 2),
        ("zzzzz:mux", "there is no module 'zzzzz'", "the directory {here} and the installed packages were searched", 2),
        ("app.tasks:mux", "there is no module 'app.tasks'", "", 2),
        ("app:mx", "app has no 'mx'", "did you mean app:mux?", 2),
        ("app:zzzzz", "app has no 'zzzzz'", "in app there is app:mux", 2),
        ("app:mux.handlr", "app:mux has no 'handlr'", "did you mean app:mux.handler?", 2),
        (
            "app:number",
            "app:number is a int; expected a ServeMux, an AsyncServer, or a callable",
            "in app there is app:mux",
            2,
        ),
        ("app:send", "is the function send(task); expected", "in app there is app:mux", 2),
        ("app:takes", "is the function takes(name); expected", "in app there is app:mux", 2),
        ("app:ServeMux", "is the class ServeMux; expected", "in app there is app:mux", 2),
    ],
)
def test_what_is_no_target(here: Command, target: str, message: str, hint: str, code: int) -> None:
    """The text says what was found and what is accepted; the hint is the nearest right one."""
    with pytest.raises(CommandError, match=re.escape(message)) as caught:
        load(target)
    assert hint.replace("{here}", str(Path.cwd())) in caught.value.hint
    assert caught.value.code == code


async def test_a_callable_that_returns_something_else(here: Command) -> None:
    """What came out, and what is accepted."""
    with pytest.raises(CommandError, match=re.escape("app:wrong() returned a int; expected a ServeMux")):
        await load("app:wrong").resolve()


async def test_a_callable_that_fails(here: Command) -> None:
    """With the user's own lines of the traceback."""
    with pytest.raises(CommandError, match=re.escape("app:fails() failed: RuntimeError: no database")) as caught:
        await load("app:fails").resolve()
    assert 'raise RuntimeError("no database")' in caught.value.detail
    assert "cli/target.py" not in caught.value.detail


def test_a_module_that_does_not_import(here: Command) -> None:
    """The traceback begins with the user's first line: neither ours nor the import machinery's stand before it."""
    here.write("def f():\n    missing_name\nf()\n", "bad.py")
    with pytest.raises(CommandError, match="module bad does not import: NameError: name 'missing_name'") as caught:
        load("bad:mux")
    lines = caught.value.detail.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "bad.py" in lines[1]
    assert "importlib" not in caught.value.detail
    assert caught.value.code == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x x\n", "SyntaxError: invalid syntax"),
        ("import surely_not_installed\n", "ModuleNotFoundError: No module named 'surely_not_installed'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
    ],
)
def test_more_ways_not_to_import(here: Command, text: str, reason: str) -> None:
    """A missing dependency of the module is not the module missing."""
    here.write(text, "bad.py")
    with pytest.raises(CommandError, match=re.escape(f"module bad does not import: {reason}")) as caught:
        load("bad:mux")
    assert caught.value.code == 1


def test_on_the_command_line(command: Command) -> None:
    """The same, as a person sees it: no traceback of ours, nothing on stdout."""
    told = command("worker", "app:mx")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == "error: app has no 'mx'\nhint: did you mean app:mux?\n"
