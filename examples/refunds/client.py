"""How the agent reaches the outside world: payments and e-mail, over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import httpx

_TIMEOUT = httpx.Timeout(30.0, connect=5.0)


class Payment(TypedDict):
    """A payment as the service confirmed it."""

    id: str
    reference: str
    order_id: str
    amount: int
    currency: str


class ServiceClient:
    """Send requests: a payment is made once per key, an e-mail as often as it is requested.

    Connections are opened with the first request and belong to the event loop that made it.
    """

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, trust_env=False)

    async def pay(
        self, *, idempotency_key: str, reference: str, order_id: str, amount: int, currency: str
    ) -> Payment:
        """Pay, and have both sides' books say by `reference` what for."""
        body = {
            "reference": reference,
            "order_id": order_id,
            "amount": amount,
            "currency": currency,
        }
        payment: Payment = await self._post("/payments", body, idempotency_key)
        return payment

    async def send_email(self, *, reference: str, to: str, subject: str, text: str) -> None:
        """Send an e-mail; the mail service's log has it under `reference`."""
        body = {"reference": reference, "to": to, "subject": subject, "text": text}
        await self._post("/emails", body, None)

    async def report(self, path: str, fact: Mapping[str, str]) -> None:
        """Tell the services what the agent is doing, so that it can be counted from outside."""
        await self._post(path, fact, None)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _post(self, path: str, body: Mapping[str, Any], key: str | None) -> Any:
        headers = {"Idempotency-Key": key} if key else {}
        response = await self._http.post(path, json=body, headers=headers)
        response.raise_for_status()
        return response.json()
