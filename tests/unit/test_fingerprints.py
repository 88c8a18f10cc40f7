"""Fingerprints: what changes them, and that nothing else does."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.tools import StructuredTool
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from pydantic import create_model
from sqlalchemy import create_engine
from typing_extensions import TypedDict

from agentflow import effect, transaction
from agentflow.errors import InvalidInputError, UnknownVersionError
from agentflow.nodes import ToolPolicy, approval_node, llm_node, tool_node
from agentflow.tasks import Task, TaskRunner
from agentflow.versions import Fingerprint, fingerprint_of, source
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
    parse = source._parse

    def counted(filename: str, module: dict[str, Any]) -> Any:
        parsed.append(filename)
        return parse(filename, module)

    monkeypatch.setattr(source, "_parse", counted)
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
spec = importlib.util.spec_from_file_location("source", sys.argv[1])
source = sys.modules["source"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(source)
for file in sys.argv[2:]:
    print(source.digest(source.canonical(ast.parse(open(file, encoding="utf-8").read()))))
"""


def test_code_reads_the_same_in_every_version_of_python() -> None:
    """Whatever is installed beside the version that runs the tests."""
    files = [source.__file__, versions_v1.__file__, __file__, str(PROJECT / "agentflow/app.py")]

    def read(python: str | Path) -> str:
        ran = subprocess.run(
            [python, "-c", CANONICAL, source.__file__, *files],
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

    made = cell()
    monkeypatch.setattr(sys.modules[source.MAIN], "node", made, raising=False)
    assert source.redefined_in_main(made) == []
    assert source.redefined_in_main(cell()) == []
    monkeypatch.setattr(sys.modules[source.MAIN], "node", lambda _: {"log": []})
    assert source.redefined_in_main(made) == ["node"]
