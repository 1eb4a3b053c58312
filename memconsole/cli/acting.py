"""Commands that act: every Action of the registry, and macros."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from memconsole import macros
from memconsole.actions import Action, Handoff
from memconsole.cli import output
from memconsole.cli.connect import source
from memconsole.command import action_of
from memconsole.errors import ExitCode, Refused, UsageError
from memconsole.macros import Macro, StepResult
from memconsole.model import Danger, Plan
from memconsole.source import Source


def act(options: argparse.Namespace) -> int:
    """Plan one Action, ask where it destroys, and apply it; ``--dry-run`` only shows the plan."""
    action = action_of(options, options.rest)
    with source(options, need="plan" if options.dry_run else "act") as found:
        plan = found.plan(action)
        if options.dry_run:
            if options.json:
                output.json(plan)
            else:
                output.plan(plan)
            return ExitCode.REFUSED if plan.refusals else ExitCode.DONE
        _refuse(plan)
        if plan.danger is Danger.DESTROYS and not options.yes:
            _confirm(plan)
        with _told(found, action):
            outcome = found.apply(action)
    if options.json:
        output.json(outcome)
    else:
        output.outcome(outcome)
    return ExitCode.DONE


def _told(found: Source, action: Action) -> contextlib.AbstractContextManager[None]:
    """What says how far a long action is, where there is anything to say."""
    if not isinstance(action, Handoff):
        return contextlib.nullcontext()
    from memconsole.cli import handing

    return handing.told(found)


def _refuse(plan: Plan) -> None:
    if plan.refusals:
        first = plan.refusals[0]
        raise Refused(first.what, first.why, first.remedy, code=first.code)


def _confirm(plan: Plan) -> None:
    """Show the plan and have its name typed.

    Raises:
        UsageError: nobody is there to type it.
        Refused: another word was typed.
    """
    name = plan.confirm or "yes"
    if not sys.stdin.isatty():
        raise UsageError(f"{plan.action} wants to be confirmed", "there is no terminal to ask on", "add --yes")
    output.plan(plan)
    sys.stderr.write(f"type {name} to go on: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip() != name:
        raise Refused(f"{plan.action} was not confirmed", "", "nothing was changed", code="NotConfirmed")


def macro_list(options: argparse.Namespace) -> int:
    """The macros of the macro directories; a file that is none is said on stderr."""
    found, broken = macros.discover()
    if options.json:
        output.json(found)
    else:
        for macro in found:
            key = f"  [{macro.key}]" if macro.key else ""
            output.text(f"{macro.name}{key}  {macro.title}  ({', '.join(macro.params) or 'no parameters'})")
    for path, error in broken:
        output.note(f"memconsole: {path}: {error}")
    if not found and not broken:
        output.note(f"no macros in {', '.join(str(path) for path in macros.macro_paths())}")
    return ExitCode.FAILED if broken else ExitCode.DONE


def macro_run(options: argparse.Namespace) -> int:
    """Run a macro, or show every plan of it; a failure in the middle says what was done and what not."""
    macro = macros.find(options.macro)
    given = dict(options.settings)
    macros.settings_for(macro, given)
    with source(options, need="plan" if options.dry_run else "act") as found:
        if options.dry_run:
            results = list(_shown(macros.dry_run(macro, found, given), quiet=options.json))
        else:
            if not options.yes:
                _confirm_macro(macro, found, given)
            results = list(_shown(macros.run(macro, found, given), quiet=options.json))
    if options.json:
        output.json(results)
    if options.dry_run:
        return ExitCode.DONE
    macros.verdict(macro, results)
    return ExitCode.DONE


def _confirm_macro(macro: Macro, found: Source, given: dict[str, str]) -> None:
    """Ask once for a macro that destroys something."""
    plans = [result.plan for result in macros.dry_run(macro, found, given) if result.plan]
    if not any(plan.danger is Danger.DESTROYS for plan in plans):
        return
    for plan in plans:
        output.note(f"will: {plan.cli}")
    _confirm(Plan(f"macro {macro.name}", f"memconsole macro run {macro.name}", Danger.DESTROYS, confirm=macro.name))


def _shown(results: Iterator[StepResult], *, quiet: bool) -> Iterator[StepResult]:
    for result in results:
        if not quiet:
            _show_step(result)
        yield result


def _show_step(result: StepResult) -> None:
    head = f"step {result.number}: "
    if result.error:
        output.text(f"{head}FAILED {result.text}: {result.error}")
    elif result.skipped:
        output.text(f"{head}not begun: {result.text}")
    elif result.outcome is not None:
        output.text(f"{head}{result.outcome.text}")
    elif result.plan is not None:
        output.text(head.rstrip())
        output.plan(result.plan)
        if result.note:
            output.text(f"  note: {result.note}")
    else:
        output.text(f"{head}{result.text} (opens in the console)")
