"""The tests that every saver has to pass; run them on your own.

They are for backends of agentflow's own checkpointer, and for any LangGraph checkpointer that
promises the same: durable, ordered, fenced, with one head for each namespace. Each suite is a class
of plain pytest tests and two hooks, which open the saver. `SaverSuite` is all of them.

    ```python
    from agentflow.testing.savers import SaverSuite


    class TestMySaver(SaverSuite):
        @pytest.fixture(autouse=True)
        def _store(self, tmp_path):  # whatever fixtures the hooks need
            self.url = f"mine://{tmp_path}"

        def open(self):  # a context manager: a saver on an empty store
            return MySaver(self.url)

        def open_another(self, *, verify_deltas=False):  # on the same store, as another process
            return MySaver(self.url, verify_deltas=verify_deltas)
    ```

A saver without leases leaves out `FencingSuite`, and one without `sweep` `RetentionSuite`: derive
from the other suites, as `SaverSuite` does. The suites need `pytest` and `hypothesis`, and no
plugin. LangGraph has a suite of its own for what any checkpointer does
(`langgraph-checkpoint-conformance`); these go on where it ends.
"""

# ruff: noqa: E402 -- assertions are rewritten only in modules that are imported afterwards

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in (
            "branches",
            "calls",
            "contract",
            "copies",
            "deletion",
            "deltas",
            "fencing",
            "heads",
            "histories",
            "listing",
            "lists",
            "order",
            "parity",
            "retention",
            "writes",
        )
    )
)

from agentflow.testing.savers.base import Suite as Suite
from agentflow.testing.savers.branches import BranchesSuite as BranchesSuite
from agentflow.testing.savers.contract import ContractSuite as ContractSuite
from agentflow.testing.savers.copies import CopySuite as CopySuite
from agentflow.testing.savers.deletion import DeletionSuite as DeletionSuite
from agentflow.testing.savers.deltas import DeltaChannelSuite as DeltaChannelSuite
from agentflow.testing.savers.fencing import FencingSuite as FencingSuite
from agentflow.testing.savers.heads import HeadsSuite as HeadsSuite
from agentflow.testing.savers.histories import HistoriesSuite as HistoriesSuite
from agentflow.testing.savers.listing import ListingSuite as ListingSuite
from agentflow.testing.savers.lists import ListsSuite as ListsSuite
from agentflow.testing.savers.order import OrderSuite as OrderSuite
from agentflow.testing.savers.parity import ParitySuite as ParitySuite
from agentflow.testing.savers.retention import RetentionSuite as RetentionSuite
from agentflow.testing.savers.writes import WritesSuite as WritesSuite


class SaverSuite(
    ContractSuite,
    ListingSuite,
    WritesSuite,
    DeletionSuite,
    CopySuite,
    HeadsSuite,
    BranchesSuite,
    FencingSuite,
    OrderSuite,
    ListsSuite,
    HistoriesSuite,
    DeltaChannelSuite,
    RetentionSuite,
    ParitySuite,
):
    """Everything that agentflow promises of a saver."""
