"""The OpenAPI document against the service, by schemathesis: no 5xx, no undocumented answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.older import save_model
from tests.stack import TODAY, Stack

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


def conforms(client: httpx.Client, folder: Path, *options: str) -> None:
    """Run schemathesis and hold that it found nothing."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-c", RUN, "run", f"{client.base_url}/openapi.json"]
    common = [
        "--seed", "1", "--generation-database", "none",
        "--request-timeout", "90", "--warnings", "off", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, *common, *options], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_no_answer_is_undocumented(client: httpx.Client, working: None, tmp_path: Path) -> None:
    conforms(client, tmp_path, "--phases", "examples,fuzzing,stateful", "--max-examples", "3")


ALL = ("--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "40")


@pytest.mark.slow
def test_no_answer_is_undocumented_in_any_phase(
    client: httpx.Client, working: None, tmp_path: Path
) -> None:
    conforms(client, tmp_path, *ALL, "--max-time", "150")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_answer_of_the_whole_service_is_undocumented(redis_url: str, tmp_path: Path) -> None:
    """With a worker that really runs what is asked for, and fails what takes it too long."""
    save_model(TODAY, tmp_path / "models" / "tiny")
    stack = Stack(redis_url, tmp_path / "models", tmp_path / "log")
    limits = {"DDPM_MAX_JOB_EVALUATIONS": "5000", "DDPM_JOB_DEADLINE_S": "5"}
    try:
        client = stack.api(TODAY, **limits)
        stack.worker(TODAY, **limits)
        stack.until(lambda: client.get("/readyz").status_code == 200)
        conforms(client, tmp_path, *ALL, "--max-time", "240")
        assert client.get("/readyz").status_code == 200
    finally:
        stack.close()
