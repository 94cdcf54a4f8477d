"""Rows of text out of files and Hub data sets: the one place that knows data formats and column names.

Every row remembers where it came from, so that whoever finds fault with it can name the file and the line.
All errors are :class:`~dcr_scale.errors.UserError` with one line.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dcr_scale.config import ContrastSource, Label, Source
from dcr_scale.errors import UserError

if TYPE_CHECKING:
    import pyarrow

Kind = Literal["contrast", "general", "refusals", "prompts", "suite"]

BUILTIN = Path(__file__).with_name("builtin")
HUB = "hub:"

# Tried in this order, whatever their case, where the configuration names no column. XSTest's `focus` is the
# word that a prompt and its contrast turn on.
USUAL_COLUMNS = {
    "prompt": ("prompt", "question", "instruction", "text"),
    "input": ("input",),
    "response": ("response", "output", "answer", "completion"),
    "label": ("label",),
    "family": ("family", "focus"),
    "pair": ("pair",),
    "category": ("category", "category_text", "semanticcategory", "type"),
}
USUAL_LABELS: dict[str, Label] = {
    "seemingly_toxic": "seemingly_toxic",
    "safe": "seemingly_toxic",
    "toxic": "toxic",
    "unsafe": "toxic",
}
ROLES: dict[Kind, tuple[str, ...]] = {
    "contrast": ("prompt", "input", "label", "family", "pair"),
    "general": ("prompt", "input", "response", "family"),
    "refusals": ("prompt", "input", "response", "family"),
    "prompts": ("prompt", "input", "family", "pair"),
    "suite": ("prompt", "input", "label", "category"),
}
TEXTS = ("prompt", "input", "response")
OPTIONAL = ("input", "family", "pair", "category")


@dataclass(frozen=True)
class Row:
    """One row under our own names: prompt and, by kind, family, label, pair, category or response.

    The prompt has the row's input, if any, appended after a blank line; an absent family, pair or category is ``""``; a
    label is one of :data:`~dcr_scale.config.Label`. ``where`` reads like ``"prompts.jsonl, line 12"``.
    """

    values: dict[str, str]
    where: str


class _Table(NamedTuple):
    name: str
    columns: list[str]
    records: Iterable[tuple[str, Mapping[str, Any]]]


def read_rows(source: Source, *, kind: Kind) -> list[Row]:
    """All rows of one source, in its own order; ``source.limit`` is left to the caller, who has the seed.

    Raises UserError where the source cannot be read, lacks a column, or has a row without a prompt, response
    or known label.
    """
    table = _open(source, kind)
    columns = _resolve(table, source, kind) if table.columns else {}
    rows = []
    for where, record in table.records:
        values = {role: _value(record, column, role, where) for role, column in columns.items()}
        values = {role: values.get(role, "") for role in ROLES[kind]}
        if appended := values.pop("input"):
            values["prompt"] += f"\n\n{appended}"
        rows.append(Row(values, where))
    if not rows:
        raise UserError(f"{table.name}: no rows; each class needs at least two")
    if isinstance(source, ContrastSource):
        return _labelled(rows, source, columns.get("label"))
    return rows


def read_columns(source: Source) -> list[str]:
    """The names of a file's or Hub data set's columns, as published. Raises UserError where it cannot be read."""
    return _open(source, "suite").columns


def quoted(text: str, width: int = 60) -> str:
    """A text's beginning in quotes on one line, for error messages."""
    return f"'{_one_line(text, width)}'"


def listed(found: Sequence[str], most: int = 3) -> str:
    """The first few findings and how many there are in all, for error messages."""
    more = f" … {len(found)} in all" if len(found) > most else ""
    return "; ".join(found[:most]) + more


# --- formats ------------------------------------------------------------------------------------------------


