"""Webhooks: Standard Webhooks headers, retries, and no way into private networks.

A delivery is claimed from the store, so it survives this process. The name is resolved here, every
address checked, and the request sent to the checked address itself: a second look-up could answer
otherwise.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
import time

import httpx
from redis.exceptions import RedisError

from app.metrics import Metrics
from app.views import dump, job_view, timestamp
from jobs.settings import Settings
from jobs.store.reader import JobReader, JobState
from jobs.webhooks import Claim, WebhookQueue

log = logging.getLogger(__name__)
_POLL_S = 1.0
_TIMEOUT_S = 10.0
_MOST_DELAY_S = 7200.0


class AddressRefused(Exception):
    """The host of a webhook resolves to an address that is not public."""


def signing_key(secret: str) -> bytes:
    """The key in a `whsec_…` secret. Raises ValueError if it is not base64."""
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error as error:
        raise ValueError("DDPM_WEBHOOK_SECRET: must be whsec_ and base64") from error


def signed_headers(key: bytes, message_id: str, now: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks: HMAC-SHA256 of `id.timestamp.body`."""
    signed = f"{message_id}.{now}.".encode() + body
    digest = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(now),
        "webhook-signature": f"v1,{digest}",
    }


async def checked_address(host: str, port: int, *, private_too: bool) -> str:
    """An address of the host. Raises AddressRefused if any of them is not public, OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(parsed, "ipv4_mapped", None) or parsed
        if not private_too and (not mapped.is_global or mapped.is_multicast):
            raise AddressRefused(f"{host} is {address}, which is not a public address")
    return addresses[0]


class Courier:
    """Delivers what is due; `run` may run several times at once."""

    def __init__(
        self, settings: Settings, queue: WebhookQueue, reader: JobReader, metrics: Metrics
    ) -> None:
        secret = settings.webhook_secret
        self._key = b"" if secret is None else signing_key(secret.get_secret_value())
        self._private_too = settings.webhook_private_addresses
        self._queue = queue
        self._reader = reader
        self._metrics = metrics
        self._client = httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def run(self) -> None:
        """Deliver until canceled."""
        while True:
            try:
                claim = await self._queue.claim()
                if claim is None:
                    await asyncio.sleep(_POLL_S)
                else:
                    await self.deliver(claim)
            except RedisError as error:
                log.warning("webhooks: %s; trying again", error)
                await asyncio.sleep(_POLL_S)
            except Exception:
                log.exception("webhooks: trying again")
                await asyncio.sleep(_POLL_S)

    async def deliver(self, claim: Claim) -> None:
        """One attempt, and what follows from it."""
        state = await self._reader.job(claim.job_id)
        url = None if state is None else _url(state)
        if state is None or url is None:
            await self._queue.settle(claim.job_id)
            return
        try:
            answer = await self._send(url, state)
        except AddressRefused as error:
            await self._give_up(claim, str(error))
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            await self._again(claim, f"{type(error).__name__}: {error}", None)
        else:
            await self._judge(claim, answer)

    async def _judge(self, claim: Claim, answer: httpx.Response) -> None:
        if answer.is_success:
            self._metrics.webhooks.labels("delivered").inc()
            await self._queue.settle(claim.job_id)
        elif answer.status_code == 429 or answer.status_code >= 500:
            asked = answer.headers.get("retry-after", "")
            wait = min(float(asked), _MOST_DELAY_S) if asked.isdigit() else None
            await self._again(claim, f"status {answer.status_code}", wait)
        else:
            await self._give_up(claim, f"status {answer.status_code}")

    async def _again(self, claim: Claim, why: str, wait: float | None) -> None:
        kept = await self._queue.postpone(claim, wait)
        self._metrics.webhooks.labels("postponed" if kept else "given_up").inc()
        outcome = "trying again" if kept else "given up"
        log.warning("webhook of job %s, attempt %d: %s; %s", *claim, why, outcome)

    async def _give_up(self, claim: Claim, why: str) -> None:
        self._metrics.webhooks.labels("given_up").inc()
        log.warning("webhook of job %s, attempt %d: %s; given up", *claim, why)
        await self._queue.settle(claim.job_id)

    async def _send(self, url: str, state: JobState) -> httpx.Response:
        target = httpx.URL(url)
        port = target.port or (443 if target.scheme == "https" else 80)
        address = await checked_address(target.host, port, private_too=self._private_too)
        body = payload(state)
        headers = signed_headers(self._key, f"msg_{state.record.id}", int(time.time()), body)
        headers["host"] = target.netloc.decode()
        # The name still goes into TLS, and the certificate must be for it.
        return await self._client.post(
            target.copy_with(host=address),
            content=body,
            headers=headers,
            extensions={"sni_hostname": target.host},
        )


def payload(state: JobState) -> bytes:
    """The body: `job.{status}`, when it ended, and the job as GET /jobs/{id} has it."""
    view = json.loads(dump(job_view(state)))
    record = state.record
    event = {
        "type": f"job.{record.status}",
        "timestamp": timestamp(record.completed_at or record.created_at),
        "data": view,
    }
    return json.dumps(event, separators=(",", ":")).encode()


def _url(state: JobState) -> str | None:
    return state.record.spec.webhook_url
