"""The two forms of a log line."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from jobs import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root, ddpm = logging.getLogger(), logging.getLogger("ddpm")
    before = root.handlers[:], root.level, ddpm.level
    yield
    root.handlers[:], level, of_ddpm = before
    root.setLevel(level)
    ddpm.setLevel(of_ddpm)


def test_json_has_the_fields_and_the_traceback() -> None:
    stream = io.StringIO()
    logs.configure("auto", stream=stream)
    logs.JOBS.info("job %s", "x", extra={"fields": {"job_id": "x", "error": None, "run_s": 0.5}})
    try:
        raise ValueError("ε\nzwei")
    except ValueError:
        logging.getLogger("ddpm.worker").exception("it broke")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "job x" and first["run_s"] == 0.5 and "error" not in first
    assert (first["level"], first["logger"]) == ("info", "ddpm.jobs")
    assert "ValueError: ε\nzwei" in second["exception"]


def test_others_say_warnings_alone() -> None:
    stream = io.StringIO()
    logs.configure("text", level="warning", stream=stream)
    logging.getLogger("another").info("chatter")
    logs.REQUESTS.info("a request")
    logs.REQUESTS.warning("a warning", extra={"fields": {"status": 500}})
    [line] = stream.getvalue().splitlines()
    assert line.endswith("ddpm.requests a warning status=500")


class Counted(io.StringIO):
    """Counts what a process would ask the system for."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


def test_lines_are_gathered_and_a_warning_is_not_kept() -> None:
    stream = Counted()
    logs.configure("json", stream=stream, gather=True)
    for number in range(100):
        logs.REQUESTS.info("request %d", number)
    logs.REQUESTS.warning("now")
    said = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert said == [*(f"request {number}" for number in range(100)), "now"]
    assert stream.writes < 100
    logs.REQUESTS.info("later")
    deadline = time.monotonic() + 30
    while "later" not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "later" in stream.getvalue()


def test_a_process_that_ends_has_said_all() -> None:
    code = "from jobs import logs; logs.configure('json', gather=True); logs.JOBS.info('hello')"
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60)
    assert json.loads(ended.stderr)["message"] == "hello"


def test_a_terminal_gets_text() -> None:
    ours, theirs = pty.openpty()
    code = "from jobs import logs; logs.configure('auto'); logs.JOBS.info('hello')"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    assert os.read(ours, 1000).decode().strip().endswith("ddpm.jobs hello")
    os.close(ours)
