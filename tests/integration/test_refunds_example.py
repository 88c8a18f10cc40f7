"""The refund agent under agentflow, uninterrupted: every ticket ends as expected."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentflow import AgentFlow
from agentflow.types import Approval, Decision, RunStatus
from examples.refunds.client import ServiceClient
from examples.refunds.graph import build_graph
from examples.refunds.ledger import Ledger
from examples.refunds.observer import Observer
from examples.refunds.script import chat_model
from examples.refunds.services import Server, Services
from examples.refunds.shop import Case, read_cases

CASES = {case.ticket["id"]: case for case in read_cases()}


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


@pytest.fixture
async def app(
    sqlite_url: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AgentFlow]:
    monkeypatch.delenv("AGENTFLOW_MODEL", raising=False)
    with Server(Services(ledger)).running() as server:
        services = ServiceClient(server.url)
        graph = build_graph(chat_model(), services).compile()
        async with AgentFlow(sqlite_url) as app:
            app.register(graph.with_config(callbacks=[Observer(services)]), name="refund")
            yield app
        await services.aclose()


def decision(case: Case, approval: Approval) -> Decision:
    assert case.review is not None, f"{case.ticket['id']} was held and should not be"
    if case.review.decision != "edit":
        return Decision(type=case.review.decision, message=case.review.message)
    edited = {**approval.request.proposal, "amount": case.review.amount}
    return Decision(type="edit", value=edited)


@pytest.mark.slow
async def test_every_ticket_ends_as_expected(app: AgentFlow, ledger: Ledger) -> None:
    for ticket_id, case in CASES.items():
        await app.submit("refund", {"ticket": case.ticket}, run_id=ticket_id)
    async with app.worker():
        for run_id in CASES:
            await app.wait(run_id, until="parked", timeout=60)
        held = (await app.approvals.list()).items
        for approval in held:
            case = CASES[approval.run_id]
            await app.approvals.decide(approval.id, decision(case, approval), by="alice")
        for run_id in CASES:
            await app.wait(run_id, until="ended", timeout=60)

    assert {approval.run_id for approval in held} == {
        ticket_id for ticket_id, case in CASES.items() if case.review
    }
    runs = (await app.list_runs(limit=1000)).items
    assert {run.status for run in runs} == {RunStatus.SUCCEEDED}
    paid = {payment.reference: payment.money for payment in ledger.payments()}
    assert paid == {ticket_id: case.refund for ticket_id, case in CASES.items() if case.refund}
    assert ledger.counts().payments_requested == len(paid)
    assert ledger.emails() == ledger.email_requests() == dict.fromkeys(CASES, 1)


async def test_observer_reports_each_node_and_model_call_once(
    app: AgentFlow, ledger: Ledger
) -> None:
    run = await app.submit("refund", {"ticket": CASES["T-1001"].ticket}, run_id="observed")
    assert (await app.drive(run.id)).status is RunStatus.SUCCEEDED
    nodes = ("classify", "look_up", "propose", "approve", "pay", "email")
    assert ledger.executions("started") == {("observed", node): 1 for node in nodes}
    assert ledger.executions("finished") == ledger.executions("started")
    assert ledger.model_calls() == {("observed", "classify"): 1, ("observed", "propose"): 1}


@pytest.mark.parametrize("ticket_id", ["T-1017", "T-1039"])
async def test_hostile_ticket_fools_the_model_and_not_the_rules(
    app: AgentFlow, ledger: Ledger, ticket_id: str
) -> None:
    run = await app.submit("refund", {"ticket": CASES[ticket_id].ticket})
    parked = await app.drive(run.id)
    assert parked.status is RunStatus.WAITING
    (approval,) = (await app.approvals.list(run_id=run.id)).items
    assert "more than was paid for the order" in approval.request.proposal["reasons_to_ask"]
    assert ledger.payments() == []
