"""Prefer (RFC 7240) and Accept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastapi import Request

from jobs.formats import FORMATS, PICTURES

MOST_WAIT_S = 60


@dataclass(frozen=True)
class Wish:
    """How a client wants its answer.

    wait_s: hold the request for so long. applied: value of Preference-Applied, or None.
    media: `json`, `events`, or the suffix of a picture's format.
    """

    wait_s: float
    applied: str | None
    media: str


def wish(request: Request) -> Wish:
    """What Prefer and Accept say together.

    A client that takes pictures and no JSON waits as long as it can, even if it did not ask to.
    """
    wait = prefer_wait(request.headers.getlist("prefer"))
    media = accepted(request.headers.get("accept", ""))
    if wait is not None:
        return Wish(wait, f"wait={wait}", media)
    return Wish(MOST_WAIT_S if media in PICTURES else 0, None, media)


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


def accepted(accept: str) -> str:
    """The kind of answer that ranks highest; `json` where nothing else is named."""
    best, best_q = "json", 0.0
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        kind = _KINDS.get(media)
        q = _quality(parameters)
        if kind is not None and q > best_q:
            best, best_q = kind, q
    return best


_KINDS = {
    **{FORMATS[suffix].media: suffix for suffix in PICTURES},
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
