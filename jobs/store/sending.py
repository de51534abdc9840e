"""Many calls of one script in one round trip."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError


def send_all(connection: Any, script: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """What the script answers to each list of arguments, or the error it ends with.

    It must be harmless to run a call twice: a restarted Redis has forgotten the script, perhaps
    in the middle.
    """
    # Not Script(client=pipe): that asks SCRIPT EXISTS before every pipeline.
    replies = _send(connection, script, calls)
    if any(isinstance(reply, NoScriptError) for reply in replies):
        connection.script_load(script)
        replies = _send(connection, script, calls)
    return replies


def _send(connection: Any, script: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
    sha = hashlib.sha1(script.encode()).hexdigest()  # the name that Redis gives it
    with connection.pipeline(transaction=False) as pipe:
        for args in calls:
            pipe.evalsha(sha, 0, *args)
        replies: list[Any] = pipe.execute(raise_on_error=False)
    return replies
