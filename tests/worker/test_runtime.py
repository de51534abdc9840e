"""Runtime and outputs on a real Redis, in this process: what the record of a job says."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

import diffusion
from app.views import manifest
from diffusion import Model
from jobs.settings import Settings
from jobs.store import writer
from jobs.store.batch import InBatch
from jobs.store.connections import connect
from jobs.store.events import JobFault
from jobs.store.janitor import Janitor
from jobs.store.rq_queue import Queues
from jobs.store.started import MAX_LONE_CRASHES
from worker import outputs
from worker.engine.loop import Engine
from worker.engine.tasks import Work
from worker.flights import Ending, Flight, Intent, Outcome
from worker.kinds.chain_state import pack
from worker.kinds.noise import NoiseFlight
from worker.models import ModelFolder
from worker.rq.adapter import EngineWorker
from worker.runtime import Runtime

Service = Any  # of conftest.py; tests cannot import it


@pytest.fixture
def runtime(service: Service) -> Iterator[Runtime]:
    yield from make_runtime(service)


def make_runtime(
    service: Service, *, threads: bool = False, **settings: object
) -> Iterator[Runtime]:
    given = {"redis_url": service.url, "models": service.models, "compile": False}
    changed = Settings(**{**given, **settings})  # type: ignore[arg-type]
    folder = ModelFolder(changed.models, queue=changed.queue)
    runtime = Runtime(changed, service.store, folder, threads=threads)
    runtime.start()
    yield runtime
    runtime.close()


def run(runtime: Runtime, job_id: str, execution: str = "e1") -> Ending:
    begun = runtime.begin(job_id, execution, "w")
    ending = runtime.run_to_end(begun).ending if isinstance(begun, Flight) else begun
    assert ending is not None
    return ending


def events(service: Service, job_id: str) -> list[str]:
    rows = service.redis.xrange(f"ddpm:job:{job_id}:events")
    return [fields[b"event"].decode() for _, fields in rows]


def test_events_come_in_order(service: Service, runtime: Runtime) -> None:
    job_id = service.admit(steps=4, snapshots={"at": (1,), "kinds": ("x_t", "eps")})
    assert run(runtime, job_id) is Ending.SUCCEEDED
    names = events(service, job_id)
    assert names[:2] == ["status", "status"] and names[-2:] == ["status", "done"]
    assert names.count("progress") in (2, 3, 4) and names.count("snapshot") == 2
    assert names.index("image") > names.index("snapshot")


def test_progress_is_told_a_few_times_a_second(
    service: Service, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first step and the last, however many there are, and whenever it is time."""
    told = {}
    for seconds in (1e9, 0.0):
        monkeypatch.setattr(outputs, "TELL_S", seconds)
        job_id = service.admit(steps=6)
        assert run(runtime, job_id) is Ending.SUCCEEDED
        rows = service.redis.xrange(f"ddpm:job:{job_id}:events")
        found = [json.loads(f[b"data"]) for _, f in rows if f[b"event"] == b"progress"]
        told[seconds] = [event["step"] for event in found]
    assert told == {1e9: [1, 6], 0.0: [1, 2, 3, 4, 5, 6]}
    totals = service.redis.hgetall("ddpm:totals")
    assert totals[b"image_steps"] == b"12"


def test_a_deadline_ends_the_job_with_a_reason(service: Service) -> None:
    for runtime in make_runtime(service, job_deadline_s=0.2):
        job_id = service.admit(steps=1000, num_images=8)
        assert run(runtime, job_id) is Ending.FAILED
        fault = service.record(job_id).fault
        assert fault.code == "deadline_exceeded" and "more than 0 s" in fault.detail


