"""Fingerprints: what changes them, and that nothing else does."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.tools import StructuredTool
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from pydantic import Field, create_model
from sqlalchemy import create_engine
from typing_extensions import TypedDict

from agentflow import effect, transaction
from agentflow.errors import InvalidInputError, UnknownVersionError
from agentflow.nodes import ToolPolicy, approval_node, llm_node, tool_node
from agentflow.tasks import Task, TaskRunner
from agentflow.versions import Fingerprint, fingerprint_of, source, syntax
from tests.golden import versions_v1

PROJECT = Path(__file__).parents[2]


class State(TypedDict, total=False):
    """A log."""

    log: Annotated[list[str], operator.add]


def define(code: str, folder: Path, name: str = "node") -> Callable[..., Any]:
    """Define a function in a file of its own, as another version of a project would."""
    folder.mkdir(exist_ok=True)
    file = folder / f"code{len(list(folder.iterdir()))}.py"
    file.write_text(textwrap.dedent(code))
    space: dict[str, Any] = {"__name__": "project"}
    exec(compile(file.read_text(), str(file), "exec"), space)  # noqa: S102 -- the test's own code
    found: Callable[..., Any] = space[name]
    return found


def tag(*nodes: Any, **options: Any) -> str:
    """Return the code tag of a graph with these nodes."""
    graph: StateGraph[State, None, State, State] = StateGraph(State)
    for number, node in enumerate(nodes):
        graph.add_node(f"n{number}", node)
        graph.add_edge(START, f"n{number}")
    nodes_of = fingerprint_of(graph.compile(), **options).graph["nodes"]
    return " ".join(nodes_of[f"n{number}"]["code"] for number in range(len(nodes)))


PLAIN = """
def helper(x):
    return x + 1

def node(state):
    return {"log": [helper(1)]}
"""
LOOK = """
def look(what: str) -> str:
    '''Look something up.'''
    return what
