from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from jobs.cards import ModelCard
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.table import admit
from jobs.settings import Settings
from jobs.store.admission import Admission, Idempotency, Order
from jobs.store.writer import JobStore

CARD = ModelCard(
    name="mnist",
    digest="d" * 64,
    queue="ddpm",
    shape=(1, 8, 8),
    betas=tuple(np.linspace(1e-4, 0.02, 1000).tolist()),
    class_names=tuple("0123456789"),
    null_label=10,
)


@pytest.fixture
def card() -> ModelCard:
    return CARD


@pytest.fixture
def settings(redis_url: str) -> Settings:
    return Settings(redis_url=redis_url)


@pytest.fixture
def store(settings: Settings) -> Iterator[JobStore]:
    store = JobStore.connect(settings)
    store.publish_card(CARD)
    yield store
    store.redis.close()


@pytest.fixture
def stall(store: JobStore) -> Iterator[Callable[[], None]]:
    """Stop Redis for longer than the store waits for an answer. What was sent to it meanwhile is
    carried out when it goes on."""
    store.redis.connection_pool.connection_kwargs["socket_timeout"] = 0.5
    store.redis.connection_pool.disconnect()
    process, going_on = int(store.redis.info("server")["process_id"]), []

    def stop() -> None:
        os.kill(process, signal.SIGSTOP)
        going_on.append(threading.Timer(1.2, lambda: os.kill(process, signal.SIGCONT)))
        going_on[-1].start()

    yield stop
    for timer in going_on:
        timer.join()


@pytest.fixture
def submit(store: JobStore) -> Callable[..., str]:
    """Admit a generate job; returns its id."""

    def _submit(
        *, client: str = "me", idempotency: Idempotency | None = None, **fields: Any
    ) -> str:
        spec, plan = admit(GenerateSpec(**fields), CARD, store.settings)
        order = Order(spec=spec, plan=plan, card=CARD, client=client, idempotency=idempotency)
        return Admission(store).admit(order).job_id

    return _submit
