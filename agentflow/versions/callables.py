"""Which functions a node is made of, and what the names in a function stand for.

A node may be a function, a method, an object that can be called, a partial, a runnable with others
in it, or a tool. What agentflow's own nodes are made of, they declare (`declare_parts`). Nothing is
called here, and no attribute is computed.
"""

from __future__ import annotations

import functools
import inspect
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.runnables import Runnable

PARTS = "__agentflow_parts__"
_FOREIGN = ("agentflow", "langchain", "langchain_core", "langgraph", "pydantic")
_RUNNABLES = ("bound", "steps__", "mapper", "branches", "default", "runnable", "fallbacks")
"""Where runnables keep those that they are made of."""
_INVOKED = ("invoke", "ainvoke")
_MAKING = ("__new__", "__init__", "__post_init__")
"""What is called where a class is."""


@dataclass(frozen=True, slots=True)
class Parts:
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
    vars(made)[PARTS] = Parts(callables, texts, names)


@dataclass(frozen=True, slots=True)
class Found:
    """A function, and whose method it is."""

    function: types.FunctionType
    owner: Any = None
    """The object, or the class, that it was found on; what `self` and `cls` stand for."""


def functions_in(found: Any) -> Iterator[Found]:
    """Yield the Python functions that a callable, a runnable or a tool is made of."""
    waiting: list[tuple[Any, Any]] = [(found, None)]
    seen: set[int] = set()
    while waiting:
        each, owner = waiting.pop()
        if id(each) in seen:
            continue  # functions that call each other
        seen.add(id(each))
        if isinstance(each, types.FunctionType):
            if not is_wrapper(each):
                yield Found(each, owner)
        elif isinstance(each, types.MethodType):
            owner = each.__self__
        elif not isinstance(each, functools.partial) and not is_foreign(type(each).__module__):
            owner = each
        waiting += [(part, owner) for part in reversed(_parts_of(each))]


def builtin_in(found: Any) -> str | None:
    """Name what is called without any Python function: of C, or a class."""
    func, afunc = (getattr(found, name, None) for name in ("func", "afunc"))
    each = found if func is None and afunc is None else func or afunc
    if isinstance(each, (type, types.BuiltinFunctionType)):
        return f"{each.__module__}.{each.__qualname__}"
    if isinstance(each, Runnable) or not callable(each):
        return None  # a model, say, which is no part of a node's code
    return f"{type(each).__module__}.{type(each).__qualname__}"


def _parts_of(found: Any) -> list[Any]:
    """Return what a callable consists of, if it is not a function itself."""
    if isinstance(found, types.FunctionType):
        return _parts_of_function(found)
    if isinstance(found, types.MethodType):
        return [found.__func__]
    if isinstance(found, functools.partial):
        given = [*found.args, *(found.keywords[name] for name in sorted(found.keywords))]
        return [found.func, *(each for each in given if _is_function(each))]
    if isinstance(found, type):
        return _parts_of_class(found)
    if found is None or isinstance(found, (types.ModuleType, types.BuiltinFunctionType)):
        return []
    own = getattr(found, "__dict__", {})
    parts = _parts_of_runnable(found, own)
    if PARTS in own:
        return [*own[PARTS].callables, *(parts or ())]
    if parts is None and "__wrapped__" in own:
        return [own["__wrapped__"]]  # a cache
    if parts is None:
        call = inspect.getattr_static(type(found), "__call__", None)
        is_own = isinstance(call, types.FunctionType) and not is_foreign(call.__module__)
        return [call] if is_own else []
    return parts


def _is_function(found: Any) -> bool:
    return isinstance(found, (types.FunctionType, types.MethodType, functools.partial))


def _parts_of_class(found: type) -> list[Any]:
    """Return how objects of a class are made, where somebody has written that."""
    made = [inspect.getattr_static(found, name, None) for name in _MAKING]
    made = [each.__func__ if isinstance(each, staticmethod) else each for each in made]
    # Those of records and of named tuples are generated: what they are made of are the types.
    return [each for each in made if _is_written(each)]


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    inner = getattr(function, "__wrapped__", None)
    if inner is not None:
        return [inner]
    if PARTS in vars(function):
        return list(vars(function)[PARTS].callables)
    parts = []
    if is_library(function):
        # What a library's node was made of: the user's functions are among it.
        for cell in function.__closure__ or ():
            with suppress(ValueError):
                if isinstance(cell.cell_contents, (types.FunctionType, types.MethodType)):
                    parts.append(cell.cell_contents)
    return parts


