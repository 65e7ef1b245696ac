"""Where Redis is: the global flags, accepted before and after the command and its sub-command, as Go's are.

Each command, each group and the root have all of them; what stands further right wins. The functions behind the
commands get one `Connection` and never see the flags.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Final, Self
from urllib.parse import quote, urlencode

import typer

from asynq_aio import (
    RedisClientOpt,
    RedisClusterClientOpt,
    RedisConnOpt,
    RedisFailoverClientOpt,
    TLSOptions,
    default_redis,
)

__all__ = ["EMBEDDED", "Connection", "connected", "point_to", "uri_of"]

EMBEDDED: Final = "embedded://"
_SETTINGS: Final = ("uri", "db", "password", "username", "cluster", "cluster_addrs", "tls", "tls_server", "insecure")
_PANEL: Final = "Connection (anywhere on the line)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """The global flags that were given; None = not given."""

    uri: Annotated[
        str | None,
        typer.Option(
            "--uri",
            "-u",
            metavar="URI",
            help="host:port, redis://, rediss://, redis-socket://, redis-sentinel://, redis-cluster:// or embedded://. "
            "Else ASYNQ_URI, and so for all of these.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    db: Annotated[
        int | None,
        typer.Option("--db", "-n", metavar="N", min=0, help="Number of the database.", rich_help_panel=_PANEL),
    ] = None
    password: Annotated[
        str | None,
        typer.Option(
            "--password",
            "-p",
            metavar="TEXT",
            help="Better in ASYNQ_PASSWORD: others can read command lines.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    username: Annotated[
        str | None, typer.Option("--username", "-U", metavar="NAME", help="ACL user.", rich_help_panel=_PANEL)
    ] = None
    cluster: Annotated[
        bool | None,
        typer.Option("--cluster/--no-cluster", help="Connect to a Redis Cluster.", rich_help_panel=_PANEL),
    ] = None
    cluster_addrs: Annotated[
        str | None,
        typer.Option(
            "--cluster-addrs",
            metavar="ADDRS",
            help="Nodes of the cluster, by commas; else 127.0.0.1:7000 to 7005.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tls: Annotated[bool | None, typer.Option("--tls/--no-tls", help="Connect by TLS.", rich_help_panel=_PANEL)] = None
    tls_server: Annotated[
        str | None,
        typer.Option(
            "--tls-server",
            metavar="NAME",
            help="Name in the server's certificate; implies TLS.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure/--no-insecure", help="With TLS: take any certificate.", rich_help_panel=_PANEL),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Else ~/.asynq.yaml, .json or .toml.", rich_help_panel=_PANEL),
    ] = None
    no_color: Annotated[
        bool | None, typer.Option("--no-color", help="No colours; so does NO_COLOR.", rich_help_panel=_PANEL)
    ] = None

    def over(self, outer: Connection | None) -> Self:
        """These flags, and the outer ones where these are not given."""
        if outer is None:
            return self
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: getattr(outer, name) if value is None else value for name, value in mine.items()})

    def given(self) -> list[str]:
        """The flags that say where Redis is, as they are written on the command line."""
        return [f"--{name.replace('_', '-')}" for name in (*_SETTINGS, "config") if getattr(self, name) is not None]

    def redis(self, environ: Mapping[str, str]) -> RedisConnOpt:
        """Where Redis is, by the first of flags, environment, config file, 127.0.0.1:6379.

        Raises:
            ConfigError: a setting cannot be right.
        """
        flags = {name: getattr(self, name) for name in _SETTINGS}
        return default_redis(environ, flags=flags, config_path=self.config)

    def settle(self, environ: MutableMapping[str, str]) -> RedisConnOpt:
        """As `redis`, and from now on the environment says the same, and only that.

        So `Client()` in the user's program and the processes that are started find the Redis of the flags; and no
        password gets into the command line of a process, which others can read.
        """
        opt = self.redis(environ)
        point_to(uri_of(opt), environ)
        return opt


def point_to(uri: str, environ: MutableMapping[str, str]) -> None:
    """Let the environment say that Redis is there, and nothing else about it."""
    for name in _SETTINGS:
        environ.pop(f"ASYNQ_{name.upper()}", None)
    environ["ASYNQ_URI"] = uri


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the global flags; it gets them as its first parameter, `connection`."""
    flags = inspect.signature(Connection).parameters
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "connection"
    ]

    def run(ctx: typer.Context, **values: object) -> None:
        given = Connection(**{name: values.pop(name) for name in flags})  # type: ignore[arg-type]  # typer has checked them
        ctx.obj = given.over(ctx.obj)
        command(connection=ctx.obj, **values)

    annotations = inspect.get_annotations(Connection, eval_str=True)
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        *(
            flag.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotations[name])
            for name, flag in flags.items()
        ),
    ]
    # What typer reads: the names, defaults and annotations of the parameters.
    vars(run)["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def uri_of(opt: RedisConnOpt) -> str:
    """The URI that stands for this option, password included: for the environment, never for people.

    Only for options that came from flags, environment or file: a callable for a password has no URI.
    """
    secure = "s" if opt.tls else ""
    query: dict[str, str] = {}
    match opt:
        case RedisClientOpt():
            if opt.addr == EMBEDDED:
                scheme, place = "embedded", ""
            elif opt.addr.startswith("/"):
                scheme, place = "redis-socket", quote(opt.addr)
            else:
                scheme, place = f"redis{secure}", opt.addr
        case RedisFailoverClientOpt():
            scheme, place = f"redis{secure}-sentinel", ",".join(opt.sentinel_addrs)
            query["master"] = opt.master_name
            if opt.sentinel_password:
                query["sentinel_password"] = str(opt.sentinel_password)
                if opt.sentinel_username:
                    query["sentinel_username"] = opt.sentinel_username
        case RedisClusterClientOpt():
            scheme, place = f"redis{secure}-cluster", ",".join(opt.addrs)
    if opt.db:
        query["db"] = str(opt.db)
    for name in ("connect_timeout", "read_timeout", "deadline"):
        query[name] = f"{getattr(opt, name).total_seconds():.6f}"
    if isinstance(opt.tls, TLSOptions):
        files = {
            "server_name": opt.tls.server_name,
            "ca": opt.tls.ca_file,
            "cert": opt.tls.cert_file,
            "key": opt.tls.key_file,
        }
        query |= {name: value for name, value in files.items() if value}
        query |= {} if opt.tls.verify else {"verify": "false"}
    login = ""
    if opt.password:  # a user name is sent only together with a password
        # Without a user name this form's password is for the sentinels too; Redis calls that user `default`.
        alone = isinstance(opt, RedisFailoverClientOpt) and not opt.shared_password
        user = opt.username or ("default" if alone else "")
        login = f"{quote(user, safe='')}:{quote(str(opt.password), safe='')}@"
    return f"{scheme}://{login}{place}?{urlencode(query, quote_via=quote)}"
