"""A launcher's flags from a tree of settings: every setting of one value has its own, with the setting's own words.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dcr_scale.config import EngineConfig, ModelConfig, Source


def add_flags(parser: argparse.ArgumentParser, settings: type, aliases: Callable[[str, type], list[str]]) -> None:
    """One flag a field of the dataclass ``settings``; a list's can be given several times. ``aliases`` gives further
    names of a field's flag. DeepSpeed's settings have none: they are given as ``key=value``."""
    hints, defaults = get_type_hints(settings), settings()
    for field in fields(settings):
        hint, default = hints[field.name], getattr(defaults, field.name)
        if hint is EngineConfig:
            continue
        flags = [f"--{field.name.replace('_', '-')}", *aliases(field.name, hint)]
        doc = field.metadata["doc"].replace("%", "%%")
        if hint is bool:
            parser.add_argument(*flags, dest=field.name, action="store_const", const="true", help=doc)
        elif hint == list[str]:
            parser.add_argument(*flags, dest=field.name, metavar="VALUE", action="append", help=doc)
        else:
            shown = "none" if default is None else default.path if _is_branch(hint) else default
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            metavar = f"{{{','.join(map(str, choices))}}}" if choices else "VALUE"
            parser.add_argument(*flags, dest=field.name, metavar=metavar, help=f"{doc} (default: {shown})")


def as_overrides(given: argparse.Namespace, settings: type) -> list[str]:
    """The flags that were given, as ``key=value``: a model's or a source's is its ``path``."""
    overrides = []
    for name, hint in get_type_hints(settings).items():
        value: Any = getattr(given, name, None)
        if value is not None:
            # Paths and patterns are text, whatever YAML would read in them.
            text = hint not in (int, bool, int | None)
            key = f"{name}.path" if _is_branch(hint) else name
            overrides.append(f"{key}={json.dumps(value, ensure_ascii=False) if text else value}")
    return overrides


def _is_branch(hint: Any) -> bool:
    return hint in (ModelConfig, Source)
