"""Every Redis key of ours. No other module spells one out, RQ's keys are never written here.

ddpm:job:{id}            hash    the record
ddpm:job:{id}:events     stream  what happened, for server-sent events
ddpm:job:{id}:outputs    hash    i:{index} and s:{t}:{kind}:{index} → float32 [C,H,W] bytes
ddpm:job:{id}:index      hash    the same fields → JSON about the output
ddpm:job:{id}:inputs     string  uploaded images, uint8 [N,H,W,C], or an x_t, float32
ddpm:job:{id}:state      hash    image index → saved chain state, while the job is active
ddpm:jobs[:status:{s}|:model:{m}]   sorted sets of ids (score 0: ids sort by time)
ddpm:paused              set     queues from which no worker takes a job
ddpm:queues              set     queues that were ever used
ddpm:admissions          string  written by each admission, so that two never overlap
ddpm:idempotency:{hash}  string  the job of an Idempotency-Key, while the key is remembered
ddpm:queue:{q}           hash    image-steps admitted and completed, ever; clocks of the turns
ddpm:queue:{q}:{status}  sorted set of ids, queued and running
ddpm:queue:{q}:turns:{priority}   sorted set of waiting ids by the place at which each begins
ddpm:queue:{q}:shares:{priority}  hash  client → image-steps asked for, as a place too
ddpm:totals              hash    output bytes held, counters for the metrics
ddpm:seconds             hash    histograms of the metrics: waiting and running times
ddpm:batches             hash    histograms of the metrics: rows of batches
ddpm:clients             hash    client → outstanding image-steps
ddpm:due                 sorted set  "expire:{id}", "forget:{id}" by time
ddpm:deadlines           sorted set  id by the time by which it was to have ended
ddpm:webhooks            sorted set  id by time of the next attempt
ddpm:webhook_attempts    hash    id → attempts made
ddpm:models              hash    name → model card, as release 0.1 reads it
ddpm:models_more         hash    name → the other fields of its card, and its digest
ddpm:rates:{model}       hash    worker → measured image-steps/s
ddpm:workers             hash    name → what the worker last said of itself
ddpm:slots               hash    worker → how many images it steps together
ddpm:begun               hash    worker → the job that it began last
ddpm:lock:{name}         string  who does what only one process may do at a time
ddpm:wake:{reader}       stream  by which an API process wakes its own blocked reader
ddpm:probe               string  written to see whether it can be
ddpm:suspects            hash    id → since when our record and RQ's disagree
"""

from __future__ import annotations

PREFIX = "ddpm:"
JOBS = PREFIX + "jobs"
QUEUES = PREFIX + "queues"
PAUSED = PREFIX + "paused"
TOTALS = PREFIX + "totals"
SECONDS = PREFIX + "seconds"
BATCHES = PREFIX + "batches"
CLIENTS = PREFIX + "clients"
ADMISSIONS = PREFIX + "admissions"
DUE = PREFIX + "due"
DEADLINES = PREFIX + "deadlines"
WEBHOOKS = PREFIX + "webhooks"
WEBHOOK_ATTEMPTS = PREFIX + "webhook_attempts"
MODELS = PREFIX + "models"
MODELS_MORE = PREFIX + "models_more"
WORKERS = PREFIX + "workers"
SLOTS = PREFIX + "slots"
BEGUN = PREFIX + "begun"
PROBE = PREFIX + "probe"
SUSPECTS = PREFIX + "suspects"


def job(job_id: str) -> str:
    """The hash of a job: its record."""
    return f"{PREFIX}job:{job_id}"


def events(job_id: str) -> str:
    """The stream of a job's events."""
    return f"{PREFIX}job:{job_id}:events"


def outputs(job_id: str) -> str:
    """The hash of a job's images and snapshots."""
    return f"{PREFIX}job:{job_id}:outputs"


def index(job_id: str) -> str:
    """The hash that says what a job's outputs are."""
    return f"{PREFIX}job:{job_id}:index"


def inputs(job_id: str) -> str:
    """What was uploaded with a job."""
    return f"{PREFIX}job:{job_id}:inputs"


def state(job_id: str) -> str:
    """The hash of the states in which chains of a job were saved."""
    return f"{PREFIX}job:{job_id}:state"


def by_status(status: str) -> str:
    """The jobs of a status, newest last."""
    return f"{JOBS}:status:{status}"


def by_model(model: str) -> str:
    """The jobs of a model, newest last."""
    return f"{JOBS}:model:{model}"


def queue(name: str) -> str:
    """What is said of a queue."""
    return f"{PREFIX}queue:{name}"


def in_queue(name: str, status: str) -> str:
    """The jobs of a queue that are in a status."""
    return f"{PREFIX}queue:{name}:{status}"


def turns(name: str, priority: str) -> str:
    """The jobs of a queue that wait for their turn."""
    return f"{PREFIX}queue:{name}:turns:{priority}"


def shares(name: str, priority: str) -> str:
    """What each client of a queue has asked for."""
    return f"{PREFIX}queue:{name}:shares:{priority}"


def idempotency(digest: str) -> str:
    """The job of an Idempotency-Key."""
    return f"{PREFIX}idempotency:{digest}"


def rates(model: str) -> str:
    """A model's measured rates."""
    return f"{PREFIX}rates:{model}"


def lock(name: str) -> str:
    """A lock that one process holds at a time."""
    return f"{PREFIX}lock:{name}"


def wake(reader: str) -> str:
    """Stream by which an API process wakes its own blocked reader."""
    return f"{PREFIX}wake:{reader}"
