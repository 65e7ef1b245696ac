"""TLS and users, against a real server with certificates made here."""

from __future__ import annotations

import ssl
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.exceptions import ConnectionError as RedisConnectionError

from asynq_aio._broker.connect import settings_of
from asynq_aio._config import RedisClientOpt, TLSOptions
from asynq_aio.errors import ConfigError
from tests.broker.own_server import free_port, own_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from asynq_aio._broker.connect import RedisClient
    from asynq_aio._config import RedisConnOpt

SECRET = "s3cr3t"

_OPENSSL = """
[req]
distinguished_name = dn
prompt = no
[dn]
CN = asynq-aio test
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:localhost, IP:127.0.0.1
[named]
basicConstraints = critical, CA:FALSE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:redis.test
[client]
basicConstraints = critical, CA:FALSE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an authority, another one, and certificates: `server` for loopback, `named`, `client`."""
    home = tmp_path_factory.mktemp("pki")
    (home / "openssl.cnf").write_text(_OPENSSL)

    def make(name: str, section: str, issuer: str | None) -> None:
        signed_by = [] if issuer is None else ["-CA", f"{issuer}.crt", "-CAkey", f"{issuer}.key"]
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-config", "openssl.cnf", "-extensions", section, "-days", "2"),
                *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}", *signed_by),
            ],
            cwd=home,
            check=True,
            capture_output=True,
        )

    make("ca", "ca", None)
    make("other-ca", "ca", None)
    for name in ("server", "named", "client"):
        make(name, name, "ca")
    subprocess.run(
        ["openssl", "ec", "-in", "client.key", "-aes128", "-passout", "pass:x", "-out", "locked.key"],
        cwd=home,
        check=True,
        capture_output=True,
    )
    return home


@asynccontextmanager
async def tls_server(pki: Path, certificate: str = "server", *, clients: bool = False) -> AsyncIterator[int]:
    """A server that speaks TLS alone; gives its port. With `clients`, it wants a certificate from them."""
    port = free_port()
    async with own_server(
        "port 0",
        f"tls-port {port}",
        f"tls-cert-file {pki}/{certificate}.crt",
        f"tls-key-file {pki}/{certificate}.key",
        f"tls-ca-cert-file {pki}/ca.crt",
        f"tls-auth-clients {'yes' if clients else 'no'}",
    ):
        yield port


async def ask(target: RedisConnOpt | str | RedisClient, *command: str) -> Any:
    """The reply to one command, over a connection of the settings."""
    settings = settings_of(target)
    connection = settings.connection(*settings.seeds[0])
    try:
        await connection.connect_check_health()
        await connection.send_command(*command)
        return await connection.read_response()
    finally:
        assert SECRET not in f"{connection!r}{settings!r}"
        await connection.disconnect()


# TLS


async def test_tls_with_an_authority_of_ones_own(pki: Path) -> None:
    """The server's certificate is checked against the given authority, by option, URI, context and handed-in client."""
    async with tls_server(pki) as port:
        ca = f"{pki}/ca.crt"
        addr = f"127.0.0.1:{port}"
        context = ssl.create_default_context(cafile=ca)
        for target in (
            RedisClientOpt(addr, tls=TLSOptions(ca_file=ca)),
            RedisClientOpt(f"localhost:{port}", tls=TLSOptions(ca_file=ca)),
            RedisClientOpt(addr, tls=context),
            f"rediss://{addr}?ca={ca}",
            redis.asyncio.Redis(host="127.0.0.1", port=port, ssl=True, ssl_ca_certs=ca),
            redis.Redis(host="127.0.0.1", port=port, ssl=True, ssl_ca_certs=ca),
            redis.asyncio.Redis.from_url(f"rediss://{addr}", ssl_ca_certs=ca),
            redis.Redis.from_url(f"rediss://{addr}", ssl_ca_certs=ca),
        ):
            assert await ask(target, "PING") == b"PONG"
            assert "TLS" in settings_of(target).description


