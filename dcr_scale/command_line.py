"""How a launcher ends: with 0, with 2 and one line for the person who must act, with 75 where the same command goes on
later, or with 1 for what was not foreseen. Imports nothing heavy."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dcr_scale.errors import OutOfMemory, Preempted, UserError
from dcr_scale.lost_rank import explain

# The run was told to stop and has saved its state (EX_TEMPFAIL of sysexits.h): run the same command again.
PREEMPTED = 75


def first_rank() -> bool:
    """Whether this process is the one that speaks, as its launcher's environment has it."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def exit_code(work: Callable[[], None]) -> int:
    """Do the work; a UserError becomes one line, any other exception a traceback on its own rank."""
    try:
        work()
    except UserError as error:
        _say(f"error: {error}", everywhere=error.agreed)
        return 2
    except Preempted as stopped:
        _say(str(stopped))
        return PREEMPTED
    except OutOfMemory as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        # Said and left at once: taken down in order, the interpreter would wait for ranks that know of nothing.
        traceback.print_exc()
        if (lost := explain(error)) is not None:
            print(f"error: {lost}", file=sys.stderr, flush=True)
        return 1
    return 0


def _say(line: str, *, everywhere: bool = True) -> None:
    """``everywhere``: every rank has the same to say."""
    if first_rank():
        print(line, file=sys.stderr, flush=True)
        return
    # The launcher ends all ranks when the first one exits; the message must be out by then.
    time.sleep(2)
    # What only some ranks know, such as a file that a node lacks, is said once a node.
    if not everywhere and int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0:
        print(f"{socket.gethostname()}: {line}", file=sys.stderr, flush=True)


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
