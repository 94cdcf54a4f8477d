"""How a launcher ends: with 0, or with 2 and one line for the person who must act. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dcr_scale.errors import UserError


def first_rank() -> bool:
    """Whether this process is the one that speaks, as its launcher's environment has it."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def exit_code(work: Callable[[], None]) -> int:
    """Do the work; a UserError becomes one line on the first rank."""
    try:
        work()
    except UserError as error:
        if first_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            # The launcher ends all ranks when the first one exits; the message must be out by then.
            time.sleep(2)
        return 2
    return 0


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """What the disk refuses inside, where ``--out`` says ``folder``, becomes a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); free space there, make it "
            "writable, or give another folder by --out"
        ) from None


def leave(code: int) -> NoReturn:
    """End the process. Native threads of the collectives can abort an interpreter that takes itself down, and what is
    done and on disk would count as failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
