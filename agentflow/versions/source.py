"""Code in a form that only a change of what it says changes.

A function is read as the syntax tree of its source (`syntax.py`). Functions of the project that it
calls by name are part of it, one level deep; so are graphs that it calls. Values that it closes
over and constants of its module are not. Of a function that a library has wrapped, only the inner
one is read.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from langgraph.pregel import Pregel

from agentflow.versions.callables import (
    PARTS,
    Found,
    builtin_in,
    functions_in,
    is_library,
    is_project,
    resolve,
)
from agentflow.versions.syntax import Tree, Writer, digest, find, parse

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
    graphs: tuple[Pregel[Any, Any, Any, Any], ...] = ()
    """Graphs that they call by name."""


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
class _Read:
    """What has been read so far."""

    tags: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    main: dict[str, None] = field(default_factory=dict)
    graphs: dict[int, Pregel[Any, Any, Any, Any]] = field(default_factory=dict)
    has_source: bool = True


@dataclass(slots=True)
class Sources:
    """Reads functions; each file is parsed once."""

    main: dict[str, str] = field(default_factory=dict)
    """What was read of `__main__`: the names of functions, and what each of them says."""
    _trees: dict[str, Tree | None] = field(default_factory=dict)
    _known: dict[types.CodeType, _Function] = field(default_factory=dict)

    def read(self, *found: Any) -> Code:
        """Read everything that is executed when one of these is called."""
        done = _Read()
        for each in found:
            is_empty = True
            for function in functions_in(each):
                self._add(done, function)
                is_empty = False
            if is_empty and (name := builtin_in(each)) is not None:
                done.tags.append(name)
        tag = digest("\n".join(done.tags))
        graphs = tuple(done.graphs.values())
        return Code(tag, frozenset(done.names), tuple(done.main), done.has_source, graphs)

    def _add(self, done: _Read, found: Found) -> None:
        own = self._read(found.function)
        done.tags.append(own.text)
        if (declared := vars(found.function).get(PARTS)) is not None:
            done.tags += map(repr, declared.texts)
            done.names |= declared.names
        done.has_source &= own.has_source
        for path, named in _named(found, own):
            if isinstance(named, Pregel):
                done.graphs[id(named)] = named
                continue
            for other in _called(found, path, named):
                called = self._read(other.function)
                done.tags.append(f"{path}={called.text}")
                done.names |= called.names
                for _, each in _named(other, called):
                    if isinstance(each, Pregel):
                        done.graphs[id(each)] = each
                self._note_main(done, other.function, called)
        done.names |= own.names
        self._note_main(done, found.function, own)

    def _read(self, function: types.FunctionType) -> _Function:
        code = function.__code__
        if code not in self._known:
            self._known[code] = self._read_anew(function)
        return self._known[code]

    def _read_anew(self, function: types.FunctionType) -> _Function:
        code = function.__code__
        if is_library(function):
            return _Function(f"{function.__module__}:{function.__qualname__}", has_source=True)
        if code.co_filename not in self._trees:
            self._trees[code.co_filename] = parse(code.co_filename, function.__globals__)
        node = find(self._trees[code.co_filename], code)
        if node is None:
            names = {*code.co_names, *code.co_freevars}
            return _Function(_compiled(code), False, names, names)
        writer = Writer()
        writer.write(node, is_top=True)
        return _Function("".join(writer.parts), True, writer.names, writer.paths)

    def _note_main(self, done: _Read, function: types.FunctionType, own: _Function) -> None:
        if function.__module__ == MAIN and function.__name__ != "<lambda>":
            done.main[function.__qualname__] = None
            if "<" not in function.__qualname__:
                self.main[function.__qualname__] = own.text


def _named(found: Found, own: _Function) -> Iterator[tuple[str, Any]]:
    """Yield what the names in a function stand for, in order."""
    if is_library(found.function):
        return
    for path in sorted(own.paths):
        if (named := resolve(found, path)) is not None:
            yield path, named


def _called(found: Found, path: str, named: Any) -> Iterator[Found]:
    """Yield the functions of the project that a name in a function stands for."""
    for other in functions_in(named):
        is_itself = other.function.__code__ is found.function.__code__
        if not is_itself and is_project(other.function, found.function):
            is_own = path.startswith(("self.", "cls.")) and other.owner is None
            yield Found(other.function, found.owner) if is_own else other


def _compiled(code: types.CodeType) -> str:
    """Write out code without its source: by what it was compiled to, which fails on the safe side.

    Another version of Python compiles it otherwise, and it is another one then.
    """
    parts = [code.co_code.hex(), repr(code.co_names), repr(code.co_varnames)]
    parts += [
        _compiled(each) if isinstance(each, types.CodeType) else _constant(each)
        for each in code.co_consts
    ]
    return digest("\n".join(parts))


def _constant(value: Any) -> str:
    # The order of a set is not the same in every process.
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def redefined_in_main(read: Mapping[str, str]) -> list[str]:
    """Name the functions of `__main__` that are not any more what was read under their name."""
    sources = Sources()
    names = []
    for name, text in read.items():
        try:
            now = functools.reduce(getattr, name.split("."), sys.modules[MAIN])
        except (KeyError, AttributeError):
            continue  # nothing stands there any more
        if all(sources._read(each.function).text != text for each in functions_in(now)):
            names.append(name)
    return names
