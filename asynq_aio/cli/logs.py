"""Log lines of a worker process on stderr: text for people, or one JSON object per line."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

import orjson

from asynq_aio.cli.output import styled

__all__ = ["LogFormat", "LogLevel", "start_logging"]


class LogLevel(StrEnum):
    """Levels by the words of Go's asynq; Python's word for one of them, too."""

    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How a log line looks."""

    TEXT = "text"
    JSON = "json"


_NUMBERS: Final = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARN: logging.WARNING,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}
_NAMES: Final = {logging.WARNING: "warn", logging.CRITICAL: "fatal"}
_STYLES: Final = {
    logging.DEBUG: "2",
    logging.INFO: "32",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "1;31",
}
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; all else was given as `extra` and belongs to the line."""


def start_logging(level: LogLevel, form: LogFormat) -> None:
    """Send all logging of this process to stderr, that of the user's program too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSONFormatter() if form is LogFormat.JSON else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_NUMBERS[level])
    # At debug they say how the loop selects and which files changed; nobody asked for that.
    for chatty in ("asyncio", "watchfiles"):
        logging.getLogger(chatty).setLevel(max(_NUMBERS[level], logging.WARNING))


def _level(record: logging.LogRecord) -> str:
    return _NAMES.get(record.levelno, record.levelname.lower())


class _TextFormatter(logging.Formatter):
    """`2030-01-31 08:00:00.123 info  [pid] asynq_aio: message`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")[:23]
        level = styled(f"{_level(record):<5}", _STYLES.get(record.levelno, "0"), sys.stderr)
        lines = [f"{moment} {level} [{record.process}] {record.name}: {record.getMessage()}"]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        if record.stack_info:
            lines.append(self.formatStack(record.stack_info))
        return "\n".join(lines)


class _JSONFormatter(logging.Formatter):
    """One object per line: time (RFC 3339, UTC), level, logger, pid, message, what was given as `extra`, error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": _level(record),
            "logger": record.name,
            "pid": record.process or os.getpid(),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD and name not in line}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        # A lone surrogate, of a file name say, cannot be written as UTF-8.
        texts = {
            name: value.encode(errors="replace").decode() if isinstance(value, str) else value
            for name, value in line.items()
        }
        return orjson.dumps(texts, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
