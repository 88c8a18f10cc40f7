"""`agentflow keys`: change the key that everything is encrypted by."""

from __future__ import annotations

import time

import typer

from agentflow.cli.command import Call, OutcomeError, command
from agentflow.cli.output import Output

group = typer.Typer(help="Look after the keys of encryption.", no_args_is_help=True)

_PAUSE = 1.0
"""Seconds between two lines about the progress."""


@command(group, "rotate")
async def rotate(call: Call) -> None:
    """Encrypt by the current key whatever is not: by older keys, or not at all.

    The current key is the first one of AGENTFLOW_KEYS. What is encrypted by the others is read
    meanwhile, by whoever has them; once this is done they may go. Killed, it is simply run again.
    """
    async with call.open_app() as app:
        done = await app.rotate_keys(_Progress(call.output))
    call.output.record(done)
    if not done.is_complete:
        raise OutcomeError(
            "some process still encrypts by an old key: give all of them the new one as their "
            "first, and run this again"
        )
    call.output.message("everything is encrypted by the current key")


class _Progress:
    """Tells how far it is, now and then."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._due = time.monotonic()

    def __call__(self, what: str, seen: int, sealed: int) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _PAUSE
            self._output.message(f"{what}: {seen} rows looked through, {sealed} sealed")
