"""Model cards as two hashes: what release 0.1 reads of each, and the rest."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.cards import ModelCard, from_store
from jobs.store.tolerance import UNREADABLE, each, text


def parse_cards(old: Mapping[bytes, bytes], more: Mapping[bytes, bytes]) -> dict[str, ModelCard]:
    """Name → card; one that cannot be read is told of, and left out."""
    pairs = [(text(name), (card, more.get(name))) for name, card in old.items()]
    return each("model card", pairs, lambda pair: _card(*pair))


def _card(old: bytes, more: bytes | None) -> ModelCard:
    """A card; where the rest of it cannot be read, what release 0.1 would read."""
    try:
        return from_store(old, more)
    except UNREADABLE:
        if more is None:
            raise
        return from_store(old, None)
