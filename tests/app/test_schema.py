"""The OpenAPI document against the service, by schemathesis: no 5xx, no undocumented answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

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
