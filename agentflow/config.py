"""Settings, and the only reader of the process environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from agentflow.errors import InvalidInputError
from agentflow.keys import KeyRing

DEFAULT_URL = "sqlite:///agentflow.db"

_LONGEST = 365 * 24 * 60 * 60
_DIGITS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How this process behaves; every field has an environment variable."""

    db_url: str = DEFAULT_URL
    """Where runs and checkpoints are stored (`AGENTFLOW_DB_URL`)."""
    lease: timedelta = timedelta(seconds=10)
    """How long a claim holds without a heartbeat (`AGENTFLOW_LEASE`, seconds)."""
    poll_interval: timedelta = timedelta(milliseconds=200)
    """How often a worker, or a wait, looks at the database (`AGENTFLOW_POLL_INTERVAL`, seconds)."""
    store_timeout: timedelta = timedelta(seconds=30)
    """How long to wait for a locked or unreachable database (`AGENTFLOW_STORE_TIMEOUT`)."""
    grace: timedelta = timedelta(seconds=25)
    """How long a worker that is told to stop may take (`AGENTFLOW_GRACE`, seconds)."""
    max_abandoned: int = 10
    """How many threads may be stuck in nodes that were given up, before the worker asks to be
    replaced (`AGENTFLOW_MAX_ABANDONED`)."""
    max_payload: int = 32 * 1024 * 1024
    """How many bytes a run's input, output or other payload may have, before compression
    (`AGENTFLOW_MAX_PAYLOAD`)."""
    keys: KeyRing | None = None
    """With them everything that is stored is encrypted (`AGENTFLOW_KEYS`, as `name=base64` pairs
    separated by commas; the first one seals). With `AGENTFLOW_ACCEPT_PLAINTEXT=1` what was stored
    before is still read."""

    offload: str | None = None
    """Where values that are too large for rows are kept (`AGENTFLOW_OFFLOAD`, a URL)."""

    @property
    def heartbeat(self) -> timedelta:
        """How often a lease is extended: three times within its length, with slack."""
        return self.lease * 0.3


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from the environment.

    Raises:
        InvalidInputError: A variable does not hold what it has to.
        MissingDriverError: There are keys, and the package `cryptography` is not installed.
    """
    env = os.environ if environ is None else environ
    defaults = Settings()
    return Settings(
        db_url=env.get("AGENTFLOW_DB_URL") or defaults.db_url,
        lease=_seconds(env, "AGENTFLOW_LEASE", defaults.lease),
        poll_interval=_seconds(env, "AGENTFLOW_POLL_INTERVAL", defaults.poll_interval),
        store_timeout=_seconds(env, "AGENTFLOW_STORE_TIMEOUT", defaults.store_timeout),
        grace=_seconds(env, "AGENTFLOW_GRACE", defaults.grace),
        max_abandoned=_count(env, "AGENTFLOW_MAX_ABANDONED", defaults.max_abandoned),
        max_payload=_count(env, "AGENTFLOW_MAX_PAYLOAD", defaults.max_payload),
        keys=_keys(env),
        offload=env.get("AGENTFLOW_OFFLOAD") or None,
    )


def _keys(env: Mapping[str, str]) -> KeyRing | None:
    text = env.get("AGENTFLOW_KEYS")
    accepts = env.get("AGENTFLOW_ACCEPT_PLAINTEXT") or "0"
    if accepts not in {"0", "1"}:
        raise InvalidInputError("setting", ("AGENTFLOW_ACCEPT_PLAINTEXT: must be 0 or 1",))
    return KeyRing.from_text(text, accept_plaintext=accepts == "1") if text else None


def _seconds(env: Mapping[str, str], name: str, default: timedelta) -> timedelta:
    text = env.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _LONGEST:
        advice = f"must be a positive number of seconds, at most {_LONGEST} (a year)"
        raise InvalidInputError("setting", (f"{name}: {advice}",))
    return timedelta(seconds=value)


def _count(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    if not text:
        return default
    if not text.isdecimal() or len(text) > _DIGITS:
        raise InvalidInputError("setting", (f"{name}: must be a whole number, 0 or more",))
    return int(text)
