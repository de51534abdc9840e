"""Specs as the store holds them: versions that live side by side read each other's.

Written is what differs from the defaults, so an older version meets a field that it does not know
only where the field says something; a default that was ever released stays what it is. Read is
what can be: a request is held to every rule where it comes in, and a spec in the store has
been through that already.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from jobs.kinds import table
from jobs.kinds.common import JobSpec

LONGEST = 200  # characters of a text from elsewhere that a message repeats
# What pydantic finds in a spec of a version that knows more, or allows more, than this one.
_NEWER = frozenset(
    {
        "extra_forbidden",
        "literal_error",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "string_pattern_mismatch",
        "string_too_long",
        "too_long",
        "too_short",
    }
)


class UnreadSpec(JobSpec):
    """The fields that every kind has, of a spec of which no more can be read."""

    kind: str = "unknown"


@dataclass(frozen=True)
class Unread:
    """Why this version cannot run a record. newer: another version can; else none can.

    request: the spec as it stands in the store, where that is what cannot be read.
    """

    newer: bool
    why: str
    request: dict[str, Any] | None = None


def stored(spec: JobSpec) -> str:
    """The JSON of a spec for the store."""
    fields = spec.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"kind": spec.kind, **fields}, separators=(",", ":"))


def read(text: str) -> tuple[JobSpec, Unread | None]:
    """A spec from the store, as much of it as can be read, and what is wrong with the rest."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        return _common({}), Unread(False, f"spec: no JSON object: {text[:LONGEST]}", {})
    kind = raw.get("kind")
    if not isinstance(kind, str):
        return _common(raw), Unread(False, "spec/kind: must be a string", raw)
    model = table.KINDS.get(kind)
    if model is None:
        return _common(raw), Unread(True, f"spec/kind: {kind[:LONGEST]} is not known here", raw)
    try:
        return model.model_validate_json(text), None
    except ValidationError as error:
        return _partly(model, raw, error)


def _partly(
    model: type[JobSpec], raw: dict[str, Any], error: ValidationError
) -> tuple[JobSpec, Unread | None]:
    """What is left of a spec without the fields that cannot be read."""
    items = error.errors(include_url=False)
    # A field that nobody set says nothing; an earlier release wrote such fields too.
    matter = [i for i in items if (i["type"], i["input"]) != ("extra_forbidden", None)]
    unread = _unread(matter, raw) if matter else None
    rest = json.loads(json.dumps(raw))
    for item in items:
        _remove(rest, item["loc"])
    try:
        return model.model_validate_json(json.dumps(rest)), unread
    except ValidationError as second:
        return _common(raw), unread or _unread(second.errors(include_url=False), raw)


def _unread(items: Sequence[Any], raw: dict[str, Any]) -> Unread:
    newer = any(item["type"] in _NEWER for item in items)
    found = [f"spec/{'/'.join(str(part) for part in i['loc'])}: {i['msg']}" for i in items[:3]]
    return Unread(newer, "; ".join(found)[: 2 * LONGEST], raw)


def _remove(fields: Any, location: Sequence[int | str]) -> None:
    """Take out the field at a location, or the outermost one on the way that is in a list."""
    name, *rest = location or ("",)
    if rest and isinstance(rest[0], str) and isinstance(fields.get(name), dict):
        _remove(fields[name], rest)
    else:
        fields.pop(name, None)


def _common(raw: dict[str, Any]) -> UnreadSpec:
    kept = {name: raw[name] for name in UnreadSpec.model_fields if name in raw}
    try:
        return UnreadSpec.model_validate_json(json.dumps(kept))
    except ValidationError as error:
        for item in error.errors(include_url=False):
            kept.pop(str(item["loc"][0]), None)
        return UnreadSpec.model_validate_json(json.dumps(kept))
