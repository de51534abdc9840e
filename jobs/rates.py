"""Estimates of time: from work known at admission and the rate that workers measure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

FRESH_S = 60.0


def combined_rate(entries: Iterable[bytes], now: float) -> float | None:
    """Image-steps/s of a model over all workers, from their `[rate, at]` entries.

    Workers heard of lately add up; if there is none, the last one known. None: never measured.
    """
    measured = [found for entry in entries if (found := parse_rate(entry)) is not None]
    fresh = [rate for rate, at in measured if now - at <= FRESH_S]
    if fresh:
        return sum(fresh) or None
    if not measured:
        return None
    return max(measured, key=lambda entry: entry[1])[0] or None


def parse_rate(entry: bytes) -> tuple[float, float] | None:
    """(image-steps/s, Unix time of the measurement); None for what is no such entry."""
    try:
        rate, at = (float(value) for value in json.loads(entry))
    except (ValueError, TypeError, RecursionError):
        return None
    return (rate, at) if math.isfinite(rate) and math.isfinite(at) and rate >= 0 else None


def eta_s(work: float, rate: float | None) -> float | None:
    """Seconds for so many image-steps; None while no rate is known."""
    return None if rate is None else round(max(work, 0.0) / rate, 2)


def retry_after(work: float, rate: float | None, *, fallback: int = 10) -> int:
    """Whole seconds, 1..3600, after which so many image-steps will be done."""
    if rate is None:
        return fallback
    return min(3600, max(1, math.ceil(work / rate)))
