"""A program of its own that runs one server, and ends it when the process that wanted it is gone.

    python keeper.py LOG DIRECTORY COMMAND ...      DIRECTORY: removed at the end; "" keeps everything

Standard input is the lifeline: nothing is written to it, and the kernel closes it with its last holder, also after
`kill -9`. Why not `prctl(PR_SET_PDEATHSIG)` alone: its signal comes when the *thread* that forked ends, which may be
one of a pool, and only Linux has it. Here it guards the other side: a keeper that is killed takes its server along.

The first line of standard output is the process ID of the server. The exit status is the server's; 128 + n after a
signal n.
Only the standard library is imported, and little of it: six of these start for a cluster.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from typing import NoReturn

__all__: list[str] = []

_GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _serve(log: str, command: list[str], keeper: int) -> NoReturn:
    """In the forked child: become the server."""
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target, source in ((0, nothing), (1, output), (2, output)):
            os.dup2(source, target)
        if sys.platform == "linux":
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:  # it died before the call above
                os._exit(1)
        os.execv(command[0], command)  # noqa: S606  (no shell is wanted)
    except OSError as exc:
        os.write(2, f"cannot run {command[0]}: {exc.strerror}\n".encode())
    os._exit(127)


def _status(server: int, *, block: bool) -> int | None:
    """The exit status of the server, or None while it runs."""
    pid, status = os.waitpid(server, 0 if block else os.WNOHANG)
    if pid == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _end(server: int, child_died: int, *, gently: bool) -> int:
    """Stop the server; its data is either removed anyway or worth a moment to be written."""
    os.kill(server, signal.SIGTERM if gently else signal.SIGKILL)
    os.kill(server, signal.SIGCONT)  # one that was stopped by SIGSTOP would never see SIGTERM
    if gently:
        until = time.monotonic() + _GRACE_SECONDS
        while (left := until - time.monotonic()) > 0:
            code = _status(server, block=False)
            if code is not None:
                return code
            if select.select([child_died], [], [], left)[0]:
                os.read(child_died, 64)
        os.kill(server, signal.SIGKILL)
    code = _status(server, block=True)
    return 0 if code is None else code


def main() -> int:
    """Run the command until it ends, the lifeline is closed, or SIGTERM comes."""
    log, directory, *command = sys.argv[1:]
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    told_to_end = False

    def end(_signal: int, _frame: object) -> None:
        nonlocal told_to_end
        told_to_end = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)  # only to be woken
    keeper = os.getpid()
    server = os.fork()
    if server == 0:
        _serve(log, command, keeper)
    os.write(1, b"%d\n" % server)

    code: int | None = None
    while code is None:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 64)
            code = _status(server, block=False)
        if code is None and (told_to_end or (0 in ready and not os.read(0, 64))):
            code = _end(server, woken, gently=not directory)
            if directory:
                import shutil

                shutil.rmtree(directory, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
