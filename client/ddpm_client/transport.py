"""How both clients speak HTTP."""

from __future__ import annotations

from typing import Any

import httpx

from ddpm_client.version import VERSION

CONNECT_S = 5.0
# The service says something every 15 s at least.
STREAM_TIMEOUT = httpx.Timeout(60.0, connect=CONNECT_S)


def options(url: str, key: str | None, timeout: float) -> dict[str, Any]:
    """Options of an httpx client."""
    headers = {"User-Agent": f"ddpm-client/{VERSION}"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    return {"base_url": url, "headers": headers, "timeout": timeout, "follow_redirects": False}
