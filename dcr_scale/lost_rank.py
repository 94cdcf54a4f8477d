"""What to tell the person whose run ended because its ranks lost each other. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import socket

# Gloo raises plain RuntimeErrors, which begin with where in its source they come from.
_GLOO = re.compile(r"^(?:Gloo \w+ failed with )?\[[^\]]*gloo/[^\]]*\] *")
# It goes on with advice that does not help here.
_ADVICE = re.compile(r"\. This is typically caused.*", re.DOTALL)


def explain(error: BaseException) -> str | None:
    """One line for a failure of the ranks' connection, gloo's or torch.distributed's own; None for any other error.

    NCCL's own failures never come here: torch's watchdog ends the process from another thread, and says why.
    """
    text = str(error)
    if not _GLOO.match(text) and "DistError" not in {parent.__name__ for parent in type(error).__mro__}:
        return None
    cause = _ADVICE.sub("", _GLOO.sub("", text)).splitlines()[0].strip()
    waited = " It had waited as long as engine.timeout_minutes says." if "timed out" in cause.lower() else ""
    return (
        f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} lost the other ranks: {cause}.{waited} A rank "
        "that ended first says why in its own output; if none does, a node or its network is gone. The same command "
        "goes on from the last checkpoint"
    )
