"""GET /models, /models/{name}, /models/{name}/schedule."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from app import documents
from app.outputs import file_response
from app.problems import Problem, documented
from app.routes.jobs import json_response
from app.routes.operation import Operation
from app.services import services
from jobs.cards import ModelCard, Preset, Sampling, schedule_tables
from jobs.kinds.chain import DEFAULT_STEPS

router = APIRouter(tags=["models"], route_class=Operation)
ERRORS = documented("unauthorized", "not_found", "store_unavailable")


EXAMPLE: dict[str, Any] = {
    "name": "mnist",
    "digest": "9f2c…",
    "shape": [1, 32, 32],
    "T": 1000,
    "schedule": "linear",
    "class_names": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
    "guidance": True,
    "prediction": "epsilon",
    "learned_variance": False,
    "samplers": ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc"],
    "draws": ["ddpm"],
    "spacings": ["uniform", "quadratic", "leading", "trailing", "lambda", "karras"],
    "sampling": {"sampler": "ddpm", "variance": "small", "spacing": "uniform"},
    "steps": 100,
    "presets": {"fast": {"sampler": "ddim", "steps": 20, "spacing": "uniform", "evaluations": 20}},
    "parameters": 1623169,
    "queue": "ddpm",
    "image_steps_per_s": 390.5,
    "served": True,
    "description": "handwritten digits",
    "thumbnail": "/models/mnist/thumbnail.png",
}


class PresetView(Preset):
    """A way to sample by name. evaluations: of the network, an image from noise."""

    evaluations: int


class ModelView(BaseModel):
    """A model that jobs can ask for."""

    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})

    name: str
    digest: str
    shape: list[int] = Field(min_length=3, max_length=3, description="C, H, W")
    T: int
    schedule: str
    class_names: tuple[str, ...]
    guidance: bool
    prediction: str
    learned_variance: bool
    samplers: tuple[str, ...]
    draws: tuple[str, ...] = Field(
        description="those of them whose steps draw noise: their chains from one x_t differ"
    )
    spacings: tuple[str, ...]
    sampling: Sampling = Field(description="what holds where a request says nothing")
    steps: int = Field(description="the same of its own sampler")
    presets: dict[str, PresetView] = Field(
        {}, description="what `preset` in a request may say, and what it stands for"
    )
    parameters: int | None
    queue: str
    image_steps_per_s: float | None
    served: bool
    description: str
    thumbnail: str | None = Field(None, description="URL of a small picture, if there is one")


class ModelList(BaseModel):
    """Every known model."""

    model_config = ConfigDict(json_schema_extra={"example": {"data": [EXAMPLE]}})

    data: list[ModelView]


class ScheduleView(BaseModel):
    """The forward process: entry k is for t[k] = k + 1."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "t": [1, 2],
                "beta": [0.0001, 0.02],
                "alpha_bar": [0.9999, 0.9799],
                "snr": [9999.0, 48.75],
                "posterior_variance": [0.0, 9.9e-05],
            }
        }
    )

    t: list[int]
    beta: list[float]
    alpha_bar: list[float]
    snr: list[float]
    posterior_variance: list[float]


@router.get(
    "/models",
    response_model=ModelList,
    responses=documented("unauthorized", "store_unavailable"),
)
async def list_models(request: Request) -> Response:
    """Models that workers have published; `served` tells whether one lives that has it."""
    cards = await services(request).reader.cards()
    views = [await _view(request, card) for _, card in sorted(cards.items())]
    return json_response(ModelList(data=views).model_dump_json())


@router.get("/models/{name}", response_model=ModelView, responses=ERRORS)
async def get_model(request: Request, name: str) -> Response:
    """A model."""
    return json_response((await _view(request, await _card(request, name))).model_dump_json())


@router.get("/models/{name}/schedule", response_model=ScheduleView, responses=ERRORS)
async def get_schedule(request: Request, name: str) -> Response:
    """β_t, ᾱ_t, SNR_t and β̃_t for t = 1..T."""
    tables = schedule_tables(await _card(request, name))
    return json_response(ScheduleView(**tables).model_dump_json())


@router.get(
    "/models/{name}/thumbnail.png",
    response_class=Response,
    responses={200: documents.files("png"), **ERRORS},
)
async def get_thumbnail(request: Request, name: str) -> Response:
    """A small picture of what a model draws."""
    card = await _card(request, name)
    if not card.thumbnail:
        raise Problem("not_found", f"model {name} has no thumbnail")
    # No copy is good for long: the name may come to mean another model.
    return file_response(base64.b64decode(card.thumbnail), "png", cache="no-cache")


async def _card(request: Request, name: str) -> ModelCard:
    cards = await services(request).reader.cards()
    if name not in cards:
        known = ", ".join(sorted(cards)) or "none yet"
        raise Problem("not_found", f"no model {name}; there are: {known}")
    return cards[name]


async def _view(request: Request, card: ModelCard) -> ModelView:
    reader = services(request).reader
    rate = await reader.rate(card.name)
    return ModelView(
        name=card.name,
        digest=card.digest,
        shape=list(card.shape),
        T=card.T,
        schedule=card.schedule_kind,
        class_names=card.class_names,
        guidance=card.null_label is not None,
        prediction=card.prediction,
        learned_variance=card.learned_variance,
        samplers=tuple(card.samplers),
        draws=tuple(name for name, traits in card.samplers.items() if traits.draws),
        spacings=card.spacings,
        sampling=card.sampling,
        steps=min(card.steps or DEFAULT_STEPS, card.T),
        presets={
            name: PresetView(**preset.model_dump(), evaluations=preset.steps)
            for name, preset in card.presets.items()
        },
        parameters=card.parameters,
        queue=card.queue,
        image_steps_per_s=None if rate is None else round(rate, 2),
        served=any(card.name in worker.models for worker in await reader.workers()),
        description=card.description,
        thumbnail=f"/models/{card.name}/thumbnail.png" if card.thumbnail else None,
    )
