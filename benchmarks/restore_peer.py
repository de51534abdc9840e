"""Restored digits beside azula's DiffPIR and MMPS: same weights, digits and evaluations.

    .venv/bin/python benchmarks/restore_peer.py --data FOLDER_WITH_MNIST_PARQUET [--azula FOLDER]

Test digits of which the lower half is unknown, no label given. Ours: a whole service (`ddpm up`) of
which clients each ask for one digit at a time with POST /restore. azula (`pip install --no-deps
azula einops`, into a FOLDER of its own): our U-Net in float32 as its denoiser, its defaults, in
this process, one digit at a time as a plain server would, and in batches as large as we have
clients. Printed are how many digits a classifier reads rightly, PSNR, and network evaluations of
all images a second, a product with the Jacobian counted as one.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from quality import Classifier, classifier, evaluate, load_classifier, load_split
from restore import Value, Way, measured, psnr, ways
from serving import OUR_PORT, server
from torch import Tensor

import diffusion

TASK, SIDE = "lower half", 32
BOX = [0, SIDE // 2, SIDE, SIDE]
VARIANCE = 1e-4  # of y: azula divides by it
LEAST_SIGMA = 1e-3  # azula divides by that too; as its own schedules
WARM_S = 150  # seconds that compiling may take
Restored = tuple[Tensor, float]  # images, seconds


# Ours


def ask(client: httpx.Client, way: Way, y: Tensor, *, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """A digit by the service, and what is said of its job."""
    buffer = io.BytesIO()
    np.save(buffer, y.numpy())
    body = {
        "operator": {"name": "mask", "boxes": [BOX]},
        "y": base64.b64encode(buffer.getvalue()).decode(),
        "method": way.method,
        "steps": way.steps,
        "travel": way.travel,
        "seed": seed,
    } | ({"solver_steps": way.solver_steps} if way.method == "moment" else {})
    job = client.post("/restore", json=body, headers={"Prefer": "wait=60"}).raise_for_status()
    told = job.json()
    while told["status"] != "succeeded":
        if told["status"] not in ("queued", "running"):
            raise SystemExit(f"a job ended as {told}")
        told = client.get(told["urls"]["self"], params={"wait": 20}).json()
    found = client.get(f"/jobs/{told['id']}/images/0.npy").content
    return torch.from_numpy(np.load(io.BytesIO(found))), told


def in_service(client: httpx.Client, way: Way, y: Tensor, *, clients: int) -> Restored:
    """All digits, by so many clients at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda i: ask(client, way, y[i], seed=i)[0], range(len(y))))
    return torch.stack(found), time.perf_counter() - began


def warm(client: httpx.Client, way: Way, y: Tensor, *, clients: int) -> None:
    """Until compiled code runs, or the patience ends."""
    until = time.monotonic() + WARM_S
    while time.monotonic() < until:
        in_service(client, way, y[: 2 * clients], clients=clients)
        _, job = ask(client, way, y[0], seed=0)
        made = job["manifest"]["provenance"]
        if made["code"] == "compiled":
            break
    print(f"the service: {made['dtype']}, {made['code']}", file=sys.stderr, flush=True)


# The peer


