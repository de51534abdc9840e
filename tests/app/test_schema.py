"""The OpenAPI document against the service, by schemathesis: no 5xx, no undocumented answer."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jobs.store import keys
from tests.app.conftest import Worker

RUN = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
# What is asked: no error of ours, no answer that is not documented, no deleted thing that answers.
# A stream of events is documented as the text that it is; schemathesis reads it event by event.
CONFIG = """
[checks]
enabled = false
not_a_server_error.enabled = true
status_code_conformance.enabled = true
content_type_conformance.enabled = true
response_headers_conformance.enabled = true
response_schema_conformance.enabled = true
unsupported_method.enabled = true
allow_header_conformance.enabled = true
use_after_free.enabled = true
ensure_resource_availability.enabled = true

[[operations]]
include-path = "/jobs/{job_id}/events"
checks.response_schema_conformance.enabled = false
"""


@pytest.fixture
def working(worker: Worker) -> Iterator[None]:
    """A worker that ends every job at once: no stream and no wait lasts."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.005):
            for job_id in worker.store.redis.zrange(keys.by_status("queued"), 0, 50):
                with contextlib.suppress(AssertionError):  # canceled or deleted meanwhile
                    worker.finish(job_id.decode())

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


def conforms(client: httpx.Client, folder: Path, *options: str) -> None:
    """Run schemathesis and hold that it found nothing."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-c", RUN, "run", f"{client.base_url}/openapi.json"]
    common = [
        "--seed", "1", "--generation-database", "none",
        "--request-timeout", "60", "--warnings", "off", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, *common, *options], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_no_answer_is_undocumented(client: httpx.Client, working: None, tmp_path: Path) -> None:
    conforms(client, tmp_path, "--phases", "examples,fuzzing", "--max-examples", "3")


@pytest.mark.slow
def test_no_answer_is_undocumented_in_any_phase(
    client: httpx.Client, working: None, tmp_path: Path
) -> None:
    phases = "examples,coverage,fuzzing,stateful"
    conforms(client, tmp_path, "--phases", phases, "--max-examples", "40", "--max-time", "150")
