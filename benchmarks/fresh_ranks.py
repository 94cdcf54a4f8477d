"""One arm of a benchmark in processes of its own, one a rank, so that no arm inherits another's memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run_on_ranks(
    script: str, arm: str, options: Sequence[str], ranks: int, environment: Mapping[str, str] | None = None
) -> Any:
    """Start ``script --arm ARM *options`` on so many ranks of this machine, and read rank 0's last line that is JSON.

    ``environment`` goes over what tells a rank its place. Ends the program where a rank fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, script, "--arm", arm, *options]
    processes = []
    for rank in range(ranks):
        own = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(command, env=os.environ | own | dict(environment or {}), stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{arm}: a rank failed")
    # Libraries print lines of their own.
    return json.loads(next(line for line in reversed(outputs[0].splitlines()) if line.startswith(("{", "["))))
