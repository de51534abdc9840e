"""What people want to know of a model, beside its weights: a description and a small picture.

`card.json` and `thumbnail.png` in its folder. Neither is part of the model's digest: a better
description makes no other model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusion.files import CheckpointError, read_json, size_of, write_json

CARD_NAME = "card.json"
THUMBNAIL_NAME = "thumbnail.png"
MOST_DESCRIPTION = 2000  # characters
MOST_THUMBNAIL = 32 * 2**10  # bytes
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class About:
    """description: plain text. thumbnail: a PNG file, or b"" for none."""

    description: str = ""
    thumbnail: bytes = b""

    def __post_init__(self) -> None:
        if not isinstance(self.description, str) or len(self.description) > MOST_DESCRIPTION:
            raise CheckpointError(
                f"description: must be a text of at most {MOST_DESCRIPTION} characters"
            )
        if len(self.thumbnail) > MOST_THUMBNAIL:
            size = len(self.thumbnail)
            raise CheckpointError(f"thumbnail: {size} bytes; must be at most {MOST_THUMBNAIL}")
        if self.thumbnail and not self.thumbnail.startswith(_PNG):
            raise CheckpointError("thumbnail: must be a PNG")


def read_about(folder: str | Path) -> About:
    """What a model's folder says of it; what is not there is empty. Raises CheckpointError."""
    card, thumbnail = Path(folder) / CARD_NAME, Path(folder) / THUMBNAIL_NAME
    raw = read_json(card) if card.exists() else {}
    content = b""
    try:
        if thumbnail.exists():
            size_of(thumbnail)
            with thumbnail.open("rb") as file:
                content = file.read(MOST_THUMBNAIL + 1)
    except OSError as error:
        raise CheckpointError(f"{thumbnail}: cannot be read: {error}") from error
    return About(raw.get("description", ""), content)


def write_about(about: About, folder: str | Path) -> None:
    """Write what there is to say into a model's folder."""
    write_json({"description": about.description}, Path(folder) / CARD_NAME)
    if about.thumbnail:
        (Path(folder) / THUMBNAIL_NAME).write_bytes(about.thumbnail)
