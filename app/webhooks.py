"""Webhooks: Standard Webhooks headers, retries, and no way into private networks.

A delivery is claimed from the store, so it survives this process. The name is resolved here, every
address checked, and the request sent to the checked address itself: a second look-up could answer
otherwise. A receiver is a stranger: one deadline over all of a delivery, a few bytes of its answer,
and few deliveries to one host at once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import time
from collections import Counter
from collections.abc import Coroutine

import httpx
from redis.exceptions import RedisError

from app.addresses import AddressRefused, checked_address
from app.metrics import Metrics
from app.pools import Pool
from app.tasks import reap
from app.views import dump, job_view, timestamp
from jobs.settings import Settings
from jobs.store.reader import JobReader, JobState
from jobs.webhooks import Claim, WebhookQueue

log = logging.getLogger(__name__)
_POLL_S = 1.0
_MOST_AT_ONCE = 16
_MOST_A_HOST = 2
_MOST_AN_ADDRESS = 8  # which may serve many names, of one owner or of many
_HOST_BUSY_S = 1.0
_MOST_ANSWER = 4096  # bytes of an answer that are read; nothing in them matters
_MOST_DELAY_S = 7200.0


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


class _AddressBusy(Exception):
    """Enough deliveries are on their way to this address, by whatever names."""


class Courier:
    """Delivers what is due, several at once, few of them to one host, and to one address no more
    than half of them: a receiver may have any number of names."""

    def __init__(
        self, settings: Settings, queue: WebhookQueue, reader: JobReader, metrics: Metrics
    ) -> None:
        secret = settings.webhook_secret
        self._key = b"" if secret is None else signing_key(secret.get_secret_value())
        self._private_too = settings.webhook_private_addresses
        self._deadline_s = settings.webhook_timeout_s
        self._lookups = Pool("lookups", 8)
        self._hosts: Counter[str] = Counter()  # deliveries on their way, by name
        self._addresses: Counter[str] = Counter()  # and by address, once that is known
        self._sending: set[asyncio.Task[None]] = set()
        self._queue = queue
        self._reader = reader
        self._metrics = metrics
        # Connections are kept by address, and a certificate was checked for one name alone.
        self._client = httpx.AsyncClient(
            timeout=settings.webhook_timeout_s,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def close(self) -> None:
        """Close the connections."""
        self._lookups.close()
        await self._client.aclose()

    async def run(self) -> None:
        """Deliver until canceled."""
        try:
            while True:
                if len(self._sending) >= _MOST_AT_ONCE:
                    await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
                elif not await self._guarded(self._next()):
                    await asyncio.sleep(_POLL_S)
        finally:
            await reap(self._sending)

    async def _guarded(self, work: Coroutine[None, None, bool]) -> bool:
        """The work's answer; False where it failed, which ends nothing."""
        try:
            return await work
        except RedisError as error:
            log.warning("webhooks: %s; trying again", error)
        except Exception:
            log.exception("webhooks: trying again")
        return False

    async def _next(self) -> bool:
        """Set out with what is due next. False: nothing is."""
        claim = await self._queue.claim()
        if claim is None:
            return False
        state = await self._reader.job(claim.job_id)
        url = None if state is None else _url(state)
        if state is None or url is None:
            await self._queue.settle(claim.job_id)
            return True
        host = _host(url)
        if self._hosts[host] >= _MOST_A_HOST:
            await self._queue.put_back(claim, _HOST_BUSY_S)
            return True
        self._hosts[host] += 1
        task = asyncio.create_task(self._deliver(claim, url, state, host=host))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        return True

    async def _deliver(self, claim: Claim, url: str, state: JobState, *, host: str) -> None:
        try:
            await self._guarded(self._attempt(claim, url, state))
        finally:
            _count_down(self._hosts, host)

    async def _attempt(self, claim: Claim, url: str, state: JobState) -> bool:
        """One attempt, and what follows from it."""
        try:
            async with asyncio.timeout(self._deadline_s):
                answer = await self._send(url, state)
        except _AddressBusy:
            await self._queue.put_back(claim, _HOST_BUSY_S)
        except (AddressRefused, httpx.InvalidURL, UnicodeError) as error:  # for good
            await self._give_up(claim, str(error))
        except TimeoutError:
            await self._again(claim, f"not over after {self._deadline_s:g} s", None)
        except (httpx.HTTPError, OSError) as error:
            await self._again(claim, f"{type(error).__name__}: {error}", None)
        except Exception as error:  # a fault of ours: not for ever, then
            log.exception("webhook of job %s, attempt %d", *claim)
            await self._again(claim, f"{type(error).__name__}: {error}", None)
        else:
            await self._judge(claim, answer)
        return True

    async def _judge(self, claim: Claim, answer: httpx.Response) -> None:
        if answer.is_success:
            self._metrics.webhooks.labels("delivered").inc()
            await self._queue.settle(claim.job_id)
        elif answer.status_code == 429 or answer.status_code >= 500:
            wait = _seconds(answer.headers.get("retry-after", ""))
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
        address = await checked_address(
            target.host, port, private_too=self._private_too, lookups=self._lookups
        )
        if self._addresses[address] >= _MOST_AN_ADDRESS:
            raise _AddressBusy
        self._addresses[address] += 1
        try:
            return await self._send_to(address, target, state)
        finally:
            _count_down(self._addresses, address)

    async def _send_to(self, address: str, target: httpx.URL, state: JobState) -> httpx.Response:
        body = payload(state)
        headers = signed_headers(self._key, f"msg_{state.record.id}", int(time.time()), body)
        headers["host"] = target.netloc.decode()
        # The name still goes into TLS, and the certificate must be for it.
        request = self._client.build_request(
            "POST",
            target.copy_with(host=address),
            content=body,
            headers=headers,
            extensions={"sni_hostname": target.host},
        )
        answer = await self._client.send(request, stream=True)
        try:
            await _skim(answer)
        finally:
            await answer.aclose()
        return answer


async def _skim(answer: httpx.Response) -> None:
    """Read the beginning of an answer, which is all of a reasonable one."""
    size = 0
    async for chunk in answer.aiter_raw():
        size += len(chunk)
        if size > _MOST_ANSWER:
            return


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


def _seconds(text: str) -> float | None:
    """A Retry-After in seconds; None where it is none (`isdecimal` alone would take any script's
    digits, `isdigit` even a superscript, which is no number)."""
    return min(float(text), _MOST_DELAY_S) if text.isascii() and text.isdecimal() else None


def _count_down(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


def _host(url: str) -> str:
    """What deliveries are counted by; an URL that is none is its own host."""
    try:
        return httpx.URL(url).host
    except (httpx.InvalidURL, UnicodeError):  # a name that IDNA cannot read is the latter
        return url


def _url(state: JobState) -> str | None:
    return state.record.spec.webhook_url
