"""Errors as RFC 9457 problems. This is the one place where an HTTP error is made."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field, ValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.validation import clipped, detail_of, parents, place_of, pointer_to
from jobs.errors import (
    JobNotFound,
    OutputExpired,
    PictureError,
    PictureMedia,
    PictureTooLarge,
    Refused,
    SpecError,
)
from jobs.store.trouble import CODES as TROUBLES
from jobs.store.trouble import trouble_of

log = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)
MEDIA_TYPE = "application/problem+json"
# An answer stays small, whatever was asked: a field's name may be as long as a request.
MOST_ERRORS = 20
LONGEST_DETAIL = 2000
_MOST_LOOKED_AT = 1000

# code → status: every code the service answers with.
CODES: dict[str, int] = {
    "bad_request": 400,
    "unauthorized": 401,
    "not_found": 404,
    "not_ready": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "timeout": 408,
    "job_canceled": 409,
    "expired": 410,
    "too_large": 413,
    "unsupported_media_type": 415,
    "invalid_request": 422,
    "idempotency_conflict": 422,
    "quota_exceeded": 429,
    "headers_too_large": 431,
    "internal": 500,
    "job_failed": 500,
    "busy": 503,
    "no_models": 503,
    "queue_full": 503,
    "storage_full": 503,
    "still_running": 504,
    **dict.fromkeys(TROUBLES, 503),
}


class FieldError(BaseModel):
    """What is wrong with one field."""

    pointer: str = Field(description="JSON pointer into the request", examples=["/num_images"])
    detail: str


class ProblemBody(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    request_id: str
    errors: list[FieldError] = Field([], description="the first 20 at most")


class Problem(Exception):
    """An answer that is an error. Raise it anywhere below a route."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


def field_problem(pointer: str, detail: str) -> Problem:
    """A 422 about one field."""
    error = FieldError(pointer=pointer, detail=detail)
    return Problem("invalid_request", f"{clipped(pointer) or '/'}: {detail}", errors=[error])


def read_json(model: type[M], text: bytes) -> M:
    """The JSON that a client sent, as a model. Raises Problem 422 with what pydantic found, or for
    a field that comes twice, of which it would take the last.

    Only here is a ValidationError the client's: anywhere else it is about data of ours, a 500.
    """
    try:
        found = model.model_validate_json(text)
    except ValidationError as error:
        try:
            asked = json.loads(text)
        except (ValueError, RecursionError):  # that is what is wrong
            asked = None
        raise _fields_problem(error.errors(include_url=False), model, asked) from error
    json.loads(text, object_pairs_hook=_distinct)
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise field_problem(pointer_to((name,)), "came twice: must be given once")
        seen.add(name)


