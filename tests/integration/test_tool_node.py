"""`tool_node`: what becomes of the calls of a model's answer."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolCall, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, create_react_agent
from langgraph.types import Command
from pydantic import BaseModel, Field, field_validator

from agentflow import AgentFlow, RetryPolicy, request_approval
from agentflow.errors import ApprovalMismatchError, InvalidDecisionError, InvalidInputError
from agentflow.nodes import ToolPolicy, tool_node
from agentflow.testing import ScriptedChatModel
from agentflow.types import Approval, Run, RunStatus

SENT: list[dict[str, Any]] = []


class Mail(BaseModel):
    """A mail."""

    to: str = Field(min_length=3)
    text: str

    @field_validator("to")
    @classmethod
    def is_address(cls, value: str) -> str:
        if "@" not in value:
            raise ValueError("is no address")
        return value


@tool(args_schema=Mail)
async def send_mail(to: str, text: str) -> str:
    """Send a mail."""
    SENT.append({"to": to, "text": text})
    return f"sent to {to}"


@tool
async def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word}: a word"


class State(MessagesState):
    seen: list[str]


@pytest.fixture(autouse=True)
def _forget() -> None:
    SENT.clear()


@pytest.fixture
async def app() -> AsyncIterator[AgentFlow]:
    async with AgentFlow("memory://") as opened:
        yield opened


def call(name: str, call_id: str, **args: Any) -> ToolCall:
    return ToolCall(name=name, args=args, id=call_id, type="tool_call")


def mail(call_id: str = "m1", to: str = "ann@example.com", text: str = "hello") -> ToolCall:
    return call("send_mail", call_id, to=to, text=text)


def graph_of(node: Any, calls: Sequence[ToolCall]) -> StateGraph[State, None, State, State]:
    def answer(state: State) -> dict[str, Any]:
        return {"messages": [AIMessage("", tool_calls=list(calls))]}

    graph = StateGraph(State)
    graph.add_node("answer", answer)
    graph.add_node("tools", node)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", "tools")
    return graph


async def begin(app: AgentFlow, node: Any, calls: Sequence[ToolCall]) -> Run:
    app.register(graph_of(node, calls), name="g")
    handle = await app.submit("g", {"messages": [HumanMessage("go")]}, run_id="r")
    return await app.drive(handle.id)


def results(run: Run) -> list[tuple[str, str]]:
    assert run.status is RunStatus.SUCCEEDED, run.error
    return [
        (each.tool_call_id, each.text)
        for each in run.output["messages"]
        if isinstance(each, ToolMessage)
    ]


async def pending(app: AgentFlow) -> list[Approval]:
    return list((await app.approvals.list(status="pending")).items)


ASKS = ToolPolicy(approval="always")
ONCE = RetryPolicy(max_attempts=1)
SOON = RetryPolicy(initial_interval=0.01)


async def test_nothing_is_called_before_all_are_approved_and_then_what_was_approved(
    app: AgentFlow,
) -> None:
    calls = [mail("m1"), mail("m2", to="bob@example.com"), call("look_up", "l1", word="tea")]
    node = tool_node([send_mail, look_up], policies={"send_mail": ASKS})
    run = await begin(app, node, calls)
    edited = {"to": "eve@example.com", "text": "changed"}
    for kind in ("approve", "edit"):
        (asked,) = await pending(app)
        assert SENT == []
        decision: dict[str, Any] = {"type": kind}
        if kind == "edit":
            decision["value"] = {**asked.request.proposal, "args": edited}
        await app.approvals.decide(asked.id, decision, by="alice")
        run = await app.drive("r")
    assert [{"to": "ann@example.com", "text": "hello"}, edited] == SENT
    first, second, third = results(run)
    assert first == ("m1", "sent to ann@example.com")
    assert second == (
        "m2",
        f"[A reviewer has changed the arguments to {json.dumps(edited)}.]\nsent to eve@example.com",
    )
    assert third == ("l1", "tea: a word")


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        ({"type": "reject", "message": "not now"}, "not now"),
        ({"type": "reject"}, "A reviewer has rejected this call; it was not made."),
        ({"type": "respond", "value": "I rang them."}, "I rang them."),
    ],
)
async def test_what_is_not_approved_is_not_called_and_the_model_is_told(
    app: AgentFlow, decision: dict[str, Any], told: str
) -> None:
    policy = ToolPolicy(approval="always", allowed=("approve", "reject", "respond"))
    await begin(app, tool_node([send_mail], policy=policy), [mail()])
    (asked,) = await pending(app)
    await app.approvals.decide(asked.id, decision, by="alice")
    assert results(await app.drive("r")) == [("m1", told)]
    assert SENT == []


@pytest.mark.parametrize(
    "change",
    [
        {"args": {"to": "x", "text": ""}},
        {"args": {"to": "ann@example.com"}},
        {"name": "look_up"},
        {"id": "m2"},
        {"more": 1},
    ],
)
async def test_edit_that_does_not_fit_the_tool_is_refused_and_asked_again(
    app: AgentFlow, change: dict[str, Any]
) -> None:
    await begin(app, tool_node([send_mail, look_up], policy=ASKS), [mail()])
    (asked,) = await pending(app)
    with pytest.raises(InvalidDecisionError):
        await app.approvals.decide(
            asked.id, {"type": "edit", "value": {**asked.request.proposal, **change}}, by="alice"
        )
    assert [each.id for each in await pending(app)] == [asked.id]


async def test_edit_that_only_the_tools_own_check_refuses_is_not_called(app: AgentFlow) -> None:
    await begin(app, tool_node([send_mail], policy=ASKS), [mail()])
    (asked,) = await pending(app)
    value = {**asked.request.proposal, "args": {"to": "nobody", "text": ""}}
    await app.approvals.decide(asked.id, {"type": "edit", "value": value}, by="alice")
    ((_, told),) = results(await app.drive("r"))
    assert told.startswith("The reviewer's arguments do not fit.")
    assert "is no address" in told
    assert SENT == []


async def test_arguments_that_do_not_fit_are_refused_before_anybody_is_asked(
    app: AgentFlow,
) -> None:
    node = tool_node([send_mail], policy=ASKS)
    run = await begin(app, node, [mail(to="nobody"), call("unknown", "u1")])
    (_, refused), (_, unknown) = results(run)
    assert "is no address" in refused
    assert "unknown is not a valid tool" in unknown
    assert SENT == []


async def test_two_calls_with_one_id_are_both_refused(app: AgentFlow) -> None:
    run = await begin(app, tool_node([send_mail], policy=ASKS), [mail("m"), mail("m", text="b")])
    assert results(run) == [("m", "2 calls have the same id.")] * 2
    assert SENT == []


async def test_predicate_that_changes_its_mind_does_not_let_a_rejected_call_through(
    app: AgentFlow,
) -> None:
    wanted = [True]

    def asks(args: Any, state: Any) -> bool:
        assert state["messages"]
        return args["to"] == "ann@example.com" and wanted[0]

    policies = {"send_mail": ToolPolicy(approval=asks)}
    node = tool_node([send_mail], policies=policies)
    await begin(app, node, [mail("m1"), mail("m2", to="bob@example.com")])
    (asked,) = await pending(app)
    wanted[0] = False
    await app.approvals.decide(asked.id, {"type": "reject"}, by="alice")
    await app.drive("r")
    assert SENT == [{"to": "bob@example.com", "text": "hello"}]


async def test_call_that_the_model_changed_after_its_approval_is_refused(app: AgentFlow) -> None:
    """A model asked in the node that also runs its tools: it answers anew with each attempt."""
    node = tool_node([send_mail], policy=ASKS)
    texts = iter(["hello", "something else"])

    async def think_and_act(state: State) -> Any:
        answer = AIMessage("", tool_calls=[mail(text=next(texts))])
        return await node.ainvoke({"messages": [answer]})

    graph = StateGraph(State)
    graph.add_node("both", think_and_act)
    graph.add_edge(START, "both")
    app.register(graph, name="g")
    handle = await app.submit("g", {"messages": [HumanMessage("go")]})
    await app.drive(handle.id)
    (asked,) = await pending(app)
    await app.approvals.decide(asked.id, "approve", by="alice")
    run = await app.drive(handle.id)
    assert run.error is not None
    assert run.error.type.endswith(ApprovalMismatchError.__name__)
    assert run.attempt == 1, "it is not tried again"
    assert SENT == []


async def test_tools_get_state_and_call_id_and_return_commands_and_artifacts(
    app: AgentFlow,
) -> None:
    @tool
    async def note(
        word: str,
        state: Annotated[dict[str, Any], InjectedState],
        call_id: Annotated[str, InjectedToolCallId],
    ) -> Command[Any]:
        """Note a word."""
        seen = [*state.get("seen", []), word]
        return Command(update={"seen": seen, "messages": [ToolMessage("ok", tool_call_id=call_id)]})

    @tool(response_format="content_and_artifact")
    def chart(word: str) -> tuple[str, dict[str, Any]]:
        """Draw a chart."""
        return "drawn", {"points": [1, 2], "of": word}

    policy = ToolPolicy(approval="always")
    node = tool_node([note, chart], policies={"note": policy})
    await begin(app, node, [call("note", "n1", word="tea"), call("chart", "c1", word="tea")])
    (asked,) = await pending(app)
    assert asked.request.proposal["args"] == {"word": "tea"}
    await app.approvals.decide(asked.id, "approve", by="alice")
    run = await app.drive("r")
    assert sorted(results(run)) == [("c1", "drawn"), ("n1", "ok")]
    assert run.output["seen"] == ["tea"]
    artifacts = [each.artifact for each in run.output["messages"] if isinstance(each, ToolMessage)]
    assert {"points": [1, 2], "of": "tea"} in artifacts


async def test_only_so_many_calls_are_made_at_once(app: AgentFlow) -> None:
    inside: set[str] = set()
    most: list[int] = []

    @tool
    async def count(word: str) -> str:
        """Count."""
        inside.add(word)
        for _ in range(20):
            await asyncio.sleep(0)
        most.append(len(inside))
        inside.remove(word)
        return word

    calls = [call("count", f"c{number}", word=str(number)) for number in range(6)]
    await begin(app, tool_node([count], max_concurrency=2), calls)
    assert max(most) <= 2
    assert len(most) == 6


@pytest.mark.parametrize("on_error", ["raise", "message"])
async def test_error_of_a_tool_fails_the_attempt_or_is_a_message(
    app: AgentFlow, on_error: Any
) -> None:
    @tool
    async def broken(word: str) -> str:
        """Break."""
        SENT.append({"word": word})
        raise LookupError("no such word")

    node = tool_node([broken], policy=ToolPolicy(on_error=on_error))
    app.register(graph_of(node, [call("broken", "b1", word="tea")]), name="g", retry=ONCE)
    handle = await app.submit("g", {"messages": [HumanMessage("go")]})
    run = await app.drive(handle.id)
    if on_error == "message":
        assert results(run) == [("b1", "Error: LookupError: no such word")]
    else:
        assert run.error is not None
        assert run.error.type == "builtins.LookupError"
    assert len(SENT) == 1


async def test_model_hears_nothing_of_a_call_that_may_have_happened(app: AgentFlow) -> None:
    @tool
    async def broken(word: str) -> str:
        """Break."""
        SENT.append({"word": word})
        raise ConnectionResetError

    node = tool_node([broken], policy=ToolPolicy(on_error="message"))
    app.register(graph_of(node, [call("broken", "b1", word="tea")]), name="g", retry=ONCE)
    handle = await app.submit("g", {"messages": [HumanMessage("go")]})
    assert (await app.drive(handle.id)).status is RunStatus.WAITING
    (asked,) = (await app.approvals.list()).items
    assert asked.kind == "effect"
    answer = {"type": "respond", "value": {"happened": True, "outcome": "sent"}}
    await app.approvals.decide(asked.id, answer, by="ada")
    assert results(await app.drive(handle.id)) == [("b1", "sent")]
    assert len(SENT) == 1


async def test_idempotent_tool_that_takes_too_long_is_called_again(app: AgentFlow) -> None:
    calls = Counter[str]()

    @tool
    async def slow(word: str) -> str:
        """Take long, the first time."""
        calls[word] += 1
        if calls[word] == 1:
            await asyncio.Event().wait()
        return "done"

    node = tool_node([slow], policy=ToolPolicy(timeout=0.05, idempotent=True))
    app.register(graph_of(node, [call("slow", "s1", word="tea")]), name="g", retry=SOON)
    handle = await app.submit("g", {"messages": [HumanMessage("go")]})
    assert results(await app.drive(handle.id)) == [("s1", "done")]
    assert calls["tea"] == 2


async def test_tool_may_ask_for_itself(app: AgentFlow) -> None:
    @tool
    async def pay(amount: int) -> str:
        """Pay."""
        answer = request_approval({"amount": amount}, title="Pay")
        SENT.append(answer.proposal)
        return f"paid {answer.proposal['amount']}"

    await begin(app, tool_node([pay]), [call("pay", "p1", amount=5)])
    (asked,) = await pending(app)
    assert SENT == []
    await app.approvals.decide(asked.id, {"type": "edit", "value": {"amount": 3}}, by="alice")
    assert results(await app.drive("r")) == [("p1", "paid 3")]
    assert SENT == [{"amount": 3}]


def test_it_works_without_a_run_and_without_a_loop() -> None:
    graph = graph_of(tool_node([look_up_here]), [call("look_up_here", "l1", word="tea")]).compile()
    output = graph.invoke({"messages": [HumanMessage("go")], "seen": []})
    assert output["messages"][-1].text == "tea: a word"


async def test_calls_may_be_given_without_a_state() -> None:
    graph: Any = StateGraph(dict)
    node = tool_node([look_up_here])

    async def run(state: Any) -> Any:
        return await node.ainvoke([call("look_up_here", "l1", word="tea")])

    graph.add_node("run", run)
    graph.add_edge(START, "run")
    output = await graph.compile().ainvoke({"x": 1})
    assert output["messages"][-1].text == "tea: a word"


@tool
def look_up_here(word: str) -> str:
    """Look a word up."""
    return f"{word}: a word"


@pytest.mark.parametrize(
    "options",
    [{"policies": {"other": ToolPolicy()}}, {"max_concurrency": 0}],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        tool_node([look_up], **options)


@pytest.mark.parametrize(
    "options",
    [{"approval": "sometimes"}, {"allowed": ()}, {"timeout": 0}, {"on_error": "ignore"}],
)
def test_policies_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        ToolPolicy(**options)


# In agents that others have built.


def answers(messages: Sequence[AnyMessage]) -> AIMessage:
    if isinstance(messages[-1], ToolMessage):
        return AIMessage("done")
    return AIMessage("", tool_calls=[mail("m1"), mail("m2", to="bob@example.com")])


@pytest.mark.filterwarnings("ignore:create_react_agent")
async def test_prebuilt_agent_asks_about_all_calls_at_once(app: AgentFlow) -> None:
    agent = create_react_agent(
        ScriptedChatModel(script=answers), tool_node([send_mail], policy=ASKS)
    )
    app.register(agent, name="agent")
    handle = await app.submit("agent", {"messages": [HumanMessage("go")]})
    await app.drive(handle.id)
    asked = {each.request.proposal["id"]: each for each in await pending(app)}
    assert asked.keys() == {"m1", "m2"}
    await app.approvals.decide(asked["m2"].id, "approve", by="alice")
    await app.approvals.decide(asked["m1"].id, {"type": "reject", "message": "no"}, by="alice")
    run = await app.drive(handle.id)
    assert dict(results(run)) == {"m1": "no", "m2": "sent to bob@example.com"}
    assert run.output["messages"][-1].text == "done"
    assert SENT == [{"to": "bob@example.com", "text": "hello"}]


async def test_middleware_that_asks_works_beside_it(app: AgentFlow) -> None:
    """LangChain's agent asks by its middleware; a node of ours behind it by its policy."""
    middleware = HumanInTheLoopMiddleware(interrupt_on={"send_mail": True})
    agent = create_agent(
        ScriptedChatModel(script=answers), tools=[send_mail], middleware=[middleware]
    )
    own = tool_node([look_up], policy=ASKS)

    def then(state: State) -> dict[str, Any]:
        return {"messages": [AIMessage("", tool_calls=[call("look_up", "l1", word="tea")])]}

    graph = StateGraph(State)
    graph.add_node("agent", agent)
    graph.add_node("then", then)
    graph.add_node("tools", own)
    graph.add_edge(START, "agent")
    graph.add_edge("agent", "then")
    graph.add_edge("then", "tools")
    graph.add_edge("tools", END)
    app.register(graph, name="g")
    handle = await app.submit("g", {"messages": [HumanMessage("go")]})
    await app.drive(handle.id)
    (batch,) = await pending(app)
    decisions = [{"type": "approve"}, {"type": "reject", "message": "no"}]
    await app.approvals.decide(batch.id, {"type": "approve", "decisions": decisions}, by="alice")
    await app.drive(handle.id)
    (own_question,) = await pending(app)
    assert own_question.request.proposal["args"] == {"word": "tea"}
    await app.approvals.decide(own_question.id, "approve", by="alice")
    run = await app.drive(handle.id)
    assert SENT == [{"to": "ann@example.com", "text": "hello"}]
    told = dict(results(run))
    assert (told["m1"], told["l1"]) == ("sent to ann@example.com", "tea: a word")
    assert "rejected" in told["m2"]
