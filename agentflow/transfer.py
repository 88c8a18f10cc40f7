"""One run as one JSON file, and back: into another database, also of another kind.

The file has what is stored of the run, its thread as an archive, and the fingerprints of its graph;
no code. What is encrypted stays so, and needs its key where it is imported. Payloads open only for
the same tenant, run and thread.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

from agentflow.checkpoint import Saver
from agentflow.errors import (
    AgentflowError,
    ConflictError,
    HashMismatchError,
    InvalidInputError,
    NotFoundError,
    UnknownVersionError,
)
from agentflow.failpoints import failpoint
from agentflow.objects import Bundle
from agentflow.storage import RunStore
from agentflow.types import Run, RunStatus, SystemClock

_HEAD = {
    "run_id": "run_id",
    "thread_id": "thread_id",
    "graph": "graph",
    "graph_version": "version",
    "status": "status",
    "fingerprint": "fingerprint",
}
"""What a file says of its run, by the column that has it."""
FORMAT, VERSION = "agentflow-run", 1
_WHAT = "exported run"


async def export_run(
    store: RunStore, saver: BaseCheckpointSaver[Any], tenant: str, run_id: str
) -> dict[str, Any]:
    """See `AgentFlow.export_run`."""
    own = _own(saver)
    rows = await store.get_rows(tenant, run_id)
    run = rows["run"][0]
    bundle, archive_id = Bundle(), None
    try:
        archived = await own.aarchive(run["thread_id"], to=bundle, keep=True)
        archive_id = archived.archive_id
    except NotFoundError:
        pass  # it has not begun
    head = await _head_of(own, run["thread_id"])
    if await store.get_rows(tenant, run_id) != rows:
        raise ConflictError(f"run {run_id!r} went on while it was read; pause it, and call again")
    content = {
        "tenant": tenant,
        "run_id": run_id,
        "thread_id": run["thread_id"],
        "graph": run["graph"],
        "graph_version": run["version"],
        "status": run["status"],
        "fingerprint": run.get("fingerprint"),
        "exported_at": SystemClock().now().isoformat(),
        "is_encrypted": own.keys is not None,
        "checkpoint_id": head,
        "rows": rows,
        "archive": archive_id,
        "objects": {name: base64.b64encode(data).decode() for name, data in bundle.objects.items()},
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "sha256": _hash_of(content),
        "content": content,
    }


async def import_run(
    store: RunStore,
    saver: BaseCheckpointSaver[Any],
    tenant: str,
    exported: Mapping[str, Any],
    *,
    by: str | None,
) -> Run:
    """See `AgentFlow.import_run`."""
    own, content = _own(saver), _content_of(exported, tenant)
    run_id, thread_id = content["run_id"], content["thread_id"]
    try:
        await store.get_run(tenant, run_id)
    except NotFoundError:
        pass
    else:
        raise ConflictError(f"run {run_id!r} is there already; nothing was imported")
    restored = await _restore(own, content)
    failpoint("transfer.restored")
    try:
        return await store.import_run(
            tenant, content["rows"], by=by, origin=str(exported["sha256"])
        )
    except (AgentflowError, LookupError) as exc:
        if restored:
            await own.adelete_thread(thread_id)
        if isinstance(exc, LookupError):
            raise HashMismatchError(_WHAT, "it lacks what every run has") from exc
        raise


async def _restore(saver: Saver, content: Mapping[str, Any]) -> bool:
    """Make the run's thread, unless it has none; say whether it was made now."""
    if content["archive"] is None:
        return False
    try:
        objects = {
            name: base64.b64decode(data, validate=True) for name, data in content["objects"].items()
        }
    except (binascii.Error, AttributeError, TypeError) as exc:
        raise HashMismatchError(_WHAT, "an object of its archive is none") from exc
    try:
        await saver.arestore(
            content["thread_id"], source=Bundle(objects), archive_id=content["archive"]
        )
    except ConflictError:
        # An import that was cut short has left the thread, and no run.
        if await _head_of(saver, content["thread_id"]) != content["checkpoint_id"]:
            raise
        return False
    return True


async def _head_of(saver: Saver, thread_id: str) -> str | None:
    place = {"thread_id": thread_id, "checkpoint_ns": ""}
    head = await saver.readable_anywhere().aget_tuple({"configurable": place})
    return None if head is None else str(head.checkpoint["id"])


def _content_of(exported: Any, tenant: str) -> Mapping[str, Any]:
    """Verify an exported run.

    Raises:
        InvalidInputError: It is none, or another tenant's.
        UnknownVersionError: A newer program made it.
        HashMismatchError: It is damaged.
    """
    if not isinstance(exported, Mapping) or exported.get("format") != FORMAT:
        raise InvalidInputError(_WHAT, ("it is none; 'agentflow run export' makes one",))
    version = exported.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise UnknownVersionError(version if isinstance(version, int) else -1, VERSION, _WHAT)
    content = exported.get("content")
    if not isinstance(content, Mapping) or exported.get("sha256") != _hash_of(content):
        raise HashMismatchError(_WHAT)
    try:
        if content["tenant"] != tenant:
            raise InvalidInputError(
                _WHAT, (f"it is of tenant {content['tenant']!r}, and this is {tenant!r}",)
            )
        _check_head(content)
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise HashMismatchError(_WHAT, "it lacks what every run has") from exc
    return content


def _check_head(content: Mapping[str, Any]) -> None:
    """See that what is said of the run is so, and that its thread is there if it has one."""
    run: Mapping[str, Any]
    (run,) = content["rows"]["run"]
    for name, column in _HEAD.items():
        if content[name] != run.get(column):
            raise HashMismatchError(_WHAT, f"its {name} is not that of the run in it")
    has_begun = run.get("checkpoint_id") is not None
    if content["archive"] is None and has_begun and not RunStatus(run["status"]).is_ended:
        raise HashMismatchError(_WHAT, "it has begun, and nothing of its thread is there")


def _hash_of(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _own(saver: BaseCheckpointSaver[Any]) -> Saver:
    if not isinstance(saver, Saver):
        raise InvalidInputError(
            "checkpoints", ("must be opened by open_checkpointer to be exported or imported",)
        )
    return saver
