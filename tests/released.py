"""What each release writes into the store, as files: `python -m tests.released NAME` makes one.

NAME: a release (its code is taken from the history), or `today`. The same requests are made of
each, so that what one wrote can be compared with what another did.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from redis import Redis

from tests.conftest import redis_executable, wait_for_redis
from tests.older import build, save_model
from tests.stack import TODAY, Stack, Version

FOLDER = Path(__file__).parent / "jobs" / "released"
PREFIX = "ddpm:job:"


def picture(seed: int) -> str:
    """A picture of 8×8, base64."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# A request of each kind: as little as can be said, and as much.
REQUESTS: dict[str, dict[str, Any]] = {
    "generate": {"seed": 1},
    "generate, all said": {
        "seed": 2**53 - 1,
        "num_images": 2,
        "sampler": "ddim",
        "steps": 10,
        "spacing": "quadratic",
        "eta": 0.5,
        "deterministic": True,
        "format": "webp",
        "ttl_s": 86_400,
        "priority": "high",
        "snapshots": {"at": [1000, 500], "kinds": ["x_t", "eps"], "preview_px": 16},
    },
    "noise": {"seed": 3, "t": [1, 500], "images": [picture(0)]},
    "reconstruct": {"seed": 4, "t": 20, "images": [picture(1)]},
    "interpolate": {"seed": 5, "t": 20, "lambdas": [0, 0.5, 1], "images": [picture(2), picture(3)]},
    "likelihood": {"seed": 6, "samples": 5, "images": [picture(4)]},
}


def collect(stack: Stack, version: Version) -> dict[str, Any]:
    """The records that a version writes: of jobs that ended, that wait, and that were canceled."""
    client, worker = stack.api(version), stack.worker(version)
    ids = {}
    for name, request in REQUESTS.items():
        reply = client.post(f"/{name.partition(',')[0]}", json=request)
        assert reply.status_code == 202, reply.text
        ids[name] = reply.json()["id"]
    for job_id in ids.values():
        stack.until(lambda j=job_id: status(stack, j) == "succeeded", worker)
    around = {
        name: texts(stack, f"ddpm:{name}")
        for name in ("models", "models_more", "workers", "rates:tiny")
    }
    stack.stop(worker)
    for name, path in (("queued", ""), ("canceled", "/cancel")):
        ids[name] = client.post("/generate", json={"seed": 7}).json()["id"]
        if path:
            client.post(f"/jobs/{ids[name]}{path}").raise_for_status()
    records = {name: texts(stack, PREFIX + job_id) for name, job_id in ids.items()}
    return {"records": records, **around}


def status(stack: Stack, job_id: str) -> str:
    """Where a job stands."""
    return (stack.redis.hget(PREFIX + job_id, "status") or b"").decode()


def texts(stack: Stack, key: str) -> dict[str, str]:
    """A hash as text."""
    raw: Any = stack.redis.hgetall(key)
    return {name.decode(): value.decode() for name, value in raw.items()}


def main(name: str) -> None:
    """Write the file of a release."""
    folder = Path(tempfile.mkdtemp(prefix="ddpm-released-"))
    version = TODAY if name == "today" else build(folder, name)
    save_model(version, folder / "models" / "tiny")
    socket = folder / "redis.sock"
    server = subprocess.Popen(
        [redis_executable(), "--port", "0", "--unixsocket", str(socket), "--save", ""],
        stdout=subprocess.DEVNULL,
    )
    stack = Stack(f"unix://{socket}", folder / "models", folder / "log")
    try:
        with Redis.from_url(stack.url) as redis:
            wait_for_redis(redis, server)
        found = collect(stack, version)
        FOLDER.mkdir(exist_ok=True)
        text = json.dumps(found, indent=1, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    finally:
        stack.close()
        server.terminate()
        server.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