async def test_certificates_that_do_not_fit(pki: Path) -> None:
    """A wrong authority, the system's, and a wrong name are refused; `verify=False` takes anything."""
    async with tls_server(pki, "named") as port:
        addr, ca = f"127.0.0.1:{port}", f"{pki}/ca.crt"
        for tls, says in (
            (TLSOptions(ca_file=f"{pki}/other-ca.crt"), "CERTIFICATE_VERIFY_FAILED"),
            (TLSOptions(ca_file=f"{pki}/other-ca.crt", server_name="redis.test"), "CERTIFICATE_VERIFY_FAILED"),
            (True, "CERTIFICATE_VERIFY_FAILED"),
            (TLSOptions(ca_file=ca), "IP address mismatch"),
            (TLSOptions(ca_file=ca, server_name="other.test"), "Hostname mismatch"),
        ):
            with pytest.raises(RedisConnectionError, match=says):
                await ask(RedisClientOpt(addr, tls=tls), "PING")
        for good in (
            TLSOptions(ca_file=ca, server_name="redis.test"),
            TLSOptions(verify=False),
            TLSOptions(verify=False, server_name="other.test"),
        ):
            assert await ask(RedisClientOpt(addr, tls=good), "PING") == b"PONG"
        assert await ask(f"rediss://{addr}?ca={ca}&server_name=redis.test", "PING") == b"PONG"
        assert await ask(f"rediss://{addr}?verify=false", "PING") == b"PONG"
        lax = redis.Redis(host="127.0.0.1", port=port, ssl=True, ssl_cert_reqs="none", ssl_check_hostname=False)
        assert await ask(lax, "PING") == b"PONG"


async def test_mutual_tls(pki: Path) -> None:
    """A server that wants a certificate gets the one of the options; without one there is no connection."""
    async with tls_server(pki, clients=True) as port:
        addr, ca = f"127.0.0.1:{port}", f"{pki}/ca.crt"
        cert, key = f"{pki}/client.crt", f"{pki}/client.key"
        mine = TLSOptions(ca_file=ca, cert_file=cert, key_file=key)
        assert await ask(RedisClientOpt(addr, tls=mine), "PING") == b"PONG"
        uri = f"rediss://{addr}?ca={ca}&cert={cert}&key={key}"
        assert await ask(uri, "PING") == b"PONG"
        client = redis.asyncio.Redis(
            host="127.0.0.1",
            port=port,
            ssl=True,
            ssl_ca_certs=ca,
            ssl_certfile=cert,
            ssl_keyfile=key,
        )
        assert await ask(client, "PING") == b"PONG"
        with pytest.raises(RedisConnectionError):
            await ask(RedisClientOpt(addr, tls=TLSOptions(ca_file=ca)), "PING")


async def test_a_key_in_the_certificate_file(pki: Path, tmp_path: Path) -> None:
    """One file may hold both certificate and key."""
    both = tmp_path / "both.pem"
    both.write_text((pki / "client.crt").read_text() + (pki / "client.key").read_text())
    async with tls_server(pki, clients=True) as port:
        tls = TLSOptions(ca_file=f"{pki}/ca.crt", cert_file=str(both))
        assert await ask(RedisClientOpt(f"127.0.0.1:{port}", tls=tls), "PING") == b"PONG"


async def test_plain_text_to_a_tls_port_and_back(pki: Path) -> None:
    """Both mistakes end in an error within the timeouts rather than in a hang."""
    async with tls_server(pki) as port:
        with pytest.raises(RedisConnectionError):
            await ask(f"redis://127.0.0.1:{port}?read_timeout=5s", "PING")
    plain = free_port()
    async with own_server(f"port {plain}"):
        with pytest.raises(redis.RedisError):
            await ask(f"rediss://127.0.0.1:{plain}?connect_timeout=1s&verify=false", "PING")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"ca_file": "none.crt"}, "ca_file .* cannot be read: No such file"),
        ({"ca_file": "ca.key"}, "ca_file .* cannot be read"),
        ({"cert_file": "none.crt"}, "cert_file .* cannot be used: No such file"),
        ({"cert_file": "client.crt"}, "expected a certificate and its unencrypted key"),
        ({"cert_file": "client.crt", "key_file": "server.key"}, "expected a certificate and its unencrypted key"),
        ({"cert_file": "client.crt", "key_file": "locked.key"}, "expected a certificate and its unencrypted key"),
    ],
)
def test_files_that_cannot_be_used(pki: Path, files: dict[str, str], says: str) -> None:
    """A wrong file is an error of the settings, which names the file, before anything is dialled."""
    tls = TLSOptions(**{name: str(pki / file) for name, file in files.items()})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=says):
        settings_of(RedisClientOpt(tls=tls))


def test_files_of_a_client_that_cannot_be_used() -> None:
    """The same for a client that is handed in, and for what the asyncio connections of redis-py lack."""
    with pytest.raises(ConfigError, match="TLS files of the client"):
        settings_of(redis.Redis(ssl=True, ssl_ca_certs="/none.crt"))
    with pytest.raises(ConfigError, match="ssl_validate_ocsp_stapled, which"):
        settings_of(redis.Redis(ssl=True, ssl_validate_ocsp_stapled=True))


# Users


