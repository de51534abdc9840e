"""The load of the storm, and the reckoning: for `reliability.py`.

It knows of the service what a client knows: it posts deterministic jobs, each with an
Idempotency-Key, again and again until it has an answer, and looks at what becomes of them.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from storm import REQUESTS, Stage, until


@dataclass
class Row:
    """What became of what was accepted under a fault. recovery: seconds, the longest while in
    which jobs were under way and none ended."""

    tries: int = 0
    accepted: int = 0
    lost: int = 0
    failed: int = 0
    doubled: int = 0
    different: int = 0
    recovery: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.failed or self.doubled or self.different)


class Load(threading.Thread):
    """Posts jobs so that some are always under way, and looks at what becomes of them.

    expected: a request and the digest of its model → the SHA-256 of its images, filled in where it
    is not known.
    """

    def __init__(
        self,
        stage: Stage,
        expected: dict[str, set[Any]],
        *,
        requests: Any = REQUESTS,
        most: int = 12,
    ) -> None:
        super().__init__(daemon=True)
        self.stage, self.expected, self.requests, self.most = stage, expected, requests, most
        self.client = httpx.Client(base_url=stage.url, timeout=15, trust_env=False)
        self.pending: dict[str, int] = {}  # job → number of its request
        self.ids: set[str] = set()
        self.ended = 0
        self.row = Row()
        self.stopping = threading.Event()
        self._numbers = itertools.count()
        self._moved = time.monotonic()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Until it is stopped and all has ended, or has not for too long."""
        try:
            while not self.stopping.is_set() or self.pending:
                if not self.stopping.is_set() and len(self.pending) < self.most:
                    self._post(next(self._numbers))
                    self.stage.wait(0, brief=0.3)  # beside other tests, not all of the machine
                for job_id in list(self.pending):
                    self._look(job_id)
                if (
                    self.stopping.is_set()
                    and time.monotonic() - self._stopped > self.stage.patience
                ):
                    break
                time.sleep(0.2 if self.stage.brief else 0.02)
        except BaseException as error:
            self.failure = error

    def recover(self) -> None:
        """Wait until jobs end again."""
        before = self.ended
        until(lambda: self.ended > before or self.failure, "a job to end", self.stage.patience)

    def turn(self) -> Row:
        """What became of the jobs since the last turn of this kind."""
        row, self.row = self.row, Row()
        return row

    def finish(self) -> Row:
        """Post no more, wait for the rest, and reckon."""
        self._stopped = time.monotonic()
        self.stopping.set()
        self.join()
        if self.failure is not None:
            raise self.failure
        for job_id in self.pending:
            self.row.lost += 1
            self.row.notes.append(f"{job_id} never ended")
        self._count_doubles()
        return self.row

    def _post(self, number: int) -> None:
        key, body = uuid.uuid4().hex, self.requests[number % len(self.requests)]
        deadline = time.monotonic() + self.stage.patience
        while time.monotonic() < deadline:
            try:
                reply = self.client.post("/generate", json=body, headers={"Idempotency-Key": key})
            except httpx.HTTPError:
                time.sleep(0.2)
                continue
            if reply.status_code < 300:
                job_id = reply.json()["id"]
                if not self.pending:
                    self._moved = time.monotonic()
                self.pending[job_id] = number % len(self.requests)
                self.ids.add(job_id)
                self.stage.posted.add(job_id)
                self.row.accepted += 1
                return
            if reply.status_code == 422 and "/model: " in reply.text:  # it is away: not taken in
                return
            if reply.status_code != 503:
                raise RuntimeError(f"refused: {reply.status_code} {reply.text}")
            time.sleep(0.2)
        raise TimeoutError("the API takes no job")

    def _look(self, job_id: str) -> None:
        try:
            reply = self.client.get(f"/jobs/{job_id}")
        except httpx.HTTPError:
            time.sleep(0.1)
            return
        if reply.status_code == 503:
            return
        if reply.status_code == 404:
            self.row.lost += 1
            self.row.notes.append(f"{job_id} is not known any more")
        elif (job := reply.raise_for_status().json())["status"] in ("queued", "running"):
            return
        else:
            self._judge(job, self.pending[job_id])
        self.ended += 1
        now = time.monotonic()
        self.row.recovery, self._moved = max(self.row.recovery, now - self._moved), now
        del self.pending[job_id]

    def _judge(self, job: dict[str, Any], number: int) -> None:
        if job["status"] != "succeeded":
            self.row.failed += 1
            self.row.notes.append(f"{job['id']}: {job['status']}: {job.get('error')}")
            return
        images = tuple(image["sha256"] for image in job["images"])
        made_by = f"{self.requests[number]} {job['manifest']['model_digest']}"
        known = self.expected.setdefault(made_by, {images})
        self.row.different += images not in known

    def _count_doubles(self) -> None:
        """Jobs that nobody asked for; images and ends that were told twice."""
        cursor: str | None = ""
        while cursor is not None:
            params: dict[str, Any] = {"limit": 100, **({"cursor": cursor} if cursor else {})}
            page = self.client.get("/jobs", params=params).raise_for_status().json()
            self.row.doubled += sum(job["id"] not in self.stage.posted for job in page["data"])
            cursor = page.get("next_cursor")
        for job_id in self.ids:
            entries: Any = self.stage.redis.xrange(f"ddpm:job:{job_id}:events")
            told = Counter(
                (row[b"event"], row[b"data"])
                for _, row in entries
                if row[b"event"] in (b"image", b"done", b"error")
            )
            self.row.doubled += sum(count - 1 for count in told.values())
