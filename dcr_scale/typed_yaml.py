"""YAML files and ``key=value`` overrides into a tree of dataclasses, with errors a person can act on.

Knows nothing of any particular configuration: :mod:`dcr_scale.config` declares the tree with :func:`setting`, and
:func:`load` fills it. Imports nothing heavy, so that a typing error costs milliseconds on every rank.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from dcr_scale.errors import UserError

Tree = TypeVar("Tree")

COMMAND_LINE = "command line"


def setting(
    default: Any,
    doc: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare one field: its default (a callable makes a fresh one), what it means, and its range."""
    metadata = {"doc": doc, "at_least": at_least, "at_most": at_most, "above": above}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _WrongValue(UserError):
    """A value that is not what its key takes; ``expected`` says what would be."""

    def __init__(self, message: str, expected: str):
        super().__init__(message)
        self.expected = expected


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``3e-4`` as a number (YAML 1.1 does not) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # what << brings in may be overridden
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text ``3e-4``, since :class:`_Loader` would read a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read_yaml(path: str | Path) -> dict:
    """Read a YAML mapping. Raises UserError where the file is missing, not UTF-8, malformed, or no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; see the folder configs/ for examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 text file ({error})") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys, found a {_kind(tree)}")
    return tree


def load(schema: type[Tree], path: str | Path | None, overrides: list[str]) -> Tree:
    """Build ``schema`` from a YAML file and ``key=value`` overrides; overrides win, and reach whole branches.

    Raises UserError with one line that names the source (file or command line), the full dotted key, what was
    found, and for an unknown key the nearest known one.
    """
    tree = read_yaml(path) if path is not None else {}
    origins: dict[str, str] = {"": str(path)}
    for override in overrides:
        key, found, text = override.partition("=")
        key = key.strip()
        if not found or not key:
            raise UserError(f"{COMMAND_LINE}: expected key=value, found {override!r}")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"{COMMAND_LINE}: {key}: {text!r} is not valid YAML; quote it") from None
        _check_known(schema, tree, key, text)
        tree = _replace(tree, key.split("."), value, key)
        origins[key] = COMMAND_LINE
    return _build(schema, tree, "", origins)


def to_tree(config: Any) -> Any:
    """The plain dicts, lists and scalars of a filled schema, in declaration order: as YAML knows them."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_tree(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_tree(item) for item in config]
    if isinstance(config, dict):
        return {key: to_tree(value) for key, value in config.items()}
    return config


def dump(config: Any) -> str:
    """The configuration as YAML text that :func:`load` reads back to an equal tree."""
    return yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


# --- overrides -------------------------------------------------------------------------------------------------


def _replace(tree: Any, path: list[str], value: Any, key: str) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(tree, list):
        if not head.isdigit() or int(head) >= len(tree):
            raise UserError(f"{COMMAND_LINE}: {key}: {head!r} is not an index of the {len(tree)} entries there")
        copy: Any = list(tree)
        index: Any = int(head)
        copy[index] = _replace(copy[index], rest, value, key) if rest else value
        return copy
    branch = dict(tree) if isinstance(tree, dict) else {}
    branch[head] = _replace(branch.get(head), rest, value, key) if rest else value
    return branch


def _check_known(schema: type, tree: Any, key: str, text: str) -> None:
    """Walk a dotted key through the schema, so that an override's typing error is found before its value's.

    A number reaches an entry only of a list that ``tree`` has already.
    """
    at: Any = schema
    walked: list[str] = []
    parts = key.split(".")
    for part in parts:
        at = _branch_type(at)
        if dataclasses.is_dataclass(at):
            hints = typing.get_type_hints(at)
            if part not in hints:
                raise UserError(
                    _unknown_key(COMMAND_LINE, ".".join([*walked, part]), list(hints), colon="its value follows {}=")
                )
            at = hints[part]
        elif typing.get_origin(at) in (list, dict):
            if typing.get_origin(at) is list and not isinstance(tree, list):
                raise UserError(_no_such_list(key, parts[: len(walked)], parts[len(walked) + 1 :], text))
            at = typing.get_args(at)[-1]
        else:
            raise UserError(f"{COMMAND_LINE}: unknown key {key}: {'.'.join(walked)} is a single value")
        walked.append(part)
        if isinstance(tree, list):
            tree = tree[int(part)] if part.isdigit() and int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None


