"""Clients that two generators make of the OpenAPI document: what it is made for, and used."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.main import create_app
from jobs.kinds.table import KINDS
from jobs.settings import Settings

# Media types that openapi-python-client does not know are bytes.
FILES = ["image/png", "image/webp", "image/gif", "application/zip", "application/x-npy"]
NPM = ["openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3"]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(create_app(Settings()).openapi()))
    return found


def operations(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for path in schema["paths"].values() for operation in path.values()]


def test_operations_are_called_what_they_do(schema: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(schema)]
    assert len(names) == len(set(names))
    assert all(name.isidentifier() and name.islower() for name in names)
    assert {*KINDS, "get_job", "list_jobs", "cancel_job", "get_image", "get_events"} <= {*names}


def test_every_status_has_one_type(schema: dict[str, Any]) -> None:
    for operation in operations(schema):
        for status, response in operation["responses"].items():
            types = [content["schema"] for content in response.get("content", {}).values()]
            assert all(one == types[0] for one in types), (operation["operationId"], status)


def test_what_has_a_default_is_not_required(schema: dict[str, Any]) -> None:
    for name, model in schema["components"]["schemas"].items():
        for field in model.get("required", []):
            assert "default" not in model["properties"][field], f"{name}.{field}"


def test_defaults_of_parameters_are_allowed(schema: dict[str, Any]) -> None:
    checked = 0
    for operation in operations(schema):
        for parameter in operation.get("parameters", []):
            its = parameter["schema"]
            if isinstance(its.get("default"), int | float):
                assert its.get("minimum", its["default"]) <= its["default"], parameter
                checked += 1
    assert checked > 5


def test_a_python_client_is_generated_and_used(
    client: httpx.Client, working: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By openapi-python-client: a job, held until it ends, its picture, its events."""
    (tmp_path / "schema.json").write_text(client.get("/openapi.json").text)
    config = {"content_type_overrides": dict.fromkeys(FILES, "application/octet-stream")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it formats by ruff
    done = subprocess.run(
        [
            sys.executable, "-c", "from openapi_python_client.cli import app; app()",
            "generate", "--path", "schema.json", "--config", "config.json",
            "--meta", "none", "--output-path", "generated_ddpm", "--fail-on-warning",
        ],
        cwd=tmp_path, env=os.environ | {"PATH": tools}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))

    def part(name: str) -> Any:
        return importlib.import_module(f"generated_ddpm.{name}")

    for name in KINDS:
        part(f"api.create.{name}")
    api = part("client").Client(base_url=str(client.base_url))
    body = part("models.generate_spec").GenerateSpec(seed=4, num_images=2)
    with api:
        job = part("api.create.generate").sync(client=api, body=body, prefer="wait=30")
        assert job.status.value == "succeeded" and job.request["seed"] == 4
        again = part("api.jobs.get_job").sync(job.id, client=api, wait=1)
        assert again.images[1].sha256 == job.images[1].sha256
        picture = part("api.outputs.get_image").sync(job.id, 1, "png", client=api)
        assert Image.open(io.BytesIO(picture.payload.read())).size == (8, 8)
        events = part("api.jobs.get_events").sync(job.id, client=api)
        assert events.rstrip().splitlines()[-2] == "event: done"
        refused = part("api.create.generate").sync(
            client=api, body=part("models.generate_spec").GenerateSpec(num_images=65)
        )
        assert (refused.code, refused.errors[0].pointer) == ("invalid_request", "/num_images")
        gone = part("api.jobs.delete_job").sync_detailed(job.id, client=api)
        assert gone.status_code == 204


TYPESCRIPT = """
import createClient from "openapi-fetch";
import type { components, paths } from "./schema";

type Job = components["schemas"]["JobView"];
const api = createClient<paths>({ baseUrl: process.argv[2] });

const made = await api.POST("/generate", {
  body: { seed: 4, num_images: 2 },
  params: { header: { Prefer: "wait=30" } },
});
if (!made.data) throw new Error(made.error.detail);
const job: Job = made.data;
const picture = await api.GET("/jobs/{job_id}/images/{index}.{suffix}", {
  params: { path: { job_id: job.id, index: 1, suffix: "png" } },
  parseAs: "arrayBuffer",
});
const events = await api.GET("/jobs/{job_id}/events", {
  params: { path: { job_id: job.id } },
  parseAs: "text",
});
const refused = await api.POST("/generate", { body: { num_images: 65 } });
console.log(JSON.stringify({
  status: job.status,
  seed: job.images?.[1]?.seed,
  bytes: picture.data?.byteLength,
  done: events.data?.includes("event: done"),
  code: refused.error?.code,
}));
"""


@pytest.mark.slow
def test_a_typescript_client_is_generated_and_used(
    client: httpx.Client, working: None, tmp_path: Path
) -> None:
    """By openapi-typescript: the same, type-checked strictly and run by node."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("there is no node here")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    install = [npm, "install", "--no-audit", "--no-fund", "--silent", *NPM]
    if subprocess.run(install, cwd=tmp_path, timeout=240).returncode:
        pytest.skip("openapi-typescript is not installed, and npm cannot get it")
    (tmp_path / "schema.json").write_text(client.get("/openapi.json").text)
    (tmp_path / "use.ts").write_text(TYPESCRIPT)
    # Types of node that this needs, without another package.
    (tmp_path / "node.d.ts").write_text("declare const process: { argv: string[] };")
    binaries = tmp_path / "node_modules" / ".bin"
    for command in (
        # Without the option, it takes whatever has a default for required.
        [
            str(binaries / "openapi-typescript"), "schema.json", "--default-non-nullable", "false",
            "-o", "schema.d.ts",
        ],
        [
            str(binaries / "tsc"), "--strict", "--module", "esnext", "--target", "es2022",
            "--lib", "es2022,dom,dom.iterable", "--moduleResolution", "bundler",
            "use.ts", "node.d.ts",
        ],
        [node, "use.js", str(client.base_url)],
    ):  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found.pop("bytes") > 60
    assert found == {
        "status": "succeeded", "seed": 4, "done": True, "code": "invalid_request",
    }  # fmt: skip
