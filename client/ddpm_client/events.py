"""The events of a job, and the reading of their stream."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import ValidationError

from ddpm_client.models import Model


class Event(Model):
    """Something that happened. id: where to resume after it; name: of the kind of event."""

    id: str | None = None
    name: str


class StatusEvent(Event):
    """The job has entered a state."""

    name: Literal["status"] = "status"
    status: str


class ProgressEvent(Event):
    """Image-steps done, of how many; t of an image that was just stepped."""

    name: Literal["progress"] = "progress"
    step: int
    total: int
    t: int | None = None
    eta_s: float | None = None


class SnapshotEvent(Event):
    """A state of the chain. png: base64, where it was asked for."""

    name: Literal["snapshot"] = "snapshot"
    t: int
    index: int
    kind: str
    url: str
    png: str | None = None


class ImageEvent(Event):
    """A finished image. png: base64, with `inline`."""

    name: Literal["image"] = "image"
    index: int
    url: str
    sha256: str
    png: str | None = None


class DoneEvent(Event):
    """The last event of a job that succeeded or was canceled."""

    name: Literal["done"] = "done"
    status: str


class ErrorEvent(Event):
    """The last event of a job that failed."""

    name: Literal["error"] = "error"
    code: str
    detail: str
    status: str | None = None


class ResetEvent(Event):
    """Earlier events are gone; `job` is what they said, all together."""

    name: Literal["reset"] = "reset"
    reason: str
    job: dict[str, Any]


EVENTS: dict[str, type[Event]] = {
    "status": StatusEvent,
    "progress": ProgressEvent,
    "snapshot": SnapshotEvent,
    "image": ImageEvent,
    "done": DoneEvent,
    "error": ErrorEvent,
    "reset": ResetEvent,
}


def event_of(name: str, data: str, event_id: str | None) -> Event:
    """An event from its parts; one that this client does not know keeps its fields as they are."""
    fields: Any = json.loads(data)
    if not isinstance(fields, dict):
        fields = {"data": fields}
    given = {**fields, "name": name, "id": event_id}
    try:
        return EVENTS.get(name, Event).model_validate(given)
    except ValidationError:  # of a newer service
        return Event.model_validate(given)


class Parser:
    """Bytes of a stream in, events out, however the bytes are cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._name, self._id = "", ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that end in this chunk."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        found = [self._line(line.removesuffix(b"\r").decode()) for line in lines]
        return [event for event in found if event is not None]

    def _line(self, line: str) -> Event | None:
        if line:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                self._name = value
            elif field == "id":
                self._id = value
            elif field == "data":
                self._data.append(value)
            return None
        name, data, event_id = self._name, self._data, self._id
        self._name, self._data, self._id = "", [], ""
        return event_of(name, "\n".join(data), event_id or None) if data else None
