"""The ledger that fault tests judge by keeps what it acknowledged, and can hold that back."""

import json
import threading

import pytest

from tests.fault.forkserver import ForkServer
from tests.fault.ledger import Ledger, arecord, record

pytestmark = pytest.mark.slow  # it is a process of its own


def test_acknowledged_entry_is_in_the_file(ledger: Ledger) -> None:
    assert record(ledger.address, run="r", step="pay", key="k", attempt=1) == 1
    lines = ledger.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == ledger.entries()
    assert ledger.entries() == [{"run": "r", "step": "pay", "key": "k", "attempt": 1}]


async def test_entries_are_found_by_their_facts(ledger: Ledger) -> None:
    for number in range(3):
        await arecord(ledger.address, run="r", step="pay" if number else "mail", attempt=number)
    assert [entry["attempt"] for entry in ledger.entries(step="pay")] == [1, 2]
    assert ledger.entries(step="refuse") == []


def test_held_entry_is_seen_but_not_acknowledged_until_release(ledger: Ledger) -> None:
    ledger.hold(step="pay")
    caller = threading.Thread(target=record, args=(ledger.address,), kwargs={"step": "pay"})
    caller.start()
    assert ledger.wait_for(step="pay") == [{"step": "pay"}]
    record(ledger.address, step="mail")  # others are not held
    assert caller.is_alive()
    ledger.release()
    caller.join(10)
    assert not caller.is_alive()


def test_waiting_for_more_than_comes_is_a_timeout_that_says_what_came(ledger: Ledger) -> None:
    record(ledger.address, step="pay")
    with pytest.raises(TimeoutError, match="1 of 2 entries"):
        ledger.wait_for(step="pay", count=2, timeout=0.05)


def test_ledger_survives_a_caller_killed_while_it_is_held(
    ledger: Ledger, forkserver: ForkServer
) -> None:
    ledger.hold(step="pay")
    victim = forkserver.spawn("tests.unit.test_ledger:record_payment", ledger.address)
    ledger.wait_for(step="pay")
    victim.kill()
    victim.wait()
    ledger.release()
    assert record(ledger.address, step="mail") == 2
    assert len(ledger.entries()) == 2


def record_payment(address: str) -> None:
    record(address, step="pay")
