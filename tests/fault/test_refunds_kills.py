"""The refunds example, killed at every commit and in the middle of every node: it pays once.

The services are a process of their own; what was executed, paid and mailed is counted in their
ledger. One ticket serves all: a person changes its amount, so every node of the graph is passed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.messages import AIMessage, ToolMessage

from agentflow.types import Decision, Run, RunStatus
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

    async def submit(self, name: str) -> None:
        await self.scene.app.submit("refund", {"ticket": CASE.ticket}, run_id=name, queue=name)

    async def decide(self) -> None:
        """Do what people do: look for requests, and answer them."""
        for approval in (await self.scene.app.approvals.list()).items:
            assert CASE.review is not None
            edited = {**approval.request.proposal, "amount": CASE.review.amount}
            await self.scene.app.approvals.decide(
                approval.id,
                Decision(type="edit", value=edited),
                by="alice",
                idempotency_key=approval.id,
            )

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
    middles += [("/payments", {}), ("/emails", {})]
    names = []
    for path, match in sampler.some(middles, 4):
        name = "-".join([path.strip("/"), *match.values()])
        names.append(name)
        await shop.submit(name)
        reply = await shop.control.post("/holds", json={"path": path, "match": match})
        hold = f"/holds/{reply.json()['hold']}"
        victim = shop.scene.worker(lease=LONG, queues=[name])
        await shop.scene.until(partial(caught, shop, hold), f"a request to {path} with {match}")
        victim.kill()
        victim.wait()
        await shop.control.delete(hold)
    shop.scene.expire(names)
    await settle_and_compare(shop, names, tally)


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
        assert executions(shop, run.id) == usual + again, (run.id, begun[run.id], saved[run.id])
    paid = Counter((payment.idempotency_key, payment.money) for payment in shop.books.payments())
    assert paid == {(f"{name}:payment", CASE.refund): 1 for name in [*names, "twin"]}
    assert shop.books.emails() == {f"{name}:email": 1 for name in [*names, "twin"]}
    assert_sound(scene.url, [*names, "twin"])
    executed_again = sum((begun[name] - saved[name]).total() for name in names)
    tally(
        kills=len(names),
        executed_again=executed_again,
        payments_requested=shop.books.counts().payments_requested,
        payments_applied=shop.books.counts().payments_applied,
    )


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
    state["payment"] = {k: v for k, v in state["payment"].items() if k != "id"}
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
