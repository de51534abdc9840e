"""What pages of browsers need: documentation without a key, other origins, pictures by address."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.keyfile import new_key
from app.signing import signed
from jobs.settings import Settings
from jobs.store.writer import JobStore
from tests.app.conftest import CARD, Worker, png, until

Serve = Callable[..., httpx.Client]
KEY = {"Authorization": "Bearer secret"}


def test_the_documentation_opens_with_keys_set(serve: Serve) -> None:
    client = serve(api_keys="secret")
    page = client.get("/docs").text
    for address in re.findall(r'(?:src|href)="(/[^"]+)"|url: \'([^\']+)\'', page):
        assert client.get("".join(address)).status_code == 200, address


def test_a_page_of_another_origin_may_ask(serve: Serve) -> None:
    client = serve(api_keys="secret", cors_origins="https://one.example,https://two.example")
    ask = {
        "Origin": "https://two.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,prefer,idempotency-key",
    }
    reply = client.options("/generate", headers=ask)  # a browser sends no key with it
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://two.example"
    for header in ("authorization", "prefer", "idempotency-key"):
        assert header in reply.headers["access-control-allow-headers"].lower()
    reply = client.get("/jobs", headers={"Origin": "https://two.example", **KEY})
    assert reply.headers["access-control-allow-origin"] == "https://two.example"
    assert "Retry-After" in reply.headers["access-control-expose-headers"]
    assert "X-Alpha-Bar" in reply.headers["access-control-expose-headers"]
    ask["Access-Control-Request-Method"] = "HEAD"
    assert client.options("/jobs", headers=ask).status_code == 200
    # The answer to a request without a key can be read, too.
    reply = client.get("/jobs", headers={"Origin": "https://one.example"})
    assert reply.status_code == 401 and "access-control-allow-origin" in reply.headers
    for headers in ({"Origin": "https://three.example"}, {}):
        reply = client.get("/healthz", headers=headers)
        assert "access-control-allow-origin" not in reply.headers


def test_without_the_setting_no_other_origin_may(client: httpx.Client) -> None:
    reply = client.get("/healthz", headers={"Origin": "https://one.example"})
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("wrong", ["one.example", "https://one.example/", "https://a b"])
def test_an_origin_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="must be like https://example"):
        Settings(cors_origins=(wrong,))


def test_signed_addresses_open_without_a_key(serve: Serve, worker: Worker) -> None:
    client = serve(api_keys="secret,other")
    body = {"num_images": 2, "snapshots": {"every": 50}}
    job_id = client.post("/generate", json=body, headers=KEY).json()["id"]
    started = worker.start(job_id)
    worker.snapshot(started, 500)
    for index in range(2):
        worker.image(started, index)
    assert worker.store.succeed(job_id, "e")
    job = client.get(f"/jobs/{job_id}", params={"sign": 60}, headers=KEY).json()
    urls = [one["url"] for one in (*job["images"], *job["snapshots"])]
    urls += [job["urls"][name] for name in ("images", "grid", "events")]
    assert len(urls) == 6
    for url in urls:
        assert client.get(url).status_code == 200, url
        assert client.get(url.partition("?")[0]).status_code == 401
    picture = urls[0]
    assert client.get(picture + "&px=64").status_code == 200
    assert client.head(picture).status_code == 200
    # For this output, in this time, by this key, and to read it alone.
    assert client.get(picture.replace("images/0", "images/1")).status_code == 401
    expires = re.search(r"expires=(\d+)", picture)
    assert expires is not None and 0 < int(expires[1]) - time.time() <= 60
    assert client.get(picture.replace(expires[1], str(int(expires[1]) + 1))).status_code == 401
    assert client.get(picture.replace("key=", "key=x")).status_code == 401
    assert client.get(picture[:-1]).status_code == 401
    assert client.get(re.sub(r"signature=\w+", "signature=", picture)).status_code == 401
    assert client.delete(job["urls"]["events"]).status_code == 401
    assert client.get(f"/jobs/{job_id}?{picture.partition('?')[2]}").status_code == 401
    assert client.get(picture, headers={"Authorization": "Bearer wrong"}).status_code == 401
    # It ends with its time.
    short = client.get(f"/jobs/{job_id}", params={"sign": 1}, headers=KEY).json()
    url = short["images"][0]["url"]
    until(lambda: client.get(url).status_code == 401)


def test_what_samples_are_together_is_signed_too(serve: Serve, worker: Worker) -> None:
    client = serve(api_keys="secret")
    operator = {"name": "mask", "boxes": [[0, 0, 4, 8]]}
    body = {"images": [base64.b64encode(png()).decode()], "operator": operator, "num_images": 2}
    job_id = client.post("/restore", json=body, headers=KEY).json()["id"]
    worker.finish(job_id)
    job = client.get(f"/jobs/{job_id}", params={"sign": 60}, headers=KEY).json()
    for name in ("mean", "std"):
        assert client.get(job["urls"][name]).status_code == 200, name
        assert client.get(job["urls"][name].partition("?")[0]).status_code == 401


def test_a_signature_makes_no_other_request(serve: Serve) -> None:
    client = serve(api_keys="secret")
    digest = hashlib.sha256(b"secret").digest()
    name, expires = digest.hex()[:16], int(time.time()) + 60
    for path in ("/jobs", "/models", "/metrics", "/jobs/0123456789abcdef0123456789ab"):
        url = signed(path, name=name, digest=digest, expires=expires)
        assert client.get(url).status_code == 401, path


def test_a_revoked_key_takes_its_signatures_with_it(
    serve: Serve, worker: Worker, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    (key, line), (_, other) = new_key("alice"), new_key("bob")
    file.write_text(f"{line}\n{other}\n")
    client = serve(api_keys_file=file)
    headers = {"Authorization": f"Bearer {key}"}
    job_id = client.post("/generate", json={}, headers=headers).json()["id"]
    worker.finish(job_id)
    job = client.get(f"/jobs/{job_id}", params={"sign": 600}, headers=headers).json()
    url = job["images"][0]["url"]
    assert client.get(url).status_code == 200 and "key=alice" in url
    file.write_text(f"{other}\n")
    until(lambda: client.get(url).status_code == 401)


def test_without_keys_addresses_need_no_signature(client: httpx.Client, worker: Worker) -> None:
    job_id = client.post("/generate", json={}).json()["id"]
    worker.finish(job_id)
    job = client.get(f"/jobs/{job_id}", params={"sign": 60}).json()
    assert job["images"][0]["url"] == f"/jobs/{job_id}/images/0.png"


def test_who_takes_a_picture_alone_gets_nothing_else(client: httpx.Client, worker: Worker) -> None:
    ask = {"Accept": "image/png", "Prefer": "wait=1"}
    reply = client.post("/generate", json={}, headers=ask)
    assert reply.status_code == 504 and reply.json()["code"] == "still_running"
    assert reply.headers["location"] in reply.json()["detail"]
    both = client.post("/generate", json={}, headers={**ask, "Accept": "image/png, */*;q=0.1"})
    assert both.status_code == 202 and both.json()["status"] == "queued"
    worker.finish(both.json()["id"])


@pytest.mark.parametrize("label", ["7", 7])
def test_a_class_is_named(client: httpx.Client, label: object) -> None:
    job = client.post("/generate", json={"class_label": label}).json()
    assert job["request"]["class_label"] == 7


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("seven", "seven: must be one of 0, 1, 2"),
        (10, "10: must be 0..9"),
        (-1, "-1: must be a label, 0 or more, or the name of a class"),
        (1.5, "1.5: must be a label"),
        (True, "True: must be a label"),
        ([7], "[7]: must be a label"),
    ],
)
def test_a_class_that_is_none(client: httpx.Client, label: object, says: str) -> None:
    [error] = client.post("/generate", json={"class_label": label}).json()["errors"]
    assert error["pointer"] == "/class_label" and error["detail"].startswith(says)


@pytest.mark.parametrize(
    ("body", "pointer", "like", "others"),
    [
        ({"num_image": 1}, "/num_image", "num_images", "class_label"),
        ({"snapshots": {"evry": 1}}, "/snapshots/evry", "every", "preview_px"),
    ],
)
def test_a_field_that_is_none(
    client: httpx.Client, body: object, pointer: str, like: str, others: str
) -> None:
    errors = client.post("/generate", json=body).json()["errors"]
    detail = {error["pointer"]: error["detail"] for error in errors}[pointer]
    assert f"there is no such field; did you mean {like}? There are" in detail
    assert others in detail


def test_a_model_says_what_it_is(client: httpx.Client, store: JobStore) -> None:
    about = {"description": "Squares.", "thumbnail": base64.b64encode(png()).decode()}
    store.publish_card(CARD.model_copy(update=about))

    def model() -> dict[str, str | None]:
        told: dict[str, str | None] = client.get("/models/mnist").json()
        return told

    until(lambda: model()["description"] == "Squares.")  # cards are read again now and then
    picture = client.get(model()["thumbnail"] or "")
    assert picture.content == png() and picture.headers["content-type"] == "image/png"
    store.publish_card(CARD)
    until(lambda: model()["thumbnail"] is None)
    assert client.get("/models/mnist/thumbnail.png").status_code == 404
