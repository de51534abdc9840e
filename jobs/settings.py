"""All settings: environment variables `DDPM_…`, and `REDIS_URL`.

Built by `create_app()` and by each command, never at import.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from redis import ConnectionPool

MIB = 2**20
_USER = re.compile(r"://([^:@/]*)(:.*)?@", re.DOTALL)
_QUERY = re.compile(r"(password=)[^&]*")
_ORIGIN = re.compile(r"https?://[^/,\s]+")
DAY_S = 86_400
PREFIX = "DDPM_"
MODEL_OF_NO_NAME = "mnist"  # of a request that names none, where several are served


class Settings(BaseSettings):
    """Configuration of the API, the worker and the supervisor."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, populate_by_name=True)

    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        validation_alias=AliasChoices("REDIS_URL", "redis_url"),
        description="Redis, as redis://, rediss:// or unix:// URL (variable REDIS_URL)",
    )
    models: Path = Field(default=Path("models"), description="folder of checkpoint folders")
    default_model: str | None = Field(
        default=None,
        description="model of a request that names none; else the only one, else mnist",
    )
    queue: str = Field(default="ddpm", description="RQ queue a worker listens to")

    # Limits of one request
    max_images: int = Field(default=64, ge=1, description="images a job")
    max_job_bytes: int = Field(default=256 * MIB, ge=1, description="output bytes a job (float32)")
    max_job_evaluations: int = Field(
        default=1_000_000, ge=1, description="images × evaluations a job"
    )
    max_upload_bytes: int = Field(default=16 * MIB, ge=1, description="bytes of a request body")
    max_upload_memory: int = Field(
        default=256 * MIB, ge=1, description="bytes of all request bodies that are being read"
    )
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="seconds that a request's body may take"
    )
    max_upload_pixels: int = Field(
        default=4096 * 4096, ge=1, description="pixels of an uploaded picture"
    )

    # Limits of the service
    max_queued_jobs: int = Field(default=2000, ge=1, description="jobs that wait in one queue")
    max_output_bytes: int = Field(default=2048 * MIB, ge=1, description="output bytes of all jobs")
    client_quota: int = Field(
        default=0,
        ge=0,
        description="outstanding images × evaluations a client may have; 0: no quota",
    )
    job_deadline_s: float = Field(
        default=6 * 3600.0, gt=0, description="running time a job may take"
    )

    # Lifetimes
    ttl_s: int = Field(default=DAY_S, ge=1, description="seconds that outputs are kept")
    max_ttl_s: int = Field(
        default=7 * DAY_S, ge=1, description="largest ttl_s a request may ask for"
    )
    record_ttl_s: int = Field(
        default=7 * DAY_S, ge=1, description="seconds a record outlives its outputs"
    )
    idempotency_ttl_s: int = Field(
        default=DAY_S, ge=1, description="seconds an Idempotency-Key is kept"
    )
    events_maxlen: int = Field(default=2000, ge=10, description="events kept a job, about")

    # The API
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="bearer keys, separated by commas; none: no authentication"
    )
    api_keys_file: Path | None = Field(
        default=None, description="file of named keys, hashed (`ddpm key`); read as it changes"
    )
    allow_public_without_keys: bool = Field(
        default=False, description="let the API listen on a public address without keys"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="origins, separated by commas, whose pages may use the API; `*`: all",
    )
    webhook_secret: SecretStr | None = Field(
        default=None, description="whsec_ and base64, signs webhooks; none: webhooks are off"
    )
    webhook_private_addresses: bool = Field(
        default=False, description="let webhooks reach private addresses"
    )
    webhook_timeout_s: float = Field(
        default=15.0, gt=0, le=50, description="seconds of one delivery of a webhook, all in all"
    )
    mark_outputs: bool = Field(
        default=True,
        description="say in each picture and film that a machine made it (IPTC, as XMP)",
    )
    c2pa_certificate: Path | None = Field(
        default=None, description="PEM file: the certificate that signs pictures (C2PA), its chain"
    )
    c2pa_key: Path | None = Field(default=None, description="PEM file: the key of that certificate")
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = (
        Field(default="es256", description="of that key, as C2PA names it")
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="of the logs: text, json, or auto: text on a terminal"
    )
    sse_comment_s: float = Field(default=15.0, gt=0, description="seconds between comment lines")
    janitor_s: float = Field(default=10.0, gt=0, description="seconds between maintenance runs")

    # The worker
    slots: int = Field(default=64, ge=1, description="images stepped together, a model")
    checkpoint_s: float = Field(default=2.0, gt=0, description="seconds between saved chain states")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the network; auto: bfloat16 where convolutions gain by it"
    )
    compile: bool = Field(default=True, description="compile the network in the background")
    cache_dir: Path = Field(
        default=Path("~/.cache/ddpm-serve"), description="folder of the compiled code"
    )
    drain_s: float = Field(default=8.0, ge=0, description="seconds to finish work on SIGTERM")
    model_wait_s: float = Field(
        default=120.0,
        ge=0,
        description="seconds that jobs wait for a model that is not in the folder (yet)",
    )
    stall_limit_s: float = Field(
        default=120.0, gt=0, description="seconds without a step: device hung"
    )

    @field_validator("redis_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        ConnectionPool.from_url(value)  # it connects to nothing yet
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin}: must be like https://example.org, or *")
        return value

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(key.strip() for key in value.split(",") if key.strip())
        return value


def shown(url: str) -> str:
    """A URL of Redis as it may be printed: without its password, whatever else is wrong with it."""
    hidden = _USER.sub(lambda m: f"://{m[1]}:***@" if m[2] else f"://{m[1]}@", url)
    return _QUERY.sub(r"\1***", hidden)


def load_settings(**given: Any) -> Settings:
    """For a command: options over the environment; None is not given.

    Raises click.ClickException that names the variable that is wrong; warns of one that is none.
    """
    for warning in unknown_variables(os.environ):
        click.echo(f"warning: {warning}", err=True)
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        variable = name if name == "REDIS_URL" else f"DDPM_{name.upper()}"
        given_as = _told(name, first["input"])
        detail = f"{variable} = {given_as}: {first['msg']}"
        raise click.ClickException(detail) from error


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """A sentence for each variable that looks like a setting of ours, and is none."""
    known = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields if name != "redis_url"]
    sentences = []
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            (like, *_) = [*difflib.get_close_matches(name.upper(), known, 1, 0.75), None]
            hint = f"did you mean {like}?" if like else "see the README's table of settings"
            sentences.append(f"{name} is no setting; {hint}")
    return sentences


def _told(name: str, value: object) -> str:
    """A wrong value as an error may repeat it."""
    if name == "REDIS_URL":
        return repr(shown(str(value)))
    secret = name in ("api_keys", "webhook_secret")
    return "(not shown)" if secret else repr(value)
