"""Code in a form that only a change of what it says changes.

A function is read as the syntax tree of its source, without positions, comments, docstrings and its
own name, written out in a way that does not depend on the version of Python. Functions of the
project that it names are part of it, one level deep. Values that it closes over and constants of
its module are not. Of a function that others are wrapped around, only the inner one is read; what
agentflow's own nodes are made of, they declare (`declare_parts`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# Never in what decides: where a name is used, what a comment says of a type, `u` before a text.
_IGNORED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
_FOREIGN = ("agentflow", "langchain", "langchain_core", "langgraph", "pydantic")
_SIZE = 16
_PARTS = "__agentflow_parts__"
MAIN = "__main__"


class CodeChangedWarning(UserWarning):
    """A function in `__main__` was defined again after a graph was registered with it."""


@dataclass(frozen=True, slots=True)
class Code:
    """What was read of one or more functions."""

    tag: str
    names: frozenset[str]
    """Names that they use; of the functions that they call, too."""
    main: tuple[str, ...]
    """Those that stand in `__main__`: a script, or the cells of a notebook."""
    has_source: bool


def digest(text: str) -> str:
    """Return a short digest."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_SIZE]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a node of ours is made of."""

    callables: tuple[Any, ...]
    texts: tuple[str, ...]
    names: frozenset[str]


def declare_parts(made: Any, *parts: Any, leads_anywhere: bool = False) -> None:
    """Say what of the user's a node is made of, which is not to be seen in its own code.

    Args:
        made: The node: a function of ours, or an object.
        parts: Callables are read. Of a function, texts count too; whatever else does not.
        leads_anywhere: Whether it says by a `Command` where to go.
    """
    callables = tuple(part for part in parts if callable(part))
    texts = tuple(part for part in parts if isinstance(part, str))
    names = frozenset({"Command"} if leads_anywhere else ())
    vars(made)[_PARTS] = _Parts(callables, texts, names)


def code_tag(function: Any) -> str | None:
    """Identify the code of one callable; `None` for what has none to look at."""
    if next(functions_in(function), None) is None:
        return None
    code = Sources().read(function)
    return code.tag if code.has_source else None


@dataclass(slots=True)
class _Function:
    """What was read of one function, without what it calls."""

    text: str
    has_source: bool
    names: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)
    """Dotted names."""


@dataclass(slots=True)
class Sources:
    """Reads functions; each file is parsed once."""

    _trees: dict[str, Mapping[int, list[ast.AST]] | None] = field(default_factory=dict)
    _known: dict[types.CodeType, _Function] = field(default_factory=dict)

    def read(self, *found: Any) -> Code:
        """Read everything that is executed when one of these is called."""
        tags: list[str] = []
        names: set[str] = set()
        main: dict[str, None] = {}
        has_source = True
        for each in found:
            for function in functions_in(each):
                own = self._read(function)
                tags.append(own.text)
                if (declared := vars(function).get(_PARTS)) is not None:
                    tags += map(repr, declared.texts)
                    names |= declared.names
                has_source &= own.has_source
                for path, other in self._called(function, own):
                    called = self._read(other)
                    tags.append(f"{path}={called.text}")
                    names |= called.names
                    _note_main(main, other)
                names |= own.names
                _note_main(main, function)
        return Code(digest("\n".join(tags)), frozenset(names), tuple(main), has_source)

    def _read(self, function: types.FunctionType) -> _Function:
        code = function.__code__
        if code not in self._known:
            self._known[code] = self._read_anew(function)
        return self._known[code]

    def _read_anew(self, function: types.FunctionType) -> _Function:
        code = function.__code__
        if _is_library(function):
            return _Function(f"{function.__module__}:{function.__qualname__}", has_source=True)
        node = self._find(function)
        if node is None:
            # Without its source there is little to go by that every version of Python agrees on.
            return _Function(f"{code.co_varnames}{code.co_names}", has_source=False)
        writer = _Writer()
        writer.write(node, is_top=True)
        return _Function("".join(writer.parts), True, writer.names, writer.paths)

    def _find(self, function: types.FunctionType) -> ast.AST | None:
        """Find a function in the tree of its file."""
        code = function.__code__
        if code.co_filename not in self._trees:
            self._trees[code.co_filename] = _parse(code.co_filename, function.__globals__)
        tree = self._trees[code.co_filename]
        candidates = [] if tree is None else tree.get(code.co_firstlineno, [])
        named = [node for node in candidates if getattr(node, "name", "<lambda>") == code.co_name]
        if len(named) > 1:
            named = [node for node in named if _holds(node, code)] or named
        # Of lambdas inside one another, the innermost.
        return named[-1] if named else None

    def _called(
        self, function: types.FunctionType, own: _Function
    ) -> Iterator[tuple[str, types.FunctionType]]:
        """Yield the functions of the project that a function names, in order of their names."""
        for path in sorted(own.paths):
            for other in functions_in(_resolve(function, path)):
                if other.__code__ is not function.__code__ and _is_project(other, function):
                    yield path, other


def functions_in(found: Any) -> Iterator[types.FunctionType]:
    """Yield the Python functions that a callable, a runnable or a tool is made of."""
    waiting, seen = [found], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue  # functions that call each other
        seen.add(id(each))
        if isinstance(each, types.FunctionType) and not _is_wrapper(each):
            yield each
        waiting += reversed(_parts_of(each))


