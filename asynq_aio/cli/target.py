"""From `app:mux` to what it names, and every way in which it can be wrong."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Final, TypeAlias, cast

from asynq_aio import AsyncServer, ServeMux
from asynq_aio.cli.output import FAILED, USAGE, CommandError

__all__ = ["Factory", "Target", "load"]

_ACCEPTED: Final = "expected a ServeMux, an AsyncServer, or a callable without parameters that returns one of them"

Found: TypeAlias = ServeMux | AsyncServer
Factory: TypeAlias = Callable[[], Found | Awaitable[Found]]


@dataclass(frozen=True, slots=True)
class Target:
    """What `module:attribute` names."""

    name: str
    module: ModuleType
    found: Found | Factory

    async def resolve(self) -> tuple[AsyncServer | None, ServeMux]:
        """The server, if the program makes its own, and the handlers.

        A callable is called here, in the event loop in which its server will run.

        Raises:
            CommandError: what came out is neither a ServeMux nor an AsyncServer, or it has no handlers.
        """
        found: object = self.found
        if not isinstance(found, ServeMux | AsyncServer):
            try:
                found = cast("Factory", found)()
                if inspect.isawaitable(found):
                    found = await found
            except Exception as error:
                raise CommandError(
                    f"{self.name}() failed: {type(error).__name__}: {error}", detail=_tail(error, error.__traceback__)
                ) from error
        match found:
            case ServeMux():
                return None, found
            case AsyncServer():
                return found, self._mux_beside()
            case _:
                raise CommandError(f"{self.name}() returned {_kind(found)}; {_ACCEPTED}", code=USAGE)

    def _mux_beside(self) -> ServeMux:
        """A server does not know its handlers before it runs: they are the one ServeMux of its module."""
        muxes = {name: value for name, value in vars(self.module).items() if isinstance(value, ServeMux)}
        distinct = list({id(mux): mux for mux in muxes.values()}.values())
        if len(distinct) == 1:
            return distinct[0]
        module = self.module.__name__
        if not distinct:
            raise CommandError(
                f"{self.name} is an AsyncServer, but module {module} has no ServeMux for it",
                hint=f"import or make the mux in {module}, or name the mux itself: asynq-aio worker {module}:mux",
                code=USAGE,
            )
        raise CommandError(
            f"{self.name} is an AsyncServer, but module {module} has several ServeMuxes: {', '.join(muxes)}",
            hint=f"include() them into one, or name one: asynq-aio worker {module}:{next(iter(muxes))}",
            code=USAGE,
        )


def load(target: str) -> Target:
    """Import the module of `module:attribute`, with the current directory importable, and take the attribute.

    Raises:
        CommandError: it is no such text, the module is not there or does not import, or the attribute is not there or
            is nothing that can work tasks.
    """
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise CommandError(
            f"{target!r} names no handlers; expected module:attribute, such as app:mux", hint=_guess(target), code=USAGE
        )
    if module_name.endswith(".py") or "/" in module_name or os.sep in module_name:
        raise CommandError(f"{module_name!r} is a file; expected the name of a module", hint=_guess(target), code=USAGE)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module = _import(module_name, here)
    found: object = module
    for step, name in enumerate(path.split(".")):
        try:
            found = getattr(found, name)
        except AttributeError:
            where = ":".join((module_name, ".".join(path.split(".")[:step]))).rstrip(":")
            raise _missing(where, found, name, module_name if step == 0 else None) from None
    if not _acceptable(found):
        raise CommandError(f"{target} is {_kind(found)}; {_ACCEPTED}", hint=_offer(module), code=USAGE)
    return Target(target, module, cast("Found | Factory", found))


def _acceptable(found: object) -> bool:
    if isinstance(found, ServeMux | AsyncServer):
        return True
    if isinstance(found, type) or not callable(found):
        return False
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError):  # it has parameters, or no signature that can be read
        return False
    return True


def _import(name: str, here: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise _broken(name, error, here) from error
        raise _not_found(name, missing, here) from None
    except (Exception, SystemExit) as error:
        raise _broken(name, error, here) from error


def _not_found(name: str, missing: str, here: str) -> CommandError:
    parent, _, last = missing.rpartition(".")
    if parent:
        package = sys.modules[parent]
        near = difflib.get_close_matches(
            last, [module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))]
        )
        near = [f"{parent}.{one}" for one in near]
    else:
        near = difflib.get_close_matches(missing, [module.name for module in pkgutil.iter_modules([here])])
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"the directory {here} and the installed packages were searched"
    )
    return CommandError(
        f"there is no module {missing!r}" + ("" if missing == name else f" (of {name})"), hint=hint, code=USAGE
    )


def _broken(name: str, error: BaseException, here: str) -> CommandError:
    hint = (
        f"the directory {here} and the installed packages were searched"
        if isinstance(error, ModuleNotFoundError)
        else ""
    )
    return CommandError(
        f"module {name} does not import: {type(error).__name__}: {error}",
        detail=_tail(error, error.__traceback__),
        hint=hint,
        code=FAILED,
    )


def _tail(error: BaseException, frames: TracebackType | None) -> str:
    """The traceback from the user's first line on: ours and those of the import machinery come before it."""
    ours = str(Path(__file__).parent)
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if not file.startswith(("<frozen importlib", ours)) and file != importlib.__file__:
            break
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames, chain=False))


def _missing(where: str, owner: object, name: str, module_name: str | None) -> CommandError:
    public = [one for one in dir(owner) if not one.startswith("_")]
    near = difflib.get_close_matches(name, public, n=1)
    if near:
        return CommandError(
            f"{where} has no {name!r}", hint=f"did you mean {where}{':' if module_name else '.'}{near[0]}?", code=USAGE
        )
    hint = _offer(owner) if isinstance(owner, ModuleType) else f"it has {', '.join(public[:10]) or 'nothing public'}"
    return CommandError(f"{where} has no {name!r}", hint=hint, code=USAGE)


def _offer(module: ModuleType) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, ServeMux | AsyncServer)]
    if names:
        return f"in {module.__name__} there is {' and '.join(f'{module.__name__}:{name}' for name in names)}"
    return f"in {module.__name__} there is neither a ServeMux nor an AsyncServer; make one: mux = ServeMux()"


def _guess(target: str) -> str:
    module, _, attribute = target.partition(":")
    module = module.removesuffix(".py").strip("./").replace(os.sep, ".").replace("/", ".") or "app"
    return f"did you mean {module}:{attribute or 'mux'}?"


def _kind(found: object) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}"
    if inspect.isroutine(found):
        return f"the function {found.__name__}{_parameters(found)}"
    return f"a {type(found).__name__}"


def _parameters(function: Callable[..., object]) -> str:
    try:
        return f"({', '.join(inspect.signature(function).parameters)})"
    except ValueError:
        return "(...)"
