from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from jobs.kinds.generate import GenerateSpec
from jobs.kinds.table import admit
from jobs.settings import Settings
from jobs.store import keys
from jobs.store.admission import Admission, Order
from jobs.store.janitor import Janitor
from jobs.store.workers import WorkerInfo
from jobs.store.writer import JobStore
from tests.app.conftest import CARD, Worker, until


def submit(client: httpx.Client, **body: object) -> str:
    reply = client.post("/generate", json=body)
    assert reply.status_code == 202, reply.text
    job_id: str = reply.json()["id"]
    return job_id


def waiting(store: JobStore) -> list[str]:
    ids: list[str] = Queue("ddpm", connection=store.redis, serializer=JSONSerializer).job_ids
    return ids


def test_unknown_ids_are_404(client: httpx.Client) -> None:
    for method, path in (
        ("GET", "/jobs/none"),
        ("DELETE", "/jobs/none"),
        ("POST", "/jobs/none/cancel"),
        ("GET", "/jobs/none/events"),
        ("GET", "/jobs/none/images/0.png"),
        ("GET", "/jobs/none/images.zip"),
        ("GET", "/jobs/none/snapshots/5/0.png"),
        ("GET", "/models/none"),
        ("GET", "/nothing"),
    ):
        reply = client.request(method, path)
        assert reply.status_code == 404, path
        assert reply.json()["code"] == "not_found"
        if method == "GET":
            assert client.head(path).status_code == 404 and not client.head(path).content
    wrong = client.delete("/generate")
    assert wrong.status_code == 405 and wrong.json()["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST" and "POST" in wrong.json()["detail"]
    both = client.post("/jobs/none")
    assert both.status_code == 405 and both.headers["allow"] == "GET, DELETE, HEAD"
    file = client.post("/static/index.html")
    assert file.status_code == 405 and "PUT" not in file.headers.get("allow", "")


def test_listing_with_cursor_and_filters(client: httpx.Client, worker: Worker) -> None:
    ids = [submit(client) for _ in range(7)]
    worker.finish(ids[2])
    worker.start(ids[3])
    seen: list[str] = []
    cursor = None
    for _ in range(4):
        params = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = client.get("/jobs", params=params).json()
        seen += [job["id"] for job in page["data"]]
        cursor = page.get("next_cursor")
        if cursor is None:
            break
    assert seen == ids[::-1]
    assert "images" not in page["data"][0]

    def listed(**params: object) -> list[str]:
        page = client.get("/jobs", params=params).json()  # type: ignore[arg-type]
        return [job["id"] for job in page["data"]]

    assert listed(status="succeeded") == [ids[2]]
    assert listed(status="running", model="mnist") == [ids[3]]
    assert listed(status="queued") == [ids[i] for i in (6, 5, 4, 1, 0)]
    assert listed(model="other") == [] and listed(status="failed") == []
    exact = client.get("/jobs", params={"limit": 7}).json()
    assert len(exact["data"]) == 7 and "next_cursor" not in exact
    unknown = client.get("/jobs", params={"state": "queued"}).json()
    assert unknown["errors"] == [
        {
            "pointer": "/query/state",
            "detail": "unknown; must be one of status, model, limit, cursor",
        }
    ]
    twice = client.get("/jobs?limit=3&limit=4").json()
    assert twice["errors"] == [
        {"pointer": "/query/limit", "detail": "given twice; must be given once"}
    ]
    for bad in ({"cursor": "x"}, {"status": "lost"}, {"limit": 0}):
        assert client.get("/jobs", params=bad).status_code == 422


def test_cancel_a_waiting_job(client: httpx.Client, store: JobStore) -> None:
    job_id = submit(client)
    first = client.post(f"/jobs/{job_id}/cancel").json()
    assert first["status"] == "canceled" and first["completed_at"]
    assert waiting(store) == []
    rq_job = Job.fetch(job_id, connection=store.redis, serializer=JSONSerializer)
    assert rq_job.get_status() == "canceled"
    assert client.post(f"/jobs/{job_id}/cancel").json() == first


def test_cancel_a_running_job(client: httpx.Client, worker: Worker) -> None:
    job_id = submit(client)
    started = worker.start(job_id)
    asked = client.post(f"/jobs/{job_id}/cancel").json()
    assert asked["status"] == "running" and asked["cancel_requested"]
    worker.snapshot(started, 5, "x_start")
    worker.store.canceled(job_id, "e")
    ended = client.post(f"/jobs/{job_id}/cancel").json()
    assert ended["status"] == "canceled"
    assert [s["kind"] for s in ended["snapshots"]] == ["x_start"]
    assert client.get(ended["snapshots"][0]["url"]).status_code == 200


def test_cancel_leaves_a_finished_job_alone(client: httpx.Client, worker: Worker) -> None:
    job_id = submit(client)
    worker.finish(job_id)
    before = client.get(f"/jobs/{job_id}").json()
    reply = client.post(f"/jobs/{job_id}/cancel")
    assert reply.status_code == 200 and reply.json() == before


@pytest.mark.parametrize("running", [False, True])
def test_delete(client: httpx.Client, store: JobStore, worker: Worker, running: bool) -> None:
    job_id = submit(client)
    if running:
        worker.image(worker.start(job_id))
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert client.get(f"/jobs/{job_id}").status_code == 404
    assert client.delete(f"/jobs/{job_id}").status_code == 404
    assert waiting(store) == [] and not store.redis.keys("*" + job_id + "*")
    assert store.start(job_id, "e2", worker="w", digest="d") is None
    [queue] = client.get("/queue").json()["queues"]
    assert (queue["queued"], queue["running"], queue["image_steps"]) == (0, 0, 0)


def test_expiry(client: httpx.Client, worker: Worker, store: JobStore) -> None:
    job_id = submit(client, ttl_s=5)
    worker.finish(job_id)
    job = client.get(f"/jobs/{job_id}").json()
    assert job["expires_at"] > job["completed_at"]
    url = job["images"][0]["url"]
    assert client.get(url).status_code == 200
    until(lambda: client.get(url).status_code != 200)
    gone = client.get(url)
    assert gone.status_code == 410 and gone.json()["code"] == "expired"
    after = client.get(f"/jobs/{job_id}").json()
    assert after["status"] == "expired" and after["images"] == []
    until(lambda: store.redis.zscore(keys.by_status("expired"), job_id) is not None)
    assert int(store.redis.hget(keys.TOTALS, "output_bytes") or 0) == 0
    assert client.get(url).status_code == 410
    listed = client.get("/jobs", params={"status": "expired"}).json()["data"]
    assert [entry["id"] for entry in listed] == [job_id]
    film = client.get(f"/jobs/{job_id}/snapshots.gif")
    assert film.status_code == 410


def test_estimates_follow_the_measured_rate(
    store: JobStore, worker: Worker, serve: Callable[..., httpx.Client]
) -> None:
    client = serve()
    ids = [submit(client, steps=100) for _ in range(2)]
    assert "eta_s" not in client.get(f"/jobs/{ids[0]}").json()
    store.heartbeat(WorkerInfo("w", "ddpm", ("mnist",)), rates={"mnist": 50.0})
    time.sleep(1.1)  # rates are remembered for a second
    jobs = [client.get(f"/jobs/{job_id}").json() for job_id in ids]
    assert [job["eta_s"] for job in jobs] == [2.0, 4.0]
    assert [job["queue_position"] for job in jobs] == [0, 1]
    queue = client.get("/queue").json()
    assert queue["queues"][0]["eta_s"] == 4.0 and queue["workers"][0]["name"] == "w"
    worker.progress(worker.start(ids[0]), done=50, t=500)
    assert client.get(f"/jobs/{ids[1]}").json()["eta_s"] == 3.0
    running = client.get(f"/jobs/{ids[0]}").json()
    assert running["progress"] == {"step": 50, "total": 100, "t": 500}
    assert running["eta_s"] == 1.0 and "queue_position" not in running


def test_redis_away_is_503(store: JobStore, serve: Callable[..., httpx.Client]) -> None:
    # The server is started on an address where nothing listens.
    from tests.app.conftest import serving

    with serving(Settings(redis_url="redis://127.0.0.1:1/0")) as client:
        for path in ("/jobs", "/readyz", "/queue"):
            reply = client.get(path)
            assert reply.status_code == 503 and reply.json()["code"] == "store_unavailable"
            assert reply.headers["retry-after"] == "5"
        assert client.get("/healthz").status_code == 200
        assert client.post("/generate", json={}).status_code == 503


def test_admission_is_one_transaction(store: JobStore) -> None:
    spec, plan = admit(GenerateSpec(), CARD, store.settings)
    with store.redis.monitor() as monitor:
        Admission(store).admit(Order(spec=spec, plan=plan, card=CARD, client="c"))
        store.redis.echo("end")
        said: list[tuple[str, str]] = []
        for entry in monitor.listen():
            of_script = entry["client_type"] == "lua"  # of the command before it
            port = said[-1][0] if of_script and said else entry["client_port"]
            said.append((port, entry["command"].split(" ")[0]))
            if said[-1][1] == "ECHO":
                break
    # What the server and its janitor do meanwhile is not of it.
    commands = [command for port, command in said if port == said[-1][0]]
    inside = commands[commands.index("MULTI") + 1 : commands.index("EXEC")]
    writes = {"HSET", "ZADD", "SADD", "HINCRBY", "INCR", "XADD", "RPUSH", "SET"}
    assert "RPUSH" in inside and "XADD" in inside
    outside = commands[: commands.index("MULTI")] + commands[commands.index("EXEC") + 1 :]
    assert not writes & set(outside)


def test_the_janitor_takes_back_what_a_dead_worker_left(
    client: httpx.Client, store: JobStore, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.store.janitor._CONFIRM_S", 0.0)
    requeued, canceled, lost = (submit(client) for _ in range(3))
    for job_id in (requeued, canceled, lost):
        worker.start(job_id)  # RQ still has them as queued, as after its own cleaning
    store.cancel(canceled)
    Job.fetch(lost, connection=store.redis, serializer=JSONSerializer).delete()
    janitor = Janitor(store)
    deadline = time.monotonic() + 60
    while client.get(f"/jobs/{lost}").json()["status"] == "running":
        janitor.run()  # skips a round while the server's own holds the lock
        assert time.monotonic() < deadline
    assert client.get(f"/jobs/{requeued}").json()["status"] == "queued"
    assert client.get(f"/jobs/{canceled}").json()["status"] == "canceled"
    failed = client.get(f"/jobs/{lost}").json()
    assert failed["status"] == "failed" and failed["error"]["code"] == "lost"
