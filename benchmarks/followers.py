"""Clients that follow jobs by their event streams, and take them up again wherever they broke."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import Counter
from typing import Any, Self

import httpx
from storm import Stage
from storm_load import Row

FOLLOWERS = 4


class Followers(contextlib.AbstractContextManager["Followers"]):
    """Each makes one job after another and reads its stream to the end."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow, daemon=True)
            for _ in range(1 if stage.brief else FOLLOWERS)
        ]
        self._read: dict[str, list[tuple[str, str]]] = {}  # job → (id, name) of its events
        self._broke = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def stop(self) -> None:
        """Make no more jobs, and read the last to their ends."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=self._stage.patience)

    def _follow(self) -> None:
        steps = 200 if self._stage.brief else 1000
        body = {"model": "tiny", "steps": steps, "snapshots": {"every": 20, "kinds": ["x_t"]}}
        with httpx.Client(base_url=self._stage.url, timeout=30, trust_env=False) as client:
            while not self._stop.is_set():
                headers = {"Idempotency-Key": uuid.uuid4().hex}
                while True:
                    try:
                        reply = client.post("/generate", json=body, headers=headers)
                        job_id = reply.raise_for_status().json()["id"]
                        break
                    except httpx.HTTPError:
                        time.sleep(0.2)
                self._stage.posted.add(job_id)
                self._read[job_id] = []
                while not self._ended(job_id):
                    try:
                        self._take_up(client, job_id)
                    except httpx.HTTPError:
                        self._broke += 1
                        time.sleep(0.2)

    def _ended(self, job_id: str) -> bool:
        read = self._read[job_id]
        return bool(read) and read[-1][1] in ("done", "error")

    def _take_up(self, client: httpx.Client, job_id: str) -> None:
        read = self._read[job_id]
        headers = {"Last-Event-ID": read[-1][0]} if read else {}
        with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as reply:
            reply.raise_for_status()
            event_id = name = ""
            for line in reply.iter_lines():
                key, _, value = line.partition(": ")
                if key == "id":
                    event_id = value
                elif key == "event":
                    name = value
                elif not line and name:
                    read.append((event_id, name))
                    event_id = name = ""

    def reckon(self, row: Row) -> None:
        """Count gaps as lost and repeats as doubled."""
        events = 0
        for job_id, read in self._read.items():
            entries: Any = self._stage.redis.xrange(f"ddpm:job:{job_id}:events")
            stored = [entry_id.decode() for entry_id, _ in entries]
            told = Counter(event_id for event_id, _ in read)
            row.lost += sum(event_id not in told for event_id in stored)
            row.doubled += sum(count - 1 for count in told.values())
            events += len(read)
        row.accepted += len(self._read)
        row.notes.append(
            f"{events} events of {len(self._read)} streams, broken {self._broke} times"
        )