def test_a_request_can_set_a_deadline(service: Service, runtime: Runtime) -> None:
    """It counts from the request, whether the job waits or runs."""
    early = service.admit(steps=2, deadline_s=600)
    assert run(runtime, early) is Ending.SUCCEEDED
    swept, refused = (service.admit(steps=2, deadline_s=0.2) for _ in range(2))
    cut = service.admit(steps=1000, num_images=8, deadline_s=0.6)
    assert run(runtime, cut) is Ending.FAILED
    assert run(runtime, refused) is Ending.FAILED
    Janitor(service.store).end_late()
    for job_id, seconds in ((swept, "0.2"), (refused, "0.2"), (cut, "0.6")):
        record = service.record(job_id)
        assert record.fault == JobFault(
            code="deadline_exceeded", detail=f"not done within deadline_s = {seconds}"
        )
    assert service.record(swept).started_at is None and service.rq_status(swept) == "canceled"
    assert service.redis.zcard("ddpm:deadlines") == 1  # what is left is of a job that has ended
    assert not {"deadline_s"} & set(manifest(service.record(early)))


def test_a_job_that_ended_is_not_run_again(service: Service, runtime: Runtime) -> None:
    job_id = service.admit(steps=2)
    assert run(runtime, job_id) is Ending.SUCCEEDED
    before = events(service, job_id)
    assert run(runtime, job_id, "e2") is Ending.SUCCEEDED
    assert events(service, job_id) == before
    assert run(runtime, "unknown", "e3") is Ending.LOST


