"""A process that rotates keys and is killed on its way: `python -m … URL KEYS COUNT`."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys

from agentflow import AgentFlow
from agentflow.failpoints import arm
from agentflow.keys import KeyRing


async def main(url: str, keys: str, count: int) -> None:
    passed = itertools.count(1)

    def die() -> None:
        if next(passed) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    arm("keys.rewritten", die)
    async with AgentFlow(url, keys=KeyRing.from_text(keys, accept_plaintext=True)) as app:
        await app.rotate_keys()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
