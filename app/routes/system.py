"""GET /queue, /healthz, /readyz, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from app.problems import Problem, documented
from app.routes.jobs import json_response
from app.services import services
from jobs.rates import eta_s
from jobs.store.reader import JobReader, QueueState
from jobs.version import VERSION

router = APIRouter(tags=["system"])


_QUEUE: Any = {
    "name": "ddpm",
    "queued": 3,
    "running": 2,
    "image_steps": 420,
    "eta_s": 1.08,
    "paused": False,
}


class QueueView(BaseModel):
    """One queue. image_steps: not yet done. eta_s: until all of it is done, at the measured rate
    of the models it serves. paused: workers take no job from it."""

    model_config = ConfigDict(json_schema_extra={"example": _QUEUE})

    name: str
    queued: int
    running: int
    image_steps: int
    eta_s: float | None
    paused: bool = False


class WorkerView(BaseModel):
    """A worker that spoke lately. active: images in flight. slots: how many of one model it steps
    together, the others wait; null where an older worker does not say it."""

    name: str
    queue: str
    models: tuple[str, ...]
    device: str
    active: int
    slots: int | None = None


class QueuesView(BaseModel):
    """All queues and workers."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "queues": [_QUEUE],
                "workers": [
                    {
                        "name": "ddpm-4f1c",
                        "queue": "ddpm",
                        "models": ["mnist"],
                        "device": "cpu",
                        "active": 6,
                        "slots": 64,
                    }
                ],
            }
        }
    )

    queues: list[QueueView]
    workers: list[WorkerView]


class Health(BaseModel):
    """Alive. version: of this software."""

    model_config = ConfigDict(json_schema_extra={"example": {"status": "ok", "version": VERSION}})

    status: str = "ok"
    version: str = VERSION


class Readiness(BaseModel):
    """Ready: Redis takes writes and at least one model is known. paused: queues, if there are any,
    whose jobs wait until they are resumed."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"status": "ready", "models": 1, "workers": 1}}
    )

    status: str = "ready"
    models: int
    workers: int
    paused: list[str] | None = None


@router.get(
    "/queue",
    response_model=QueuesView,
    responses=documented("unauthorized", "store_unavailable"),
)
async def get_queue(request: Request) -> Response:
    """How much waits, how much runs, who works."""
    reader = services(request).reader
    views = [await _queue_view(reader, state) for state in await reader.queues()]
    slots = await reader.slots()
    workers = [
        WorkerView(
            name=w.name,
            queue=w.queue,
            models=w.models,
            device=w.device,
            active=w.active,
            slots=slots.get(w.name),
        )
        for w in await reader.workers()
    ]
    return json_response(QueuesView(queues=views, workers=workers).model_dump_json())


async def _queue_view(reader: JobReader, state: QueueState) -> QueueView:
    cards = (await reader.cards()).values()
    rates = [await reader.rate(card.name) for card in cards if card.queue == state.name]
    known = [rate for rate in rates if rate is not None]
    rate = sum(known) / len(known) if known else None  # work is not kept apart by model
    return QueueView(
        name=state.name,
        queued=state.queued,
        running=state.running,
        image_steps=state.outstanding,
        eta_s=eta_s(state.outstanding, rate),
        paused=state.paused,
    )


@router.post(
    "/queue/{name}/pause",
    response_model=QueueView,
    responses=documented("unauthorized", "not_found", "store_unavailable"),
)
async def pause_queue(request: Request, name: str) -> Response:
    """Let workers take no more jobs from a queue. Jobs are still accepted, and wait; those that
    run go on."""
    return await _paused(request, name, paused=True)


@router.post(
    "/queue/{name}/resume",
    response_model=QueueView,
    responses=documented("unauthorized", "not_found", "store_unavailable"),
)
async def resume_queue(request: Request, name: str) -> Response:
    """Let workers take jobs from a queue again."""
    return await _paused(request, name, paused=False)


async def _paused(request: Request, name: str, *, paused: bool) -> Response:
    reader = services(request).reader
    state = await reader.pause(name, paused=paused)
    if state is None:
        raise Problem("not_found", f"no queue {name[:100]}")
    return json_response((await _queue_view(reader, state)).model_dump_json())


@router.get("/healthz", response_model=Health)
async def get_healthz() -> Response:
    """Whether this process answers."""
    return json_response(Health().model_dump_json())


@router.get(
    "/readyz", response_model=Readiness, responses=documented("no_models", "store_unavailable")
)
async def get_readyz(request: Request) -> Response:
    """Whether jobs can be taken in. No worker needs to live for that: they wait."""
    reader = services(request).reader
    await reader.check_writable()
    cards = await reader.cards()
    if not cards:
        detail = "no worker has published a model yet"
        raise Problem("no_models", detail, headers={"Retry-After": "5"})
    view = Readiness(
        models=len(cards), workers=len(await reader.workers()), paused=await reader.paused() or None
    )
    return json_response(view.model_dump_json(exclude_none=True))


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus text; where accepted OpenMetrics, with ids of requests",
            "content": {
                "application/openmetrics-text": {
                    "schema": {"type": "string"},
                    "example": 'ddpm_queue_jobs{queue="ddpm",status="queued"} 3.0\n# EOF\n',
                },
                "text/plain": {
                    "schema": {"type": "string"},
                    "example": 'ddpm_queue_jobs{queue="ddpm",status="queued"} 3.0\n',
                },
            },
        },
        **documented("unauthorized", "store_unavailable"),
    },
)
async def get_metrics(request: Request) -> Response:
    """Counters and gauges for Prometheus."""
    held = services(request)
    accept = request.headers.get("accept", "")
    content, media = await held.metrics.render(held.reader, accept)
    return Response(content, headers={"Content-Type": media})
