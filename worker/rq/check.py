"""That the installed RQ is the one which this folder is written for: its private parts, by name."""

from __future__ import annotations

import inspect
from typing import Any

from rq import worker_registration
from rq.callbacks import execute_stopped_callback
from rq.executions import Execution
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.queue import Queue
from rq.registry import clean_registries
from rq.suspension import is_suspended
from rq.version import VERSION
from rq.worker import BaseWorker


class RQMismatch(RuntimeError):
    """The installed RQ is not the one that this folder was written for."""


# What is overridden or called, with its parameters.
_SIGNATURES: dict[Any, str] = {
    BaseWorker.execute_job: "self job queue",
    BaseWorker.dequeue_job_and_maintain_ttl: "self timeout max_idle_time",
    BaseWorker.cleanup_execution: "self job pipeline execution",
    BaseWorker._finalize_success: "self job queue execution return_value",
    BaseWorker._finalize_failure: "self job queue execution exc_info",
    BaseWorker.handle_job_failure: "self job queue started_job_registry exc_string execution",
    BaseWorker.maintain_heartbeats: "self job execution",
    BaseWorker.get_heartbeat_ttl: "self job working_time",
    BaseWorker.heartbeat: "self timeout pipeline",
    BaseWorker.handle_payload: "self message",
    BaseWorker._pubsub_exception_handler: "self exc pubsub pubsub_thread",
    BaseWorker.request_stop: "self signum frame",
    BaseWorker.request_stop_execution: "self execution_id",
    BaseWorker.check_for_suspension: "self burst",
    BaseWorker.clean_registries: "self",
    BaseWorker.run_maintenance_tasks: "self",
    BaseWorker.register_death: "self",
    BaseWorker.teardown: "self",
    BaseWorker.set_state: "self state pipeline",
    Queue.dequeue_any: "queues timeout connection job_class serializer death_penalty_class",
    Queue.enqueue_job: "self job pipeline at_front unique",
    Execution.create: "job ttl pipeline worker_name",
    IntermediateQueue.cleanup: "self worker queue",
    IntermediateQueue.should_be_cleaned_up: "self job_id",
    IntermediateQueue.remove: "self job_id",
    Job.prepare_for_execution: "self worker_name pipeline",
    Job.cancel: "self pipeline enqueue_dependents remove_from_dependencies",
    clean_registries: "queue exception_handlers",
    worker_registration.clean_worker_registry: "queue",
    execute_stopped_callback: "job death_penalty_class",
    is_suspended: "connection worker",
}
_ATTRIBUTES = ("_stop_requested", "_stopped_job_id", "_shutdown_requested_date", "_ordered_queues")


def check_rq() -> None:
    """Raise RQMismatch, naming what differs, unless RQ has every part as it is used here."""
    if VERSION.split(".")[:2] != ["3", "0"]:
        raise RQMismatch(f"RQ {VERSION} is installed; this worker needs rq>=3.0,<3.1")
    for function, expected in _SIGNATURES.items():
        found = " ".join(inspect.signature(function).parameters)
        if found != expected:
            name = function.__qualname__
            raise RQMismatch(f"RQ's {name} takes ({found}); this worker expects ({expected})")
    source = inspect.getsource(BaseWorker.__init__)
    missing = [name for name in _ATTRIBUTES if f"self.{name}" not in source]
    if missing:
        raise RQMismatch(f"RQ's worker has no {', '.join(missing)}")
