"""Fitted steerings back from their files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dcr_scale.baselines.scans import Scans
from dcr_scale.baselines.steering import FORMAT, Steering
from dcr_scale.baselines.surgical import Surgical
from dcr_scale.errors import UserError

METHODS: dict[str, type[Steering]] = {kind.method: kind for kind in (Surgical, Scans)}


def load(path: str | Path) -> Steering:
    """Read what :meth:`Steering.save` wrote. Raises UserError for a file that is something else."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; launchers/steer.py writes one") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if metadata.get("format") != FORMAT or metadata.get("method") not in METHODS:
        found = f"{metadata.get('format', 'no steering')!r} by {metadata.get('method', 'no method')!r}"
        raise UserError(
            f"{path}: holds {found}; {FORMAT!r} by {' or '.join(METHODS)} can be applied; "
            "write it by launchers/steer.py"
        )
    try:
        settings = json.loads(metadata["settings"])
        return METHODS[metadata["method"]].restored(int(metadata["layers"]), tensors, settings)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); write it by launchers/steer.py") from None
