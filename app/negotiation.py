"""Prefer (RFC 7240) and Accept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastapi import Request

from app.problems import Problem
from jobs.formats import FORMATS, PICTURES

MOST_WAIT_S = 60


@dataclass(frozen=True)
class Wish:
    """How a client wants its answer.

    wait_s: hold the request for so long. applied: value of Preference-Applied, or None.
    media: `json`, `events`, or the suffix of a picture's format. json: whether JSON will do, too.
    """

    wait_s: float
    applied: str | None
    media: str
    json: bool = True


def wish(request: Request) -> Wish:
    """What Prefer and Accept say together.

    A client that takes pictures and no JSON waits as long as it can, even if it did not ask to.
    Raises Problem 406 for one that takes pictures alone, and of no kind that there is.
    """
    wait = prefer_wait(request.headers.getlist("prefer"))
    accept = ", ".join(request.headers.getlist("accept"))
    kinds = ranked(accept)
    if not kinds and _asks_for_a_picture(accept):
        known = ", ".join(name for name in _KINDS if "*" not in name)
        raise Problem("not_acceptable", f"Accept: {accept:.200}: must name one of {known}")
    media, json = accepted(accept), "json" in kinds or not kinds
    if wait is not None:
        return Wish(wait, f"wait={wait}", media, json)
    return Wish(MOST_WAIT_S if media in PICTURES else 0, None, media, json)


def prefer_wait(values: list[str]) -> int | None:
    """Seconds of the first `wait=N`, at most 60; None where there is none."""
    for value in values:
        for preference in value.split(","):
            name, _, seconds = preference.partition(";")[0].partition("=")
            digits = seconds.strip().strip('"')
            if name.strip().lower() == "wait" and digits.isdecimal():
                # Not int() of whatever came: it refuses numbers of thousands of digits.
                return min(int(digits), MOST_WAIT_S) if len(digits) < 10 else MOST_WAIT_S
    return None


def _asks_for_a_picture(accept: str) -> bool:
    """Or for an array, of whatever format: whoever has a file of it must not find JSON there."""
    media = (part.partition(";")[0].strip().lower() for part in accept.split(","))
    return any(name.startswith("image/") or name in _ARRAYS for name in media)


def accepted(accept: str) -> str:
    """The kind of answer that ranks highest; `json` where nothing else is named."""
    kinds = ranked(accept)
    return max(kinds, key=lambda kind: kinds[kind], default="json")


def ranked(accept: str) -> dict[str, float]:
    """The kinds of answer that are named, in their order, and how much each is wanted: over 0."""
    found: dict[str, float] = {}
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        kind, q = _KINDS.get(media), _quality(parameters)
        if kind is not None and q > 0:
            found[kind] = max(q, found.get(kind, 0.0))
    return found


_ARRAYS = {known.media for known in FORMATS.values() if known.array is not None}
_KINDS = {
    **{FORMATS[suffix].media: suffix for suffix in PICTURES},
    "image/*": next(iter(PICTURES)),
    "text/event-stream": "events",
    "application/json": "json",
    "application/*": "json",
    "*/*": "json",
}


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                q = float(value)
            except ValueError:
                return 0.0
            return q if math.isfinite(q) else 0.0
    return 1.0
