"""Going on with a run: its stored configuration, and what of it may be another one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.config import ConfigError, TrainConfig, apply_overrides, parse_config, renamed
from training.state import CONFIG_FILE, StateError

# What may change in mid-run: how long, how fast, how it is shown, and what divergence asks for.
# Anything else would make the run a mixture of two, and its stored configuration untrue.
MAY_CHANGE = (
    "accumulate",
    "checkpoint_every",
    "compile",
    "data.in_memory",
    "device",
    "log_every",
    "optimizer.decay_steps",
    "optimizer.grad_clip",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "precision",
    "sample_every",
    "sample_images",
    "sample_steps",
    "sampling",
    "steps",
)


def stored_config(folder: Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """The configuration a run was started with. Raises StateError; ConfigError for an override."""
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a table")
        parse_config(raw, str(path))
    except OSError as error:
        raise StateError(f"{folder}: no run to resume: {path}: {error.strerror}") from error
    except ConfigError as error:
        raise StateError(f"{error}; this version cannot go on with the run") from error
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path}: damaged: {error}") from error
    raw = renamed(raw, str(path))
    apply_overrides(raw, overrides)
    return parse_config(raw, str(path))


def check_resumable(folder: Path, config: TrainConfig) -> None:
    """Raises StateError that names every key of `config` that may not change."""
    old, new = (flat(c.model_dump(mode="json")) for c in (stored_config(folder), config))
    changed = [
        f"{key} = {new.get(key)!r} (was {old.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key)
    ]
    if changed:
        raise StateError(
            f"{folder}: --resume goes on with the run as {CONFIG_FILE} has it, but "
            f"{', '.join(changed)}; what may change is {', '.join(MAY_CHANGE)}. "
            "--out starts another run, --init another from its weights"
        )


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    return dict(_flat(tables, prefix))


def _flat(tables: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
