"""Record one chain of each class with a running service, for the stage of the page before its
first run:

    .venv/bin/python benchmarks/recorded.py --model mnist --url http://localhost:8000

writes `app/static/page/recorded/{model}.webp`, a row a timestep and in each x_t of every image,
then x̂_0 of every image; the finished images themselves, without loss, in `{model}-images.webp`;
and the `.json` that tells which model and which t these are.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

FOLDER = Path(__file__).parent.parent / "app" / "static" / "page" / "recorded"
IMAGES = 9
FRAMES = 16
KINDS = ("x_t", "x_start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-class", type=int, default=1)
    parser.add_argument("--quality", type=int, default=80)
    args = parser.parse_args()
    with httpx.Client(base_url=args.url, timeout=120, headers={"Prefer": "wait=60"}) as client:
        model = client.get(f"/models/{args.model}").json()
        labels = [(args.first_class + i) % len(model["class_names"]) for i in range(IMAGES)]
        jobs = [record(client, model, label, args.seed) for label in labels]
        sheet = sheet_of(client, jobs, model["shape"])
        finished = row_of(client, jobs)
    times = sorted({snapshot["t"] for snapshot in jobs[0]["snapshots"]}, reverse=True)
    said = ("kind", "model", "sampler", "steps", "spacing", "variance", "guidance", "seed")
    request = {name: jobs[0]["request"][name] for name in said} | {"num_images": IMAGES}
    FOLDER.mkdir(exist_ok=True)
    sheet.save(FOLDER / f"{args.model}.webp", quality=args.quality, method=6)
    finished.save(FOLDER / f"{args.model}-images.webp", lossless=True, method=6)
    about = {"digest": model["digest"], "size": model["shape"][1:], "t": times, "request": request}
    (FOLDER / f"{args.model}.json").write_text(json.dumps(about) + "\n")
    print((FOLDER / f"{args.model}.webp").stat().st_size, "bytes")


def record(client: httpx.Client, model: dict[str, Any], label: int, seed: int) -> dict[str, Any]:
    steps = model["steps"]
    every = -(-steps // FRAMES)
    asked = {
        "model": model["name"],
        "class_label": label,
        "seed": seed,
        "steps": steps,
        "snapshots": {"every": every, "kinds": KINDS},
    }
    job: dict[str, Any] = client.post("/generate", json=asked).raise_for_status().json()
    while job["status"] in ("queued", "running"):
        job = client.get(job["urls"]["self"], params={"wait": 60}).json()
    assert job["status"] == "succeeded", job
    return job


def sheet_of(client: httpx.Client, jobs: list[dict[str, Any]], shape: list[int]) -> Image.Image:
    _, height, width = shape
    times = sorted({snapshot["t"] for snapshot in jobs[0]["snapshots"]}, reverse=True)
    sheet = Image.new("RGB", (2 * len(jobs) * width, len(times) * height))

    def put(url: str, column: int, row: int) -> None:
        picture = Image.open(io.BytesIO(client.get(url).raise_for_status().content))
        sheet.paste(picture.convert("RGB"), (column * width, row * height))

    for i, job in enumerate(jobs):
        for snapshot in job["snapshots"]:
            column = i + len(jobs) * KINDS.index(snapshot["kind"])
            put(snapshot["url"], column, times.index(snapshot["t"]))
    return sheet


def row_of(client: httpx.Client, jobs: list[dict[str, Any]]) -> Image.Image:
    images = [
        Image.open(io.BytesIO(client.get(job["images"][0]["url"]).raise_for_status().content))
        for job in jobs
    ]
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        row.paste(image.convert("RGB"), (i * image.width, 0))
    return row


if __name__ == "__main__":
    main()
