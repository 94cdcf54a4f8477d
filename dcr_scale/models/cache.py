"""Folders under ~/.cache/dcr_scale that are built once, whole or not at all, however many processes ask
at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dcr_scale.errors import UserError


def cache_folder() -> Path:
    return Path.home() / ".cache" / "dcr_scale"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """``target``, which ``build`` fills under a temporary name beside it the first time.

    One process builds and the others wait; where locks do not reach (another node on a shared home
    folder), whoever renames first wins. Raises UserError where the disk refuses.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if target.is_dir():
                return target
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
            try:
                build(partial)
                # mkdtemp's 0700 and safetensors' 0600 would keep other users of a shared cache out.
                partial.chmod(0o755)
                for path in partial.rglob("*"):
                    path.chmod(0o755 if path.is_dir() else 0o644)
                try:
                    os.rename(partial, target)
                except OSError:
                    if not target.is_dir():
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); free space there") from None
    return target