"""
SAME = {
    "comments": PLAIN.replace("return x + 1", "return x + 1  # one more"),
    "layout": PLAIN.replace('{"log": [helper(1)]}', '{\n        "log": [\n helper( 1 ) ] }'),
    "quotes": PLAIN.replace('"log"', "'log'"),
    "docstring": PLAIN.replace("(state):\n", '(state):\n    """Say what it does."""\n'),
    "place": f"import math\n\nX = 1\n{PLAIN}",
    "its own name": PLAIN.replace("def node", "def renamed") + "\nnode = renamed\n",
}
OTHER = {
    "its code": PLAIN.replace("helper(1)", "helper(2)"),
    "a function that it calls": PLAIN.replace("x + 1", "x + 2"),
    "a default": PLAIN.replace("(state)", "(state, n=1)"),
    "async": PLAIN.replace("def node", "async def node"),
}


@pytest.mark.parametrize("code", SAME.values(), ids=SAME)
def test_what_does_not_change_what_code_says_does_not_count(code: str, tmp_path: Path) -> None:
    assert tag(define(code, tmp_path / "b")) == tag(define(PLAIN, tmp_path / "a"))


@pytest.mark.parametrize("code", OTHER.values(), ids=OTHER)
def test_what_changes_what_code_says_counts(code: str, tmp_path: Path) -> None:
    assert tag(define(code, tmp_path / "b")) != tag(define(PLAIN, tmp_path / "a"))


RUNNABLES = "from langchain_core.runnables import *\ndef f(s): return {'log': [%d]}\nnode = "
CALLED = {
    "method of an object": """
        class Node:
            def __call__(self, state): return self.help(state)
            def help(self, state): return {"log": [%d]}
        node = Node()
        """,
    "method that a subclass overrides": """
        class Base:
            def __call__(self, state): return self.help(state)
            def help(self, state): return {}
        class Node(Base):
            def help(self, state): return {"log": [%d]}
        node = Node()
        """,
    "function that an object was given": """
        class Node:
            def __init__(self, f): self.f = f
            def __call__(self, state): return self.f(state)
        def f(state): return {"log": [%d]}
        node = Node(f)
        """,
    "method of an object that it has": """
        class Bank:
            __slots__ = ()
            def pay(self): return {"log": [%d]}
        class Node:
            __slots__ = ("bank",)
            def __init__(self): self.bank = Bank()
            def run(self, state): return self.bank.pay()
        node = Node().run
        """,
    "method of a global object": """
        class Bank:
            def pay(self): return {"log": [%d]}
        bank = Bank()
        def node(state): return bank.pay()
        """,
    "class that it makes an object of": """
        class Pay:
            def __init__(self, amount): self.amount = amount + %d
        def node(state): return {"log": [Pay(1).amount]}
        """,
    "function that a partial was given": """
        import functools
        def f(): return %d
        node = functools.partial(lambda f, state: {"log": [f()]}, f)
        """,
    "graph inside of a function": """
        from langgraph.graph import START, StateGraph
        graph = StateGraph(dict)
        graph.add_node("n", lambda _: {"log": [%d]})
        graph.add_edge(START, "n")
        graph = graph.compile(checkpointer=False)
        def call(state): return graph.invoke(state)
        def node(state): return call(state)
        """,
    "parallel": RUNNABLES + "RunnableParallel(log=f)",
    "branch": RUNNABLES + "RunnableBranch((bool, f), str)",
    "binding": RUNNABLES + "RunnableLambda(f).with_retry().with_config(tags=['x'])",
    "fallback": RUNNABLES + "RunnableLambda(str).with_fallbacks([RunnableLambda(f)])",
    "assignment": RUNNABLES + "RunnablePassthrough.assign(log=f)",
    "own runnable": """
        from langchain_core.runnables import Runnable
        class Node(Runnable):
            def invoke(self, state, config=None): return {"log": [%d]}
        node = Node()
        """,
}


@pytest.mark.parametrize("code", CALLED.values(), ids=CALLED)
def test_whatever_a_node_calls_by_name_counts(code: str, tmp_path: Path) -> None:
    one, again, two = (
        tag(define(textwrap.dedent(code) % number, tmp_path / str(index)))
        for index, number in enumerate((1, 1, 2))
    )
    assert one == again != two


def test_what_stands_in_for_something_else_is_not_looked_at(tmp_path: Path) -> None:
    """A lazy setting, or what belongs to the request that is being served."""
    code = """
        class Lazy:
            def __getattribute__(self, name): raise RuntimeError("outside of a request")
            @property
            def __class__(self): raise RuntimeError("outside of a request")
        request = Lazy()
        class Settings:
            current = Lazy()
        def node(state): return {"log": [request.user, Settings.current.rate]}
        """
    assert tag(define(code, tmp_path / "a")) == tag(define(code, tmp_path / "b"))


def test_second_graph_that_a_node_calls_counts() -> None:
    def calls(*numbers: int) -> str:
        one, two = (
            StateGraph[Any](State).add_node("n", lambda _: {}, metadata={"version": str(n)})
            for n in numbers
        )
        first, second = (each.add_edge(START, "n").compile() for each in (one, two))
        outer: Any = StateGraph(State)
        outer.add_node("n", lambda state: second.invoke(first.invoke(state)))
        return fingerprint_of(outer.add_edge(START, "n").compile()).digest

    assert len({calls(1, 1), calls(1, 2), calls(2, 1)}) == 3


def test_code_without_source_is_known_by_what_it_was_compiled_to(tmp_path: Path) -> None:
    def compiled(code: str) -> str:
        space: dict[str, Any] = {"__name__": "project"}
        exec(compile(code, "/gone.py", "exec"), space)  # noqa: S102 -- the test's own code
        return tag(space["node"])

    codes = [
        "def node(s): return {'log': ['a']}",
        "def node(s): return {'log': ['b']}",
        "def node(s): return s + 1",
        "def node(s): return s - 1",
        "def f(): return 1\ndef node(s): return f()",
        "def f(): return 2\ndef node(s): return f()",
        "def node(s): return s in {'a', 'b'}",
    ]
    made = [compiled(code) for code in codes]
    assert len(set(made)) == len(codes)
    assert made == [compiled(code) for code in codes]


def test_builtins_and_classes_are_told_apart() -> None:
    assert len({tag(node) for node in (len, sorted, Path)}) == 3


def test_reducer_that_is_a_partial_counts(tmp_path: Path) -> None:
    code = "import functools\nnode = functools.partial(lambda n, a, b: a + [%d], 1)"

    def reducer(number: int) -> Any:
        kind = Annotated[list[int], define(code % number, tmp_path / str(number))]
        graph = StateGraph(create_model("S", log=(kind, [])))
        graph.add_node("n", lambda _: {})
        graph.add_edge(START, "n")
        return fingerprint_of(graph.compile()).graph["channels"]["log"]["reducer"]

    assert reducer(1) != reducer(2)


def test_version_of_a_node_stands_for_its_code(tmp_path: Path) -> None:
    old, new = define(PLAIN, tmp_path / "a"), define(OTHER["its code"], tmp_path / "b")
    assert tag(old, versions={"n0": "3"}) == tag(new, versions={"n0": "3"}) == "version 3"


def test_lambdas_of_one_line_are_told_apart() -> None:
    one, two = (lambda _: {"log": ["a"]}), (lambda _: {"log": ["b"]})
    assert tag(one) != tag(two)


def test_functions_of_tools_and_tasks_and_methods_count(tmp_path: Path) -> None:
    def forms(code: str, folder: Path) -> list[str]:
        function = define(code, folder)

        def lookup(state: str) -> str:
            """Look something up."""
            return str(function(state))

        lookup.__code__ = lookup.__code__  # as it is; what it calls differs
        flow = entrypoint()(lambda x: task(function)(x).result())
        return [
            tag(type("Node", (), {"__call__": function})()),
            tag(ToolNode([lookup])),
            fingerprint_of(flow).digest,
        ]

    before, after = forms(PLAIN, tmp_path / "a"), forms(OTHER["its code"], tmp_path / "b")
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert before[2] != after[2]


def test_functions_of_a_library_that_hold_each_other_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def even(state: Any) -> Any:
        return odd(state)

    def odd(state: Any) -> Any:
        return even(state)

    own = tag(even)
    for function in (even, odd):
        monkeypatch.setattr(function, "__module__", "langgraph.prebuilt")
    assert tag(even) not in {own, ""}


def test_file_is_parsed_once_for_all_its_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = syntax.parse

    def counted(filename: str, module: dict[str, Any]) -> Any:
        parsed.append(filename)
        return parse(filename, module)

    monkeypatch.setattr("agentflow.versions.source.parse", counted)
    tag(*[define(PLAIN, tmp_path / "a")] * 2, lambda _: {}, lambda _: {"log": []})
    assert len(parsed) == len(set(parsed))
    assert __file__ in parsed


def test_command_that_nobody_declared_leads_anywhere(tmp_path: Path) -> None:
    code = PLAIN.replace('{"log": [helper(1)]}', 'Command(goto="x")')
    graph: StateGraph[State, None, State, State] = StateGraph(State)
    graph.add_node("open", define(f"from langgraph.types import Command\n{code}", tmp_path))
    graph.add_node("said", define(code, tmp_path), destinations=("open",))
    graph.add_edge(START, "open")
    nodes = fingerprint_of(graph.compile()).graph["nodes"]
    assert nodes["open"]["open"]
    assert not nodes["said"]["open"]
    assert nodes["said"]["to"] == ["open"]


@dataclass
class Box:
    """Holds a set."""

    of: frozenset[int]


def test_fields_and_defaults_of_types_count() -> None:
    def channels(kind: Any, default: Any) -> Any:
        schema = create_model("S", order=(kind, default))
        graph = StateGraph(schema)
        graph.add_node("n", lambda _: {})
        graph.add_edge(START, "n")
        return fingerprint_of(graph.compile()).graph["channels"]["order"]

    one = create_model("Order", amount=(int, 1), __module__="project")
    two = create_model("Order", amount=(float, 1), __module__="project")
    assert channels(one | None, None) != channels(two | None, None)
    assert channels(int, 1) != channels(int, 2)
    assert channels(int | None, 1) == channels(None | int, 1)
    factories = [Field(default_factory=lambda: [1]), Field(default_factory=lambda: [2])]
    assert channels(list, factories[0]) != channels(list, factories[1])
    # Sets of the same, in another order: that of texts is another one with each hash seed.
    sets = [frozenset([0, 8]), frozenset([8, 0])]
    assert repr(sets[0]) != repr(sets[1])
    for made in (lambda each: each, lambda each: {"a": [each]}, lambda each: Box(of=each)):
        first, second = map(made, sets)
        assert channels(Any, first) == channels(Any, second)
    assert channels(Any, sets[0]) != channels(Any, frozenset([0, 9]))


def test_golden_fingerprint_is_still_read_and_made() -> None:
    text = versions_v1.FILE.read_text().strip()
    assert Fingerprint.of_text(text, "golden").text == text
    assert fingerprint_of(versions_v1.graph()).text == text


@pytest.mark.parametrize("text", ["", "[]", '{"form": 1}', '{"form": 1, "graph": {}}'])
def test_what_is_no_fingerprint_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="somewhere"):
        Fingerprint.of_text(text, "somewhere")


def test_fingerprint_of_a_newer_program_is_refused() -> None:
    text = versions_v1.FILE.read_text().replace('"form":1', '"form":2')
    with pytest.raises(UnknownVersionError):
        Fingerprint.of_text(text, "somewhere")


def test_fingerprint_is_the_same_in_every_process_and_hash_seed() -> None:
    made = {
        subprocess.run(
            [sys.executable, "-c", "from tests.golden import versions_v1 as v; v.write()"],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("4711",)
    }
    assert made == {versions_v1.FILE.read_bytes()}


CANONICAL = """
import ast, importlib.util, sys
spec = importlib.util.spec_from_file_location("syntax", sys.argv[1])
syntax = sys.modules["syntax"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(syntax)
for file in sys.argv[2:]:
    print(syntax.digest(syntax.canonical(ast.parse(open(file, encoding="utf-8").read()))))
"""


def test_code_reads_the_same_in_every_version_of_python() -> None:
    """Whatever is installed beside the version that runs the tests."""
    files = [syntax.__file__, versions_v1.__file__, __file__, str(PROJECT / "agentflow/app.py")]

    def read(python: str | Path) -> str:
        ran = subprocess.run(
            [python, "-c", CANONICAL, syntax.__file__, *files],
            capture_output=True,
            check=True,
            text=True,
        )
        return ran.stdout

    others = sorted(
        found
        for minor in (11, 12, 13)
        for found in Path(sys.base_prefix).parent.glob(f"3.{minor}.*/bin/python3")
    )
    print(f"read by {', '.join(map(str, others)) or 'no other version: none is installed'}")
    assert {read(python) for python in others} <= {read(sys.executable)}


def test_what_is_wrapped_is_read_and_what_is_wrapped_around_it_is_not(tmp_path: Path) -> None:
    """So neither a release of agentflow's nor one of another library changes what a graph is."""

    def forms(code: str, folder: Path) -> list[Any]:
        function = define(code, folder)
        around = define("def around(state):\n    return function(state)\n", folder, "around")
        calls = around.__globals__
        made = []
        for wrap in (effect, transaction(create_engine("sqlite://")), lru_cache):
            calls["function"] = wrap(function)
            made += [tag(wrap(function)), tag(around)]
        return made

    before, after = forms(PLAIN, tmp_path / "a"), forms(OTHER["its code"], tmp_path / "b")
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert len({*before[::2]}) == len({*before[1::2]}) == 1
    plain = define(PLAIN, tmp_path / "c")
    assert before[0] == tag(plain)


def test_what_nodes_of_ours_are_made_of_counts(tmp_path: Path) -> None:
    """Prompts, tools, conditions, tasks."""

    def forms(code: str, folder: Path, text: str) -> list[str]:
        function = define(code, folder)
        tool = StructuredTool.from_function(function, name="look", description="look")
        asked = ToolPolicy(approval=function)
        runner = TaskRunner([Task(name="one", run=function)]).graph
        maybe = TaskRunner([Task(name="one", run=str, condition=function)]).graph
        return [
            tag(llm_node("x:y", prompt=function)),
            tag(llm_node("x:y", prompt=text)),
            tag(llm_node("x:y", trim=function)),
            tag(approval_node(function)),
            tag(approval_node(text)),
            tag(approval_node("a", when=function)),
            tag(tool_node([tool])),
            tag(tool_node([define(LOOK, folder, "look")], policies={"look": asked})),
            tag(tool_node([define(LOOK, folder, "look")], policy=asked)),
            fingerprint_of(runner).digest,
            fingerprint_of(maybe).digest,
        ]

    before = forms(PLAIN, tmp_path / "a", "be brief")
    assert before == forms(SAME["comments"], tmp_path / "c", "be brief")
    after = forms(OTHER["its code"], tmp_path / "b", "be kind")
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_approval_that_says_where_to_go_leads_anywhere() -> None:
    graph: StateGraph[State, None, State, State] = StateGraph(State)
    edges = {"approve": "said", "reject": "said"}
    graph.add_node("asked", approval_node("log"))
    graph.add_node("open", approval_node("log", edges=edges))
    graph.add_node("said", approval_node("log", edges=edges), destinations=("open",))
    graph.add_edge(START, "asked")
    nodes = fingerprint_of(graph.compile()).graph["nodes"]
    assert [nodes[name]["open"] for name in ("asked", "open", "said")] == [False, True, False]


def test_decorated_function_of_a_notebook_is_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def cell() -> Any:
        def node(state: State) -> State:
            return {}

        node.__module__, node.__qualname__ = source.MAIN, "node"
        return effect(node)

    module = sys.modules[source.MAIN]
    made = cell()
    read = source.Sources()
    read.read(made)
    for again in (made, cell()):
        monkeypatch.setattr(module, "node", again, raising=False)
        assert source.redefined_in_main(read.main) == []
    monkeypatch.setattr(module, "node", lambda _: {"log": []})
    assert source.redefined_in_main(read.main) == ["node"]
