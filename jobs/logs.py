"""The logs of API and workers: text on a terminal, one JSON object a line anywhere else.

A line about a request or a job carries its ids and durations as fields, `extra={"fields": {…}}`.
Neither a key nor a picture nor a query ever becomes a field.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["auto", "json", "text"]
REQUESTS = logging.getLogger("ddpm.requests")
JOBS = logging.getLogger("ddpm.jobs")


def configure(form: LogFormat, *, level: str = "info", stream: TextIO | None = None) -> None:
    """Let this process log so. level: of what ddpm says; others say warnings and worse."""
    target = stream or sys.stderr
    as_text = form == "text" or (form == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ddpm").setLevel(level.upper())


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
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """For people: the time, the logger, the message, the fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, before a traceback if there is one."""
        fields = "".join(f" {name}={value}" for name, value in fields_of(record).items())
        return super().formatMessage(record) + fields
