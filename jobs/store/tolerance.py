"""Reading what others have written into the store: each item alone, and none of it an error.

Another version writes here too, and now and then something that is not ours at all.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from redis.exceptions import ResponseError

log = logging.getLogger(__name__)
T = TypeVar("T")
UNREADABLE = (ValueError, TypeError, LookupError, RecursionError, OverflowError, AttributeError)
LONGEST = 200  # characters of a text from elsewhere that a message repeats
_LATEST = 2.5e11  # Unix time that a date can still show
# What a script or a command says that met data of another sort than it expects.
_DATA_FAULTS = (
    "WRONGTYPE",
    "attempt to ",
    "not an integer",
    "not a valid float",
    "would overflow",
    "bad argument",
    "must be strings or integers",
)
_told: set[str] = set()


def is_data_fault(error: Exception) -> bool:
    """Whether Redis refused because of what it holds, not because of how it fares."""
    return isinstance(error, ResponseError) and any(part in str(error) for part in _DATA_FAULTS)


def each(what: str, items: Iterable[tuple[str, Any]], read: Callable[[Any], T]) -> dict[str, T]:
    """Name → what `read` makes of each item, without those that it cannot read.

    Those are told of in the log, once each.
    """
    found = {}
    for name, item in items:
        try:
            found[name] = read(item)
        except UNREADABLE as error:
            tell_once(f"{what} {name[:LONGEST]}", str(error))
    return found


def tell_once(what: str, why: str) -> None:
    """Log something unreadable, the first time."""
    if what not in _told and len(_told) < 10_000:
        _told.add(what)
        log.warning("%s in the store cannot be read: %s", what, why[: 2 * LONGEST])


def text(raw: bytes) -> str:
    """Text, whatever the bytes are."""
    return raw.decode(errors="replace")


def items(raw: Mapping[bytes, bytes]) -> list[tuple[str, bytes]]:
    """The fields of a hash, names as text."""
    return [(text(name), value) for name, value in raw.items()]


def finite(raw: bytes | str) -> float:
    """A finite number. Raises ValueError."""
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError(f"{raw!r}: not finite")
    return value


def number(raw: str) -> float:
    """A finite number that can be a time. Raises ValueError."""
    value = finite(raw)
    if abs(value) > _LATEST:
        raise ValueError(f"{raw}: out of range")
    return value


def count(raw: bytes | str | None) -> int:
    """A counter; 0 where there is none, or nonsense, as in `counters.lua`."""
    try:
        found = int(raw or 0)
    except ValueError:
        return 0
    return found if abs(found) < 2**53 else 0


def json_object(raw: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


class Fields:
    """The fields of a hash, read one by one. faults: what is wrong with those that were asked."""

    def __init__(self, raw: Mapping[bytes, bytes]) -> None:
        self._text = {text(name): text(value) for name, value in raw.items()}
        self.faults: list[str] = []

    def need(self, name: str, read: Callable[[str], T], instead: T) -> T:
        """A field that must be there; `instead` (and a fault) where it is not, or is nonsense."""
        if name not in self._text:
            self.faults.append(f"{name}: is missing")
            return instead
        return self._read(name, read, instead)

    def find(self, name: str, read: Callable[[str], T], instead: T) -> T:
        """A field that may be absent or empty."""
        return self._read(name, read, instead) if self._text.get(name) else instead

    def _read(self, name: str, read: Callable[[str], T], instead: T) -> T:
        try:
            return read(self._text[name])
        except UNREADABLE:
            self.faults.append(f"{name}: {self._text[name][:LONGEST]!r} cannot be read")
            return instead
