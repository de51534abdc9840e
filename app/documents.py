"""What the OpenAPI document says beyond what FastAPI finds by itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from app.views import EXAMPLE_ID
from jobs.formats import FORMATS, PICTURES
from jobs.kinds.common import JobSpec
from jobs.store.events import EVENTS

_REF = "#/components/schemas/"

_HEADERS = [
    {
        "name": "Prefer",
        "in": "header",
        "schema": {"type": "string"},
        "example": "wait=30",
        "description": "hold the answer until the job ends, at most 60 s (RFC 7240)",
    },
    {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": {"type": "string", "maxLength": 255},
        "example": "order-1742",
        "description": "the same key and body give the same job, for 24 hours",
    },
]

_FILE = {"type": "string", "format": "binary"}
_ARRAYS = {"x_t": "the state to start from", "y": "the measurement"}


def create_request(
    kind: type[JobSpec], body: type[JobSpec], query: type[BaseModel], examples: dict[str, Any]
) -> dict[str, Any]:
    """What a kind's route takes: JSON, and where it takes files, multipart too."""
    schema = {"$ref": _REF + body.__name__}
    content: dict[str, Any] = {"application/json": {"schema": schema, "examples": examples}}
    if kind.takes:
        form: dict[str, Any] = {}
        if "pictures" in kind.takes:
            about = "PNG, JPEG or WebP files"
            form["image"] = {"type": "array", "items": _FILE, "description": about}
        for array, about in _ARRAYS.items():
            if array in kind.takes:
                form[array] = {**_FILE, "description": f"{about}: .npy, float [C,H,W]"}
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": {**form, "request": schema}},
            "encoding": {"request": {"contentType": "application/json"}},
        }
    parameters = [*_of_query(query), *_HEADERS]
    return {"parameters": parameters, "requestBody": {"required": True, "content": content}}


def _of_query(model: type[BaseModel]) -> list[dict[str, Any]]:
    """The parameters of a query that the model reads."""
    fields: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": schema,
            "description": schema["description"],
        }
        for name, schema in fields.items()
    ]


CREATE_ERRORS = (
    "unauthorized", "not_acceptable", "timeout", "expired", "too_large", "unsupported_media_type",
    "invalid_request", "idempotency_conflict", "quota_exceeded", "busy", "queue_full",
    "storage_full", "no_models", "store_unavailable", "job_failed", "job_canceled", "still_running",
)  # fmt: skip

EVENT_EXAMPLES: dict[str, dict[str, Any]] = {
    "status": {"status": "running"},
    "progress": {"step": 12, "total": 100, "t": 881, "eta_s": 0.9},
    "snapshot": {
        "t": 801,
        "index": 0,
        "kind": "x_start",
        "url": f"/jobs/{EXAMPLE_ID}/snapshots/801/0.png?kind=x_start",
    },
    "image": {"index": 0, "url": f"/jobs/{EXAMPLE_ID}/images/0.png", "sha256": "5f8c…"},
    "done": {"status": "succeeded"},
    "error": {"code": "out_of_memory", "detail": "the device ran out of memory"},
    "reset": {"reason": "trimmed", "job": {"id": EXAMPLE_ID, "status": "running"}},
}

_STREAM_TEXT = (
    'id: 1769860800140-0\nevent: status\ndata: {"status":"running"}\n\n'
    'id: 1769860800320-0\nevent: progress\ndata: {"step":12,"total":100,"t":881}\n\n'
    'id: 1769860801350-2\nevent: done\ndata: {"status":"succeeded"}\n\n'
)

EVENT_STREAM: dict[str, Any] = {
    "description": "Server-sent events; the data of each is JSON, its schema named by the event",
    "content": {
        "text/event-stream": {
            "schema": {"type": "string"},
            "example": _STREAM_TEXT,
            "x-events": {
                name: {"schema": {"$ref": _REF + model.__name__}, "example": EVENT_EXAMPLES[name]}
                for name, model in EVENTS.items()
            },
        }
    },
}

_JOB = {"application/json": {"schema": {"$ref": _REF + "JobView"}}}
_LOCATION = {
    "Location": {"description": "The job", "schema": {"type": "string"}},
    "Idempotency-Replayed": {
        "description": "`true`: an earlier request with this key made the job",
        "schema": {"type": "string"},
    },
    "Preference-Applied": {"description": "Echo of Prefer", "schema": {"type": "string"}},
}


def files(*suffixes: str) -> dict[str, Any]:
    """A 200 that is a file of one of these kinds."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "description": "The file",
        "content": {FORMATS[suffix].media: binary for suffix in suffixes},
    }


CREATED: dict[int | str, dict[str, Any]] = {
    202: {"description": "Taken in", "headers": _LOCATION, "content": _JOB},
    200: {
        "description": "With Prefer: wait, the job ended in time. With Accept: image/png or "
        "image/webp the picture (the grid of several); with Accept: text/event-stream the events",
        "headers": _LOCATION,
        "content": _JOB,
        # Only for who asks: a client made from this document gets one type a status.
        "x-accept": {**files(*PICTURES)["content"], **EVENT_STREAM["content"]},
    },
}
