"""Bearer keys, and who a client is."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.types import Scope

from jobs.settings import Settings

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
OPEN_PREFIX = "/static/"


class PublicWithoutKeys(ValueError):
    """The API would listen on a public address without any key."""


def check_bind(host: str, settings: Settings) -> None:
    """Raise PublicWithoutKeys unless the address is loopback, keys are set, or it is forced."""
    if settings.api_keys or settings.allow_public_without_keys or _is_loopback(host):
        return
    raise PublicWithoutKeys(
        f"--host {host} is reachable from outside and no key is set: set DDPM_API_KEYS, "
        "or DDPM_ALLOW_PUBLIC_WITHOUT_KEYS=1 if something else guards it"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Keyring:
    """The keys of the settings. Empty: everyone may do everything."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [_digest(key.get_secret_value()) for key in settings.api_keys]

    def admits(self, scope: Scope) -> bool:
        """Whether the request may pass; every key is compared, in constant time."""
        path = scope["path"]
        if not self._digests or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return True
        given = _digest(_bearer(scope) or "")
        return any([hmac.compare_digest(given, known) for known in self._digests])  # noqa: C419

    def client(self, scope: Scope) -> str:
        """Who asks, for quotas and idempotency: the key if there are any, else the address."""
        if self._digests:
            return "key:" + _digest(_bearer(scope) or "").hex()[:16]
        peer = scope.get("client")
        return f"ip:{peer[0]}" if peer else "local"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _bearer(scope: Scope) -> str | None:
    kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None
