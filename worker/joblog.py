"""The line of the log that each flight leaves."""

from __future__ import annotations

from jobs import logs
from jobs.store.records import JobRecord


def log_job(record: JobRecord, ending: str, seconds: float, error: BaseException | None) -> None:
    """One line a flight: what it was, how it ended, and how long it took here."""
    fields = {
        "job_id": record.id,
        "request_id": record.request_id or None,
        "kind": record.spec.kind,
        "model": record.model,
        "ending": ending,
        "images": record.images,
        "image_steps": record.work,
        "wait_s": round((record.started_at or record.created_at) - record.created_at, 4),
        "run_s": round(seconds, 4),
        "error": None if error is None else f"{type(error).__name__}: {error}"[:500],
    }
    logs.JOBS.info("job %s %s", record.id, ending, extra={"fields": fields})
