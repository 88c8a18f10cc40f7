"""Seeing that no effect is overlooked because the key that its name is hidden by is not at hand.

An effect is looked for by hashes of its key, under each key of the ring (`effect_rows.key_hashes`).
One that was recorded under another key would not be found, and be called again. So before a scope
is first used, it is looked through for what is sealed by other keys: a key that the ring's `lookup`
has is asked for, and where one is missing no effect is begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from agentflow.database import Database
from agentflow.database.session import Session
from agentflow.database.tables import effects
from agentflow.errors import HashMismatchError
from agentflow.journal import GLOBAL, NewEffect
from agentflow.keys import MAX_NAME
from agentflow.storage.payloads import Payloads, place_of
from agentflow.types import Lease

_AT_ONCE = 1000
_HEADS = (
    f"SELECT seq, effect_id, substr(request, 1, {16 + MAX_NAME}) FROM agentflow_effects "  # noqa: S608 -- numbers of its own
    f"WHERE tenant = ? AND scope = ? AND seq > ? ORDER BY seq LIMIT {_AT_ONCE}"
)
"""As much of each envelope as names its key; on the bare driver, as `effect_steps` is."""
_OVERLAP = 100
"""How far back what was looked through is looked through again: numbers are given in one order and
committed in another."""
_MAX_SCOPES = 1000

_Row = tuple[int, str, bytes]


class EffectKeys:
    """Looks for keys that effects are sealed by and this process has not met."""

    def __init__(self, database: Database, payloads: Payloads) -> None:
        """Look through `database`."""
        self._database = database
        self._payloads = payloads
        self._attempts: dict[tuple[str, str, int], None] = {}
        self._seen: dict[str, int] = {}
        """By tenant, the number up to which effects with a key of the whole tenant are known."""

    async def meet(self, lease: Lease, new: NewEffect) -> None:
        """Learn all keys that the effect might have been recorded under.

        Raises:
            UnknownKeyError: One of them is not here.
            UnencryptedValueError: It might be recorded in plaintext, which is not accepted.
        """
        tenant = lease.tenant
        if new.scope == GLOBAL:
            # Others may use such a key at any time.
            await self._look(tenant, GLOBAL, self._seen.get(tenant, 0) - _OVERLAP)
            return
        attempt = (tenant, new.scope, lease.token)
        if attempt not in self._attempts:
            await self._look(tenant, new.scope, 0)
            self._attempts[attempt] = None
            if len(self._attempts) > _MAX_SCOPES:
                # Of two threads that see this both may pick the same one.
                self._attempts.pop(next(iter(tuple(self._attempts))), None)

    async def _look(self, tenant: str, scope: str, after: int) -> None:
        while page := await self._database.query(partial(_read, tenant, scope, after)):
            for _, effect_id, head in page:
                place = {"tenant": tenant, "effect_id": effect_id}
                try:
                    self._payloads.strict.check_key(head, where=place_of(effects.c.request, place))
                except HashMismatchError:
                    continue  # whoever finds it by its hash is told
            after = page[-1][0]
            if scope == GLOBAL:
                self._seen[tenant] = max(self._seen.get(tenant, 0), after)
            if len(page) < _AT_ONCE:
                return


def _read(tenant: str, scope: str, after: int, session: Session) -> Sequence[_Row]:
    return [
        (seq, effect_id, bytes(head))
        for seq, effect_id, head in session.fetch(_HEADS, (tenant, scope, after))
    ]
