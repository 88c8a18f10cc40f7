"""Which version of a graph a run gets, and code that changes in a notebook."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import pytest

from agentflow import AgentFlow
from agentflow.errors import IncompatibleGraphError, InvalidInputError, UnknownGraphError
from agentflow.types import RunStatus
from agentflow.versions import CodeChangedWarning
from tests.integration.graphs import asks, chain


def app_of(*versions: str) -> AgentFlow:
    """Open an app with some versions of a graph, each of which logs its number."""
    app = AgentFlow("memory://")
    for version in versions:
        app.register(
            chain(("n", lambda _, version=version: {"log": [version]})), name="g", version=version
        )
    return app


async def test_run_gets_the_newest_version_or_the_one_it_asks_for_and_keeps_it() -> None:
    async with app_of("2", "10", "9") as app:
        newest = await app.submit("g", {"log": []})
        asked = await app.submit("g", {"log": []}, version="10")
        app.register(chain(("other", lambda _: {"log": ["11"]})), name="g", version="11")
        runs = [await app.drive(each.id) for each in (newest, asked)]
        assert [(run.version, run.output["log"]) for run in runs] == [("9", ["9"]), ("10", ["10"])]
        with pytest.raises(UnknownGraphError):
            await app.submit("g", {"log": []}, version="12")


async def test_share_of_new_runs_goes_to_a_version_by_their_ids() -> None:
    async with app_of("1", "2") as app:
        ids = [f"run-{number}" for number in range(60)]
        await app.route("g", "2", 0.25, by="ann")
        got = {
            each: (await app.get_run((await app.submit("g", {}, run_id=each)).id)) for each in ids
        }
        canary = {run_id for run_id, run in got.items() if run.version == "2"}
        assert 5 <= len(canary) <= 25
        # The same in every process, and again and again; more of them with a larger share.
        registry = app_of("1", "2")._registry
        routes = await app.list_routes("g")
        assert {each for each in ids if registry.choose("g", each, routes).version == "2"} == canary
        larger = await app.route("g", "2", 0.75)
        assert canary < {e for e in ids if registry.choose("g", e, larger).version == "2"}
        pinned = await app.submit("g", {}, version="1", run_id=f"pinned-{min(canary)}")
        assert (await pinned.run()).version == "1"
        # Of what is not here, nothing can be submitted.
        assert app_of("1")._registry.choose("g", min(canary), routes).version == "1"
        assert await app.route("g", "2", None) == ()
        assert (await (await app.submit("g", {})).run()).version == "2"


@pytest.mark.parametrize("share", [-0.1, 1.1, "half", True])
async def test_share_that_is_none_is_refused(share: Any) -> None:
    async with app_of("1") as app:
        with pytest.raises(InvalidInputError, match="share"):
            await app.route("g", "1", share)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand in for the module of a notebook's cells."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def run_cell(notebook: ModuleType, code: str, number: int) -> None:
    """Execute a cell as IPython does: its source is found by the name of its file."""
    import linecache

    name = f"<cell {number}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), vars(notebook))  # noqa: S102 -- that is what a notebook does


CELL = "def pay(state):\n    return {'log': ['paid']}\n"


async def test_code_that_changed_in_a_notebook_is_warned_of_by_name(notebook: ModuleType) -> None:
    run_cell(notebook, CELL, 1)
    async with AgentFlow("memory://") as app:
        app.register(chain(("ask", asks("?")), ("pay", notebook.pay)), name="g")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle = await app.submit("g", {"log": []})
            assert (await app.drive(handle.id)).status is RunStatus.WAITING
            run_cell(notebook, f"# The same again.\n{CELL}", 2)
            await app.submit("g", {"log": []})
        run_cell(notebook, CELL.replace("paid", "paid twice"), 3)
        with pytest.warns(CodeChangedWarning, match=r"'pay' of __main__ changed .* register it"):
            await app.submit("g", {"log": []})
        [approval] = await handle.approvals()
        await app.approvals.decide(approval.id, {"type": "approve"}, by="ann")
        app._registry.graphs.clear()
        app.register(chain(("ask", asks("?")), ("pay", notebook.pay)), name="g")
        with pytest.raises(IncompatibleGraphError, match=r"of __main__, .* changed: pay"):
            await app.drive(handle.id)


async def test_functions_that_a_node_calls_and_conditions_are_warned_of_too(
    notebook: ModuleType,
) -> None:
    run_cell(notebook, "def fee(): return 1\ndef pay(state): return {'log': [str(fee())]}\n", 1)
    run_cell(
        notebook, "def onward(state): return '__end__'\nclass Rule:\n    def ok(self): pass\n", 2
    )
    run_cell(notebook, "rule = Rule()\ndef check(state): return rule.ok() or {}\n", 3)
    graph: Any = chain(("check", notebook.check), ("pay", notebook.pay))
    graph.add_conditional_edges("pay", notebook.onward, ["__end__"])
    async with AgentFlow("memory://") as app:
        app.register(graph.compile(), name="g")
        for number, code in enumerate(
            (
                "def fee(): return 2",
                "def onward(state): return 'pay'",
                "class Rule:\n def ok(self): 1",
            )
        ):
            run_cell(notebook, f"{code}\n", number + 4)
            name = ("fee", "onward", "Rule.ok")[number]
            with pytest.warns(CodeChangedWarning, match=f"'{name}'"):
                await app.submit("g", {"log": []})
