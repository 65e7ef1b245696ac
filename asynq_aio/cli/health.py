"""Answers for an orchestrator's probes: `/livez` (does the event loop turn?) and `/readyz` (is the server healthy?).

They come from a thread, so that a loop that hangs is told from one that is busy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Final

import orjson

from asynq_aio.cli.output import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["STALE_SECONDS", "Answer", "serving"]

STALE_SECONDS: Final = 10.0
"""An event loop that has not turned for so long hangs: some handler blocks it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe is told: well or not, and why."""

    well: bool
    facts: Mapping[str, object]


@contextmanager
def serving(port: int | None, probes: Mapping[str, Callable[[], Answer]]) -> Iterator[int | None]:
    """Answer GET /<name> of each probe on all interfaces with 200 or 503 and a JSON object; None = no port, no server.

    Yields:
        The port, a free one where 0 was asked for.
    Raises:
        CommandError: the port is taken.
    """
    if port is None:
        yield None
        return

    class Handler(BaseHTTPRequestHandler):
        server_version = "asynq-aio"
        sys_version = ""
        timeout = 10  # a client that says nothing must not keep its thread

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, *, body: bool) -> None:
            probe = probes.get(self.path.partition("?")[0].strip("/"))
            status, document = 404, dict[str, object](status="not found", paths=[f"/{name}" for name in probes])
            if probe is not None:
                answer = probe()
                status = 200 if answer.well else 503
                document = {"status": "ok" if answer.well else "failed", **answer.facts}
            content = orjson.dumps(document, default=str) + b"\n"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds; nobody reads about them."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True  # an open probe must not hold up the exit

    try:
        server = Server(("", port), Handler)
    except OSError as error:
        raise CommandError(
            f"cannot listen on the health port {port}: {error.strerror}",
            hint="give another --health-port; 0 takes a free one",
        ) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="health", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
