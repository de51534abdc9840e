"""The two HTML pages, each with a policy that lets its own scripts run and no others."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, Response

STATIC = Path(__file__).parent / "static"
PAGE = STATIC / "index.html"
DOCS_STATIC = "/static/docs"

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    """The web page."""
    policy = page_policy(PAGE.stat().st_mtime_ns)
    # An upgrade must not meet a page from a browser's cache; the ETag makes the check cheap.
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": policy}
    return FileResponse(PAGE, headers=headers)


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


@functools.lru_cache(maxsize=1)
def page_policy(changed: int) -> str:  # noqa: ARG001
    """The policy of the page as it was when it last `changed`."""
    html = PAGE.read_text("utf-8")
    return policy_of(html, styles=" ".join(_hashes("style", html)))


def policy_of(html: str, *, scripts: str = "", styles: str = "") -> str:
    """A Content-Security-Policy for a page: its inline scripts by their hashes, and nothing from
    anywhere else. scripts, styles: further sources of each."""
    allowed = " ".join([*_hashes("script", html), scripts]).strip()
    return "; ".join(
        [
            "default-src 'none'",
            "script-src " + (allowed or "'none'"),
            "style-src " + (styles or "'none'"),
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    )


def _hashes(tag: str, html: str) -> list[str]:
    """The sources of a page's inline elements, as a policy names them."""
    texts = re.findall(rf"<{tag}(?![^>]*\bsrc=)[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts if text)
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
