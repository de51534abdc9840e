"""Request bodies: JSON or multipart, limited in bytes before anything is decoded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.problems import Problem, field_problem
from jobs.kinds.common import ARRAYS

# Values in a JSON text, which bounds what parsing and its errors cost: no field takes more than
# 10,000, and a picture is one.
_MOST_VALUES = 12_000
_PIECE = 2**18  # bytes that are decompressed at a time
_UNKNOWN_PART = (
    "unknown part: there are `image` files and `request` (for /reconstruct also `x_t`, for "
    "/restore also `y`)"
)


@dataclass(frozen=True)
class Body:
    """A request body: its JSON text, and the files that came with it.

    files: the parts named `image`; arrays: those with the name of an array, .npy files.
    """

    text: bytes
    files: tuple[bytes, ...] = ()
    arrays: Mapping[str, bytes] = field(default_factory=dict)

    def fingerprint(self, kind: str) -> str:
        """Digest of what was asked, whatever the order of fields or the multipart boundary."""
        try:
            canonical = json.dumps(json.loads(self.text), sort_keys=True).encode()
        except (ValueError, RecursionError):  # the spec will say what is wrong with it
            canonical = self.text
        digest = hashlib.sha256(kind.encode() + b"\0" + canonical)
        for file in self.files:
            digest.update(hashlib.sha256(file).digest())
        for name, array in sorted(self.arrays.items()):
            digest.update(name.encode() + hashlib.sha256(array).digest())
        return digest.hexdigest()


async def read_body(
    request: Request, *, limit: int, most_files: int = 0, arrays: Collection[str] = ()
) -> Body:
    """The body, at most `limit` bytes. Raises Problem 413, 415 or 422.

    most_files: how many `image` parts a multipart body may have; 0: JSON only. arrays: which
    parts with .npy files it may have.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "application/json" or (media.startswith("application/") and "+json" in media):
        async with aclosing(_limited(request, limit)) as chunks:
            return Body(_parsable(b"".join([chunk async for chunk in chunks])))
    if media == "multipart/form-data" and most_files:
        body = await _multipart(request, limit, most_files)
        for name in body.arrays:
            if name not in arrays:
                raise field_problem(f"/{name}", _UNKNOWN_PART)
        return body
    kinds = "application/json or multipart/form-data" if most_files else "application/json"
    raise Problem("unsupported_media_type", f"Content-Type {media or '(none)'}: must be {kinds}")


def _decoded(request: Request) -> AsyncGenerator[bytes, None]:
    """The body's chunks without their Content-Encoding. Raises Problem 415 or 422."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("identity", ""):
        return request.stream()
    if coding in ("gzip", "x-gzip"):
        return _gunzipped(request)
    detail = f"Content-Encoding {coding}: must be gzip or identity"
    raise Problem("unsupported_media_type", detail, headers={"Accept-Encoding": "gzip"})


async def _gunzipped(request: Request) -> AsyncGenerator[bytes, None]:
    """The chunks that come out of a body that is a gzip. Raises Problem 422."""
    gunzip = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    async for chunk in request.stream():
        try:
            while chunk and not gunzip.eof:
                # In pieces: a kilobyte may hold a megabyte, and the limit counts what comes out.
                yield gunzip.decompress(chunk, _PIECE)
                chunk = gunzip.unconsumed_tail
                await asyncio.sleep(0)
        except zlib.error as error:
            raise Problem("invalid_request", f"the body is no gzip: {error}") from error
        if chunk or gunzip.unused_data:
            raise Problem("invalid_request", "the body goes on after its gzip ended")
    while not gunzip.eof:  # what came out of it may still be inside
        piece = gunzip.decompress(b"", _PIECE)
        if not piece:
            raise Problem("invalid_request", "the body's gzip is cut short")
        yield piece


def _parsable(text: bytes) -> bytes:
    """A JSON text with few enough values. Raises Problem 422."""
    found = sum(map(text.count, (b",", b"[", b"{")))
    if found > _MOST_VALUES:
        raise field_problem("", f"about {found} values in the JSON: must be at most {_MOST_VALUES}")
    return text


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks; 413 as soon as it is known to be too large."""
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    if size > limit:
        raise Problem("too_large", f"{size} bytes: must be at most {limit}")
    size = 0
    async for chunk in _decoded(request):
        size += len(chunk)
        if size > limit:
            raise Problem("too_large", f"more than {limit} bytes")
        yield chunk


_AS_BYTES = "latin-1"


class _FormParser(MultiPartParser):
    """Keeps files in memory, where they are limited, and refuses a form without its end."""

    spool_max_size = 2**31
    _complete = False

    @property
    def _charset(self) -> str:
        """Not what the client says, which may be any codec of Python's: this keeps each byte."""
        return _AS_BYTES

    @_charset.setter
    def _charset(self, said: str) -> None: ...

    def on_end(self) -> None:
        self._complete = True

    async def parse(self) -> FormData:
        form = await super().parse()
        if not self._complete:  # Starlette would drop the part that is cut, and leave it open
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("the form is cut short")
        return form


async def _multipart(request: Request, limit: int, most_files: int) -> Body:
    try:
        async with aclosing(_limited(request, limit)) as chunks:
            # More than allowed, so that the error can be ours.
            parser = _FormParser(
                request.headers, chunks, max_files=most_files + 2, max_fields=2, max_part_size=limit
            )
            form = await parser.parse()
    except MultiPartException as error:
        raise Problem("invalid_request", error.message) from error
    try:
        return await _parts(form, most_files)
    finally:
        await form.close()


async def _parts(form: FormData, most_files: int) -> Body:
    text: bytes | None = None
    arrays: dict[str, bytes] = {}
    files = []
    for name, value in form.multi_items():
        name = name.encode(_AS_BYTES).decode(errors="replace")
        content = await value.read() if isinstance(value, UploadFile) else value.encode(_AS_BYTES)
        if name == "request":
            if text is not None:
                raise field_problem("/request", "came twice: must be one part")
            text = _parsable(content)
        elif name == "image" and isinstance(value, UploadFile):
            files.append(content)
        elif name in ARRAYS and isinstance(value, UploadFile):
            arrays[name] = content
        elif name in ("image", *ARRAYS):
            raise field_problem(
                f"/{name}", f"came as text: must be a file ({name}=@FILE with curl)"
            )
        else:
            raise field_problem(f"/{name}", _UNKNOWN_PART)
    if len(files) > most_files:
        raise field_problem("/image", f"{len(files)} pictures: must be at most {most_files}")
    return Body(b"{}" if text is None else text, tuple(files), arrays)


def from_base64(text: str, pointer: str) -> bytes:
    """A file given as base64; a `data:` prefix and line breaks are allowed. Raises Problem 422."""
    payload = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise field_problem(pointer, f"is not base64: {error}") from error
