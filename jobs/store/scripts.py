"""The Lua scripts: each write of a job's progress or end is one of them, atomic and fenced.

Fenced: a worker names its execution id, and a script does nothing for one that no longer holds
the job. So a worker that was frozen while another took over writes nothing when it thaws.
Their text is in `lua/`; each file says what its arguments are.
"""

from __future__ import annotations

from pathlib import Path

from jobs.observed import SECONDS
from jobs.states import TRANSITIONS
from jobs.store.keys import PREFIX

_FOLDER = Path(__file__).parent / "lua"
_LEGAL = ", ".join(
    f"['{source}>{target}'] = true"
    for source, targets in TRANSITIONS.items()
    for target in sorted(targets)
)
_STATES = ", ".join(f"{status} = true" for status in TRANSITIONS)
_PREFIX = f"local P = '{PREFIX}'\n"


def _text(name: str) -> str:
    return (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")


_BOUNDS = ", ".join(f"{bound:g}" for bound in SECONDS)
_TABLES = (
    f"local STATES = {{{_STATES}}}\nlocal LEGAL = {{{_LEGAL}}}\nlocal BOUNDS = {{{_BOUNDS}}}\n"
)
_TURNS = _text("counters") + _text("turns")
_PRELUDE = _PREFIX + _TABLES + _TURNS + _text("prelude")
_FORGET = _PRELUDE + _text("forget")

ADMIT = _PREFIX + _TURNS + _text("admit")
NEXT = _PRELUDE + _text("next")
VIEW = _PRELUDE + _text("view")
START = _PRELUDE + _text("start")
WRITE = _PRELUDE + _text("write")
PUT = _PRELUDE + _text("put")
FINISH = _PRELUDE + _text("finish")
REQUEUE = _PRELUDE + _text("requeue")
RETURN = _PRELUDE + _text("return")
CANCEL = _PRELUDE + _text("cancel")
PURGE = _FORGET + _text("purge")
SWEEP = _FORGET + _text("sweep")
RECOUNT = _PRELUDE + _text("recount")
UNLOCK = _text("unlock")
