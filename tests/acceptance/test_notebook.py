"""The first notebook, as its reader uses it: the kernel is restarted while the run waits."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import jupytext
import nbformat
import psutil
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from jupytext.compare import compare_notebooks
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
FIRST = NOTEBOOKS / "01-first-durable-agent.ipynb"
RESTART = "## Restart the kernel here"

OpenKernel = Callable[[NotebookNode], AbstractAsyncContextManager[NotebookClient]]


@pytest.fixture
def open_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenKernel:
    """Open kernels that run this Python in one folder, whatever else Jupyter finds installed."""
    spec = tmp_path / "jupyter" / "kernels" / "this-python"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    facts = {"argv": command, "display_name": "This Python", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(facts), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    folder = tmp_path / "work"
    folder.mkdir()

    @asynccontextmanager
    async def opened(notebook: NotebookNode) -> AsyncIterator[NotebookClient]:
        client = NotebookClient(
            notebook,
            kernel_name="this-python",
            timeout=40,
            startup_timeout=40,
            resources={"metadata": {"path": str(folder)}},
        )
        async with client.async_setup_kernel(cleanup_kc=True):
            yield client

    return opened


def test_notebook_is_what_its_source_says() -> None:
    for source in sorted(NOTEBOOKS.glob("*.py")):
        notebook = jupytext.read(source.with_suffix(".ipynb"))
        nbformat.validate(notebook)
        compare_notebooks(notebook, jupytext.read(source), fmt="py:percent")
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert not cell.outputs, f"{source.stem}: outputs are not committed"
                assert cell.execution_count is None


async def test_run_survives_the_kernel_that_started_it(open_kernel: OpenKernel) -> None:
    notebook = jupytext.read(FIRST)
    (restart,) = (i for i, cell in enumerate(notebook.cells) if RESTART in cell.source)
    before, after = notebook.cells[:restart], notebook.cells[restart:]
    definitions = [cell for cell in before if "definitions" in cell.metadata.get("tags", ())]

    first = await execute(open_kernel, before)
    assert first.count("the model is called") == 1
    assert shown(first, "status") == ["waiting", "pending"]
    assert shown(first, "proposal") == ["{'order': 'A-17', 'amount': 40}"]

    second = await execute(open_kernel, [*definitions, *after])
    assert "the model is called" not in second
    assert shown(second, "status") == ["waiting", "resolved"]
    assert shown(second, "decision") == ["edit by ann"]
    assert "\n25\n" in second
    events = re.findall(r"^ *\d+  (\S+)$", second, re.MULTILINE)
    assert events[0] == "run.submitted"
    assert events[-1] == "run.succeeded"
    assert "run.recovered" not in events


async def execute(open_kernel: OpenKernel, cells: list[NotebookNode]) -> str:
    """Execute cells in a kernel of their own, kill it, and return all that they showed."""
    notebook = NotebookNode(  # type: ignore[no-untyped-call]  # nbformat types but a part of itself
        cells=cells, metadata={}, nbformat=4, nbformat_minor=5
    )
    async with open_kernel(notebook) as client:
        for index, cell in enumerate(cells):
            await client.async_execute_cell(cell, index)
        await kill(client)
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return "\n".join([*map(text_of, outputs), ""])


async def kill(client: NotebookClient) -> None:
    assert isinstance(client.km, AsyncKernelManager)
    assert isinstance(client.km.provisioner, LocalProvisioner)
    process = psutil.Process(client.km.provisioner.pid)
    process.kill()
    await client.km.shutdown_kernel(now=True)
    assert not process.is_running()


def text_of(output: NotebookNode) -> str:
    if output.output_type == "stream":
        return str(output.text)
    data = output.data
    return str(data.get("text/html", data["text/plain"]))


def shown(html: str, name: str) -> list[str]:
    """Return what the tables show in their rows of that name."""
    found = re.findall(rf"<th>{name}</th><td>(.*?)</td>", html)
    return [cell.replace("&#x27;", "'") for cell in found]
