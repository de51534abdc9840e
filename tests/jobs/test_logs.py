"""The two forms of a log line."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
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


def test_a_terminal_gets_text() -> None:
    ours, theirs = pty.openpty()
    code = "from jobs import logs; logs.configure('auto'); logs.JOBS.info('hello')"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    assert os.read(ours, 1000).decode().strip().endswith("ddpm.jobs hello")
    os.close(ours)
