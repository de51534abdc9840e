"""How our processes start others of ours, whatever folder they are started in."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command_of(module: str, *arguments: str) -> list[str]:
    """The command line of a module of ours in this interpreter.

    -P: the working folder is not searched. A user's own `app/` there must not stand in for ours.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment, with what finds our packages where they are not installed."""
    inherited = dict(os.environ)
    if str(ROOT) not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        paths = [str(ROOT), inherited.get("PYTHONPATH", "")]
        inherited["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return inherited
