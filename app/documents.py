"""What the OpenAPI document says beyond what FastAPI finds by itself."""

from __future__ import annotations

from typing import Any

from app.views import EXAMPLE_ID
from jobs.store.events import EVENTS

_REF = "#/components/schemas/"

GENERATE_EXAMPLES: dict[str, Any] = {
    "seven": {"summary": "One digit", "value": {"class_label": 7}},
    "chain": {
        "summary": "Four images in 50 DDIM steps, with the chain's x̂_0 every tenth step",
        "value": {
            "num_images": 4,
            "seed": 1,
            "sampler": "ddim",
            "steps": 50,
            "snapshots": {"every": 10, "kinds": ["x_start"]},
        },
    },
    "guided": {
        "summary": "Guidance away from the unconditional",
        "value": {"class_label": 3, "guidance": 2.5, "deterministic": True},
    },
}
_PICTURE = "iVBORw0KGgo…"
NOISE_EXAMPLE = {"t": [1, 250, 500, 1000], "seed": 0, "images": [_PICTURE], "fit": "pad"}
RECONSTRUCT_EXAMPLES: dict[str, Any] = {
    "image": {
        "summary": "Four samples of p(x_0|x_t) from one picture, noised to t",
        "value": {"images": [_PICTURE], "t": 400, "num_images": 4, "seed": 1},
    },
    "branch": {
        "summary": "Go on from a snapshot of an earlier job, with other noise",
        "value": {"source": {"job": EXAMPLE_ID, "t": 505, "index": 0}, "num_images": 4, "seed": 2},
    },
    "x_t": {
        "summary": "From an array of your own, as base64 .npy",
        "value": {"x_t": "k05VTVBZAQB2AHsn…", "t": 250, "sampler": "ddim", "steps": 50},
    },
}
INTERPOLATE_EXAMPLES: dict[str, Any] = {
    "five": {
        "summary": "From one picture to another in five images",
        "value": {
            "images": [_PICTURE, _PICTURE],
            "t": 500,
            "lambdas": [0.0, 0.25, 0.5, 0.75, 1.0],
            "seed": 3,
        },
    }
}
LIKELIHOOD_EXAMPLES: dict[str, Any] = {
    "estimate": {
        "summary": "An unbiased estimate from 50 evaluations an image",
        "value": {"images": [_PICTURE], "mode": "monte_carlo", "samples": 50, "seed": 0},
    },
    "full": {
        "summary": "All terms of the bound, and three of them told one by one",
        "value": {"images": [_PICTURE], "mode": "full", "terms": [1, 100, 1000], "seed": 0},
    },
}

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

GENERATE: dict[str, Any] = {
    "parameters": _HEADERS,
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": _REF + "GenerateSpec"},
                "examples": GENERATE_EXAMPLES,
            }
        },
    },
}

_FILE = {"type": "string", "format": "binary"}


def _about_pictures(body: str, examples: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A route that takes pictures as JSON or multipart. parts: what else a form may have."""
    pictures = {"type": "array", "items": _FILE, "description": "PNG, JPEG or WebP files"}
    form = {"image": pictures, **parts, "request": {"$ref": _REF + body}}
    return {
        "parameters": _HEADERS,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": _REF + body}, "examples": examples},
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": form},
                    "encoding": {"request": {"contentType": "application/json"}},
                },
            },
        },
    }


NOISE = _about_pictures("NoiseBody", {"four": {"summary": "x_t at four t", "value": NOISE_EXAMPLE}})
RECONSTRUCT = _about_pictures(
    "ReconstructBody",
    RECONSTRUCT_EXAMPLES,
    x_t={**_FILE, "description": "the state to start from: .npy, float [C,H,W]"},
)
INTERPOLATE = _about_pictures("InterpolateBody", INTERPOLATE_EXAMPLES)
LIKELIHOOD = _about_pictures("LikelihoodBody", LIKELIHOOD_EXAMPLES)

CREATE_ERRORS = (
    "unauthorized", "timeout", "expired", "too_large", "unsupported_media_type", "invalid_request",
    "idempotency_conflict", "quota_exceeded", "busy", "queue_full", "storage_full", "no_models",
    "store_unavailable", "job_failed", "job_canceled",
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
    "error": {"code": "worker_error", "detail": "the device ran out of memory"},
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
    media = {
        "png": "image/png",
        "webp": "image/webp",
        "gif": "image/gif",
        "npy": "application/x-npy",
        "zip": "application/zip",
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "The file", "content": {media[suffix]: binary for suffix in suffixes}}


CREATED: dict[int | str, dict[str, Any]] = {
    202: {"description": "Taken in", "headers": _LOCATION, "content": _JOB},
    200: {
        "description": "With Prefer: wait, the job ended in time; with Accept: image/png or "
        "image/webp the picture (the grid of several); with Accept: text/event-stream the events",
        "headers": _LOCATION,
        "content": {
            **_JOB,
            **files("png", "webp")["content"],
            **EVENT_STREAM["content"],
        },
    },
}
