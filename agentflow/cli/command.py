"""What every command shares: the common options, the way to the app, and how errors are told.

`command` adds the common options to a function's own and gives it a `Call`. An error of ours
becomes one line on stderr and the exit code of the table in `agentflow.errors`; a traceback is
shown only with `--debug`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentflow.cli.output import Output, OutputFormat
from agentflow.errors import AgentflowError, AppReferenceError, BlockedTypeError, meaning

if TYPE_CHECKING:
    from agentflow.app import AgentFlow

_PANEL = "Common options"

AppOption = functools.partial(
    typer.Option,
    "--app",
    metavar="MODULE:ATTRIBUTE",
    help="The app, an AgentFlow in a module. (env: AGENTFLOW_APP)",
    show_envvar=False,
    rich_help_panel=_PANEL,
)
DbOption = functools.partial(
    typer.Option,
    "--db",
    metavar="URL",
    help="The database; it overrides the app's own. (env: AGENTFLOW_DB_URL)",
    show_envvar=False,
    rich_help_panel=_PANEL,
)
DebugOption = functools.partial(
    typer.Option,
    "--debug",
    help="Show the traceback of an error. (env: AGENTFLOW_DEBUG)",
    show_envvar=False,
    rich_help_panel=_PANEL,
)
FormatOption = Annotated[
    OutputFormat | None,
    typer.Option("-o", "--output", help="How to print data.", rich_help_panel=_PANEL),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.", rich_help_panel=_PANEL)]


class UsageError(Exception):
    """An argument that cannot be what was meant; nothing was done."""

    def __init__(self, option: str, problem: str) -> None:
        """Name the option and what is wrong with it, or how to give it."""
        super().__init__(option, problem)
        self.option = option
        self.problem = problem

    def __str__(self) -> str:
        """Say both."""
        return f"{self.option} {self.problem}"


class OutcomeError(Exception):
    """The command did what it could, and the outcome is not a success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The common options of one invocation."""

    app: str | None
    db: str | None
    output: Output
    yes: bool
    debug: bool

    def open_app(self, *, needs_graphs: bool = False) -> AgentFlow:
        """Return the app: the one referred to, else a bare one on the database.

        Args:
            needs_graphs: The command runs graphs, which only the user's app knows.
        """
        if self.app is not None:
            return _load_app(self.app, self.db)
        if needs_graphs:
            raise UsageError(
                "--app", "is missing: give --app module:attribute, or set AGENTFLOW_APP"
            )
        from agentflow.app import AgentFlow

        return AgentFlow(self.db)

    @property
    def can_ask(self) -> bool:
        """Whether a person can be asked: questions go to stderr, answers come from stdin."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def confirm(self, question: str) -> bool:
        """Ask a person, if there is one and `--yes` was not given."""
        if self.yes or not self.can_ask:
            return True
        return typer.confirm(question, err=True)


def command(group: typer.Typer, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function `f(call: Call, …)`, sync or async, as a command of the group."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        group.command(name)(_with_common_options(function))
        return function

    return register


def _with_common_options(function: Callable[..., Any]) -> Callable[..., None]:
    def run(
        *,
        typer_context: typer.Context,
        app: Annotated[str | None, AppOption()] = None,
        db: Annotated[str | None, DbOption()] = None,
        output: FormatOption = None,
        yes: YesOption = False,
        debug: Annotated[bool, DebugOption()] = False,
        **own: Any,
    ) -> None:
        before = typer_context.find_root().params
        call = Call(
            app=app or before["app"] or None,
            db=db or before["db"] or None,
            output=Output(output or before["output"] or OutputFormat.TABLE),
            yes=yes or before["yes"],
            debug=debug or before["debug"],
        )
        _run(call, functools.partial(function, call, **own))

    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "call"]
    common = [
        p
        for p in inspect.signature(run, eval_str=True).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (common[0], *own, *common[1:])]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by typer
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__ = function.__name__
    run.__doc__ = function.__doc__
    return run


def _run(call: Call, body: Callable[[], Any]) -> None:
    try:
        result = body()
        if inspect.iscoroutine(result):
            asyncio.run(result)
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except UsageError as exc:
        call.output.error("usage", str(exc))
        raise typer.Exit(2) from exc
    except OutcomeError as exc:
        call.output.error("error", str(exc))
        raise typer.Exit(1) from exc
    except AgentflowError as exc:
        _show_traceback(call)
        needs_types = isinstance(exc, BlockedTypeError) and call.app is None
        hint = "--app module:attribute imports the types of your graphs" if needs_types else None
        call.output.error(meaning(exc).code, str(exc), hint=hint)
        raise typer.Exit(meaning(exc).exit_code) from exc
    except Exception as exc:
        _show_traceback(call)
        hint = None if call.debug else "--debug or AGENTFLOW_DEBUG=1 shows the traceback"
        call.output.error("error", describe(exc), hint=hint)
        raise typer.Exit(1) from exc


def describe(error: BaseException) -> str:
    """Return an exception as one line; a driver's further lines may hold parameters."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _show_traceback(call: Call) -> None:
    if call.debug:
        traceback.print_exc()


def _load_app(reference: str, db: str | None) -> AgentFlow:
    module_name, _, path = reference.partition(":")
    if not module_name or not path:
        raise AppReferenceError(reference, "it has no module, or no attribute after a colon")
    if db is not None:
        # What the module opens on import, besides the app, is to use the same database.
        os.environ["AGENTFLOW_DB_URL"] = db  # noqa: TID251  # written for others, not read
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as exc:
        raise AppReferenceError(reference, f"its import failed with {describe(exc)}") from exc
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as exc:
            raise AppReferenceError(reference, f"there is no attribute {name!r}") from exc
    from agentflow.app import AgentFlow

    if not isinstance(found, AgentFlow):
        raise AppReferenceError(reference, f"it is a {type(found).__name__}, not an AgentFlow")
    return found if db is None or db == found.url else found.with_url(db)
