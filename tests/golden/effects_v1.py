"""Makes `effects-v1.jsonl`: rows of effects as the first version with them stored them.

    python -m tests.golden.effects_v1

Each line has the columns of a row, bytes in hex, and the record that it is read as. It is made
once and never again: whatever comes later has to read it.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from agentflow.codec import Codec
from agentflow.config import Settings
from agentflow.database import Database
from agentflow.database.tables import effects
from agentflow.journal import EffectFailure, EffectStatus, Outcome, Resolution
from agentflow.storage.effect_rows import to_effect
from agentflow.storage.payloads import Payloads
from agentflow.storage.sql import SqlRunStore
from agentflow.types import Lease, plain
from tests.conformance.runs import running
from tests.conformance.test_run_store_effects import new
from tests.integration.sealed import ring

FILE = Path(__file__).with_name("effects-v1.jsonl")
KEY = "golden"


def codec(*, is_encrypted: bool) -> Codec:
    """Return the codec that rows are sealed by."""
    return Codec(keys=ring(KEY) if is_encrypted else None)


def read(row: dict[str, Any], *, is_encrypted: bool) -> Any:
    """Return the record of a row as plain data, as it is read now."""
    with_keys = codec(is_encrypted=is_encrypted)
    payloads = Payloads(strict=with_keys, lenient=with_keys.readable_anywhere())
    return json.loads(json.dumps(plain(to_effect(typed(row), payloads)), default=str))


def typed(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a row as the database gives them."""
    found: dict[str, Any] = {}
    for column in effects.c:
        value = row[column.name]
        if value is not None and isinstance(column.type, sa.LargeBinary):
            value = bytes.fromhex(value)
        elif isinstance(column.type, sa.TypeDecorator):
            value = column.type.process_result_value(value, None)  # type: ignore[arg-type]  # needs none
        found[column.name] = value
    return found


async def _fill(store: SqlRunStore) -> None:
    lease: Lease = await running(store, "r")

    async def begin(key: str, **changes: Any) -> str:
        return (await store.begin_effect(lease, new(key=key, **changes))).effect.id

    await begin("intended", arguments={"n": 1, "text": "é", "list": [1.5, None, True]})
    done = await begin("succeeded", compensate="m:void")
    await store.finish_effect(
        lease, done, Outcome(status=EffectStatus.SUCCEEDED, value={"tuple": (1, 2)})
    )
    failure = EffectFailure(type="builtins:OSError", message="no", args=("no",), state={"n": 1})
    failed = await begin("failed")
    await store.finish_effect(lease, failed, Outcome(status=EffectStatus.FAILED, failure=failure))
    said = await begin("resolved", on_in_doubt="fail")
    late = await begin("late")
    await store.release_run(lease, reason="drain", counts=False)
    yes = Resolution(happened=True, outcome={"id": 7}, by="ada", comment="seen")
    await store.resolve_effect("", said, yes)
    await store.resolve_effect("", late, Resolution(happened=False, by="ada"))
    await store.finish_effect(lease, late, Outcome(status=EffectStatus.SUCCEEDED, value="late"))


async def make() -> None:
    """Write the file."""
    lines = []
    for is_encrypted in (False, True):
        database = Database("memory://", Settings())
        store = SqlRunStore(database, codec=codec(is_encrypted=is_encrypted), owns_database=True)
        await _fill(store)
        query = sa.text("SELECT * FROM agentflow_effects ORDER BY seq")
        rows = await database.read(lambda c, q=query: c.execute(q).mappings().all())  # type: ignore[misc]  # bound at once
        for found in rows:
            row = {k: v.hex() if isinstance(v, bytes) else v for k, v in found.items()}
            record = read(row, is_encrypted=is_encrypted)
            lines.append({"is_encrypted": is_encrypted, "row": row, "record": record})
        await store.close()
    FILE.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(make())
