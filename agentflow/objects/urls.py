"""From the URL of an object store to the store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from agentflow.errors import InvalidInputError, UnsupportedUrlError
from agentflow.objects.base import ObjectStore
from agentflow.objects.files import FolderStore

_SUPPORTED = ("file:///folder",)


def open_objects(url: str) -> ObjectStore:
    """Open the object store at `url`.

    Args:
        url: `file:///folder`, a folder that is there.

    Raises:
        UnsupportedUrlError: Its scheme is another one.
        InvalidInputError: It is malformed.
        ObjectStoreError: There is no such folder.
    """
    try:
        parts = urlsplit(url)
    except (AttributeError, TypeError, ValueError):
        raise InvalidInputError("object store", ("url: is malformed",)) from None
    if parts.scheme != "file":
        raise UnsupportedUrlError(parts.scheme or "(none)", _SUPPORTED)
    path = unquote(parts.path)
    is_local = parts.netloc in {"", "localhost"}
    is_plain = not parts.query and not parts.fragment and "\x00" not in path
    if not is_local or not is_plain or not path.startswith("/") or not path.strip("/"):
        advice = "url: must name a folder from the root on, as file:///var/lib/agentflow does"
        raise InvalidInputError("object store", (advice,))
    return FolderStore(f"file://{parts.path}", Path(path))
