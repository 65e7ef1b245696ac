"""Where Redis is when nobody says so: flags, environment, config file, 127.0.0.1:6379."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeGuard

from asynq_aio._config import (
    CLUSTER_ADDRS,
    EMBEDDED,
    RedisClientOpt,
    RedisClusterClientOpt,
    RedisConnOpt,
    TLSOptions,
)
from asynq_aio._uris import BOOLS, parse_redis_uri, says_database
from asynq_aio.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["default_redis", "find_config_file"]

_CONFIG_NAMES: Final = (".asynq.yaml", ".asynq.yml", ".asynq.json", ".asynq.toml")
_SETTINGS: Final = ("uri", "db", "username", "password", "cluster", "cluster_addrs", "tls", "tls_server", "insecure")

_FLAG, _ENVIRONMENT, _FILE, _NOWHERE = range(4)


@dataclass(frozen=True, slots=True)
class _Setting:
    """A value, and who says so: the lower the rank, the more it counts."""

    rank: int
    name: str
    value: object = field(repr=False)

    def text(self) -> str:
        if isinstance(self.value, str):
            return self.value
        raise ConfigError(f"{self.name} is of type {type(self.value).__name__}; expected a text (in quotes, in a file)")

    def number(self) -> int:
        if isinstance(self.value, int) and not isinstance(self.value, bool):
            return self.value
        if isinstance(self.value, str) and re.fullmatch(r"-?[0-9]{1,9}", self.value):
            return int(self.value)
        raise ConfigError(f"{self.name} is {self.value!r}; expected a number")

    def switch(self) -> bool:
        if isinstance(self.value, bool):
            return self.value
        if isinstance(self.value, str) and self.value.lower() in BOOLS:
            return BOOLS[self.value.lower()]
        raise ConfigError(f"{self.name} is {self.value!r}; expected true or false")

    def addresses(self) -> list[str]:
        value = self.value
        if isinstance(value, str):
            return [one.strip() for one in value.split(",")]
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return value
        raise ConfigError(f"{self.name} is of type {type(value).__name__}; expected host:port,host:port")


def default_redis(
    environ: Mapping[str, str],
    *,
    flags: Mapping[str, object] | None = None,
    config_path: str | Path | None = None,
) -> RedisConnOpt:
    """Where Redis is, by the first of: flags, environment (`ASYNQ_URI` ...), config file, 127.0.0.1:6379.

    The settings are those of Go's command line: uri, db, username, password, cluster, cluster_addrs, tls, tls_server
    and insecure; in the environment in capitals behind `ASYNQ_`. What a URI says counts as said where the URI stands: a
    password of the environment does not replace the one in a URI that is given as a flag.

    Args:
        environ: The environment, usually `os.environ`.
        flags: Settings from the command line; None = not given.
        config_path: The config file; None = `find_config_file(environ)`. YAML, JSON, or TOML by its suffix.
    Raises:
        ConfigError: a setting cannot be right, or the config file cannot be read.
    """
    given: dict[str, _Setting] = {}
    path = Path(config_path) if config_path is not None else find_config_file(environ)
    if path is not None:
        for name, value in _read_config(path).items():
            given[name] = _Setting(_FILE, f"{name} in {path}", value)
    for name in _SETTINGS:
        variable = f"ASYNQ_{name.upper()}"
        if text := environ.get(variable):
            given[name] = _Setting(_ENVIRONMENT, variable, text)
    for name, value in (flags or {}).items():
        if value is not None:
            given[name] = _Setting(_FLAG, f"--{name}", value)
    return _combine(given)


def find_config_file(environ: Mapping[str, str]) -> Path | None:
    """`.asynq.yaml`, `.yml`, `.json` or `.toml` in the home directory, the first that is there."""
    home = environ.get("HOME") or environ.get("USERPROFILE")
    if not home:
        return None
    return next((path for name in _CONFIG_NAMES if (path := Path(home, name)).is_file()), None)


def _read_config(path: Path) -> dict[str, object]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"the config file {path} cannot be read: {exc.strerror or type(exc).__name__}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the config file {path} is not UTF-8; save it as UTF-8") from exc
    where = ""
    try:
        found: object = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except tomllib.TOMLDecodeError:
        found, where = (), " as TOML"
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        found, where = (), f" as YAML{f', line {mark.line + 1}' if mark else ''}"
    # Outside the handlers: the parsers' errors quote the file, and it may hold a password.
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"the config file {path} cannot be read{where}; expected lines such as 'uri: 127.0.0.1:6379'")
    settings = {str(name).lower(): value for name, value in found.items() if value is not None}
    for name in settings:
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, _SETTINGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_SETTINGS)}"
            raise ConfigError(f"the config file {path} has the unknown key {name!r}; {hint}")
    return settings


def _combine(given: Mapping[str, _Setting]) -> RedisConnOpt:
    uri, cluster = given.get("uri"), given.get("cluster")
    opt: RedisConnOpt = RedisClientOpt()
    uri_rank = _NOWHERE
    db_said = False
    if uri is not None:
        opt, uri_rank = parse_redis_uri(uri.text()), uri.rank
        db_said = says_database(uri.text())
    if cluster is not None and cluster.rank <= uri_rank and cluster.switch():
        opt = _as_cluster(opt, uri, given.get("cluster_addrs"))

    def wins(setting: _Setting | None, *, said_by_uri: bool) -> TypeGuard[_Setting]:
        return setting is not None and (setting.rank <= uri_rank or not said_by_uri)

    login_said = opt.password is not None
    if wins(user := given.get("username"), said_by_uri=login_said):
        opt = replace(opt, username=user.text())
    if wins(password := given.get("password"), said_by_uri=login_said):
        opt = replace(opt, password=password.text())
    if wins(db := given.get("db"), said_by_uri=db_said):
        opt = replace(opt, db=db.number())
    tls, server, insecure = given.get("tls"), given.get("tls_server"), given.get("insecure")
    wanted = opt.tls is not False or server is not None or (tls is not None and tls.switch())
    if wanted:
        options = opt.tls if isinstance(opt.tls, TLSOptions) else TLSOptions()
        if wins(server, said_by_uri=options.server_name is not None):
            options = replace(options, server_name=server.text())
        if wins(insecure, said_by_uri=not options.verify) and insecure.switch():
            options = replace(options, verify=False)
        opt = replace(opt, tls=True if options == TLSOptions() else options)
    return opt


def _as_cluster(opt: RedisConnOpt, uri: _Setting | None, addrs: _Setting | None) -> RedisConnOpt:
    """The cluster that `opt`, read from `uri`, is a node of."""
    match opt:
        case RedisClusterClientOpt():
            return opt if addrs is None else replace(opt, addrs=addrs.addresses())
        case RedisClientOpt() if opt.addr != EMBEDDED and not opt.addr.startswith("/"):
            if addrs is not None:
                seeds: Sequence[str] = addrs.addresses()
            else:
                seeds = CLUSTER_ADDRS if uri is None else [opt.addr]
            return RedisClusterClientOpt(
                addrs=seeds,
                username=opt.username,
                password=opt.password,
                db=opt.db,
                tls=opt.tls,
                connect_timeout=opt.connect_timeout,
                read_timeout=opt.read_timeout,
                deadline=opt.deadline,
            )
        case _:
            name = "the URI" if uri is None else uri.name
            raise ConfigError(f"{name} is no address of a cluster node, but cluster is set; leave one of them out")
