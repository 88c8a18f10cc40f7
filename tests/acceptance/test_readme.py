"""The documents, taken at their word: code runs as printed, and every test they name exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentflow import AgentFlow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "GLOSSARY.md"]
SUITES = ROOT / "agentflow" / "testing" / "savers"
DOCUMENTS += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def programs() -> dict[str, str]:
    """Return the printed programs by the file name in their first line."""
    return {code.splitlines()[0].removeprefix("# "): code for code in blocks("python")}


def run(command: list[str], folder: Path, **env: str) -> str:
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_programs_print_what_the_readme_says(tmp_path: Path) -> None:
    printed = blocks("text")
    assert list(programs()) == ["refund_agent.py", "chat.py"]
    for (name, code), expected in zip(programs().items(), printed, strict=True):
        (tmp_path / name).write_text(code, encoding="utf-8")
        assert run([sys.executable, "-W", "error", name], tmp_path) == expected


async def test_commands_finish_the_run_that_they_submit(tmp_path: Path) -> None:
    (tmp_path / "refund_agent.py").write_text(programs()["refund_agent.py"], encoding="utf-8")
    (block,) = (block for block in blocks("sh") if "agentflow worker &" in block)
    export, worker, *commands = block.splitlines()
    env = dict([export.removeprefix("export ").split("=")])
    shown = ""
    with in_background(worker, tmp_path, env):
        async with AgentFlow(f"sqlite:///{tmp_path / 'refunds.db'}") as app:
            for command in commands:
                approval_id = ""
                if " approval " in command:
                    await app.wait("A-18", until="parked", timeout=40)
                    (approval,) = (await app.approvals.list(run_id="A-18")).items
                    approval_id = approval.id
                elif " run show " in command:
                    await app.wait("A-18", timeout=40)
                arguments = [approval_id if word == "ID" else word for word in own(command)]
                shown = run(arguments, tmp_path, **env)
    assert "paid 60 euros for A-18" in shown
    assert "run.succeeded" in shown


@contextmanager
def in_background(command: str, folder: Path, env: dict[str, str]) -> Iterator[None]:
    """Have a worker run meanwhile; it must drain when it is told to."""
    with subprocess.Popen(
        own(command.removesuffix(" &")),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield
            process.terminate()
            _, messages = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode == 0, messages


def own(command: str) -> list[str]:
    """Return a command of the README as a call of this checkout."""
    program, *arguments = shlex.split(command)
    assert program == "agentflow"
    return [sys.executable, "-m", "agentflow", *arguments]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_tests_and_linked_files_exist(document: str) -> None:
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    for file, inherits, name in re.findall(r"`?(tests/[\w/]+\.py)::(\w+::)?(\w+)", text):
        # What a class of the file inherits stands in a suite that is shipped.
        places = [ROOT / file, *(SUITES.glob("*.py") if inherits else ())]
        assert any(name in functions(place) for place in places), f"{document}: {file}::{name}"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), f"{document} links {target}"


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
