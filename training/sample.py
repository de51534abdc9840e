"""`ddpm sample`: images, grids and films of the reverse chain, offline."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion.checkpoint import load
from diffusion.device import pick_device
from diffusion.model import Model
from diffusion.sampling import Step, sample
from training.pictures import grid, save_film, save_picture, to_picture, to_uint8

PICTURES, FILMS = (".png", ".webp"), (".gif", ".webp")
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


class OutputError(ValueError):
    """A file name that says nothing we can write."""


@dataclass(frozen=True)
class SampleOptions:
    """What the command line asks for; `every` is --snapshots, `folder` whether `out` is one."""

    model: Path
    num_images: int
    class_label: str | None
    guidance: float
    preset: str | None
    sampler: str | None
    steps: int | None
    spacing: str | None
    eta: float | None
    variance: str | None
    corrector_steps: int | None
    seed: int | None
    out: Path
    folder: bool
    every: int | None
    kind: str
    device: str | None
    dtype: str
    compiled: bool
    batch_size: int
    quiet: bool

    @property
    def suffix(self) -> str:
        """Of the file to write, in lower case; empty for a folder."""
        return "" if self.folder else self.out.suffix.lower()

    @property
    def film(self) -> bool:
        """Whether the output is an animation."""
        suffix = self.suffix
        return suffix == ".gif" or (suffix == ".webp" and self.every is not None)


def draw(options: SampleOptions) -> tuple[Path, int]:
    """Sample and write; returns what was written and the seed. Raises ValueError, OSError."""
    suffix = options.suffix
    if suffix and suffix not in (*PICTURES, *FILMS):
        raise OutputError(
            f"--out {options.out}: must end in .png, .webp or .gif, or be a folder: DIR/"
        )
    if not suffix and options.every is not None:
        raise OutputError("--snapshots: needs --out FILE.png, .webp or .gif")
    model = load(options.model, pick_device(options.device))
    seed = options.seed if options.seed is not None else secrets.randbelow(2**53)
    labels = parse_labels(options.class_label, model, options.num_images)
    snapshots = Snapshots(options, model)
    with tqdm(desc="sampling", unit="eval", disable=options.quiet) as bar:

        def on_step(_: int, done: int, step: Step) -> None:
            snapshots.add(done, step)
            bar.total = options.num_images * step.rows  # network evaluations of single images
            bar.update(len(step.x_t))

        images = sample(
            model,
            options.num_images,
            preset=options.preset,
            sampler=options.sampler,
            steps=options.steps,
            seed=seed,
            class_label=labels,
            guidance=options.guidance,
            spacing=options.spacing,
            eta=options.eta,
            variance=options.variance,
            corrector_steps=options.corrector_steps,
            dtype=DTYPES[options.dtype],
            compile=options.compiled,
            batch_size=options.batch_size,
            on_step=on_step,
        )
    return write(options, images, snapshots), seed


def parse_labels(text: str | None, model: Model, n: int) -> list[int] | None:
    """Labels 0..n−1 from "7", "3,1,4" or class names, used in turn. Raises ValueError."""
    if text is None:
        return None
    names = {name: i for i, name in enumerate(model.config.class_names)}
    labels = []
    for word in (part.strip() for part in text.split(",")):
        if word not in names and not word.isdigit():
            known = ", ".join(names) or f"0..{model.config.network.num_classes - 1}"
            raise ValueError(f"--class-label {word!r}: must be one of {known}")
        labels.append(names[word] if word in names else int(word))
    return [labels[i % len(labels)] for i in range(n)]


class Snapshots:
    """Collects what x_t or x̂_0 was every N steps; for a film, at most about 120 frames."""

    def __init__(self, options: SampleOptions, model: Model) -> None:
        way = {"sampler": options.sampler, "steps": options.steps}
        if options.preset in model.presets:
            way["steps"] = model.presets[options.preset].steps
        steps = model.config.sampling.options(model.schedule.T, **way)["steps"]
        film_every = max(1, steps // 100) if options.film else None
        self.every = options.every or film_every
        self.kind, self.shape = options.kind, model.shape
        self.frames: dict[int, list[Tensor]] = {}

    def add(self, done: int, step: Step) -> None:
        """Keep this step if it is due: the first, and every N-th after it."""
        if self.every and (done - 1) % self.every == 0:
            kept: Tensor = getattr(step, self.kind)
            self.frames.setdefault(done, []).append(kept.clamp(-1, 1).cpu())

    def stages(self, images: Tensor) -> list[Tensor]:
        """[N, C, H, W] a stage, in order, the finished images last."""
        return [*(torch.cat(parts) for parts in self.frames.values()), images.cpu()]


def write(options: SampleOptions, images: Tensor, snapshots: Snapshots) -> Path:
    """Write what --out names and return it."""
    out = options.out
    if options.folder:
        out.mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(to_uint8(images)):
            save_picture(to_picture(pixels), out / f"{i:05d}.png")
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.film:
        side = max(1, 128 // images.shape[-1]) if len(images) < 16 else 2
        frames = [enlarge(grid(stage), side) for stage in snapshots.stages(images)]
        save_film(frames, out)
    elif options.every:
        stages = snapshots.stages(images)
        rows = torch.stack(stages, dim=1).flatten(0, 1)  # one row an image
        save_picture(grid(rows, columns=len(stages)), out)
    else:
        save_picture(grid(images), out)
    return out


def enlarge(picture: Image.Image, factor: int) -> Image.Image:
    """Every pixel as a square of factor × factor."""
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)
