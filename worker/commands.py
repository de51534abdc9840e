"""The command `ddpm worker`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import click
import redis

from diffusion import cores
from diffusion.device import DeviceError, pick_device
from jobs import logs
from jobs.settings import MODEL_OF_NO_NAME, Settings, load_settings, shown
from jobs.store.connections import connect, wait_until_writable
from jobs.store.writer import JobStore
from worker.models import ModelFolder
from worker.rq.adapter import EngineWorker
from worker.runtime import Runtime

log = logging.getLogger("ddpm.worker")
# On a shared CPU the API answers first: it needs little, and at once. But at 5 a worker beside two
# busy processes got a quarter of the cores, and not two fifths.
WORKER_NICENESS = 2


@click.command()
@click.argument("names", nargs=-1)
@click.option("--queue", help="RQ queue to listen to (DDPM_QUEUE, default ddpm).")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    help="Folder of checkpoint folders (DDPM_MODELS, default models).",
)
@click.option(
    "--capacity", type=click.IntRange(8), help="Images stepped together (DDPM_SLOTS, default 64)."
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:1, …; default: a GPU if there is.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of the network.")
@click.option("--name", default="", help="How the name of this worker begins.")
@click.option("--verbose", is_flag=True, help="Log every job.")
def worker(
    names: tuple[str, ...],
    queue: str | None,
    models: Path | None,
    capacity: int | None,
    device: str,
    threads: int | None,
    name: str,
    verbose: bool,
) -> None:
    """Serve jobs from Redis (REDIS_URL) with the models of a folder, or only those NAMES."""
    settings = load_settings(queue=queue, models=models, slots=capacity)
    logs.configure(settings.log_format)
    cores.use(threads or cores.count())
    try:
        picked = pick_device(device)
        if picked.type == "cpu":
            os.nice(WORKER_NICENESS)
        first = settings.default_model or MODEL_OF_NO_NAME
        folder = ModelFolder(
            settings.models, queue=settings.queue, device=picked, names=names, first=first
        )
        serve(settings, folder, name=name, verbose=verbose)
    except DeviceError as error:
        raise click.ClickException(str(error)) from error
    except redis.exceptions.ConnectionError as error:
        raise click.ClickException(f"no Redis at {shown(settings.redis_url)}: {error}") from error


def serve(settings: Settings, folder: ModelFolder, *, name: str, verbose: bool) -> None:
    """Run a worker until it is told to stop."""
    runtime = Runtime(settings, JobStore.connect(settings), folder)
    rq_worker = EngineWorker(runtime, connect(settings), name=name)
    wait_until_writable(runtime.store.redis)
    runtime.start()
    if not folder.served:
        log.warning("no model in %s yet; waiting for one", settings.models)
    log.info("worker %s: queue %s, %s", rq_worker.name, settings.queue, ", ".join(folder.served))
    try:
        rq_worker.work(logging_level="INFO" if verbose else "WARNING")
    finally:
        runtime.close()
    log.info("worker %s: stopped", rq_worker.name)