@asynccontextmanager
async def acl_server(*users: str, requirepass: str = "") -> AsyncIterator[str]:
    """A server with these users; gives its address."""
    port = free_port()
    password = [f"requirepass {requirepass}"] if requirepass else []
    async with own_server(f"port {port}", *password, *(f"user {user}" for user in users)):
        yield f"127.0.0.1:{port}"


async def test_user_and_password() -> None:
    """The ACL user of an option, a URI or a client is the one that we are."""
    async with acl_server(f"alice on >{SECRET} ~* &* +@all") as addr:
        host, port = "127.0.0.1", int(addr.rpartition(":")[2])
        for target in (
            RedisClientOpt(addr, username="alice", password=SECRET),
            f"redis://alice:{SECRET}@{addr}",
            redis.asyncio.Redis(host=host, port=port, username="alice", password=SECRET, decode_responses=True),
            redis.Redis(host=host, port=port, username="alice", password=SECRET, decode_responses=True),
            redis.Redis.from_url(f"redis://alice:{SECRET}@{addr}"),
            redis.asyncio.Redis(
                host=host,
                port=port,
                credential_provider=redis.UsernamePasswordCredentialProvider("alice", SECRET),
            ),
        ):
            assert await ask(target, "ACL", "WHOAMI") == b"alice"
        assert await ask(f"redis://{addr}", "ACL", "WHOAMI") == b"default"
        assert await ask(RedisClientOpt(addr, username="alice"), "ACL", "WHOAMI") == b"default"


async def test_user_of_a_client_without_password() -> None:
    """A client that logs in as a user without password does so by us too."""
    async with acl_server("bob on nopass ~* &* +@all") as addr:
        client = redis.Redis(host="127.0.0.1", port=int(addr.rpartition(":")[2]), username="bob")
        assert await ask(client, "ACL", "WHOAMI") == b"bob"


async def test_wrong_password() -> None:
    """A wrong password, a missing one and one too many are authentication errors, without the password."""
    async with acl_server(requirepass="right") as addr:
        for uri in (
            f"redis://:{SECRET}@{addr}",
            f"redis://nobody:{SECRET}@{addr}",
            f"redis://{addr}",
            f"redis://{addr}/3",
        ):
            with pytest.raises(AuthenticationError) as caught:
                await ask(uri, "PING")
            assert SECRET not in str(caught.value)
        assert await ask(f"redis://:right@{addr}", "PING") == b"PONG"
    async with acl_server() as addr:
        with pytest.raises(AuthenticationError, match="without any password"):
            await ask(f"redis://:{SECRET}@{addr}", "PING")


async def test_a_user_with_few_permissions() -> None:
    """What the handshake sends besides AUTH and SELECT is a courtesy: no permission for it is needed."""
    async with acl_server(f"carol on >{SECRET} ~* &* -@all +ping +select +get") as addr:
        assert await ask(f"redis://carol:{SECRET}@{addr}/2", "PING") == b"PONG"
        with pytest.raises(NoPermissionError):
            await ask(f"redis://carol:{SECRET}@{addr}", "ROLE")


async def test_rotating_credentials() -> None:
    """A callable, sync or async, is asked at each new connection, for the password or for user and password."""
    asked: list[str] = []

    def password() -> str:
        asked.append("sync")
        return SECRET

    async def password_async() -> str:
        asked.append("async")
        return SECRET

    async def both() -> tuple[str, str]:
        asked.append("both")
        return "alice", SECRET

    async with acl_server(f"alice on >{SECRET} ~* &* +@all") as addr:
        for opt in (
            RedisClientOpt(addr, username="alice", password=password),
            RedisClientOpt(addr, username="alice", password=password_async),
            RedisClientOpt(addr, password=both),
        ):
            for _ in range(2):
                assert await ask(opt, "ACL", "WHOAMI") == b"alice"
    assert asked == ["sync", "sync", "async", "async", "both", "both"]


def _raising() -> str:
    raise OSError(SECRET)


@pytest.mark.parametrize(
    ("password", "error", "says"),
    [
        (_raising, RedisConnectionError, "given as password raised OSError"),
        (lambda: None, AuthenticationError, "returned NoneType; expected a str"),
        (lambda: ("a", "b", SECRET), AuthenticationError, "returned tuple; expected a str"),
    ],
)
async def test_callable_that_fails(password: Callable[[], Any], error: type[Exception], says: str) -> None:
    """A callable that raises is an outage; one that returns something else is a refusal. No socket stays open."""
    async with acl_server() as addr:
        settings = settings_of(RedisClientOpt(addr, password=password))
        connection = settings.connection(*settings.seeds[0])
        with pytest.raises(error, match=says) as caught:
            await connection.connect_check_health()
        assert SECRET not in str(caught.value)
        assert not connection.is_connected
