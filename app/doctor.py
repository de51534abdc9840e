"""`ddpm doctor`: what is here, what answers, and a verdict on each.

It changes nothing, and needs neither torch nor a service that runs.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
from redis.exceptions import RedisError

from app.credentials import CredentialsError, credentials_of
from app.up.running import NotRunning, redis_url
from jobs.settings import Settings, shown
from jobs.store.connections import connect
from jobs.store.trouble import trouble_of
from jobs.store.writer import JobStore
from jobs.version import VERSION

OK, WARNING, WRONG = "ok", "warning", "WRONG"
_LEAST_FREE = 2**30
_PACKAGES = {
    "fastapi": "api", "redis": "api", "rq": "api", "torch": "worker", "safetensors": "worker",
    "accelerate": "train", "datasets": "train", "huggingface_hub": "hub",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line. verdict: ok, warning or WRONG; only the last makes the command fail."""

    verdict: str
    subject: str
    detail: str


def examine(settings: Settings, *, data: Path, port: int) -> Iterator[Finding]:
    """Every finding, in order. data: of `ddpm up`; port: where its API would listen."""
    yield from packages()
    yield from machine()
    url, where = address(settings, data)
    yield from service(settings.model_copy(update={"redis_url": url}), where)
    yield from folder(settings.models)
    yield signing(settings)
    yield listening(port)
    yield from disks(settings, data)


def packages() -> Iterator[Finding]:
    """Versions, and what is missing for what."""
    python = platform.python_version()
    yield Finding(OK, "ddpm-serve", f"{VERSION}, Python {python} ({sys.executable})")
    found: list[str] = []
    missing: dict[str, list[str]] = {}
    for name, extra in _PACKAGES.items():
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.setdefault(extra, []).append(name)
    yield Finding(OK, "packages", ", ".join(found))
    for extra, names in missing.items():
        needs = f"{', '.join(names)}: not installed; `pip install 'ddpm-serve[{extra}]'`"
        yield Finding(WRONG if extra == "api" else WARNING, f"extra {extra}", needs)


