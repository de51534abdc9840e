"""The logs of API and workers: text on a terminal, one JSON object a line anywhere else.

A line about a request or a job carries its ids and durations as fields, `extra={"fields": {…}}`.
Neither a key nor a picture nor a query ever becomes a field.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["auto", "json", "text"]
REQUESTS = logging.getLogger("ddpm.requests")
JOBS = logging.getLogger("ddpm.jobs")
_LINGER_S = 0.05
_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode


def configure(
    form: LogFormat,
    *,
    level: str = "info",
    stream: TextIO | None = None,
    gather: bool = False,
) -> None:
    """Let this process log so. level: of what ddpm says; others say warnings and worse.

    gather: for a process of many lines, see `Gathering`.
    """
    target = stream or sys.stderr
    as_text = form == "text" or (form == "auto" and target.isatty())
    handler = Gathering(target) if gather else logging.StreamHandler(target)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ddpm").setLevel(level.upper())


def flush() -> None:
    """Write what was said so far, in a process that a signal is about to end."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class Gathering(logging.StreamHandler[TextIO]):
    """Lines written together, by a thread of its own and 50 ms late: who says them need not wait.

    A warning or worse is written at once, with all that was said before it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._said: list[logging.LogRecord] = []
        self._due = threading.Event()
        threading.Thread(target=self._write_later, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record for the next write."""
        self._said.append(record)
        if record.levelno >= logging.WARNING:
            self.flush()
        elif len(self._said) == 1:
            self._due.set()

    def flush(self) -> None:
        """Write what there is."""
        with self.lock or contextlib.nullcontext():
            said, self._said = self._said, []
            if not said:
                return
            try:
                self.stream.write("".join(f"{self.format(record)}\n" for record in said))
                self.stream.flush()
            except Exception:  # as every handler of the library: saying must not break what is done
                self.handleError(said[-1])

    def _write_later(self) -> None:
        while True:
            self._due.wait()
            time.sleep(_LINGER_S)
            self._due.clear()
            self.flush()


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says besides its message, without what is not there."""
    given: dict[str, Any] = getattr(record, "fields", {})
    return {name: value for name, value in given.items() if value is not None}


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """time (UTC), level, logger, message, then the fields."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.removesuffix("+00:00") + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


class TextFormatter(logging.Formatter):
    """For people: the time, the logger, the message, the fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, before a traceback if there is one."""
        fields = "".join(f" {name}={value}" for name, value in fields_of(record).items())
        return super().formatMessage(record) + fields