def _parts_of_runnable(found: Any, own: Mapping[str, Any]) -> list[Any] | None:
    """Return what a runnable, a tool or a task of the functional API calls."""
    tools = own.get("_tools_by_name")
    if isinstance(tools, Mapping):
        return [tools[name] for name in sorted(tools)]
    for names in (("steps",), ("first", "middle", "last")):
        if all(name in own for name in names):
            return list(_flat(own[name] for name in names))
    called = [own[name] for name in ("func", "afunc", "coroutine") if own.get(name) is not None]
    if called:
        # LangGraph wraps a synchronous function in a partial, to call it from a coroutine.
        return [called[0], *(p for p in called[1:] if not hasattr(p, "func"))]
    if isinstance(found, Runnable):
        invoked = (inspect.getattr_static(type(found), name, None) for name in _INVOKED)
        written = [each for each in invoked if _is_written(each)]
        return [*written, *_flat(own[name] for name in _RUNNABLES if name in own)] or None
    return None


def _is_written(found: Any) -> bool:
    """Whether it is a function that a user has written."""
    is_one = isinstance(found, types.FunctionType) and not is_library(found)
    return is_one and not found.__code__.co_filename.startswith(("<", *_libraries()))


def _flat(given: Iterable[Any]) -> Iterator[Any]:
    for each in given:
        if isinstance(each, Mapping):
            yield from (each[name] for name in sorted(each))
        elif isinstance(each, (list, tuple)):
            yield from _flat(each)
        else:
            yield each


def resolve(found: Found, path: str) -> Any:
    """Return what a dotted name stands for in a function, as far as that is known without it."""
    first, *rest = path.split(".")
    function = found.function
    free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    here: Any
    if first in free:
        try:
            here = free[first].cell_contents
        except ValueError:
            return None
    elif first in ("self", "cls") and first not in function.__globals__:
        here = _owner(function) if found.owner is None else found.owner
    else:
        here = function.__globals__.get(first)
    if _stands_in(here):
        return None
    for name in rest:
        if isinstance(inspect.getattr_static(type(here), name, None), functools.cached_property):
            return None  # it is there or not, as the case may be
        here, holder = inspect.getattr_static(here, name, None), here
        if _stands_in(here):
            return None
        if isinstance(here, (staticmethod, classmethod)):
            here = here.__func__
        elif isinstance(here, types.MemberDescriptorType):  # a slot
            with suppress(AttributeError):
                here = here.__get__(holder)
    return None if _stands_in(here) else here


def _stands_in(found: Any) -> bool:
    """Whether an object is there for another one, and would make or fetch that to be looked at."""
    return any("__class__" in vars(kind) for kind in type(found).__mro__ if kind is not object)


def _owner(function: types.FunctionType) -> Any:
    """Return the class that a method was defined in."""
    found: Any = None
    for name in function.__qualname__.split(".")[:-1]:
        found = function.__globals__.get(name) if found is None else getattr(found, name, None)
        if found is None:
            return None
    return found


def is_project(function: types.FunctionType, caller: types.FunctionType) -> bool:
    """Whether a function belongs to the user's own code."""
    if is_library(function):
        return False
    ours = (caller.__module__ or "").partition(".")[0]
    if (function.__module__ or "").partition(".")[0] == ours:
        return True
    file = function.__code__.co_filename
    return not file.startswith(_libraries()) and not file.startswith("<frozen")


def is_library(function: types.FunctionType) -> bool:
    """Whether a function belongs to one of the libraries that graphs are made with."""
    return is_foreign(function.__module__) or is_foreign(_home(function))


def is_wrapper(function: types.FunctionType) -> bool:
    """Whether a library has put a function around another one; it bears the other's name."""
    if not hasattr(function, "__wrapped__"):
        return False
    return is_foreign(_home(function)) or function.__code__.co_filename.startswith(_libraries())


def is_foreign(module: str | None) -> bool:
    """Whether a module belongs to one of the libraries that graphs are made with."""
    return (module or "").partition(".")[0] in _FOREIGN


def _home(function: types.FunctionType) -> str | None:
    """Return the module in which a function was defined, whatever it says of itself."""
    home: str | None = function.__globals__.get("__name__")
    return home


@functools.cache
def _libraries() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(str(Path(paths[name])) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
