"""What pydantic finds wrong in a request, in our words: where it is, and what."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

LONGEST_VALUE = 60  # characters of a wrong value that an error repeats
LONGEST_POINTER = 200
_NO_OBJECT = "Input should be an object"  # pydantic names a class of ours


def clipped(text: str, most: int = LONGEST_POINTER) -> str:
    """The text, or its beginning and `…` where it is longer."""
    return text if len(text) <= most else f"{text[:most]}…"


def place_of(item: Mapping[str, Any], asked: Any) -> tuple[int | str, ...]:
    """Where in the JSON an error is: without the names of the branches of a union, which pydantic
    puts among those of the fields."""
    location = tuple(item["loc"])
    if asked is None:
        return location
    return _within(asked, location, absent=item["type"] in ("missing", "extra_forbidden"))


def _within(value: Any, location: tuple[int | str, ...], *, absent: bool) -> tuple[int | str, ...]:
    """The parts of a location that lead into a value. absent: the last need not be there."""
    if not location:
        return ()
    first, *rest = location
    if absent and not rest:
        return (first,)
    below = tuple(rest)
    passed_over = _within(value, below, absent=absent)
    is_in = isinstance(value, dict) and first in value
    is_at = isinstance(value, list) and isinstance(first, int) and first < len(value)
    if not is_in and not is_at:
        return passed_over
    taken = (first, *_within(value[first], below, absent=absent))
    return taken if len(taken) >= len(passed_over) else passed_over


def parents(location: Sequence[int | str]) -> Iterator[tuple[int | str, ...]]:
    """The places that it lies in."""
    for depth in range(len(location)):
        yield tuple(location[:depth])


def detail_of(item: Mapping[str, Any], model: type[BaseModel] | None) -> str:
    """What pydantic found, after the value that it found it in."""
    if item["type"] == "extra_forbidden" and model is not None:
        return unknown_field(model, item["loc"])
    if item["type"] == "value_error":  # one of ours: without the "Value error, " before it
        return str(item["ctx"]["error"])
    value, told = item["input"], _NO_OBJECT if item["type"] == "model_type" else str(item["msg"])
    if item["type"] == "too_short" and value == []:
        return "[]: List should have at least 1 item"
    if item["type"] == "missing" or not isinstance(value, str | int | float | None):
        return told
    if isinstance(value, str):
        value = value[: LONGEST_VALUE + 1]  # it may be as long as the whole request
    text = clipped(json.dumps(value, ensure_ascii=False), LONGEST_VALUE)
    return f"{text}: {told}"


def unknown_field(model: type[BaseModel], location: Sequence[int | str]) -> str:
    """That there is no field at a location, and which there are."""
    *above, name = location
    known = [*_fields_at(model, above)]
    (like, *_) = [*difflib.get_close_matches(str(name)[:100], known, 1, 0.75), None]
    hint = f"; did you mean {like}?" if like else "."
    return f"there is no such field{hint} There are {', '.join(sorted(known))}"


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> Iterable[str]:
    """Names of the fields of the model that stands at a location inside another."""
    if not location:
        return model.model_fields
    name, *rest = location
    field = model.model_fields.get(str(name))
    inner = [] if field is None else [*_models_in(field.annotation)]
    # Behind a union's name stands the branch that was tried, behind a list's the place in it.
    below = [part for part in rest if part in {f for one in inner for f in one.model_fields}]
    return next((_fields_at(one, below) for one in inner), ())


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def pointer_to(location: Sequence[int | str]) -> str:
    """The JSON pointer (RFC 6901)."""
    parts = (clipped(str(part)) for part in location)
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)