@pytest.mark.parametrize("how", [InBatch.ALONE, InBatch.SHARED, InBatch.NO])
def test_only_a_job_that_kills_workers_alone_is_given_up(
    service: Service, runtime: Runtime, how: InBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SILENT_S", 0.0)
    job_id = service.admit(steps=2)
    for attempt in range(2 * MAX_LONE_CRASHES):
        named = {"worker": f"w{attempt}", "digest": "", "in_batch": how}
        assert service.store.start(job_id, f"e{attempt}", **named) is not None
        service.store.start("another", "e", worker=f"w{attempt}", digest="")
    ending = run(runtime, job_id, "last")
    if how is InBatch.ALONE:
        assert ending is Ending.FAILED
        assert service.record(job_id).fault.code == "gave_up"
    else:
        assert ending is Ending.SUCCEEDED


@pytest.mark.parametrize(
    ("intent", "ending"),
    [
        (Intent.CANCEL, Ending.CANCELED),
        (Intent.RELEASE, Ending.RELEASED),
        (Intent.LOSE, Ending.LOST),
    ],
)
def test_a_suspect_whose_end_is_asked_for_as_it_is_launched_ends(
    service: Service, monkeypatch: pytest.MonkeyPatch, intent: Intent, ending: Ending
) -> None:
    """Its network has to be prepared, and the engine does not know of it yet."""
    job_id = service.admit(steps=1000, num_images=64, corrector_steps=9)  # does not end by itself
    assert service.store.start(job_id, "e0", worker="dead", digest="", in_batch=InBatch.SHARED)
    entered, go_on = threading.Event(), threading.Event()
    submit = Engine.submit

    def slow(self: Engine, task: Work, *, held: bool = False) -> None:
        entered.set()
        assert go_on.wait(60)
        submit(self, task, held=held)

    monkeypatch.setattr(Engine, "submit", slow)
    for runtime in make_runtime(service, threads=True):
        flight = runtime.begin(job_id, "e1", "w")
        assert isinstance(flight, Flight) and entered.wait(60)
        runtime.end(flight, intent)
        go_on.set()
        outcome = runtime.outcomes.get(timeout=30)
        assert outcome.ending is ending
        runtime.landed(outcome)
        lanes = runtime.engine.lanes
        service.until(
            lambda lanes=lanes: lanes and not any(lane.runs for lane in lanes.values()), seconds=20
        )


def test_a_pinned_model_that_changed_is_refused(service: Service, runtime: Runtime) -> None:
    job_id = service.admit(steps=2, model_digest=service.card.digest)
    spec = service.record(job_id).spec.model_copy(update={"model_digest": "0" * 64})
    service.redis.hset(f"ddpm:job:{job_id}", "spec", spec.model_dump_json())
    assert run(runtime, job_id) is Ending.FAILED
    assert service.record(job_id).fault.code == "model_changed"


def test_states_of_another_model_do_not_count(
    service: Service, tmp_path: Path, make_model: Callable[..., Model]
) -> None:
    """A job begun with one version of a model and resumed with the next starts over."""
    service.models = tmp_path / "models"
    diffusion.save(make_model(seed=4, T=1000), service.models / "tiny")
    for runtime in make_runtime(service):
        first = service.admit(steps=6, num_images=2, seed=1, deterministic=True)
        assert run(runtime, first) is Ending.SUCCEEDED
        second = service.admit(steps=6, num_images=2, seed=1, deterministic=True)
        assert service.store.start(second, "old", worker="w", digest="another") is not None
        batch = service.store.batch()
        record = service.record(second)
        x = diffusion.sample(make_model(), 1, steps=2)[0]
        batch.checkpoint(record, "old", index=0, state=pack(3, x))
        batch.image(record, "old", index=1, x=np.zeros((1, 8, 8), np.float32))
        batch.send()
        assert run(runtime, second, "new") is Ending.SUCCEEDED
        assert service.outputs(second) == service.outputs(first)


def test_a_broken_state_only_costs_the_steps(service: Service, runtime: Runtime) -> None:
    first = service.admit(steps=6, seed=1, deterministic=True)
    assert run(runtime, first) is Ending.SUCCEEDED
    second = service.admit(steps=6, seed=1, deterministic=True)
    digest = service.card.digest
    assert service.store.start(second, "old", worker="w", digest=digest) is not None
    batch = service.store.batch()
    batch.checkpoint(service.record(second), "old", index=0, state=b"garbage")
    batch.send()
    assert run(runtime, second, "new") is Ending.SUCCEEDED
    assert service.outputs(second) == service.outputs(first)


def test_the_store_fences_an_execution_that_lost_its_job(
    service: Service, runtime: Runtime
) -> None:
    job_id = service.admit(steps=50)
    flight = runtime.begin(job_id, "old", "w")
    assert isinstance(flight, Flight)
    runtime.engine.tick()
    assert service.store.start(job_id, "new", worker="other", digest="") is not None
    before = len(events(service, job_id))
    assert runtime.run_to_end(flight) == Outcome(job_id, "old", Ending.LOST)
    runtime.engine.tick()
    assert len(events(service, job_id)) == before
    assert runtime.engine.waiting_rows == 0 and not runtime.flights


def test_a_released_job_keeps_its_state_and_loses_no_step(
    service: Service, runtime: Runtime
) -> None:
    job_id = service.admit(steps=20, num_images=2, seed=1, deterministic=True)
    flight = runtime.begin(job_id, "one", "w")
    assert isinstance(flight, Flight)
    for _ in range(7):
        runtime.engine.tick()
    runtime.end(flight, Intent.RELEASE)
    assert runtime.run_to_end(flight).ending is Ending.RELEASED
    assert service.store.requeue(job_id, "one")
    assert run(runtime, job_id, "two") is Ending.SUCCEEDED
    assert int(service.redis.hget("ddpm:totals", "image_steps")) == 40
    whole = service.admit(steps=20, num_images=2, seed=1, deterministic=True)
    assert run(runtime, whole, "three") is Ending.SUCCEEDED
    assert service.outputs(job_id) == service.outputs(whole)


def test_a_noise_job_can_be_canceled(service: Service, runtime: Runtime) -> None:
    pictures = np.zeros((32, 8, 8, 1), np.uint8)  # so many that it cannot end before it is told
    job_id = service.admit(kind="noise", t=tuple(range(1, 1001)), inputs=pictures)
    flight = runtime.begin(job_id, "e", "w")
    assert isinstance(flight, Flight)
    service.until(lambda: len(service.outputs(job_id)) > 3)
    service.store.cancel(job_id)
    assert runtime.run_to_end(flight).ending is Ending.CANCELED
    assert len(service.outputs(job_id)) < 32 * 1000


@pytest.mark.parametrize("how", ["canceled", "deleted", "stopped"])
def test_nothing_is_kept_of_a_job_that_ends_while_its_model_is_missing(
    service: Service, tmp_path: Path, how: str
) -> None:
    job_id = service.admit(steps=2)
    for runtime in make_runtime(service, threads=True, models=tmp_path / "empty"):
        rq = EngineWorker(runtime, connect(runtime.settings))
        found = rq._dequeue(None)
        assert found is not None
        rq._board(*found)
        loader = runtime._loader
        assert set(loader._missed) == {job_id}
        if how == "stopped":
            order = {"command": "stop-job", "job_id": job_id}
            rq.handle_payload({"data": json.dumps(order).encode()})
            rq._obey_orders()
        elif how == "canceled":
            assert service.store.cancel(job_id) == "canceled"
            Queues(service.redis).cancel(job_id)
        else:
            service.store.purge(job_id)
            Queues(service.redis).delete(job_id)
        rq._poll()
        assert not rq._boarded and not loader._missed and not loader._last_look
        rq.connection.close()


def test_a_network_that_was_let_go_of_is_made_ready_beside_the_work_again(service: Service) -> None:
    """What is left of the first time does not say that it failed."""
    for runtime in make_runtime(service, threads=True):
        for execution in ("e1", "e2"):
            job_id = service.admit(steps=2, deterministic=True)
            assert runtime.begin(job_id, execution, "w") is None
            service.until(partial(runtime.begin, job_id, execution, "w"))
            runtime.landed(runtime.outcomes.get(timeout=60))
            runtime.engine.networks.keep_only([])


@pytest.fixture
def noising(
    service: Service, own_redis: Callable[..., tuple[str, Any]]
) -> Iterator[tuple[Service, str]]:
    """A job that is done beside the engine, on a Redis that may come to forbid what it writes."""
    url, _ = own_redis("forbidding")
    other = type(service)(url, service.models, service.log)
    may_write(other, True)
    try:
        yield other, other.admit(kind="noise", t=(1,), inputs=np.zeros((1, 8, 8, 1), np.uint8))
    finally:
        other.close()


def may_write(service: Service, allowed: bool) -> None:
    service.redis.execute_command("ACL", "SETUSER", "default", "+hset" if allowed else "-hset")


def test_outputs_that_redis_refuses_fail_their_job(
    noising: tuple[Service, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, job_id = noising
    work = NoiseFlight.run

    def forbidden(*given: Any) -> None:
        may_write(service, False)
        try:
            work(*given)
        finally:
            may_write(service, True)

    monkeypatch.setattr(NoiseFlight, "run", forbidden)
    for runtime in make_runtime(service):
        assert run(runtime, job_id) is Ending.FAILED
        assert service.record(job_id).fault.code == "worker_error"
        assert runtime.failure is None


@pytest.mark.parametrize("threads", [False, True])
def test_work_beside_the_engine_whose_end_cannot_be_written_breaks_the_worker_down(
    noising: tuple[Service, str], monkeypatch: pytest.MonkeyPatch, threads: bool
) -> None:
    """As that of the engine does: else the job would run for ever."""
    service, job_id = noising
    work = NoiseFlight.run

    def forbidden(*given: Any) -> None:
        may_write(service, False)
        work(*given)

    monkeypatch.setattr(NoiseFlight, "run", forbidden)
    for runtime in make_runtime(service, threads=threads):
        flight = runtime.begin(job_id, "e1", "w")
        assert isinstance(flight, Flight)
        if threads:
            service.until(lambda runtime=runtime: runtime.failure is not None)
        else:
            with pytest.raises(RedisError):
                runtime.run_to_end(flight)


def test_a_model_that_goes_during_a_heartbeat_stays_gone(
    service: Service,
    tmp_path: Path,
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A heartbeat makes known again what Redis has lost; not what was taken away meanwhile."""
    service.models = tmp_path / "models"
    for name in ("tiny", "second"):
        diffusion.save(make_model(seed=4), service.models / name)
    for runtime in make_runtime(service):
        assert set(service.store.cards()) == {"tiny", "second"}
        rescan = threading.Thread(target=runtime.rescan)

        def slow(*told: Any, rescan: threading.Thread = rescan, **more: Any) -> None:
            shutil.rmtree(service.models / "second")
            rescan.start()
            rescan.join(1.0)
            type(service.store).heartbeat(service.store, *told, **more)

        monkeypatch.setattr(service.store, "heartbeat", slow)
        monkeypatch.setattr(runtime._loader, "scan", lambda: None)
        runtime.duties("me")
        rescan.join()
        assert set(service.store.cards()) == {"tiny"}


def test_models_that_go_while_redis_is_away_are_retired_later(
    service: Service,
    tmp_path: Path,
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them, but for those that are back by then; and their networks are let go."""
    service.models = tmp_path / "models"
    for seed, name in enumerate(("tiny", "second", "third", "back")):
        diffusion.save(make_model(seed=seed), service.models / name)
    for runtime in make_runtime(service):
        assert set(service.store.cards()) == {"tiny", "second", "third", "back"}
        gone = runtime.folder.served["second"].model
        for name in ("second", "third", "back"):
            shutil.rmtree(service.models / name)

        def away(name: str) -> None:
            raise RedisConnectionError

        with monkeypatch.context() as patched:
            patched.setattr(service.store, "retire_card", away)
            for _ in range(2):
                with pytest.raises(RedisConnectionError):
                    runtime.rescan()
        diffusion.save(make_model(seed=3), service.models / "back")
        runtime.rescan()
        assert set(service.store.cards()) == {"tiny", "back"}
        runtime.engine.tick()
        assert not runtime.engine.networks.is_prepared(gone)


def test_a_model_that_is_not_yet_loaded_stays_known(
    service: Service,
    tmp_path: Path,
    make_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker lives from its first model on; what it has not looked at yet is not gone."""
    for name in ("tiny", "second"):
        diffusion.save(make_model(seed=4), tmp_path / name)
    for name in ("second", "stranger"):
        service.store.publish_card(service.card.model_copy(update={"name": name}))
    folder = ModelFolder(tmp_path, queue="ddpm", first="tiny")
    runtime = Runtime(Settings(redis_url=service.url, models=tmp_path), service.store, folder)
    monkeypatch.setattr(runtime._loader, "scan", lambda: None)
    runtime.start()
    try:
        assert set(folder.served) == {"tiny"}
        assert runtime.duties("me")
        assert set(service.store.cards()) == {"tiny", "second", "stranger"}
        runtime.rescan()
        runtime._duties_at = 0.0
        assert runtime.duties("me")
        assert set(service.store.cards()) == {"tiny", "second"}
    finally:
        runtime.close()


def test_duties_publish_models_rates_and_life(
    service: Service, tmp_path: Path, make_model: Callable[..., Model]
) -> None:
    service.models = tmp_path / "models"
    diffusion.save(make_model(seed=4, T=1000), service.models / "tiny")
    for runtime in make_runtime(service):
        assert set(service.store.cards()) == {"tiny"}
        diffusion.save(make_model(seed=5), service.models / "later")
        runtime.duties("me")
        service.until(lambda: set(service.store.cards()) == {"tiny", "later"})
        runtime._duties_at = 0.0
        runtime.duties("me")
        (info,) = service.store.workers()
        assert (
            info.name == "me"
            and info.alive(time.time())
            and set(info.models)
            == {
                "tiny",
                "later",
            }
        )
        assert service.redis.hget("ddpm:rates:tiny", "me") is not None
        for path in (service.models / "later").iterdir():
            path.unlink()
        runtime.rescan()
        assert set(service.store.cards()) == {"tiny"}
