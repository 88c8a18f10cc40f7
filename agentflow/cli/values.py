"""Values given on the command line: JSON in an argument, a file or stdin, `key=value`, and ages."""

from __future__ import annotations

import json
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from agentflow.cli.command import UsageError

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def read_json(option: str, text: str) -> Any:
    """Read JSON given as text, as `@file`, or as `-` for stdin.

    Raises:
        UsageError: It is not JSON, or there is no such file.
    """
    where = ""
    if text == "-":
        text, where = sys.stdin.read(), " from stdin"
    elif text.startswith("@"):
        where = f" in the file {text[1:]!r}"
        text = _read_file(option, text[1:])
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except json.JSONDecodeError as exc:
        problem = f"is not JSON{where}: {exc.msg} at line {exc.lineno} column {exc.colno}"
        raise UsageError(option, f"{problem}; strings need double quotes") from exc
    except (ValueError, RecursionError) as exc:
        raise UsageError(option, f"cannot be used{where}: {exc}") from exc


def read_pairs(option: str, pairs: list[str]) -> dict[str, str]:
    """Read `key=value` arguments; the last of a key counts."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not key or not sign:
            raise UsageError(option, f"takes key=value, not {pair!r}")
        found[key] = value
    return found


def read_age(option: str, text: str) -> timedelta:
    """Read a number with a unit, such as `30d`."""
    found = re.fullmatch(r"(\d+)([smhdw])", text)
    if found is None or int(found[1]) == 0:
        raise UsageError(option, f"takes a number and a unit, such as 30d, not {text!r}")
    try:
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
    except OverflowError as exc:
        raise UsageError(option, f"is longer than time goes on: {text!r}") from exc


def _read_file(option: str, name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise UsageError(option, f"cannot read the file {name!r}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(option, f"cannot read the file {name!r}: it is not UTF-8") from exc


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two values under one key: which one a reader saw and which one counts would be a guess.
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found
