"""Reading a JSON config whose every field must be honoured, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from diffusion.files import CheckpointError


class Fields:
    """A foreign config, read field by field; `done` refuses what nobody asked for."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.where = where
        self.left = {name: value for name, value in raw.items() if not name.startswith("_")}

    def refuse(self, name: str, value: object, allowed: str) -> CheckpointError:
        """The error for a value that cannot be honoured."""
        return CheckpointError(f"{self.where}: {name} = {value!r:.200}: must be {allowed}")

    def take(self, name: str, default: Any, ok: Callable[[Any], bool], allowed: str) -> Any:
        """The value of a field, or CheckpointError if it is not `ok`."""
        value = self.left.pop(name, default)
        if not ok(value):
            raise self.refuse(name, value, allowed)
        return value

    def choice(self, name: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The value of a field that must be one of a few."""
        return self.take(name, default, lambda v: v in allowed, " or ".join(map(repr, allowed)))

    def integer(
        self, name: str, default: int | None, optional: bool = False, most: int = 2**31
    ) -> Any:
        """A positive integer up to `most`, or None where `optional`."""

        def ok(value: Any) -> bool:
            return (optional and value is None) or (is_integer(value) and 1 <= value <= most)

        allowed = f"an integer 1..{most}" if most < 2**31 else "a positive integer"
        return self.take(name, default, ok, allowed + " or null" * optional)

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        return float(self.take(name, default, is_number, "a number"))

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        return bool(self.take(name, default, lambda v: isinstance(v, bool), "true or false"))

    def fixed(self, fields: dict[str, tuple[Any, ...]]) -> None:
        """Fields that must have one of the given values, the first by default."""
        for name, allowed in fields.items():
            self.choice(name, allowed, allowed[0])

    def ignore(self, names: Iterable[str]) -> None:
        """Fields that change nothing of what is read."""
        for name in names:
            self.left.pop(name, None)

    def done(self) -> None:
        """Raise CheckpointError if a field is left over."""
        for name, value in self.left.items():
            raise self.refuse(name, value, "absent: this field is not known here")


def is_integer(value: object) -> bool:
    """Whether it is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def is_list(value: object, ok: Callable[[Any], bool]) -> bool:
    """Whether it is a list of at least one thing, each of them `ok`."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(ok, value))
