"""Quality of diffusers' few-step samplers beside ours: same weights, x_T, labels and judge.

    .venv/bin/python benchmarks/quality_peer.py --data FOLDER --features runs/quality/judge.pt

UniPC and DPM-Solver++ of diffusers, each with its timestep spacings and with x̂_0 clipped to
[−1, 1], as ours is (`thresholding` in its default range); and with no clip, which is its default.
Every cell is what `ddpm evaluate --quality` makes of ours: Fréchet ratio and recognised share of so
many samples. They go to results.json of --out; what is there already stays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

import diffusion
from diffusion.noise import Purpose, image_normals
from diffusion.speed import prepare
from training.bits import choose
from training.config import DataConfig
from training.features import load_features, real
from training.quality import Cell, Real
from training.splits import load_split

STEPS = (5, 6, 8, 10, 12, 15, 20, 50)
NOT_CLIPPED = (10,)  # with so many steps also as diffusers does by itself
SPACINGS: dict[str, dict[str, Any]] = {
    "linspace": {},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "lambda": {"use_lu_lambdas": True},
}


@dataclass(frozen=True)
class Peer:
    """A scheduler of diffusers, and what it is told."""

    kind: Any
    options: dict[str, Any]
    spacings: tuple[str, ...] = tuple(SPACINGS)

    def made(self, model: diffusion.Model, spacing: str, *, clip: bool) -> Any:
        """For the model's process."""
        schedule = model.config.schedule
        return self.kind(
            num_train_timesteps=schedule.T,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule="linear",
            thresholding=clip,
            **self.options,
            **SPACINGS[spacing],
        )


PEERS = {
    "diffusers DPM-Solver++ 2": Peer(DPMSolverMultistepScheduler, {"solver_order": 2}),
    "diffusers DPM-Solver++ 3": Peer(DPMSolverMultistepScheduler, {"solver_order": 3}),
    "diffusers UniPC": Peer(UniPCMultistepScheduler, {}, ("linspace", "trailing", "karras")),
}


def cells(
    steps: tuple[int, ...], peers: Sequence[str], spacings: Sequence[str]
) -> Iterator[tuple[str, str, bool, int]]:
    """(peer, spacing, clip, steps) of the peers whose name has one of `peers`."""
    for n in steps:
        for name, peer in PEERS.items():
            if not any(part in name for part in peers):
                continue
            for spacing in peer.spacings:
                if spacing in spacings:
                    yield name, spacing, True, n
            if n in NOT_CLIPPED:
                yield name, "linspace", False, n


@torch.inference_mode()
def draw(
    model: diffusion.Model, scheduler: Any, steps: int, *, labels: Tensor, batch: int
) -> Tensor:
    """As many samples as labels, from the x_T that ours are from, [N, C, H, W] in [−1, 1]."""
    found = []
    for which in torch.arange(len(labels), device=model.device).split(batch):
        x = image_normals(0, which, row=0, purpose=Purpose.X_T, shape=model.shape)
        scheduler.set_timesteps(steps, device=model.device)
        for t in scheduler.timesteps:
            time = t.double() if t.is_floating_point() else t
            eps = model.eps(x, time.expand(len(x)), labels[which])
            x = scheduler.step(eps, t, x).prev_sample
        found.append(x.clamp(-1, 1))
    return torch.cat(found)


def main() -> None:
    """Measure the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with train-* and test-*.parquet")
    parser.add_argument("--features", required=True, help="as of `ddpm evaluate --quality`")
    parser.add_argument("--model", default="models/mnist")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--reference", type=int, default=10_000, help="real images")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)))
    parser.add_argument("--peers", default="UniPC,DPM-Solver++ 2,DPM-Solver++ 3")
    parser.add_argument("--spacings", default=",".join(SPACINGS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/quality-peer"))
    asked = parser.parse_args()
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, asked.dtype)
    model = prepare(diffusion.load(asked.model, device), dtype=dtype, compile=asked.compile)
    features = load_features(asked.features, model.device)
    train, test = (
        load_split(
            DataConfig(source=asked.data, split=split, fit="pad"),
            model,
            labelled=True,
            progress=False,
        )
        for split in ("train", "test")
    )
    others = choose(train, asked.images, seed=0, labelled=True)
    chosen = choose(test, asked.reference, seed=0)
    looked = [
        real(features, each, device=model.device, batch_size=asked.batch_size).features
        for each in (chosen, others)
    ]
    judge, labels = Real(*looked), others.batch(np.arange(len(others)))[1]
    assert labels is not None
    path = asked.out / "results.json"
    kept = json.loads(path.read_text())["quality"]["cells"] if path.exists() else []
    done = {(cell["sampler"], cell["spacing"], cell["steps"]) for cell in kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    steps, peers, spacings = (v.split(",") for v in (asked.steps, asked.peers, asked.spacings))
    for name, spacing, clip, n in cells(tuple(map(int, steps)), peers, spacings):
        called = spacing if clip else f"{spacing}, not clipped"
        if (name, called, n) in done:
            continue
        scheduler = PEERS[name].made(model, spacing, clip=clip)
        images = draw(model, scheduler, n, labels=labels.to(model.device), batch=asked.batch_size)
        with torch.inference_mode():
            seen = [features(part) for part in images.split(asked.batch_size)]
        values = torch.cat([each[0] for each in seen]).double().cpu().numpy()
        read = torch.cat([each[1] for each in seen]).argmax(1).cpu()
        share = float((read == labels).double().mean())
        ratio, error = judge.ratio(values, seed=0)
        spread = float(np.sqrt(share * (1 - share) / len(labels)))
        cell = Cell(name, called, n, len(labels), ratio, error, share, spread)
        print(cell, flush=True)
        kept.append(asdict(cell))
        path.write_text(json.dumps({"dtype": asked.dtype, "quality": {"cells": kept}}, indent=2))


if __name__ == "__main__":
    main()
