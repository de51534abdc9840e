"""`ddpm serve-model` and `ddpm pull`: a checkpoint under a name in the folder of models."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion import checkpoint
from diffusion.about import MOST_THUMBNAIL, About, read_about, write_about
from diffusion.diffusers.folder import is_diffusers_folder
from diffusion.model import Model
from diffusion.samplers import SAMPLERS
from diffusion.sampling import sample
from diffusion.tuned import TUNED_NAME
from training.pictures import encoded, grid
from training.sample import enlarge
from training.state import CONFIG_FILE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HUB_PATTERNS = ["*.json", "*.safetensors", "thumbnail.png"]  # nothing else is ever fetched
_SHOWN, _STEPS, _SIDE = 8, 20, 128


class PublishError(ValueError):
    """A name or a folder that cannot be taken. The message says which and why."""


def publish(
    source: Path,
    models: Path,
    name: str,
    *,
    description: str | None = None,
    replace: bool = False,
) -> Path:
    """Put the checkpoint in `source` into `models` under a name, with a description and a picture.

    The folder appears whole or not at all; a worker that runs finds it by itself. Weights and
    configuration are copied byte for byte, so the digest stays; a folder of diffusers' is
    converted. Raises PublishError, CheckpointError, OSError.
    """
    if not NAME.fullmatch(name):
        raise PublishError(
            f"--name {name!r}: must be 1 to 100 of the letters A-Z and a-z, digits, '.', '_' and "
            "'-', and begin with a letter or digit"
        )
    target = models / name
    if target.exists() and not replace:
        raise PublishError(f"{target}: is there already; --replace puts this one in its place")
    model = checkpoint.load(source)
    known = read_about(source)
    said = known.description if description is None else description
    about = About(said or describe(source, model), known.thumbnail or draw(model), known.presets)
    models.mkdir(parents=True, exist_ok=True)
    # A name with a dot is no model's: no worker looks into it before it is whole.
    with tempfile.TemporaryDirectory(prefix=".", dir=models) as work:
        made = Path(work) / name
        if is_diffusers_folder(source):
            checkpoint.save(model, made)
        else:
            made.mkdir()
            for file in (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME):
                shutil.copyfile(source / file, made / file)
            if (source / TUNED_NAME).is_file():
                shutil.copyfile(source / TUNED_NAME, made / TUNED_NAME)
        write_about(about, made)
        if target.exists():
            target.rename(Path(work) / "replaced")
        made.rename(target)
    return target


def describe(source: Path, model: Model) -> str:
    """One line from what the run knows of itself."""
    network = model.config.network
    colour = {1: "grey", 3: "colour", 4: "colour and alpha"}.get(network.in_channels, "")
    said = [f"{network.image_size}×{network.image_size} {colour}".strip()]
    if model.config.class_names:
        said.append(f"{network.num_classes} classes")
    try:
        run = json.loads((source / CONFIG_FILE).read_text("utf-8"))
        said.append(f"trained {run['steps']} steps on {Path(run['data']['source']).name}")
    except (OSError, ValueError, KeyError, TypeError):  # no run of ours: nothing more is known
        pass
    return ", ".join(said)


def draw(model: Model) -> bytes:
    """A small grid of samples as a PNG, one class after the other."""
    classes = model.config.network.num_classes
    labels = [i % classes for i in range(_SHOWN)] if classes else None
    steps = min(_STEPS, model.schedule.T)
    few: dict[str, Any] = {"sampler": "ddim", "steps": steps, "spacing": "uniform"}
    if SAMPLERS[model.config.sampling.sampler].own_only:  # what it is trained for, and no other
        few = {}
    images = sample(model, _SHOWN, class_label=labels, **few)
    picture = grid(images, columns=4)
    factor = max(1, _SIDE // max(picture.size))
    picture = enlarge(picture, factor)
    while True:
        content = encoded(picture, "png", optimize=True)
        if len(content) <= MOST_THUMBNAIL:
            return content
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, Image.Resampling.BOX)


def pull(repository: str, models: Path, name: str, *, replace: bool = False) -> Path:
    """Fetch a DDPM of the Hugging Face hub and publish it.

    Only JSON, safetensors and a thumbnail are fetched. Raises PublishError, CheckpointError,
    OSError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    fetch: Callable[..., str] = snapshot_download
    try:
        found = fetch(repository, allow_patterns=HUB_PATTERNS)
    except HFValidationError as error:
        raise PublishError(f"{repository}: must be an id of the hub, as owner/name") from error
    except (HfHubHTTPError, OSError) as error:
        answered = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if not isinstance(answered, HfHubHTTPError):
            raise PublishError(
                f"{repository}: the hub cannot be reached, and the model was not fetched before: "
                "is there a network, and is HF_HUB_OFFLINE not set?"
            ) from error
        first = str(answered).strip().splitlines() or [type(answered).__name__]
        raise PublishError(f"{repository}: cannot be fetched: {first[0]}") from error
    return publish(Path(found), models, name, replace=replace)
