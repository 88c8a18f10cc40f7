"""The refunds example, killed at every commit and in the middle of every node.

It pays once and writes once. The payment is idempotent; the e-mail is not, so a person is asked
about one in doubt, and says what the mail service's log has. The services are a process of their
own; what was executed, requested, paid and mailed is counted in their ledger. One ticket serves
all: a person changes its amount, so every node of the graph is passed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.messages import AIMessage, ToolMessage

from agentflow.types import Approval, Decision, Run, RunStatus
from examples.refunds.client import ServiceClient
from examples.refunds.ledger import Ledger as Books
from examples.refunds.shop import Case, read_cases
from tests.fault.conftest import Sampler, Tally
from tests.fault.forkserver import ForkServer
from tests.fault.graphs import register_refunds
from tests.fault.ledger import Ledger
from tests.fault.sabotage import Place
from tests.fault.scene import LONG, Scene, assert_sound, durable_tasks, open_scene, places

NODES = ("classify", "look_up", "propose", "approve", "pay", "email")
CASE: Case = next(case for case in read_cases() if case.ticket["id"] == "T-1015")
_ROOT = Path(__file__).parents[2]


@dataclass
class Shop:
    """A scene whose workers run the refunds example, and the services' books."""

    scene: Scene
    books: Books
    control: httpx.AsyncClient
    doubts: dict[str, tuple[str, bool]] = field(default_factory=dict)
    """What a person was asked about effects: the run, and whether it had happened, by question."""

    async def submit(self, name: str) -> None:
        await self.scene.app.submit("refund", {"ticket": CASE.ticket}, run_id=name, queue=name)

    async def decide(self) -> None:
        """Do what people do: look for requests, and answer them."""
        for approval in (await self.scene.app.approvals.list()).items:
            if approval.kind == "effect":
                decision = self._settle(approval)
            else:
                assert CASE.review is not None
                edited = {**approval.request.proposal, "amount": CASE.review.amount}
                decision = Decision(type="edit", value=edited)
            await self.scene.app.approvals.decide(
                approval.id, decision, by="alice", idempotency_key=approval.id
            )

    def _settle(self, approval: Approval) -> Decision:
        """Say of an e-mail in doubt what the mail service's log has."""
        assert approval.request.proposal["node"] == "email", "all others can be repeated"
        _, was_sent = self.doubts.setdefault(
            approval.id, (approval.run_id, self.books.emails()[approval.run_id] > 0)
        )
        return Decision(type="respond", value={"happened": was_sent})

    def asked(self, run_id: str) -> list[bool]:
        """Return whether the e-mail had been sent, for each time that a run asked."""
        return [was_sent for run, was_sent in self.doubts.values() if run == run_id]

    async def ended_well(self, names: list[str]) -> list[Run]:
        runs = await self.scene.ended(names)
        assert {run.id: run.status for run in runs} == dict.fromkeys(names, RunStatus.SUCCEEDED)
        return runs


@pytest.fixture
async def shop(
    database_url: str,
    ledger: Ledger,
    forkserver: ForkServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Shop]:
    monkeypatch.setenv("AGENTFLOW_POLL_INTERVAL", "0.02")
    monkeypatch.delenv("AGENTFLOW_MODEL", raising=False)
    path = tmp_path / "books.sqlite"
    with running_services(path) as url:
        client = ServiceClient(url)
        register = partial(register_refunds, services=client)
        async with (
            open_scene(database_url, ledger, forkserver, register) as scene,
            httpx.AsyncClient(base_url=f"{url}/control", timeout=90, trust_env=False) as control,
        ):
            scene.services_url = url
            books = Books(path)
            shop = Shop(scene, books, control)
            scene.deciders.append(shop.decide)
            yield shop
            books.close()
        await client.aclose()
        # The services wait for whoever is still connected.
        forkserver.kill_all()