def _parts_of(found: Any) -> list[Any]:
    """Return what a callable consists of, if it is not a function itself."""
    if isinstance(found, types.FunctionType):
        return _parts_of_function(found)
    if isinstance(found, types.MethodType):
        return [found.__func__]
    if isinstance(found, functools.partial):
        return [found.func]
    if found is None or isinstance(found, (type, types.ModuleType, types.BuiltinFunctionType)):
        return []
    own = getattr(found, "__dict__", {})
    parts = _parts_of_runnable(own)
    if _PARTS in own:
        return [*own[_PARTS].callables, *(parts or ())]
    if parts is None and "__wrapped__" in own:
        return [own["__wrapped__"]]  # a cache
    if parts is None:
        call = inspect.getattr_static(type(found), "__call__", None)
        is_own = isinstance(call, types.FunctionType) and not _is_foreign(call.__module__)
        return [call] if is_own else []
    return parts


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    inner = getattr(function, "__wrapped__", None)
    if inner is not None:
        return [inner]
    if _PARTS in vars(function):
        return list(vars(function)[_PARTS].callables)
    parts = []
    if _is_library(function):
        # What a library's node was made of: the user's functions are among it.
        for cell in function.__closure__ or ():
            with suppress(ValueError):
                if isinstance(cell.cell_contents, (types.FunctionType, types.MethodType)):
                    parts.append(cell.cell_contents)
    return parts


def _parts_of_runnable(own: Mapping[str, Any]) -> list[Any] | None:
    """Return what a runnable, a tool or a task of the functional API calls."""
    tools = own.get("_tools_by_name")
    if isinstance(tools, Mapping):
        return [tools[name] for name in sorted(tools)]
    for names in (("steps",), ("first", "middle", "last")):
        if all(name in own for name in names):
            given = [own[name] for name in names]
            return [part for each in given for part in (each if isinstance(each, list) else [each])]
    called = [own[name] for name in ("func", "afunc", "coroutine") if own.get(name) is not None]
    # LangGraph wraps a synchronous function in a partial, to call it from a coroutine.
    return [called[0], *(p for p in called[1:] if not hasattr(p, "func"))] if called else None


def canonical(node: Any) -> str:
    """Write a syntax tree out, the same in every version of Python that can parse it."""
    writer = _Writer()
    writer.write(node, is_top=True)
    return "".join(writer.parts)


class _Writer:
    """Writes a syntax tree out, and notes the names that it comes by."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.names: set[str] = set()
        self.paths: set[str] = set()

    def write(self, node: Any, *, is_top: bool = False) -> None:
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
            if name == "name" and is_top and isinstance(node, _FUNCTIONS):
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


def _parse(filename: str, module: dict[str, Any]) -> Mapping[int, list[ast.AST]] | None:
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
        if isinstance(node, _FUNCTIONS):
            decorators = getattr(node, "decorator_list", [])
            line = min([node.lineno, *(each.lineno for each in decorators)])
            index.setdefault(line, []).append(node)
    return index


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


def _resolve(function: types.FunctionType, path: str) -> Any:
    """Return what a dotted name stands for in a function, as far as that is known without it."""
    first, *rest = path.split(".")
    free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    if first in free:
        try:
            found = free[first].cell_contents
        except ValueError:
            return None
    elif first in ("self", "cls") and "." in function.__qualname__:
        found = _owner(function)
    else:
        found = function.__globals__.get(first)
    for name in rest:
        if not isinstance(found, (types.ModuleType, type)):
            return None
        found = inspect.getattr_static(found, name, None)
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
    return found if callable(found) else None


def _owner(function: types.FunctionType) -> Any:
    """Return the class that a method was defined in."""
    found: Any = None
    for name in function.__qualname__.split(".")[:-1]:
        found = function.__globals__.get(name) if found is None else getattr(found, name, None)
        if found is None:
            return None
    return found


def _is_project(function: types.FunctionType, caller: types.FunctionType) -> bool:
    """Whether a function belongs to the user's own code."""
    if _is_library(function):
        return False
    ours = (caller.__module__ or "").partition(".")[0]
    if (function.__module__ or "").partition(".")[0] == ours:
        return True
    file = function.__code__.co_filename
    return not file.startswith(_libraries()) and not file.startswith("<frozen")


def _is_library(function: types.FunctionType) -> bool:
    return _is_foreign(function.__module__) or _is_foreign(_home(function))


def _is_wrapper(function: types.FunctionType) -> bool:
    """Whether a library has put a function around another one; it bears the other's name."""
    if not hasattr(function, "__wrapped__"):
        return False
    return _is_foreign(_home(function)) or function.__code__.co_filename.startswith(_libraries())


def _home(function: types.FunctionType) -> str | None:
    """Return the module in which a function was defined, whatever it says of itself."""
    home: str | None = function.__globals__.get("__name__")
    return home


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN


@functools.cache
def _libraries() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(str(Path(paths[name])) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _note_main(main: dict[str, None], function: types.FunctionType) -> None:
    if function.__module__ == MAIN and function.__name__ != "<lambda>":
        main[function.__qualname__] = None


def redefined_in_main(*found: Any) -> list[str]:
    """Name the functions of `__main__` that are not any more what stands there under their name."""
    module = sys.modules.get(MAIN)
    sources = Sources()
    names = []
    for each in found:
        for function in functions_in(each):
            if function.__module__ != MAIN or "." in function.__qualname__:
                continue
            now = getattr(module, function.__name__, None)
            now = inspect.unwrap(now) if isinstance(now, types.FunctionType) else None
            if now is None or now is inspect.unwrap(function):
                continue
            if sources.read(now).tag != sources.read(function).tag:
                names.append(function.__name__)
    return names