def machine() -> Iterator[Finding]:
    """Cores and threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    threads = os.environ.get("OMP_NUM_THREADS")
    told = f"{cores} cores, load {load:.1f}, OMP_NUM_THREADS {threads or 'not set'}"
    if threads is not None and threads.isdigit() and int(threads) < (cores or 1):
        yield Finding(WARNING, "threads", f"{told}: a worker uses {threads} of the cores")
    else:
        yield Finding(OK, "threads", told)


def address(settings: Settings, data: Path) -> tuple[str, str]:
    """The URL of Redis that is meant here, and why that one."""
    if "REDIS_URL" in os.environ:
        return settings.redis_url, "REDIS_URL"
    try:
        return redis_url(data), f"of the `ddpm up` in {data}"
    except NotRunning:
        return settings.redis_url, "the default; no `ddpm up` runs here"


def service(settings: Settings, where: str) -> Iterator[Finding]:
    """Redis, the workers and their models."""
    url = shown(settings.redis_url)
    connection = connect(settings)
    try:
        began = time.perf_counter()
        connection.ping()
        took = 1000 * (time.perf_counter() - began)
        info = connection.info()
        told = f"{info['redis_version']} at {url} ({where}), {took:.1f} ms, "
        told += f"{info['used_memory_human']} used"
        yield Finding(OK, "Redis", told)
        yield from _keeps(info)
        store = JobStore(connection, settings)
        yield from _workers(store)
    except RedisError as error:
        trouble = trouble_of(error)
        detail = trouble.detail if trouble else str(error)
        yield Finding(WRONG, "Redis", f"{url} ({where}): {detail}; `ddpm up` starts one")
    finally:
        connection.close()


def _keeps(info: dict[str, object]) -> Iterator[Finding]:
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if int(str(info.get("maxmemory", 0))) and policy != "noeviction":
        yield Finding(WRONG, "Redis memory", f"maxmemory-policy {policy}: it may throw jobs away")
    if not int(str(info.get("aof_enabled", 0))):
        detail = "appendonly is off: what was queued may be lost when Redis ends"
        yield Finding(WARNING, "Redis file", detail)


def _workers(store: JobStore) -> Iterator[Finding]:
    now, cards = time.time(), store.cards()
    alive = [worker for worker in store.workers() if worker.alive(now)]
    for worker in alive:
        models = ", ".join(worker.models) or "no model"
        detail = f"{worker.name} on {worker.device}, queue {worker.queue}: {models}"
        yield Finding(OK if worker.models else WARNING, "worker", detail)
    if not alive:
        detail = "none lives: jobs are taken in and wait; `ddpm worker` or `ddpm up` runs one"
        yield Finding(WARNING, "workers", detail)
    served = {name for worker in alive for name in worker.models}
    for name in sorted(set(cards) - served):
        detail = f"{name} was published, and no worker that lives has it: its jobs wait"
        yield Finding(WARNING, "model", detail)


def folder(models: Path) -> Iterator[Finding]:
    """The folder of checkpoints."""
    if not models.is_dir():
        yield Finding(WRONG, "models", f"{models.resolve()}: no such folder (DDPM_MODELS)")
        return
    marks = ("config.json", "model_index.json")
    names = sorted(p.name for p in models.iterdir() if any((p / mark).is_file() for mark in marks))
    detail = f"{models.resolve()}: {', '.join(names) or 'holds no checkpoint folder'}"
    yield Finding(OK if names else WRONG, "models", detail)


def signing(settings: Settings) -> Finding:
    """Whether pictures are signed, and by whom."""
    try:
        credentials = credentials_of(settings)
    except CredentialsError as error:
        return Finding(WRONG, "C2PA", str(error))
    if credentials is None:
        return Finding(OK, "C2PA", "pictures are not signed (DDPM_C2PA_CERTIFICATE is not set)")
    who = [str(credentials.signer.get(name)) for name in ("common_name", "issuer")]
    told = f"pictures are signed by {', '.join(who)} ({settings.c2pa_algorithm})"
    return Finding(OK, "C2PA", told)


def listening(port: int) -> Finding:
    """Whether the API answers at its port, or something else does."""
    url = f"http://127.0.0.1:{port}"
    try:
        reply = httpx.get(f"{url}/healthz", timeout=5, trust_env=False)
        its = reply.json()["version"]
    except httpx.ConnectError:
        return Finding(OK, "port", f"{port} is free")
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return Finding(WARNING, "port", f"{port} is taken by something else; `ddpm up --port …`")
    try:
        ready = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        return Finding(WRONG, "API", f"{its} answers on {url}, but not whether it is ready: {why}")
    if ready.is_success:
        return Finding(OK, "API", f"{its} answers on {url} and is ready")
    detail = ready.json().get("detail", "") if "json" in ready.headers["content-type"] else ""
    return Finding(WRONG, "API", f"{its} answers on {url}, and is not ready: {detail}")


def disks(settings: Settings, data: Path) -> Iterator[Finding]:
    """Room for Redis' file, for compiled code, for checkpoints."""
    for what, path in (
        ("data", data), ("compiled code", settings.cache_dir.expanduser()),
        ("models", settings.models),
    ):  # fmt: skip
        there = path.resolve()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        told = f"{free / 2**30:.1f} GiB free for {what} ({path})"
        if not os.access(there, os.W_OK):
            yield Finding(WARNING, "disk", f"{told}; not writable for this user")
        else:
            yield Finding(OK if free >= _LEAST_FREE else WRONG, "disk", told)
    if settings.compile and importlib.util.find_spec("torch") and not shutil.which("c++"):
        yield Finding(WARNING, "compiler", "no C++ compiler: networks run uncompiled, slower")
