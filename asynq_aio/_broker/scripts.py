"""The Lua scripts, read once at import: `load("claim")` is `lua/claim.lua` with its SHA."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources

__all__ = ["Script", "load"]

# A line `-- include: look` is replaced by `lua/_look.lua`: Redis' scripts cannot import from each other.
_INCLUDE = re.compile(r"^-- include: (\w+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """One Lua script; `sha` is the lower-case hex that EVALSHA wants."""

    name: str
    source: bytes
    sha: bytes


def load(name: str) -> Script:
    """The script in `lua/<name>.lua`, its includes put in."""
    source = _INCLUDE.sub(lambda match: _read(f"_{match[1]}"), _read(name)).encode()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


def _read(name: str) -> str:
    return resources.files("asynq_aio._broker").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
