"""The application, made by a factory: nothing happens at import."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app import pages, problems
from app.middleware import Edge
from app.receiving import Uploads
from app.routes import create, jobs, models, outputs, system
from app.services import Services
from app.views import JobView
from jobs.kinds.table import result_models
from jobs.settings import Settings
from jobs.store.events import EVENTS
from jobs.version import VERSION

DESCRIPTION = """Denoising diffusion as a service: images from noise, noise from images, and every
state in between. A request makes a job; the job is there at once, can be watched, canceled,
repeated to the byte, and fetched again."""
# Headers of answers that a page of another origin may read.
EXPOSED = (
    "Location", "Retry-After", "X-Request-ID", "Idempotency-Replayed", "Preference-Applied",
    "X-Alpha-Bar",
)  # fmt: skip


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API. settings: read from the environment if absent."""
    services = Services(settings or Settings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with services.running():
            yield

    app = FastAPIOffline(  # it brings the files of Swagger UI
        title="ddpm-serve",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # app/pages.py has it, with its policy
        redoc_url=None,
        redirect_slashes=False,
        # For generated clients: `get_job` is an operation, and a default is not required anywhere.
        generate_unique_id_function=lambda route: route.name,
        separate_input_output_schemas=False,
        static_url=pages.DOCS_STATIC,
    )
    app.state.services = services
    problems.install(app)
    app.include_router(create.router())
    for module in (jobs, outputs, models, system):
        app.include_router(module.router)
    app.include_router(pages.router)
    app.mount("/static", pages.Files(directory=pages.STATIC), name="static")
    app.add_middleware(Uploads, settings=services.settings)
    app.add_middleware(Edge, keyring=services.keyring, metrics=services.metrics)
    if services.settings.cors_origins:  # outermost: what asks beforehand sends no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=services.settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*", "Authorization"],
            expose_headers=EXPOSED,
        )
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    return app


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the schemas that routes name by reference."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            separate_input_output_schemas=False,
        )
        named: list[type[BaseModel]] = [
            *create.body_models(),
            *result_models(),
            JobView,
            problems.ProblemBody,
            *EVENTS.values(),
        ]
        _, found = models_json_schema(
            [(model, "validation") for model in named],
            ref_template="#/components/schemas/{model}",
        )
        components = schema.setdefault("components", {})
        components["schemas"] = {**found["$defs"], **components.get("schemas", {})}
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        _correct(schema)
        schema["security"] = [{"bearer": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema


def _correct(schema: dict[str, Any]) -> None:
    """FastAPI documents its own 422, which this service never sends: ours are problems."""
    ours = problems.documented("invalid_request")[422]
    for path in schema["paths"].values():
        for operation in path.values():
            responses = operation["responses"]
            if "application/json" in responses.get("422", {}).get("content", {}):
                responses["422"] = ours
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
