"""A route that knows its query: what would have no effect is refused, as in a request's body."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from app.problems import documented, field_problem, query_of
from app.signing import PROOF
from app.validation import pointer_to

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Operation(APIRoute):
    """Answers 422 to a query parameter that it does not take, or that comes twice."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["responses"] = documented("invalid_request") | (options.get("responses") or {})
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        taken = [field.alias for field in self.dependant.query_params]

        async def checked(request: Request) -> Response:
            if request.scope["query_string"]:
                _check(request, taken)
            return await handle(request)

        return checked


def _check(request: Request, taken: list[str]) -> None:
    for name in query_of(request):
        if name not in taken and name not in PROOF:
            known = f"must be one of {', '.join(taken)}" if taken else "none is taken here"
            raise field_problem(pointer_to(("query", name)), f"unknown; {known}")
