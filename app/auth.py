"""Bearer keys, and who a client is."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import Scope

from app.keyfile import KeyFile
from app.signing import signer_of
from jobs.settings import Settings

# The documentation says nothing of this deployment, and a browser sends no key for it.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json"})
OPEN_PREFIX = "/static/"
_KEY = "key:"


class PublicWithoutKeys(ValueError):
    """The API would listen on a public address without any key."""


def check_bind(host: str, settings: Settings) -> None:
    """Raise PublicWithoutKeys unless the address is loopback, keys are set, or it is forced."""
    has_keys = settings.api_keys or settings.api_keys_file is not None
    if has_keys or settings.allow_public_without_keys or _is_loopback(host):
        return
    raise PublicWithoutKeys(
        f"--host {host} is reachable from outside and no key is set: set DDPM_API_KEYS "
        "or DDPM_API_KEYS_FILE, or DDPM_ALLOW_PUBLIC_WITHOUT_KEYS=1 if something else guards it"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Keyring:
    """Who may do what: everyone everything, unless there are keys.

    Keys of the settings, and of a file that is read again when it changes. Only digests are kept.
    Raises KeyFileError.
    """

    def __init__(self, settings: Settings) -> None:
        digests = [digest_of(key.get_secret_value()) for key in settings.api_keys]
        self._fixed = {digest: digest.hex()[:16] for digest in digests}
        self._file = None if settings.api_keys_file is None else KeyFile(settings.api_keys_file)
        self._needed = bool(self._fixed) or self._file is not None

    def client(self, scope: Scope) -> str | None:
        """Who asks, for quotas, idempotency and metrics: `key:` and the key's name; where there
        are no keys, `ip:` and the address. None: a key is needed, and this is none."""
        if not self._needed:
            peer = scope.get("client")
            return f"ip:{peer[0]}" if peer else "local"
        given = _bearer(scope)
        if given is None:
            name = signer_of(scope, self._known())
        else:
            name, _ = self._named(digest_of(given))
        if name is not None:
            return f"{_KEY}{name}"
        path = scope["path"]
        return "open" if path in OPEN_PATHS or path.startswith(OPEN_PREFIX) else None

    def signing(self, scope: Scope) -> tuple[str, bytes] | None:
        """Name and digest of the key that a request came with, to sign in its name."""
        name, digest = self._named(digest_of(_bearer(scope) or ""))
        return None if name is None else (name, digest)

    def _known(self) -> Mapping[bytes, str]:
        return self._fixed if self._file is None else {**self._fixed, **self._file.keys()}

    def _named(self, given: bytes) -> tuple[str | None, bytes]:
        """The name of the key with this digest; all are compared, each in constant time."""
        known = self._known()
        [*found] = [name for digest, name in known.items() if hmac.compare_digest(given, digest)]
        return (found[0] if found else None), given


def key_name(client: str) -> str:
    """The key's name of a client that has one, else ""."""
    return client.removeprefix(_KEY) if client.startswith(_KEY) else ""


def digest_of(key: str) -> bytes:
    """What is kept of a key. Keys are random and long: a slow hash would add nothing."""
    return hashlib.sha256(key.encode()).digest()


def _bearer(scope: Scope) -> str | None:
    kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None
