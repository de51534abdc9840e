"""The commands `ddpm api` and `ddpm up`."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import click

from app.auth import PublicWithoutKeys, check_bind
from app.sockets import PortInUse, listen, url_of
from jobs.settings import Settings, load_settings

HOST = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
PORT = click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="TCP port."
)

DATA = click.option(
    "--data",
    default=".ddpm",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for Redis' data and for logs.",
)


def bound(settings: Settings, host: str, port: int) -> socket.socket:
    """A listening socket. Raises click.ClickException where that cannot be, or must not."""
    try:
        check_bind(host, settings)
        return listen(host, port)
    except PublicWithoutKeys as error:
        raise click.ClickException(str(error)) from error
    except PortInUse as error:
        raise click.ClickException(f"{error}: choose another with --port") from error
    except OSError as error:
        detail = f"--host {host} --port {port}: {error.strerror or error}"
        raise click.ClickException(detail) from error


@click.command()
@HOST
@PORT
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(["critical", "error", "warning", "info", "debug"]),
)
def api(host: str, port: int, log_level: str) -> None:
    """Run the HTTP API alone, against REDIS_URL."""
    settings = load_settings()
    listener = bound(settings, host, port)
    # Imported here: what can be refused at once need not wait for it.
    from app.server import serve

    click.echo(f"ddpm api: {url_of(listener)}, documentation at /docs")
    try:
        serve(settings, listener, log_level=log_level)
    except KeyboardInterrupt:  # uvicorn raises it again after an orderly stop
        return
    except ValueError as error:  # a webhook secret that is none
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("name")
@click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Add the key to this file (DDPM_API_KEYS_FILE), instead of printing its line.",
)
def key(name: str, path: Path | None) -> None:
    """Make an API key for NAME. It is printed once: only its hash is kept."""
    from app.keyfile import NAME, new_key

    if not NAME.fullmatch(name):
        raise click.ClickException(f"NAME {name!r}: must match {NAME.pattern}")
    made, line = new_key(name)
    if path is None:
        click.echo(f"for DDPM_API_KEYS_FILE: {line}", err=True)
    else:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise click.ClickException(f"--file {path}: {error.strerror or error}") from error
    click.echo(made)


@click.command()
@HOST
@PORT
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1), help="CPU threads a worker; default: all cores.")
@DATA
def up(host: str, port: int, workers: int, threads: int | None, data: Path) -> None:
    """Serve: start Redis (or use REDIS_URL), workers and the HTTP API."""
    from app.up.supervisor import StartFailed, Supervisor

    settings = load_settings()
    # Bound only to see that it can be: the API, a process of its own, binds it again.
    with bound(settings, host, port) as listener:
        port = listener.getsockname()[1]
    supervisor = Supervisor(
        settings,
        address=(host, port),
        workers=workers,
        threads=threads,
        folder=data,
        say=click.echo,
    )
    try:
        supervisor.run()
    except StartFailed as error:
        raise click.ClickException(str(error)) from error


@click.command()
@DATA
def env(data: Path) -> None:
    """Print the address of the Redis of a `ddpm up` that runs, as shell commands.

    For `eval "$(ddpm env)"`: then `rq info`, `ddpm api` and `ddpm worker` find that Redis.
    """
    from app.up.running import NotRunning, redis_url

    try:
        url = redis_url(data)
    except NotRunning as error:
        raise click.ClickException(str(error)) from error
    for variable in ("REDIS_URL", "RQ_REDIS_URL"):  # ours, and that of RQ's own commands
        click.echo(f"export {variable}={shlex.quote(url)}")


@click.command()
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(1, 65535),
    help="Where the API would listen.",
)
@DATA
def doctor(port: int, data: Path) -> None:
    """Look at versions, Redis, workers, models, threads, ports and disks, and say what is wrong.

    Exits with 1 if something is.
    """
    from app.doctor import WRONG, examine

    wrong = 0
    for finding in examine(load_settings(), data=data, port=port):
        colour = {"ok": "green", "warning": "yellow"}.get(finding.verdict, "red")
        verdict = click.style(f"{finding.verdict:8}", fg=colour)
        click.echo(f"{verdict} {finding.subject}: {finding.detail}")
        wrong += finding.verdict == WRONG
    if wrong:
        raise click.exceptions.Exit(1)
