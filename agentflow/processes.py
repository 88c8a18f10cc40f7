"""Whether a process of this machine has ended, which its silence does not say.

A mark names a process for ever: the boot of the machine, the namespace in which its number counts,
the number, and when it began. On systems without `/proc` there are none.
"""

from __future__ import annotations

import os
from pathlib import Path

_STARTED = 19
"""Which field of `/proc/PID/stat`, behind the name, says when a process began."""


def own_mark() -> str | None:
    """Return what names this process; `None` if this system cannot tell."""
    started = _started(os.getpid())
    space = _space()
    return None if space is None or started is None else f"{space}/{os.getpid()}/{started}"


def has_ended(mark: str) -> bool:
    """Whether it is known that a process has ended; of another machine's it never is."""
    space, _, rest = mark.partition("/")
    number, _, started = rest.partition("/")
    if space != _space() or not number.isdigit() or not started:
        return False
    try:
        os.kill(int(number), 0)  # whoever owns it, this says whether it is there
    except ProcessLookupError:
        return True
    except OSError:
        return False
    now = _started(int(number))
    return now is not None and now != started


def _space() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return None
    return f"{boot}:{namespace}"


def _started(number: int) -> str | None:
    try:
        # The name of a program, in parentheses, may hold anything.
        fields = Path(f"/proc/{number}/stat").read_text("utf-8", "replace").rpartition(")")[2]
        return fields.split()[_STARTED]
    except (OSError, IndexError):
        return None