def _open(source: Source, kind: Kind) -> _Table:
    if source.path.startswith(HUB):
        return _open_hub(source)
    if source.path == "builtin":
        path, name = BUILTIN / f"{kind}.jsonl", f"builtin/{kind}.jsonl"
    else:
        path, name = Path(source.path).expanduser(), source.path
    readers: dict[str, Callable[[Path, str], _Table]] = {
        ".jsonl": _open_jsonl,
        ".csv": _open_csv,
        ".parquet": _open_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{name}: cannot read files of type {path.suffix!r}; give a .jsonl (one JSON object a line), "
            f".csv or .parquet file, {HUB}owner/name, or builtin"
        )
    try:
        return reader(path, name)
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(path.name, siblings, n=1)
        advice = f"did you mean {nearest[0]!r} there?" if nearest else "check its path"
        raise UserError(f"{name}: no such file in {path.parent.absolute()}; {advice}") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or _message(error)})") from None


def _decode(path: Path, name: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts offsets from behind the byte order mark
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, start) + 1
        raise UserError(
            f"{name}, line {line}: byte 0x{data[start]:02x} at offset {start} is not UTF-8; convert the "
            f"file, as iconv -f latin1 -t utf-8 does"
        ) from None


def _open_jsonl(path: Path, name: str) -> _Table:
    records = []
    columns: dict[str, None] = {}
    # not splitlines(): JSON strings may hold U+2028 and other separators that it would cut at
    for number, line in enumerate(_decode(path, name).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); give one JSON object a line") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: found {_kind(record)} {quoted(line, 40)}; give one JSON object a line")
        columns.update(dict.fromkeys(record))
        records.append((where, record))
    return _Table(name, list(columns), records)


def _open_csv(path: Path, name: str) -> _Table:
    reader = csv.reader(io.StringIO(_decode(path, name), newline=""), strict=True)
    header: list[str] = []
    records: list[tuple[str, Mapping[str, Any]]] = []
    while True:
        # a quoted field may span lines: the row is reported by its first
        where = f"{name}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return _Table(name, header, records)
        except csv.Error as error:
            raise UserError(f"{where}: not valid CSV ({error}); a quote inside a quoted field is doubled") from None
        if not cells:
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            twice = sorted({column for column in header if header.count(column) > 1})
            if twice:
                raise UserError(f"{where}: two columns are named {twice[0]!r}; rename one")
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{where}: {len(cells)} fields where the header has {len(header)}; put quotes around a field "
                f"that holds a comma or a line break"
            )
        records.append((where, dict(zip(header, cells, strict=True))))


def _open_parquet(path: Path, name: str) -> _Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: not a readable Parquet file ({_message(error)})") from None
    return _Table(name, table.column_names, _arrow_records(table, name))


def _open_hub(source: Source) -> _Table:
    # only here: it takes seconds to import
    import datasets

    repository = source.path.removeprefix(HUB)
    name = f"{source.path}, {f'subset {source.subset}, ' if source.subset else ''}split {source.split}"
    try:
        dataset = datasets.load_dataset(repository, source.subset, split=source.split, revision=source.revision)
        # as Arrow, images and audio beside the text stay undecoded bytes
        table = dataset.with_format("arrow")[:]
    except Exception as error:  # `datasets` lets everything from network to parser errors through
        raise UserError(
            f"{name}: `datasets` could not load it ({type(error).__name__}: {_message(error)}); check name, "
            f"subset, split and network, or download it and give the file"
        ) from None
    return _Table(name, table.column_names, _arrow_records(table, name))


