"""One request alone, and among 60 others of mixed steps and samplers: how far apart are the images?

.venv/bin/python benchmarks/same_image.py
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from serving import HERE, OUR_PORT, open_client, server

ASKED = {"class_label": 4, "num_images": 4, "seed": 7, "steps": 50}
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")


async def picture(http: httpx.AsyncClient, request: dict[str, Any]) -> np.ndarray:
    """The grid of a request, as grey levels."""
    headers = {"Prefer": "wait=60", "Accept": "image/png"}
    answer = await http.post("/generate", json=request, headers=headers)
    assert answer.headers["content-type"] == "image/png", answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)), dtype=np.float64)


async def measure() -> None:
    print("| sampler | deterministic | mean absolute difference, grey levels | identical |")
    print("|---|---|---|---|")
    async with open_client() as http:
        http.base_url = httpx.URL(f"http://127.0.0.1:{OUR_PORT}")
        for sampler in SAMPLERS:
            for deterministic in (False, True):
                asked = {**ASKED, "sampler": sampler, "deterministic": deterministic}
                alone = await picture(http, asked)
                others = [
                    {"class_label": i % 10, "steps": (10, 20, 50)[i % 3], "seed": i}
                    | {"sampler": SAMPLERS[i % 2], "deterministic": i % 5 == 0}
                    for i in range(60)
                ]
                together = asyncio.gather(*(picture(http, request) for request in others))
                await asyncio.sleep(0.3)
                among = await picture(http, asked)
                await together
                apart = np.abs(alone - among).mean()
                same = "yes" if (alone == among).all() else "no"
                print(f"| {sampler} | {deterministic} | {apart:.3f} | {same} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "mnist")
    os.environ["DDPM_MODELS"] = str(parser.parse_args().model.resolve().parent)
    data = Path(tempfile.mkdtemp(prefix="ddpm-bench-"))
    command = [sys.executable, "-m", "ddpm", "up", "--port", str(OUR_PORT), "--data", str(data)]
    with server(command, f"http://127.0.0.1:{OUR_PORT}/readyz", data / "up.log"):
        asyncio.run(measure())


if __name__ == "__main__":
    main()
