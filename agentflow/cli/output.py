"""What a command prints: records to stdout, messages to stderr.

The three formats hold the same data under the records' own field names. Text that came from
outside is shown with every invisible and direction-changing character escaped, in all formats:
an approver must see what is there. JSON escapes are used, so JSON output still parses to the
original text.
"""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

import typer

from agentflow.types import Page, Unreadable, plain

# Printable by Unicode's categories, and yet nothing is seen: fillers, blanks, variation selectors.
_BLANK = frozenset(
    {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, 0x1D159}
    | set(range(0x180B, 0x1810))
    | set(range(0xFE00, 0xFE10))
    | set(range(0xE0100, 0xE01F0))
)

_FRACTION = re.compile(r"\.\d+(?=\+00:00$)")
"""Of a second: it is in the JSON, and only noise in a table."""

_LINE = 60
"""A value longer than this has lines of its own."""


class OutputFormat(StrEnum):
    """How data is printed."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


def visible(text: str, *, keep: str = "") -> str:
    """Escape each character that cannot be seen or that changes how others are shown.

    Args:
        text: Text from outside.
        keep: Control characters to leave alone, such as line breaks between lines of JSON.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep or _is_seen(char) else _escape(char) for char in text)


def _is_seen(char: str) -> bool:
    if char.isprintable():
        return ord(char) not in _BLANK
    return unicodedata.category(char) == "Zs"


def _escape(char: str) -> str:
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char)
    if short is not None:
        return short
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(
        f"\\u{int.from_bytes(units[at : at + 2], 'big'):04x}" for at in range(0, len(units), 2)
    )


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a record or payload as JSON that is safe to look at."""
    text = json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return visible(text, keep="\n")


def jsonable(value: Any) -> Any:
    """Turn a record, or a payload of any storable type, into what JSON knows."""
    value = plain(value)
    if isinstance(value, Enum):
        return jsonable(value.value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {_key(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if hasattr(value, "model_dump"):
        return jsonable(value.model_dump())
    return str(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else str(jsonable(key))


@dataclass(frozen=True, slots=True)
class Output:
    """Prints in the format that was asked for."""

    format: OutputFormat

    def message(self, text: str) -> None:
        """Tell a person something that is not data."""
        typer.echo(visible(text, keep="\n"), err=True)

    def error(self, code: str, text: str, *, hint: str | None = None) -> None:
        """Tell what went wrong; as a JSON object in one line where data is JSON."""
        if self.format is OutputFormat.TABLE:
            self.message(f"error: {text}")
            if hint is not None:
                self.message(f"hint: {hint}")
        else:
            facts = {"code": code, "message": text} | ({"hint": hint} if hint else {})
            self.message(to_json({"error": facts}))

    def rows(self, records: Sequence[Any], columns: Sequence[str], *, empty: str) -> None:
        """Print a list of records.

        Args:
            records: What was found.
            columns: The fields that a table shows, as paths (`request.title`).
            empty: What to say if there are none.
        """
        if not records:
            self.message(empty)
        if self.format is OutputFormat.JSON:
            typer.echo(to_json(records, indent=2))
        elif self.format is OutputFormat.JSONL:
            for record in records:
                typer.echo(to_json(record))
        elif records:
            _print_table([jsonable(record) for record in records], columns)

    def page(self, page: Page[Any], columns: Sequence[str], *, empty: str) -> None:
        """Print a page of a listing, with what of it cannot be read; see `rows`."""
        self.rows(self.page_rows(page, columns), columns, empty=empty)
        for each in page.unreadable:
            self.message(f"{each.id} cannot be read: {type(each.error).__name__}: {each.error}")
        if page.cursor is not None:
            self.message(f"there are more: --cursor {page.cursor}")

    def page_rows(self, page: Page[Any], columns: Sequence[str]) -> list[Any]:
        """Return the records of a page, with what is known of those that cannot be read."""
        left_out = [self._unreadable(each, columns[0]) for each in page.unreadable]
        return [*page.items, *left_out]

    def _unreadable(self, record: Unreadable, name: str) -> dict[str, Any]:
        error = type(record.error).__name__
        found = {name: record.id, "graph": record.graph, "version": record.version}
        if self.format is OutputFormat.TABLE:
            return {**found, "status": error}
        return {**found, "status": record.status, "unreadable": error}

    def record(self, record: Any, fields: Sequence[str] | None = None) -> None:
        """Print one record; a table shows the given fields, or all."""
        if self.format is OutputFormat.TABLE:
            data = jsonable(record)
            for line in field_lines(data, fields or list(data)):
                typer.echo(line)
        else:
            typer.echo(to_json(record, indent=2 if self.format is OutputFormat.JSON else None))


def field_lines(data: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    """Return `name: value` lines, without the fields that are not set."""
    found = {name: _at(data, name) for name in fields}
    shown = {name: value for name, value in found.items() if not _unset(value)}
    width = max((len(name) for name in shown), default=0)
    lines: list[str] = []
    for name, value in shown.items():
        text = _text(name, value)
        if isinstance(value, (Mapping, list)) and len(text) > _LINE:
            indented = to_json(value, indent=2).splitlines()
            lines += [f"{name}:", *(f"  {line}" for line in indented)]
        else:
            lines.append(f"{name + ':':<{width + 1}} {text}")
    return lines


def block(title: str, text: str) -> list[str]:
    """Return lines of free text under a title, each marked, so that none can pass for ours."""
    return [f"{title}:", *(f"  | {visible(line)}" for line in text.splitlines())]


def _print_table(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    cells = [[_text(column, _at(record, column)) for column in columns] for record in records]
    if not sys.stdout.isatty():
        for row in (columns, *cells):
            typer.echo("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in {"id", "status"})
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console(markup=False, emoji=False, highlight=False).print(table)


def _at(data: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(data, Mapping):
            return None
        data = data.get(name)
    return data


def _unset(value: Any) -> bool:
    return value is None or value in ("", {}, [])


def _text(path: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return visible(_FRACTION.sub("", value) if path.endswith("_at") else value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return visible(", ".join(value))
    return to_json(value)
