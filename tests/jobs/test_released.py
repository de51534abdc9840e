"""What every release wrote, read by today's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.kinds.stored import read, stored
from jobs.rates import parse_rate
from jobs.store.cards import parse_cards
from jobs.store.records import JobRecord, parse_record
from jobs.store.workers import WorkerInfo

FILES = sorted((Path(__file__).parent / "released").glob("*.json"))
STATES = {"queued": "queued", "canceled": "canceled"}  # of the jobs that did not succeed


def written(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return content


def records(file: Path) -> dict[str, JobRecord]:
    return {
        name: parse_record(fields["id"], {k.encode(): v.encode() for k, v in fields.items()})
        for name, fields in written(file)["records"].items()
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_records_of_a_release_are_read_whole(file: Path) -> None:
    found = records(file)
    assert len(found) >= 8
    for name, record in found.items():
        fields = written(file)["records"][name]
        assert record.unread is None, (name, record.unread)
        assert record.status == STATES.get(name, "succeeded")
        assert record.spec.kind == fields["kind"] and record.images == int(fields["images"])
        # Whatever the record says of the request is in the spec that was read.
        taken = record.spec.model_dump(mode="json")
        for field, value in json.loads(fields["spec"]).items():
            if field != "snapshots":
                assert taken[field] == value, (name, field)
        assert (taken.get("snapshots") is not None) == (name == "generate, all said")
        assert (record.result is not None) == (name == "likelihood")
        assert (record.levels is not None) == (name == "noise")
        assert (record.provenance is not None) == (record.status == "succeeded")


@pytest.mark.parametrize("file", FILES[1:], ids=lambda file: file.stem)
def test_a_default_that_was_released_stays_what_it_is(file: Path) -> None:
    """Every release was asked the same, and the first wrote every default out."""
    first, later = records(FILES[0]), records(file)
    assert first.keys() <= later.keys()
    for name, record in first.items():
        assert later[name].spec == record.spec, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_spec_is_what_it_was_after_the_store(file: Path) -> None:
    for name, record in records(file).items():
        text = stored(record.spec)
        assert read(text) == (record.spec, None), name
        assert "null" not in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_stands_beside_the_records_is_read_too(file: Path) -> None:
    around = written(file)
    cards, more = (
        {k.encode(): v.encode() for k, v in found.items()}
        for found in (around["models"], around.get("models_more", {}))
    )
    [card] = parse_cards(cards, more).values()
    assert (card.name, card.shape, card.T) == ("tiny", (1, 8, 8), 1000)
    [info] = [WorkerInfo.parse(text.encode()) for text in around["workers"].values()]
    assert info.models == ("tiny",) and info.device == "cpu"
    for text in around["rates:tiny"].values():
        rate = parse_rate(text.encode())
        assert rate is not None and rate[0] > 0