def _no_such_list(key: str, parent: list[str], beneath: list[str], text: str) -> str:
    for part in reversed(beneath):
        text = f"{{{part}: {text}}}"
    name = ".".join(parent)
    return (
        f"{COMMAND_LINE}: {key}: the configuration file gives no list {name} to change an entry of; give it whole, "
        f"as in '{name}=[{text}]'"
    )


def _branch_type(hint: Any) -> Any:
    """The structured member of an optional type: ``RefineConfig | None`` is walked as ``RefineConfig``."""
    if _is_union(hint):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        branches = [m for m in members if dataclasses.is_dataclass(m) or typing.get_origin(m) in (list, dict)]
        return branches[0] if branches else members[0]
    return hint


# --- building --------------------------------------------------------------------------------------------------


def _build(hint: Any, value: Any, key: str, origins: dict[str, str], metadata: dict | None = None) -> Any:
    def wrong(expected: str) -> UserError:
        where = f"{_origin(key, origins)}: {key or 'the file'}"
        return _WrongValue(f"{where}: expected {expected}, found {_show(value)}", expected)

    if _is_union(hint):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if value is None and len(members) < len(typing.get_args(hint)):
            return None
        if len(members) == 1:
            return _build(members[0], value, key, origins, metadata)
        expected = []
        for member in members:
            try:
                return _build(member, value, key, origins, metadata)
            except _WrongValue as error:
                expected.append(error.expected)
        raise wrong(", or ".join(expected))

    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, {} if value is None else value, key, origins, wrong)

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, bool) and {"yes", "no"} <= set(arguments):
            value = "yes" if value else "no"  # YAML 1.1 takes the bare words for booleans
        # bool is an int, so a plain `in` would let True stand for 1
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise wrong(("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments)))
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise wrong("a list")
        if origin is tuple and len(value) != len(arguments):
            raise wrong(f"a list of {len(arguments)} values")
        hints = arguments if origin is tuple else arguments * len(value)
        items = [
            _build(member, item, f"{key}.{i}", origins)
            for i, (member, item) in enumerate(zip(hints, value, strict=True))
        ]
        return origin(items)
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong("a mapping")
        return {str(name): _build(arguments[1], item, f"{key}.{name}", origins) for name, item in value.items()}
    return _build_scalar(hint, value, wrong, metadata or {})


def _build_dataclass(schema: type, value: Any, key: str, origins: dict[str, str], wrong: Any) -> Any:
    if not isinstance(value, dict):
        raise wrong("a mapping of keys")
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise UserError(_unknown_key(_origin(f"{prefix}{name}", origins), f"{prefix}{name}", list(fields)))
    filled = {
        name: _build(hints[name], item, f"{prefix}{name}", origins, dict(fields[name].metadata))
        for name, item in value.items()
    }
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in filled:
            raise UserError(f"{_origin(key, origins)}: {prefix}{name} must be given")
    try:
        return schema(**filled)
    except ValueError as error:
        raise UserError(f"{_origin(key, origins)}: {key or 'the file'}: {error}") from None


def _build_scalar(hint: type, value: Any, wrong: Any, metadata: dict) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise wrong(names[hint])
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong("a finite number")
    for name, holds in (
        ("at_least", lambda bound: value >= bound),
        ("at_most", lambda bound: value <= bound),
        ("above", lambda bound: value > bound),
    ):
        bound = metadata.get(name)
        if bound is not None and not holds(bound):
            raise wrong(f"{names[hint]} {name.replace('_', ' ')} {bound}")
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _origin(key: str, origins: dict[str, str]) -> str:
    """Who set this key: the longest prefix (or, for a branch, the override beneath it) that has an origin."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in origins:
            return origins[prefix]
    beneath = [who for path, who in origins.items() if key and path.startswith(f"{key}.")]
    return beneath[0] if beneath else origins[""]


def _unknown_key(
    source: str, key: str, known: list[str], *, colon: str = "YAML wants a space after the colon of {}:"
) -> str:
    """``colon``: advice for a known key that a colon and more stand behind."""
    glued = next((one for one in known if f".{one}:" in f".{key}"), None)
    if glued:
        return f"{source}: unknown key {key}; {colon.format(glued)}"
    parent, _, name = key.rpartition(".")
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f"{source}: unknown key {key}; did you mean {f'{parent}.' if parent else ''}{nearest[0]}?"
    return f"{source}: unknown key {key}; known here: {', '.join(known)}"


def _kind(value: Any) -> str:
    return {dict: "mapping", list: "list", str: "text", type(None): "null"}.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({_kind(value)})"
