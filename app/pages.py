"""The two HTML pages, each with a policy that lets its own scripts run and no others."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
PAGE = STATIC / "index.html"
DOCS_STATIC = "/static/docs"

router = APIRouter(include_in_schema=False)


class Files(StaticFiles):
    """The files of both pages. A browser asks whether its copy still holds, which the ETag makes
    cheap: after an upgrade no module must meet one of the last version."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


@router.get("/")
async def page() -> Response:
    """The web page: all of its scripts and styles are files of ours."""
    policy = policy_of(scripts="'self'", styles="'self'")
    return FileResponse(
        PAGE, headers={"Cache-Control": "no-cache", "Content-Security-Policy": policy}
    )


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The documentation, by Swagger UI from here: clusters often see no other place."""
    root = request.scope.get("root_path", "")
    answer = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=request.app.title,
        swagger_js_url=f"{root}{DOCS_STATIC}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{DOCS_STATIC}/swagger-ui.css",
        swagger_favicon_url=f"{root}{DOCS_STATIC}/favicon.png",
    )
    html = bytes(answer.body).decode()
    # Swagger UI sets style attributes; its own script and style sheet are files of ours.
    policy = policy_of(html, scripts="'self'", styles="'self' 'unsafe-inline'")
    answer.headers["Content-Security-Policy"] = policy
    return answer


def policy_of(html: str = "", *, scripts: str, styles: str) -> str:
    """A Content-Security-Policy for a page: the inline scripts of `html` by their hashes, and
    nothing from anywhere else but scripts and styles of these sources."""
    allowed = " ".join([*_hashes(html), scripts])
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {allowed}",
            f"style-src {styles}",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    )


def _hashes(html: str) -> list[str]:
    """The sources of a page's inline scripts, as a policy names them."""
    texts = re.findall(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts if text)
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
