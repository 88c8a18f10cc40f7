"""Makes `effects-apart-v1.json`: outcomes in objects as the first version with them stored them.

    python -m tests.golden.effects_apart_v1

It has the row of an effect, bytes in hex, and the object that it refers to. It is made once and
never again: whatever comes later has to read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agentflow.codec import Codec
from agentflow.database.tables import effects
from agentflow.objects import Bundle, ObjectTier
from agentflow.storage.effect_objects import put_apart
from agentflow.storage.effect_rows import to_effect
from agentflow.storage.payloads import Payloads
from tests.golden import effects_v1
from tests.integration.offloaded import text
from tests.integration.sealed import ring

FILE = Path(__file__).with_name("effects-apart-v1.json")
VALUE = {"text": text("golden", 600), "tuple": (1, 2)}


def payloads(store: Bundle, *, is_encrypted: bool) -> Payloads:
    keys = ring(effects_v1.KEY) if is_encrypted else None
    codec = Codec(keys=keys, tier=ObjectTier(store, offload_from=100))
    return Payloads(strict=codec, lenient=codec.readable_anywhere())


def read(made: dict[str, Any], *, is_encrypted: bool) -> Any:
    """Return the outcome, as it is read now."""
    store = Bundle({name: bytes.fromhex(data) for name, data in made["objects"].items()})
    row = effects_v1.typed(made["row"])
    return to_effect(row, payloads(store, is_encrypted=is_encrypted)).outcome


def _make(row: dict[str, Any], *, is_encrypted: bool) -> dict[str, Any]:
    store = Bundle()
    using = payloads(store, is_encrypted=is_encrypted)
    assert using.strict.tier is not None
    body = using.body({"value": VALUE, "failure": None}, effects.c.outcome, row)
    sealed = put_apart(using, using.strict.tier, "0a1b", row, body)
    objects = {name: data.hex() for name, data in store.objects.items()}
    return {"row": {**row, "outcome": sealed.data.hex()}, "objects": objects}


def main() -> None:
    """Write the file."""
    lines = map(json.loads, effects_v1.FILE.read_text("utf-8").splitlines())
    made = {
        "encrypted" if line["is_encrypted"] else "plain": _make(
            line["row"], is_encrypted=line["is_encrypted"]
        )
        for line in lines
        if line["record"]["key"] == "succeeded"
    }
    FILE.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
