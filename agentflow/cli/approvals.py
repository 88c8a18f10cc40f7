"""`agentflow approval`: list, show, approve, reject, edit, respond.

A decision is about what was shown: the version that was printed, or that the caller names, goes
with it, and a request that has changed since is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from agentflow.cli.command import Call, OutcomeError, UsageError, command
from agentflow.cli.output import OutputFormat, block, field_lines, jsonable, to_json
from agentflow.cli.values import read_json
from agentflow.types import Approval, Decision, WaitStatus

group = typer.Typer(help="Decide what runs wait for.", no_args_is_help=True)

_COLUMNS = ("id", "status", "run_id", "graph", "request.title", "version", "created_at")
_FIELDS = (
    "id",
    "status",
    "version",
    "request.title",
    "run_id",
    "thread_id",
    "graph",
    "ns",
    "tenant",
    "created_at",
    "request.allowed",
    "request.policy",
    "request.response_schema",
    "proposal_hash",
    "decided_by",
    "decided_at",
)
_OUTCOME = ("id", "status", "run_id", "decision.type", "decided_by", "decided_at")

ApprovalId = Annotated[str, typer.Argument(metavar="ID", help="The approval's id.")]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="Who decides; it is kept.")]
Comment = Annotated[str | None, typer.Option(help="A remark for the record; the run sees none.")]
Message = Annotated[str | None, typer.Option(help="What the run is told.")]
IfVersion = Annotated[
    int | None, typer.Option(metavar="N", help="Decide only if this version is current.")
]
StatusFilter = Literal["pending", "resolved", "expired", "withdrawn", "superseded", "all"]


@command(group, "list")
async def list_approvals(
    call: Call,
    *,
    status: Annotated[StatusFilter, typer.Option(help="Approvals of this status.")] = "pending",
    run_id: Annotated[str | None, typer.Option(help="Approvals of this run only.")] = None,
    graph: Annotated[str | None, typer.Option(help="Approvals of this graph only.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
) -> None:
    """List approvals, oldest first."""
    async with call.open_app() as app:
        page = await app.approvals.list(
            status=None if status == "all" else WaitStatus(status),
            run_id=run_id,
            graph=graph,
            limit=limit,
            cursor=cursor,
        )
    empty = "no approvals" if status == "all" else f"no {status} approvals"
    call.output.page(page, _COLUMNS, empty=empty)


@command(group, "show")
async def show(call: Call, approval_id: ApprovalId) -> None:
    """Show an approval: what is proposed, and what may be answered."""
    async with call.open_app() as app:
        approval = await app.approvals.get(approval_id)
    if call.output.format is OutputFormat.TABLE:
        for line in approval_lines(approval):
            typer.echo(line)
    else:
        call.output.record(approval)


@command(group, "approve")
async def approve(
    call: Call,
    approval_id: ApprovalId,
    *,
    by: By,
    message: Message = None,
    comment: Comment = None,
    if_version: IfVersion = None,
) -> None:
    """Approve what is shown.

    Prints the proposal and, on a terminal, asks. Without a terminal nobody has seen it, so
    --if-version must say which version is meant.
    """
    if if_version is None and not call.can_ask:
        raise UsageError(
            "--if-version",
            "is required without a terminal: give the version that 'agentflow approval show' "
            "prints, so that what was looked at is what is approved",
        )
    await _decide(
        call,
        approval_id,
        lambda approval: _each(approval, Decision(type="approve", message=message)),
        verb="Approve",
        by=by,
        comment=comment,
        if_version=if_version,
    )


@command(group, "reject")
async def reject(
    call: Call,
    approval_id: ApprovalId,
    *,
    by: By,
    message: Message = None,
    comment: Comment = None,
    if_version: IfVersion = None,
) -> None:
    """Reject what is proposed; the run is told and goes on."""
    await _decide(
        call,
        approval_id,
        lambda approval: _each(approval, Decision(type="reject", message=message)),
        verb="Reject",
        by=by,
        comment=comment,
        if_version=if_version,
    )


@command(group, "edit")
async def edit(
    call: Call,
    approval_id: ApprovalId,
    *,
    by: By,
    value: Annotated[
        str | None,
        typer.Option(metavar="JSON|@FILE|-", help="The whole proposal as it is to be."),
    ] = None,
    args: Annotated[
        str | None,
        typer.Option(
            metavar="JSON|@FILE|-", help="For a call: all its arguments as they are to be."
        ),
    ] = None,
    action_name: Annotated[
        str | None, typer.Option(help="For a call: its name, if that changes too.")
    ] = None,
    decisions: Annotated[
        str | None,
        typer.Option(
            metavar="JSON|@FILE|-", help="For several calls: a list of decisions, in their order."
        ),
    ] = None,
    message: Message = None,
    comment: Comment = None,
    if_version: IfVersion = None,
) -> None:
    """Approve with changes: give the proposal, or the call, as it is to be carried out."""
    given = {"--value": value, "--args": args, "--decisions": decisions}
    chosen = [(option, text) for option, text in given.items() if text is not None]
    if len(chosen) != 1:
        raise UsageError("edit", f"needs one of {', '.join(given)}")
    option, text = chosen[0]
    if action_name is not None and option != "--args":
        raise UsageError("--action-name", "needs --args, the arguments of the call")
    content = read_json(option, text)
    if option == "--args" and not isinstance(content, dict):
        raise UsageError("--args", "takes a JSON object: the arguments by name")

    def build(approval: Approval) -> Decision | dict[str, Any]:
        if option == "--value":
            return Decision(type="edit", message=message, value=content)
        if option == "--decisions":
            return {"decisions": content, "message": message}
        call_name = action_name or _only_action(approval)
        edited = {"name": call_name, "args": content}
        return Decision(type="edit", message=message, edited_action=edited)

    await _decide(
        call,
        approval_id,
        build,
        verb=f"To be carried out instead:\n{_indented(content)}\n\nApprove this change of",
        by=by,
        comment=comment,
        if_version=if_version,
    )


@command(group, "respond")
async def respond(
    call: Call,
    approval_id: ApprovalId,
    *,
    by: By,
    value: Annotated[str, typer.Option(metavar="JSON|@FILE|-", help="The answer.")],
    message: Message = None,
    comment: Comment = None,
    if_version: IfVersion = None,
) -> None:
    """Answer with a value: more for a budget, what came of an effect, or what a node asks for."""
    content = read_json("--value", value)
    await _decide(
        call,
        approval_id,
        lambda _: Decision(type="respond", message=message, value=content),
        verb=f"The answer:\n{_indented(content)}\n\nGive it to",
        by=by,
        comment=comment,
        if_version=if_version,
    )


@command(group, "reopen")
async def reopen(call: Call, approval_id: ApprovalId, *, by: By, comment: Comment = None) -> None:
    """Take a decision back: it is asked again, under the same id.

    What the run has done with the old answer stays done.
    """
    if not by.strip():
        raise UsageError("--by", "needs a name: it is kept in the run's log")
    async with call.open_app() as app:
        shown = await app.approvals.get(approval_id)
        if call.can_ask or call.output.format is OutputFormat.TABLE:
            call.output.message("\n".join((*approval_lines(shown), "")))
        if not call.confirm("Take this decision back?"):
            raise OutcomeError("not confirmed; nothing was changed")
        opened = await app.approvals.reopen(approval_id, by=by, comment=comment)
    call.output.record(opened, _OUTCOME)


async def _decide(
    call: Call,
    approval_id: str,
    build: Callable[[Approval], Decision | dict[str, Any]],
    *,
    verb: str,
    by: str,
    comment: str | None,
    if_version: int | None,
) -> None:
    if not by.strip():
        raise UsageError("--by", "needs a name: who decides is kept with the decision")
    async with call.open_app() as app:
        shown = await app.approvals.get(approval_id)
        decision = build(shown)
        if call.can_ask or call.output.format is OutputFormat.TABLE:
            call.output.message("\n".join((*approval_lines(shown), "")))
        is_current = shown.status is WaitStatus.PENDING and if_version in {None, shown.version}
        # What the store will refuse is not worth a question.
        if is_current and not call.confirm(f"{verb} version {shown.version}?"):
            raise OutcomeError("not confirmed; nothing was recorded")
        decided = await app.approvals.decide(
            approval_id,
            decision,
            by=by,
            comment=comment,
            version=shown.version if if_version is None else if_version,
        )
    call.output.record(decided, _OUTCOME)


def _each(approval: Approval, decision: Decision) -> Decision:
    """One decision for every action, where several are asked about at once."""
    actions = approval.request.actions
    if len(actions) <= 1:
        return decision
    return Decision(
        type=decision.type, message=decision.message, decisions=(decision,) * len(actions)
    )


def _only_action(approval: Approval) -> str:
    actions = approval.request.actions
    if len(actions) == 1:
        return actions[0].name
    raise UsageError(
        "--args",
        f"is for a request about one call, and this one is about {len(actions) or 'none'}; "
        f"use {'--decisions' if actions else '--value'}",
    )


def approval_lines(approval: Approval) -> list[str]:
    """Return what a reviewer is shown, with nothing of it hidden or cut."""
    data = jsonable(approval)
    lines = field_lines(data, _FIELDS)
    if approval.request.description:
        lines += block("description", approval.request.description)
    if not approval.request.actions:
        lines += ["proposal:", _indented(approval.request.proposal)]
    for number, action in enumerate(approval.request.actions, 1):
        lines.append(f"action {number}:")
        lines += [f"  {line}" for line in field_lines(jsonable(action), ("name", "allowed"))]
        if action.description:
            lines += [f"  {line}" for line in block("description", action.description)]
        lines += ["  args:", _indented(action.args, "    ")]
    if approval.decision is not None:
        lines += ["decision:", _indented(approval.decision)]
    if approval.comment:
        lines += block("comment", approval.comment)
    return lines


def _indented(value: Any, margin: str = "  ") -> str:
    return "\n".join(f"{margin}{line}" for line in to_json(value, indent=2).splitlines())
