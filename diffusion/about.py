"""What people want to know of a model, beside its weights: a description, a small picture, presets.

`card.json` and `thumbnail.png` in its folder. Neither is part of the model's digest: a better
description makes no other model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusion.files import CheckpointError, read_json, size_of, write_json
from diffusion.presets import Preset, read_presets
from diffusion.table import SamplerError
from diffusion.tuned import TUNED

CARD_NAME = "card.json"
THUMBNAIL_NAME = "thumbnail.png"
MOST_DESCRIPTION = 2000  # characters
MOST_THUMBNAIL = 32 * 2**10  # bytes
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class About:
    """description: plain text. thumbnail: a PNG file, or b"" for none. presets: its own."""

    description: str = ""
    thumbnail: bytes = b""
    presets: Mapping[str, Preset] = field(default_factory=dict)

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
    return About(raw.get("description", ""), content, presets_in(raw, card))


def presets_in(raw: Mapping[str, Any], card: Path) -> dict[str, Preset]:
    """The presets of a card. Raises CheckpointError."""
    try:
        return read_presets(raw.get("presets", {}))
    except SamplerError as error:
        raise CheckpointError(f"{card}: {error}") from error


def own_presets(
    folder: Path, T: int, *, samplers: Collection[str], tuned: Collection[int]
) -> dict[str, Preset]:
    """The presets that a model's folder says, of at most T steps, of those that can be run.

    samplers: those of the model. tuned: the numbers of steps that it has tuned tables of. None
    where something is wrong with its card, which keeps no model from being used: what that is
    `read_about` says.
    """
    card = folder / CARD_NAME
    try:
        found = presets_in(read_json(card), card) if card.exists() else {}
    except CheckpointError:
        return {}
    return {
        name: preset
        for name, preset in found.items()
        if preset.steps <= T
        and (preset.steps in tuned if preset.sampler == TUNED else preset.sampler in samplers)
    }


def write_about(about: About, folder: str | Path) -> None:
    """Write what there is to say into a model's folder."""
    said: dict[str, Any] = {"description": about.description}
    if about.presets:
        said["presets"] = {name: asdict(preset) for name, preset in about.presets.items()}
    write_json(said, Path(folder) / CARD_NAME)
    if about.thumbnail:
        (Path(folder) / THUMBNAIL_NAME).write_bytes(about.thumbnail)
