"""Whether two cells were made by the same settings and the same data, wherever its files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dcr_scale.data.sources import BUILTIN


def fingerprint(used: Mapping[str, Any]) -> str:
    """Hexadecimal digest of a tree of settings, in which each source's file (``path``) counts by its name and content,
    so that a record holds on another machine and not after a change of its data."""
    return hashlib.blake2b(json.dumps(_by_content(used)).encode(), digest_size=8).hexdigest()


def _by_content(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _file(value) if key == "path" else _by_content(value) for key, value in tree.items()}
    return [_by_content(value) for value in tree] if isinstance(tree, list) else tree


def _file(path: str) -> list[str]:
    files = sorted(BUILTIN.glob("*.jsonl")) if path == "builtin" else [Path(path)]
    return [Path(path).name, *(_content(file, file.stat().st_mtime_ns) for file in files)]


@cache
def _content(file: Path, _changed: int) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