@contextmanager
def running_services(path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "examples.refunds.services", "--ledger", str(path)]
    with subprocess.Popen(
        [*command, "--port", "0"], cwd=_ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.kill()


@pytest.mark.parametrize("company", [False, True], ids=["alone", "in-company"])
async def test_refund_killed_at_any_commit_ends_as_its_twin(
    shop: Shop, sampler: Sampler, tally: Tally, company: bool
) -> None:
    """Also where every commit holds something else: see `test_kills`."""
    found = await survey(shop, company=company)
    tried = {str(place): place for place in sampler.some(found, 5)}
    assert await shop.scene.kill_each(tried, shop.submit, company=company) > 0
    await settle_and_compare(shop, list(tried), tally)


async def test_refund_killed_in_the_middle_of_any_node_ends_as_its_twin(
    shop: Shop, sampler: Sampler, tally: Tally
) -> None:
    """The services hold back an answer that the node waits for; the worker is killed meanwhile."""
    await survey(shop)
    middles: list[tuple[str, dict[str, str]]] = [
        ("/executions", {"node": node, "event": event})
        for node in NODES
        for event in ("started", "finished")
    ]
    middles += [
        ("/model-calls", {"node": node, "event": event})
        for node in ("classify", "propose")
        for event in ("started", "finished")
    ]
    names = []
    for path, match in sampler.some(middles, 3):
        names.append("-".join([path.strip("/"), *match.values()]))
        await kill_at(shop, names[-1], path, match=match)
    shop.scene.expire(names)
    await settle_and_compare(shop, names, tally)


async def test_refund_killed_in_the_middle_of_an_effect_pays_and_writes_once(
    shop: Shop, tally: Tally
) -> None:
    """A request is lost on its way, or acted on, and the worker is killed before it knows."""
    await survey(shop)
    tried = {
        f"{path.strip('/')}-{moment}": (path, moment)
        for path in ("/payments", "/emails")
        for moment in ("arrival", "reply")
    }
    for name, (path, moment) in tried.items():
        await kill_at(shop, name, path, moment=moment)
    shop.scene.expire(tried)
    await settle_and_compare(shop, list(tried), tally)
    asked = {name: shop.asked(name) for name in tried}
    assert asked == {
        "payments-arrival": [],
        "payments-reply": [],
        "emails-arrival": [False],
        "emails-reply": [True],
    }
    requested = {name: len(shop.books.payment_requests(name)) for name in tried}
    assert requested == {
        "payments-arrival": 2,
        "payments-reply": 2,
        "emails-arrival": 1,
        "emails-reply": 1,
    }


async def kill_at(shop: Shop, name: str, path: str, **hold: Any) -> None:
    """Submit a run, and kill its worker when the services have its request."""
    await shop.submit(name)
    reply = await shop.control.post("/holds", json={"path": path, **hold})
    armed = f"/holds/{reply.json()['hold']}"
    victim = shop.scene.worker(lease=LONG, queues=[name])
    await shop.scene.until(partial(caught, shop, armed), f"a request to {path} with {hold}")
    victim.kill()
    victim.wait()
    await shop.control.delete(armed)


async def caught(shop: Shop, hold: str) -> Any:
    return (await shop.control.get(hold, params={"timeout": 0.02})).json()["caught"]


async def settle_and_compare(shop: Shop, names: list[str], tally: Tally) -> None:
    """Let a successor end the runs of killed workers, and compare them with the twin."""
    scene, app = shop.scene, shop.scene.app
    usual = executions(shop, "twin")
    begun = {name: executions(shop, name) for name in names}
    saved = {name: await durable_executions(shop, name, usual) for name in names}
    scene.worker(lease=LONG, queues=names, concurrency=10)
    expected = comparable((await app.state("twin")).values)
    for run in await shop.ended_well(names):
        assert comparable((await app.state(run.id)).values) == expected, run.id
        assert comparable(run.output) == expected, run.id
        again = Counter(node for node in NODES if begun[run.id][node] > saved[run.id][node])
        # Who asks about an e-mail begins once more when there is an answer.
        again += Counter(email=len(shop.asked(run.id)))
        assert executions(shop, run.id) == usual + again, (run.id, begun[run.id], saved[run.id])
    assert_once(shop, [*names, "twin"])
    assert_sound(scene.url, [*names, "twin"])
    executed_again = sum((begun[name] - saved[name]).total() for name in names)
    tally(
        kills=len(names),
        executed_again=executed_again,
        payments_requested=shop.books.counts().payments_requested,
        payments_applied=shop.books.counts().payments_applied,
        emails_in_doubt=len(shop.doubts),
        emails_requested=shop.books.counts().emails_requested,
        emails_applied=shop.books.counts().emails_applied,
    )


def assert_once(shop: Shop, names: list[str]) -> None:
    """Hold what the services have counted against what effects promise."""
    paid = Counter((payment.reference, payment.money) for payment in shop.books.payments())
    assert paid == {(name, CASE.refund): 1 for name in names}
    assert shop.books.emails() == dict.fromkeys(names, 1)
    requested = shop.books.email_requests()
    for name in names:
        requests = shop.books.payment_requests(name)
        assert len({request.idempotency_key for request in requests}) == 1, name
        # One worker was killed, so one call at most was in doubt.
        assert len(requests) <= 2, name
        # The mail service sends whatever is requested: only a person's word allows another one.
        assert requested[name] <= 1 + shop.asked(name).count(False), name


def executions(shop: Shop, run_id: str) -> Counter[str]:
    """Count the executions of each node that began, as the services saw them."""
    started = shop.books.executions("started")
    return Counter({node: started[run_id, node] for node in NODES if (run_id, node) in started})


async def durable_executions(shop: Shop, run_id: str, usual: Counter[str]) -> Counter[str]:
    """Count the executions of each node that are durable; a question counts as one."""
    durable: Counter[str] = Counter()
    for task in await durable_tasks(shop.scene.app, await shop.scene.app.get_run(run_id)):
        if task.name in NODES:
            durable[task.name] = usual[task.name] if task.result is not None else 1
    return durable


def comparable(values: Any) -> dict[str, Any]:
    """Return a final state without ids that are random, and times."""
    state = dict(values)
    state["messages"] = [
        (m.type, m.content, getattr(m, "tool_calls", None), getattr(m, "tool_call_id", None))
        for m in state["messages"]
    ]
    state["approval"] = {k: v for k, v in state["approval"].items() if k != "at"}
    own = ("id", "reference")
    state["payment"] = {k: v for k, v in state["payment"].items() if k not in own}
    return state


async def survey(shop: Shop, *, company: bool = False) -> list[Place]:
    """Run the twin, which nobody kills, and return every commit that it passed."""
    scene = shop.scene
    await shop.submit("twin")
    twin = scene.worker(lease=LONG, queues=["twin"], reports=True, company=company)
    (run,) = await shop.ended_well(["twin"])
    assert [type(message) for message in run.output["messages"]] == [
        AIMessage,
        ToolMessage,
        AIMessage,
    ]
    assert CASE.refund is not None
    assert run.output["payment"]["amount"] == CASE.refund.amount
    assert executions(shop, "twin") == Counter([*NODES, "approve"])
    twin.kill(signal.SIGTERM)  # it reports its last commits after the database has them
    assert await scene.gone(twin) == 0, twin.output()
    return places(scene.ledger.entries(event="place", pid=twin.pid))
