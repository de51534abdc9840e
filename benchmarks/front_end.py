"""What the API answers while its worker is saturated: requests a second, and how late.

    .venv/bin/python benchmarks/front_end.py [--seconds 15]

First the queue is filled, so that the worker is busy throughout. Then one client process reads
jobs at a steady rate (GET /jobs/{id}: latency), and at last many connections create jobs as fast
as they can (POST /generate: a second). The client shares the machine with all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from serving import HERE, OUR_PORT, open_client, percentile, server

BODY = {"num_images": 1, "steps": 100, "sampler": "ddim", "class_label": 3}


async def create(http: httpx.AsyncClient) -> str:
    answer = await http.post("/generate", json=BODY)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def reads(
    http: httpx.AsyncClient, ids: list[str], rate: float, seconds: float
) -> list[float]:
    """Latencies of GET /jobs/{id}, sent at a steady rate whether or not answers come."""
    start = time.perf_counter()

    async def one(i: int) -> float:
        at = start + i / rate
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        (await http.get(f"/jobs/{ids[i % len(ids)]}")).raise_for_status()
        return time.perf_counter() - at  # from when it was due: a late client counts too

    return await asyncio.gather(*(one(i) for i in range(int(rate * seconds))))


async def writes(connections: int, seconds: float) -> list[float]:
    """Latencies of POST /generate over so many connections, each waiting for its answer.

    On bare sockets: an HTTP library would take as much of the processor as what is measured.
    """
    latencies: list[float] = []
    body = json.dumps(BODY).encode()
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    end = time.perf_counter() + seconds

    async def loop() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", OUR_PORT)
        while (began := time.perf_counter()) < end:
            writer.write(request)
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert headers.startswith(b"http/1.1 202 "), headers
            await reader.readexactly(int(headers.split(b"content-length: ")[1].split(b"\r\n")[0]))
            latencies.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(loop() for _ in range(connections)))
    return latencies


async def measure(arguments: argparse.Namespace) -> None:
    async with open_client() as http:
        http.base_url = httpx.URL(f"http://127.0.0.1:{OUR_PORT}")
        ids = [await create(http) for _ in range(400)]
        await asyncio.sleep(10)  # the worker's batch is full
        latencies = await reads(http, ids, arguments.rate, arguments.seconds)
        busy = (await http.get("/queue")).json()
        created = await writes(arguments.connections, arguments.seconds)
    print("| while the worker is saturated | requests/s | p50 ms | p95 ms | p99 ms |")
    print("|---|---|---|---|---|")
    for name, found in (("GET /jobs/{id}", latencies), ("POST /generate", created)):
        p50, p95, p99 = statistics.median(found), percentile(found, 0.95), percentile(found, 0.99)
        times = " | ".join(f"{1000 * value:.1f}" for value in (p50, p95, p99))
        print(f"| {name} | {len(found) / arguments.seconds:.0f} | {times} |")
    print(f"\nthe queue while reading: {busy}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "mnist")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rate", type=float, default=50, help="reads a second")
    parser.add_argument("--connections", type=int, default=32)
    arguments = parser.parse_args()
    os.environ["DDPM_MODELS"] = str(arguments.model.resolve().parent)
    os.environ["DDPM_MAX_QUEUED_JOBS"] = "1000000"
    os.environ["DDPM_MAX_OUTPUT_BYTES"] = str(2**40)
    data = Path(tempfile.mkdtemp(prefix="ddpm-bench-"))
    command = [sys.executable, "-m", "ddpm", "up", "--port", str(OUR_PORT), "--data", str(data)]
    with server(command, f"http://127.0.0.1:{OUR_PORT}/readyz", data / "up.log"):
        asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()