def _arrow_records(table: pyarrow.Table, name: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: a text in rows {number + 1} to {number + batch.num_rows} is not UTF-8 (byte "
                f"0x{error.object[error.start]:02x}); write the file anew from decoded text"
            ) from None
        for record in records:
            number += 1
            yield f"{name}, row {number}", record


# --- columns ------------------------------------------------------------------------------------------------


def _resolve(table: _Table, source: Source, kind: Kind) -> dict[str, str]:
    """Role to column for every role of this kind that the source has."""
    one_class = isinstance(source, ContrastSource) and source.label is not None
    if isinstance(source, ContrastSource) and one_class and (source.labels or source.columns.label):
        raise UserError(
            f"data.contrast: {source.path}: label gives every row the class {source.label}, so labels and "
            f"columns.label have no effect; remove them or label"
        )
    columns: dict[str, str] = {}
    for field in fields(source.columns):
        role, chosen = field.name, getattr(source.columns, field.name)
        if role not in ROLES[kind]:
            if chosen is not None:
                raise UserError(f"{source.path}: columns.{role} has no meaning for {kind}; remove it")
            continue
        if role == "label" and one_class:
            continue
        column = _usual(table.columns, role) if chosen is None else chosen
        if column in table.columns:
            columns[role] = column
        elif column is not None or role not in OPTIONAL:
            raise UserError(_missing_column(table, role, column))
    return columns


def _usual(columns: list[str], role: str) -> str | None:
    by_name = {column.strip().lower(): column for column in columns}
    return next((by_name[name] for name in USUAL_COLUMNS[role] if name in by_name), None)


def _missing_column(table: _Table, role: str, column: str | None) -> str:
    found = ", ".join(map(repr, table.columns)) or "none"
    if column is None:
        usual = " or ".join(map(repr, USUAL_COLUMNS[role]))
        other = ", or label where all rows are of one class" if role == "label" else ""
        advice = f"no {role} column {usual}; columns found: {found}; set columns.{role}{other}"
        column = role
    else:
        advice = f"no column {column!r}, which columns.{role} names; columns found: {found}"
    nearest = difflib.get_close_matches(column, table.columns, n=1)
    return f"{table.name}: {advice}{f'; did you mean {nearest[0]!r}?' if nearest else ''}"


def _value(record: Mapping[str, Any], column: str, role: str, where: str) -> str:
    value = record.get(column)
    at = f"{where}, column {column!r}"
    if value is None:
        if role in OPTIONAL:
            return ""
        state = "is null" if column in record else "is missing"
        raise UserError(f"{at}: the {role} {state}; fill it in or remove the row")
    # a conversation of one turn is its prompt
    if role == "prompt" and isinstance(value, list) and len(value) == 1:
        [value] = value
    if not isinstance(value, str):
        # numbers name labels, families and pairs well enough, but nobody prompts with one
        if role in TEXTS or not isinstance(value, (bool, int, float)):
            raise UserError(f"{at}: the {role} must be text, found {_kind(value)}; put text there")
        return str(value)
    text = value.strip()
    if not text and role not in OPTIONAL:
        raise UserError(f"{at}: the {role} is empty; fill it in or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{at}: half a surrogate pair, \\u{ord(text[error.start]):04x}, is no character; mend the {role}"
        ) from None
    return text


def _labelled(rows: list[Row], source: ContrastSource, column: str | None) -> list[Row]:
    """The rows under our own labels, without those that the configuration drops."""
    if source.label is not None:
        return [Row({**row.values, "label": source.label}, row.where) for row in rows]
    names: Mapping[str, Label | None] = source.labels if source.labels is not None else USUAL_LABELS
    ours = {name.strip().casefold(): label for name, label in names.items()}
    kept = []
    for row in rows:
        value = row.values["label"]
        if value.casefold() not in ours:
            found = sorted({row.values["label"] for row in rows})
            listed = ", ".join(map(quoted, found[:8])) + (" …" if len(found) > 8 else "")
            raise UserError(
                f"{row.where}, column {column!r}: unknown label {quoted(value)}; values found: {listed}; map "
                f"each in data.contrast's labels to seemingly_toxic or toxic, or to null to drop its rows"
            )
        label = ours[value.casefold()]
        if label is not None:
            kept.append(Row({**row.values, "label": label}, row.where))
    return kept


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _message(error: Exception) -> str:
    return _one_line(str(error), 200) or "no message"
