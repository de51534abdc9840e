"""Signed addresses: they open one output for a while without a key, as in the `src` of a picture.

`GET /jobs/{id}?sign=600` gives a client with a key the addresses of that job so. A signature is
made with the key's own digest: the revocation of the key ends it, and every API process checks it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

from starlette.types import Scope

from app.views import JobView

MOST_S = 86_400
PROOF = ("expires", "key", "signature")  # what an address is signed by
# What can be opened so: outputs and events of a job; nothing that changes anything.
_PATHS = re.compile(r"/jobs/[0-9a-f]+/(images[./]|snapshots[./]|(grid|mean|std)\.|events$).*")
_PURPOSE = b"ddpm-serve: signed address v1"


def signed(url: str, *, name: str, digest: bytes, expires: int) -> str:
    """An address (path and query) that opens without a key until `expires` (Unix seconds).

    name, digest: of the key in whose name.
    """
    path, _, query = url.partition("?")
    values = (str(expires), name, _signature(path, expires, name, digest))
    proof = urlencode([*zip(PROOF, values, strict=True)])
    return f"{path}?{query + '&' if query else ''}{proof}"


def signer_of(scope: Scope, keys: Mapping[bytes, str]) -> str | None:
    """The name of the key whose signature an address has; None: it has none that holds."""
    if scope["method"] not in ("GET", "HEAD") or b"signature=" not in scope["query_string"]:
        return None
    path = scope["path"]
    given = dict(parse_qsl(scope["query_string"].decode("latin-1")))
    name, text = given.get("key", ""), given.get("expires", "")
    if not _PATHS.fullmatch(path) or not re.fullmatch(r"[0-9]{1,12}", text):
        return None
    expires = int(text)
    if expires < time.time():
        return None
    [*found] = [
        name
        for digest, its in keys.items()
        if its == name
        and hmac.compare_digest(
            _signature(path, expires, name, digest).encode(), given.get("signature", "").encode()
        )
    ]
    return name if found else None


def _signature(path: str, expires: int, name: str, digest: bytes) -> str:
    key = hmac.digest(digest, _PURPOSE, hashlib.sha256)
    text = "\n".join((path, str(expires), name))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def with_signed_urls(view: JobView, *, name: str, digest: bytes, seconds: int) -> JobView:
    """The job with addresses that open without a key for so many seconds."""
    expires = int(time.time()) + seconds

    def sign(url: str) -> str:
        return signed(url, name=name, digest=digest, expires=expires)

    urls = view.urls.model_copy(
        update={
            field: sign(url)
            for field in ("events", "images", "grid", "mean", "std")
            if (url := getattr(view.urls, field)) is not None
        }
    )
    images, snapshots = (
        None if many is None else [one.model_copy(update={"url": sign(one.url)}) for one in many]
        for many in (view.images, view.snapshots)
    )
    return view.model_copy(update={"urls": urls, "images": images, "snapshots": snapshots})
