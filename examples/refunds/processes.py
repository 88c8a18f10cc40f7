"""The processes of the demo: the services, the workers, and the command line.

Each is a real process; what the demo knows of one is its exit code and what the services recorded.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from examples.refunds.holds import Hold, Request

PATIENCE = 45.0
"""Seconds after which something that has not happened will not happen."""

_ROOT = Path(__file__).parents[2]
_LONG_POLL = 5.0

T = TypeVar("T")


class DemoError(Exception):
    """The demo cannot go on; the message says what was waited for."""


class Running:
    """A process that the demo started, and its log."""

    def __init__(self, name: str, process: Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    async def until(self, happened: Coroutine[Any, Any, T], *, what: str) -> T:
        """Wait for something, but not longer than this process lives.

        Raises:
            DemoError: The process ended first, or the time is over.
        """
        waiting = asyncio.create_task(happened)
        ended = asyncio.create_task(self._process.wait())
        both = {waiting, ended}
        try:
            await asyncio.wait(both, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            fate = f"ended with exit code {ended.result()}" if ended.done() else "is still running"
            raise DemoError(f"waited for {what}, but {self.name} {fate}; see {self._log}")
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def kill(self) -> int:
        """Kill the process as a power cut would, and return its exit code."""
        self._process.send_signal(signal.SIGKILL)
        return await self._process.wait()

    async def stop(self) -> None:
        """Ask the process to end.

        Raises:
            DemoError: It does not, or not with exit code 0.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            exit_code = await asyncio.wait_for(self._process.wait(), PATIENCE)
        except TimeoutError as exc:
            raise DemoError(f"{self.name} does not stop; see {self._log}") from exc
        if exit_code != 0:
            raise DemoError(f"{self.name} stopped with exit code {exit_code}; see {self._log}")

    async def end(self) -> None:
        """Leave nothing behind, whatever happened before."""
        if self._process.returncode is None:
            await self.kill()


class Services(Running):
    """The payment and e-mail services, and the demo's way to direct them."""

    def __init__(self, process: Process, log: Path, url: str) -> None:
        super().__init__("the services", process, log)
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=f"{url}/control", timeout=_LONG_POLL + 5, trust_env=False
        )

    async def hold(self, hold: Hold) -> int:
        """Arm a hold point and return its id."""
        response = await self._http.post("/holds", json=asdict(hold))
        hold_id: int = response.raise_for_status().json()["hold"]
        return hold_id

    async def wait_caught(self, hold_id: int) -> Request:
        """Return the request that a hold caught; its sender now waits for an answer."""
        while True:
            response = await self._http.get(f"/holds/{hold_id}", params={"timeout": _LONG_POLL})
            if caught := response.raise_for_status().json()["caught"]:
                return Request(**caught)

    async def end_hold(self, hold_id: int) -> None:
        """Drop the request that a hold caught, without an answer."""
        (await self._http.delete(f"/holds/{hold_id}")).raise_for_status()

    async def wait_counts(self, since: int) -> Mapping[str, int]:
        """Return the counts once they differ from those numbered `since`, or after a while."""
        params = {"since": since, "timeout": _LONG_POLL}
        response = await self._http.get("/counts", params=params)
        counts: Mapping[str, int] = response.raise_for_status().json()
        return counts

    async def end(self) -> None:
        await self._http.aclose()
        await super().end()


class Stage:
    """Starts the demo's processes on one database and one ledger, and clears them away.

    Use it with `async with`.
    """

    def __init__(self, *, db: str, queue: str, directory: Path, fault: str | None) -> None:
        self._queue = queue
        self._directory = directory
        self._fault = fault
        self._environment = {
            **os.environ,
            "AGENTFLOW_DB_URL": db,
            # Short, so that the runs of a killed worker are soon taken over.
            "AGENTFLOW_LEASE": "3",
        }
        self._started: list[Running] = []

    @property
    def ledger(self) -> Path:
        return self._directory / "ledger.sqlite"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for running in self._started:
            await running.end()

    async def start_services(self) -> Services:
        arguments = ["--ledger", str(self.ledger), "--port", "0"]
        if self._fault is not None:
            arguments += ["--fault", self._fault]
        process, log = await self._start("services", "examples.refunds.services", *arguments)
        assert process.stdout is not None
        first_line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
        if not first_line:
            raise DemoError(f"the services did not start; see {log}")
        services = Services(process, log, json.loads(first_line)["url"])
        self._environment["REFUNDS_SERVICES_URL"] = services.url
        self._started.append(services)
        return services

    async def start_worker(self, number: int, *, concurrency: int) -> Running:
        process, log = await self._start(
            f"worker-{number}",
            "agentflow",
            "worker",
            *("--app", "examples.refunds.app:app", "--queue", self._queue),
            *("--concurrency", str(concurrency)),
        )
        worker = Running(f"worker {number}", process, log)
        self._started.append(worker)
        return worker

    async def agentflow(self, *arguments: str) -> Any:
        """Run an agentflow command in a fresh process and return its JSON output.

        Raises:
            DemoError: Its exit code is not 0.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agentflow", *arguments, "-o", "json"),
            cwd=_ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        output, problem = await asyncio.wait_for(process.communicate(), PATIENCE)
        if process.returncode != 0:
            command = f"agentflow {' '.join(arguments[:2])}"
            raise DemoError(
                f"'{command}' ended with exit code {process.returncode}: {problem.decode().strip()}"
            )
        return json.loads(output)

    async def _start(self, name: str, module: str, *arguments: str) -> tuple[Process, Path]:
        log = self._directory / f"{name}.log"
        with log.open("ab") as stream:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *arguments),
                cwd=_ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if module.startswith("examples") else stream,
                stderr=stream,
            )
        return process, log
