"""Keys: hashed, several, named, revoked without a restart."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from app.auth import check_bind
from app.commands import key as key_command
from app.keyfile import KeyFile, KeyFileError, new_key
from jobs.settings import Settings
from jobs.store.writer import JobStore
from tests.app.conftest import Worker, until

Serve = Callable[..., httpx.Client]


def status(client: httpx.Client, key: str) -> int:
    return client.get("/jobs", headers={"Authorization": f"Bearer {key}"}).status_code


def test_a_key_is_revoked_without_a_restart(store: JobStore, serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    (first, one), (second, two), (third, three) = (new_key(n) for n in ("alice", "alice", "bob"))
    path.write_text(f"# ours\n\n{one}\n{two}\n")
    client = serve(api_keys_file=path, api_keys="fixed")
    assert [status(client, k) for k in (first, second, third, "fixed", "x")] == [
        200, 200, 401, 200, 401
    ]  # fmt: skip
    path.write_text(f"{two}\n{three}\n")
    until(lambda: status(client, first) == 401)
    assert [status(client, k) for k in (second, third, "fixed")] == [200, 200, 200]
    # A mistake changes nothing, and is mended by the next good file; an empty one lets nobody in.
    path.write_text(f"{three}\nbob {first}\n")
    time.sleep(1.2)
    assert [status(client, k) for k in (first, second, third)] == [401, 200, 200]
    path.unlink()
    time.sleep(1.2)
    assert status(client, third) == 200
    path.write_text("")
    until(lambda: status(client, third) == 401)
    assert status(client, "fixed") == 200 and client.get("/healthz").status_code == 200


def test_a_stream_ends_with_its_key(store: JobStore, serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made, one = new_key("alice")
    path.write_text(one)
    client = serve(api_keys_file=path, sse_comment_s=0.2)
    headers = {"Authorization": f"Bearer {made}"}
    job_id = client.post("/generate", json={}, headers=headers).json()["id"]
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as reply:
        lines = reply.iter_lines()
        assert next(line for line in lines if line.startswith("event")) == "event: status"
        path.write_text("")
        rest = list(lines)
    assert rest[-3] == "event: error" and '"code":"unauthorized"' in rest[-2]


def test_quotas_and_metrics_go_by_name(
    store: JobStore, worker: Worker, serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    (first, one), (second, two), (third, three) = (new_key(n) for n in ("alice", "alice", "bob"))
    path.write_text("\n".join((one, two, three)))
    client = serve(api_keys_file=path, client_quota=100)

    def post(key: str, steps: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return client.post("/generate", json={"steps": steps}, headers=headers)

    assert post(first, 60).status_code == 202
    assert post(second, 60).json()["code"] == "quota_exceeded"
    assert post(third, 60).status_code == 202
    text = client.get("/metrics", headers={"Authorization": f"Bearer {third}"}).text
    for line in (
        'ddpm_client_requests_total{client="alice"} 2.0',
        'ddpm_client_requests_total{client="bob"} 1.0',
        'ddpm_client_image_steps{client="alice"} 60.0',
        'ddpm_client_image_steps{client="bob"} 60.0',
    ):
        assert line in text, line
    assert not any(key in text for key in (first, second, third))


@pytest.mark.parametrize(
    "line", ["alice", "alice secret", "alice sha256:12", "a b sha256:" + "0" * 64]
)
def test_a_line_that_is_none_stops_the_start_and_is_not_repeated(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# first\n{line}\n")
    with pytest.raises(KeyFileError, match=r"keys, line 2: must be NAME sha256") as caught:
        KeyFile(path)
    assert line not in str(caught.value)
    with pytest.raises(KeyFileError, match="DDPM_API_KEYS_FILE"):
        KeyFile(tmp_path / "none")


def test_a_file_of_keys_guards_a_public_address(tmp_path: Path) -> None:
    check_bind("0.0.0.0", Settings(api_keys_file=tmp_path / "keys"))


def test_ddpm_key_makes_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made = [CliRunner().invoke(key_command, [n, "--file", str(path)]) for n in ("alice", "bob")]
    keys = KeyFile(path).keys()
    assert sorted(keys.values()) == ["alice", "bob"]
    assert all(reply.exit_code == 0 for reply in made)
    assert made[0].output.strip() not in path.read_text()
    wrong = CliRunner().invoke(key_command, ["a b"])
    assert wrong.exit_code != 0 and "must match" in wrong.output
