"""Ids as callers give them: what every database can keep, as the keys of threads and namespaces."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableConfig

from agentflow.checkpoint.rows import HeadKey, ThreadKey
from agentflow.errors import InvalidInputError

_MAX_ID = 1000
"""Bytes of the longest id or namespace; PostgreSQL's indexes take no more than two of these."""


def thread_key(tenant: str, thread_id: str) -> ThreadKey:
    """Return the key of a thread.

    Raises:
        InvalidInputError: The id cannot be stored.
    """
    check_ids(thread_id=thread_id)
    return (tenant, thread_id)


def head_key(tenant: str, config: RunnableConfig) -> HeadKey:
    """Return the key of the namespace that a configuration names.

    Raises:
        InvalidInputError: It names no thread, or something that cannot be stored.
    """
    configurable = config.get("configurable", {})
    thread_id = configurable.get("thread_id")
    if thread_id is None or thread_id == "":
        raise InvalidInputError("config", ("configurable.thread_id: is missing",))
    thread_id, ns = str(thread_id), configurable.get("checkpoint_ns") or ""
    checkpoint_id = configurable.get("checkpoint_id") or ""
    together = f"{thread_id}{ns}{checkpoint_id}"
    is_text = isinstance(ns, str) and isinstance(checkpoint_id, str)
    if not is_text or not together.isascii() or "\x00" in together or len(together) > _MAX_ID:
        check_ids(thread_id=thread_id, checkpoint_ns=ns, checkpoint_id=checkpoint_id)
    return (tenant, thread_id, ns)


def checkpoint_id_of(config: RunnableConfig) -> str | None:
    """Return the checkpoint that a configuration names, if it names one."""
    return config["configurable"].get("checkpoint_id") or None


def check_places(*configs: RunnableConfig | None) -> None:
    """Refuse configurations that name what cannot be stored.

    Raises:
        InvalidInputError: Names it.
    """
    for config in configs:
        named = (config or {}).get("configurable", {})
        names = ("thread_id", "checkpoint_ns", "checkpoint_id")
        check_ids(**{name: str(named[name]) for name in names if named.get(name)})


def check_ids(**texts: Any) -> None:
    """Refuse ids that not every database can keep and index.

    Raises:
        InvalidInputError: Names them.
    """
    bad = []
    for name, text in texts.items():
        if not isinstance(text, str):
            bad.append(f"{name}: is no text")
            continue
        if text.isascii() and "\x00" not in text and len(text) <= _MAX_ID:
            continue
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            bad.append(f"{name}: holds a lone surrogate; use plain text")
            continue
        if b"\x00" in encoded:
            bad.append(f"{name}: holds a NUL; use plain text")
        elif len(encoded) > _MAX_ID:
            bad.append(f"{name}: is longer than {_MAX_ID} bytes")
    if bad:
        raise InvalidInputError("config", tuple(bad))
