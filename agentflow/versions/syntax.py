"""Code as a syntax tree, written out in a form that only a change of what it says changes.

Positions, comments, docstrings and a function's own name do not count, and no version of Python
writes it otherwise. This module imports nothing of ours, so that any of them can be asked.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import types
from collections.abc import Mapping
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# Never in what decides: where a name is used, what a comment says of a type, `u` before a text.
_IGNORED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
_SIZE = 16
Tree = Mapping[int, list[ast.AST]]
"""The functions of a file by the line at which they begin."""


def digest(text: str) -> str:
    """Return a short digest."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_SIZE]


def canonical(node: Any) -> str:
    """Write a syntax tree out, the same in every version of Python that can parse it."""
    writer = Writer()
    writer.write(node, is_top=True)
    return "".join(writer.parts)


class Writer:
    """Writes a syntax tree out, and notes the names that it comes by."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.parts: list[str] = []
        self.names: set[str] = set()
        self.paths: set[str] = set()

    def write(self, node: Any, *, is_top: bool = False) -> None:
        """Write a node; of the outermost one, its own name does not count."""
        parts = self.parts
        if isinstance(node, ast.AST):
            if isinstance(node, ast.Constant):
                parts.append(f"{type(node.value).__name__}:{node.value!r}")
            else:
                self._write_fields(node, is_top=is_top)
        elif isinstance(node, list):
            parts.append("[")
            for each in node:
                self.write(each)
                parts.append(",")
            parts.append("]")
        else:
            parts.append(repr(node))

    def _write_fields(self, node: ast.AST, *, is_top: bool) -> None:
        parts = self.parts
        if isinstance(node, (ast.Name, ast.Attribute)):
            self._note(node)
        parts.append(f"{type(node).__name__}(")
        for name in node._fields:
            value = getattr(node, name, None)
            # Newer versions have fields that older ones lack; where empty, they say nothing.
            if value is None or value == [] or name in _IGNORED:
                continue
            if name == "name" and is_top and isinstance(node, FUNCTIONS):
                continue
            if name == "body" and isinstance(value, list):
                value = _without_docstring(node, value)
            if isinstance(node, ast.JoinedStr):
                value = _merged(value)
            parts.append(f"{name}=")
            self.write(value)
            parts.append(",")
        parts.append(")")

    def _note(self, node: ast.Name | ast.Attribute) -> None:
        self.names.add(node.id if isinstance(node, ast.Name) else node.attr)
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            self.paths.add(".".join([inner.id, *reversed(parts)]))


def _without_docstring(node: ast.AST, body: list[Any]) -> list[Any]:
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if not isinstance(node, documented) or not body or not isinstance(body[0], ast.Expr):
        return body
    first = body[0].value
    return body[1:] if isinstance(first, ast.Constant) and isinstance(first.value, str) else body


def _merged(values: list[ast.expr]) -> list[ast.expr]:
    """Join neighbouring texts of an f-string, which not every version of Python does."""
    merged: list[ast.expr] = []
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            if value.value == "":
                continue
            last = merged[-1] if merged else None
            if isinstance(last, ast.Constant) and isinstance(last.value, str):
                merged[-1] = ast.Constant(last.value + value.value)
                continue
        merged.append(value)
    return merged


def parse(filename: str, module: dict[str, Any]) -> Tree | None:
    """Index the functions of a file by the line at which they begin; `None` without a source."""
    lines = linecache.getlines(filename, module)
    try:
        tree = ast.parse("".join(lines)) if lines else None
    except (SyntaxError, ValueError):
        return None
    if tree is None:
        return None
    index: dict[int, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            decorators = getattr(node, "decorator_list", [])
            line = min([node.lineno, *(each.lineno for each in decorators)])
            index.setdefault(line, []).append(node)
    return index


def find(tree: Tree | None, code: types.CodeType) -> ast.AST | None:
    """Find a function in the tree of its file."""
    candidates = [] if tree is None else tree.get(code.co_firstlineno, [])
    named = [node for node in candidates if getattr(node, "name", "<lambda>") == code.co_name]
    if len(named) > 1:
        named = [node for node in named if _holds(node, code)] or named
    # Of lambdas inside one another, the innermost.
    return named[-1] if named else None


def _holds(node: ast.AST, code: types.CodeType) -> bool:
    """Whether code stands within a lambda, of several in its line."""
    body = getattr(node, "body", node)
    assert isinstance(body, ast.AST)
    first = (getattr(body, "lineno", 0), getattr(body, "col_offset", 0))
    last = (getattr(body, "end_lineno", 0) or 0, getattr(body, "end_col_offset", 0) or 0)
    places = [
        ((line, column), (end_line or line, end_column or column))
        for line, end_line, column, end_column in code.co_positions()
        if line is not None and column is not None and (column, end_column) != (0, 0)
    ]
    return bool(places) and all(first <= begin and end <= last for begin, end in places)