def query_of(request: Request) -> dict[str, str]:
    """The parameters of a query. Raises Problem 422 for one that comes twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in found:
            raise field_problem(pointer_to(("query", name)), "given twice; must be given once")
        found[name] = value
    return found


def read_query(model: type[M], request: Request) -> M:
    """The query of a request as a model, which knows its fields alone. Raises Problem 422."""
    try:
        return model.model_validate(query_of(request))
    except ValidationError as error:
        items = error.errors(include_url=False)
        raise _fields_problem(items, model, within=("query",)) from error


def _fields_problem(
    items: Sequence[Mapping[str, Any]],
    model: type[BaseModel] | None = None,
    asked: Any = None,
    *,
    within: tuple[str, ...] = (),
) -> Problem:
    """A 422 with what pydantic found. model: that it looked for; asked: in which JSON; within: what
    pointers begin with."""
    # A bad element also makes pydantic call its list too short: the element's error is enough. And
    # what is wrong inside of one branch of a union is enough beside its being none of the others.
    looked_at = [(place_of(item, asked), item) for item in items[:_MOST_LOOKED_AT]]
    above = {parent for place, _ in looked_at for parent in parents(place)}
    deepest = [(place, item) for place, item in looked_at if place not in above]
    shown = [
        FieldError(pointer=pointer_to((*within, *place)), detail=detail_of(item, model))
        for place, item in deepest[:MOST_ERRORS]
    ]
    first, more = shown[0], len(items) - len(looked_at) + len(deepest) - len(shown)
    rest = f" (and {more} more errors than are listed)" if more else ""
    detail = f"{clipped(first.pointer) or '/'}: {first.detail}{rest}"
    return Problem("invalid_request", detail, errors=shown)


def from_error(error: Exception) -> Problem | None:
    """The problem for an error of the packages below; None: it is not one of those."""
    match error:
        case Problem():
            return error
        case Refused():
            wait = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            return Problem(error.code, error.detail, headers=wait)
        case SpecError():
            return field_problem(error.pointer, error.detail)
        case JobNotFound():
            return Problem("not_found", str(error))
        case OutputExpired():
            return Problem("expired", str(error))
        case PictureTooLarge():
            return Problem("too_large", str(error))
        case PictureMedia():
            return Problem("unsupported_media_type", str(error))
        case PictureError():
            return Problem("invalid_request", str(error))
        case RedisError() if trouble := trouble_of(error):
            return Problem(trouble.code, trouble.detail, headers={"Retry-After": "5"})
        case _:
            return None


def response(problem: Problem, request_id: str) -> Response:
    """The HTTP response for a problem."""
    status = CODES[problem.code]
    errors = [
        FieldError(pointer=clipped(e.pointer), detail=clipped(e.detail, LONGEST_DETAIL))
        for e in problem.errors[:MOST_ERRORS]
    ]
    body = ProblemBody(
        title=HTTPStatus(status).phrase,
        status=status,
        code=problem.code,
        detail=clipped(problem.detail, LONGEST_DETAIL),
        request_id=request_id,
        errors=errors,
    )
    return Response(body.model_dump_json(), status, headers=problem.headers, media_type=MEDIA_TYPE)


async def _on_error(request: Request, error: Exception) -> Response:
    problem, request_id = from_error(error), request.scope.get("request_id", "")
    if problem is None:
        log.error("request %s", request_id, exc_info=error)
    return _answer(request, problem or internal())


def _answer(request: Request, problem: Problem) -> Response:
    request.scope["problem"] = problem.code  # for the log and the metrics
    return response(problem, request.scope.get("request_id", ""))


def internal() -> Problem:
    """The 500 that stands for a mistake of ours."""
    return Problem("internal", "an error of ours; the log has it under the request id")


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    by_status = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    code = by_status.get(error.status_code, "invalid_request")
    detail, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404:
        detail = f"no such route: {request.url.path}"
    elif "Allow" in headers:  # of one route, not of all that have the path
        allowed = ", ".join(_allowed(request))
        detail, headers["Allow"] = f"{request.method}: must be one of {allowed}", allowed
    return _answer(request, Problem(code, detail, headers=headers))


def _allowed(request: Request) -> list[str]:
    """The methods of a path: a route by itself knows its own alone."""
    found = [
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]
    return [*found, "HEAD"] if "GET" in found else found  # the middleware answers HEAD as GET


async def _on_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _answer(request, _fields_problem(error.errors()))


def install(app: FastAPI) -> None:
    """Answer every error as a problem."""
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_parameters)
    known: tuple[type[Exception], ...] = (
        Problem, Refused, SpecError, JobNotFound, OutputExpired, PictureError, RedisError,
    )  # fmt: skip
    for kind in known:
        app.add_exception_handler(kind, _on_error)


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these codes, each with its schema and an example.

    store_unavailable stands for all that Redis can be troubled by.
    """
    by_status: dict[int | str, dict[str, Any]] = {}
    if "store_unavailable" in codes:
        codes = tuple(dict.fromkeys([*codes, *TROUBLES]))
    for code in codes:
        status = CODES[code]
        entry = by_status.setdefault(status, {"description": HTTPStatus(status).phrase})
        media = entry.setdefault("content", {}).setdefault(
            MEDIA_TYPE, {"schema": {"$ref": "#/components/schemas/ProblemBody"}, "examples": {}}
        )
        media["examples"][code] = {"value": _example(code, status)}
        if status in (429, 503):
            entry["headers"] = {
                "Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}
            }
        if status == 415:
            entry["headers"] = {
                "Accept-Encoding": {
                    "description": "Where the Content-Encoding was none of ours: those that are",
                    "schema": {"type": "string"},
                }
            }
    return by_status


def _example(code: str, status: int) -> dict[str, Any]:
    details = {
        "invalid_request": "/num_images: 65: must be at most 64",
        "quota_exceeded": "5000 of 5000 image-steps are outstanding",
        "queue_full": "2000 jobs are waiting already",
        "expired": "the outputs of this job have expired",
    }
    errors = [{"pointer": "/num_images", "detail": "65: must be at most 64"}]
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": details.get(code, code.replace("_", " ")),
        "request_id": "0c5d1f2e9a7b4c3d",
        "errors": errors if code == "invalid_request" else [],
    }