def peers(model: diffusion.Model, evaluations: int) -> dict[str, tuple[int, Callable[..., Tensor]]]:
    """Name → (evaluations an image, y [N, 1, 32, 32] → images)."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.guidance import DiffPIRDenoiser, MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import Schedule
    from azula.sample import DDIMSampler

    T = model.schedule.T
    alpha_bars = torch.tensor([1.0, *model.schedule.alphas_cumprod], dtype=torch.float64)

    class Paper(Schedule):  # type: ignore[misc]
        """t in 0..1 is the timestep next to t·T."""

        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            alpha_bar = alpha_bars[(t * T).round().long()]
            sigma = (1 - alpha_bar).sqrt().clamp_min(LEAST_SIGMA)
            return alpha_bar.sqrt().to(t), sigma.to(t)

    class Ours(Denoiser):  # type: ignore[misc]
        """x_t as azula's solvers take it, [N, D]."""

        def __init__(self, *, clip: bool) -> None:
            super().__init__()
            self.schedule, self.clip = Paper(), clip

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
            at = ((t * T).round().long() - 1).clamp_min(0).expand(len(x_t))
            x_start = model.estimate(x_t.view(-1, *model.shape), at).x_start.flatten(1)
            return DiracPosterior(x_start.clamp(-1, 1) if self.clip else x_start)

    def known(x: Tensor) -> Tensor:
        return x[..., : SIDE * SIDE // 2]

    def run(make: Callable[[Tensor], Any], steps: int) -> Callable[..., Tensor]:
        def restored(y: Tensor, seed: int) -> Tensor:
            torch.manual_seed(seed)
            sampler = DDIMSampler(make(known(y.flatten(1))), eta=1.0, steps=steps, silent=True)
            ended = sampler(sampler.init((len(y), SIDE * SIDE)))
            return ended.clamp(-1, 1).view(-1, *model.shape)

        return restored

    def diffpir(y: Tensor) -> Any:
        return DiffPIRDenoiser(Ours(clip=True), y, known, VARIANCE)

    def mmps(y: Tensor) -> Any:
        noise = IsotropicCovariance(torch.tensor(VARIANCE))
        return MMPSDenoiser(Ours(clip=False), y, known, noise)

    third = evaluations // 3  # the forward, a product in the solver, and the last one
    return {
        "DiffPIR": (evaluations, run(diffpir, evaluations)),
        "MMPS, 1 iteration": (3 * third, run(mmps, third)),
    }


def in_process(restored: Callable[..., Tensor], y: Tensor, *, batch: int) -> Restored:
    """All digits, so many at once."""
    restored(y[:batch], 0)
    began = time.perf_counter()
    found = [restored(y[i : i + batch], i) for i in range(0, len(y), batch)]
    return torch.cat(found), time.perf_counter() - began


# The table


def told(name: str, cost: int, found: Restored, judge: Classifier, truth: Any) -> str:
    """A row."""
    images, seconds = found
    real, labels = (v[: len(images)] for v in truth)
    _, read = evaluate(judge, images)
    right, near = Value.of((read == labels).float()), Value.of(psnr(images, real))
    rate = cost * len(images) / seconds
    return (
        f"| {name} | {cost} | {len(images)} | {right.told('.1f', 100)} | {near.told('.2f')} | "
        f"{rate:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--azula", help="a folder to import it from")
    parser.add_argument("--model", type=Path, default=Path("models/mnist"))
    parser.add_argument("--images", type=int, default=200, help="digits")
    parser.add_argument("--alone", type=int, default=40, help="of which azula one by one")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--evaluations", type=int, default=36)
    parser.add_argument("--folder", type=Path, default=Path("runs/restore"), help="the classifier")
    parser.add_argument("--only", nargs="*", help="of our ways")
    asked = parser.parse_args()
    if asked.azula:
        sys.path.append(asked.azula)
    if importlib.util.find_spec("azula") is None:
        raise SystemExit("azula is not installed: pip install --no-deps azula einops")
    test = load_split(asked.data, "test")
    numbers = torch.arange(asked.images)
    truth = test.images(numbers), test.labels[numbers]
    if not (asked.folder / "classifier.safetensors").exists():
        classifier(load_split(asked.data, "train"), asked.folder)
    judge = load_classifier(asked.folder)
    y = measured(TASK, truth[0], numbers)
    print("| way | evaluations | digits | read as the digit, % | PSNR, dB | image-steps/s |")
    print("|---|---|---|---|---|---|", flush=True)

    place = Path(tempfile.mkdtemp(prefix="ddpm-bench-"))
    os.environ["DDPM_MODELS"] = str(asked.model.resolve().parent)
    command = [sys.executable, "-m", "ddpm", "up", "--port", str(OUR_PORT)]
    address = f"http://127.0.0.1:{OUR_PORT}"
    with (
        server([*command, "--data", str(place / "data")], f"{address}/readyz", place / "log"),
        httpx.Client(base_url=address, timeout=600, trust_env=False) as client,
    ):
        chosen = ways(asked.evaluations)
        warm(client, chosen["projection, travel 5"], y, clients=asked.clients)
        for name, way in chosen.items():
            if asked.only and name not in asked.only:
                continue
            found = in_service(client, way, y, clients=asked.clients)
            print(told(f"{name}, served", way.cost, found, judge, truth), flush=True)

    model = diffusion.load(asked.model)
    for name, (cost, restored) in peers(model, asked.evaluations).items():
        for batch, images in ((asked.clients, asked.images), (1, asked.alone)):
            found = in_process(restored, y[:images], batch=batch)
            how = f"azula {name}, " + ("one by one" if batch == 1 else f"batches of {batch}")
            print(told(how, cost, found, judge, truth), flush=True)


if __name__ == "__main__":
    main()
