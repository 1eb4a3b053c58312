"""Commands that act: every Action of the registry."""

from __future__ import annotations

import argparse
import contextlib

from memconsole.actions import Action, HandoffAction
from memconsole.cli import confirming, connect, output
from memconsole.cli.connect import source
from memconsole.command import action_of
from memconsole.errors import ExitCode, Refused
from memconsole.escaping import escape
from memconsole.model import Danger, Plan
from memconsole.source import Source


def act(options: argparse.Namespace) -> int:
    """Plan one Action, ask where it destroys, and apply it; ``--dry-run`` only shows the plan."""
    if connect.are_many(options):
        from memconsole.cli import fleeting

        return fleeting.act(options)
    action = action_of(options, options.rest)
    with source(options, need="plan" if options.dry_run else "act") as found:
        plan = found.plan(action)
        if options.dry_run:
            if options.json:
                output.json(plan)
            else:
                output.plan(plan)
            return ExitCode.REFUSED if plan.refusals else ExitCode.DONE
        refuse(plan)
        if plan.danger is Danger.DESTROYS and not options.yes:
            confirm(plan)
        with _told(found, action):
            outcome = found.apply(action)
    if options.json:
        output.json(outcome)
    else:
        output.outcome(outcome)
    return ExitCode.DONE


def _told(found: Source, action: Action) -> contextlib.AbstractContextManager[None]:
    """What says how far a long action is, where there is anything to say."""
    if not isinstance(action, HandoffAction):
        return contextlib.nullcontext()
    from memconsole.cli import handing

    return handing.told(found)


def refuse(plan: Plan) -> None:
    """Nothing, if a plan can be applied.

    Raises:
        Refused: it is refused.
    """
    if plan.refusals:
        first = plan.refusals[0]
        raise Refused(first.what, first.why, first.remedy, code=first.code)


def confirm(plan: Plan) -> None:
    """Show the plan and have its name typed.

    Raises:
        UsageError: nobody is there to type it.
        Refused: another word was typed.
    """
    name = plan.confirm or "yes"
    confirming.typed(
        name,
        f"type {escape(name)} to go on: ",
        lambda: output.plan(plan),
        what=plan.action,
        refused=Refused(
            f"{plan.action} was not confirmed",
            "another word was typed; nothing was changed",
            "type the name as it is shown, or add --yes",
            code="NotConfirmed",
        ),
    )
