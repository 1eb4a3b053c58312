"""Commands about macros: the list of them, and running one, whole, step by step, or what is left of it."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence

from memconsole import macro_run, macros
from memconsole.cli import output
from memconsole.cli.acting import confirm, refuse
from memconsole.cli.connect import source
from memconsole.errors import ExitCode, MacroError, UsageError
from memconsole.escaping import escape
from memconsole.macro_run import Decision, Face, Ran, StepResult
from memconsole.macros import Macro
from memconsole.model import Danger, Plan
from memconsole.source import Source


def listing(options: argparse.Namespace) -> int:
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
    return ExitCode.FAILED if broken else ExitCode.DONE


def show(options: argparse.Namespace) -> int:
    """A macro's parameters and steps, and the file it is in."""
    macro = macros.find(options.macro)
    if options.json:
        output.json(macro)
        return ExitCode.DONE
    output.text(f"{macro.name}: {macro.title}")
    output.text(f"  file: {macro.path}")
    for name, param in macro.params.items():
        default = "must be given" if param.default is None else f"else {param.default!r}"
        output.text(f"  --set {name}=VALUE  {param.help} ({default})")
    for number, step in enumerate(macro.steps, 1):
        output.text(f"  {number}. {step.text({})}")
    return ExitCode.DONE


def run(options: argparse.Namespace) -> int:
    """Run a macro, or show every plan of it; a failure in the middle says what was done, what not, and how to go on."""
    macro = macros.find(options.macro)
    given = dict(options.settings)
    values = macro_run.settings_for(macro, given, options.steps)
    command = _command_of(options)
    _check_commands(macro, values, options.steps)
    with source(options, need="plan" if options.dry_run else "act") as found:
        if options.dry_run:
            results = list(_shown(macro_run.dry_run(macro, found, given, options.steps), quiet=options.json))
        else:
            if not options.yes and not options.step:
                _confirm(macro, found, given, options.steps)
            face = Face(command=command, decide=_decide if options.step else None)
            results = list(_shown(macro_run.run(macro, found, given, face, options.steps), quiet=options.json))
    return _end(options, macro, results, given)


def _end(options: argparse.Namespace, macro: Macro, results: Sequence[StepResult], given: dict[str, str]) -> int:
    """Say what became of it, and what is left of it."""
    rest = None if options.dry_run else macro_run.rest_of(macro, results, given)
    again = rest.cli(options.macro, yes=options.yes) if rest is not None else ""
    failed: MacroError | None = None
    try:
        macro_run.verdict(macro, results)
    except MacroError as error:
        failed = error
    if options.json:
        said = None if failed is None else {"code": failed.code, "what": failed.what, "why": failed.why}
        output.json({"macro": macro.name, "steps": results, "error": said, "rest": rest, "again": again})
    elif failed is not None:
        output.failure(failed, as_json=False)
        if again:
            output.note(f"  the rest again: {again}")
    if failed is not None:
        return macro_run.exit_code(results)
    refused = any(result.plan is not None and result.plan.refusals for result in results)
    return ExitCode.REFUSED if refused else ExitCode.DONE


def _command_of(options: argparse.Namespace) -> Callable[[Sequence[str]], Ran]:
    """What runs the words of a command against the same control process; with ``--json`` what it writes is kept."""
    from memconsole.cli.parser import parse

    def command(words: Sequence[str]) -> Ran:
        asked = parse(words)
        for name in ("socket", "embedded", "read_only"):
            setattr(asked, name, getattr(options, name))
        if not options.json:
            output.text(f"$ {shlex.join(['memconsole', *words])}")
            return Ran(int(asked.run(asked)))
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            code = int(asked.run(asked))
        return Ran(code, written.getvalue())

    return command


def _check_commands(macro: Macro, values: dict[str, str], steps: Collection[int]) -> None:
    """Refuse a macro one of whose commands does not parse, before anything is done."""
    from memconsole.cli.parser import parse

    known = {step.save: step.save for step in macro.steps if step.save} | values
    for number, step in enumerate(macro.steps, 1):
        if step.run and (not steps or number in steps):
            parse(macro_run.words_of(step, known))


def _decide(number: int, text: str, plan: Plan | None) -> Decision:
    """Show a step and ask what to do with it.

    Raises:
        UsageError: stdin is no terminal.
        Refused: the plan is refused.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "--step asks before each step", "stdin is not a terminal", "leave --step out, or add --dry-run"
        )
    output.text(f"step {number}: {text}")
    if plan is not None:
        output.plan(plan)
        refuse(plan)
    name = (plan.confirm or "yes") if plan is not None and plan.danger is Danger.DESTROYS else "y"
    sys.stderr.write(f"{escape(name)}: do it, s: leave it out, q: stop here: ")
    sys.stderr.flush()
    said = sys.stdin.readline().strip()
    if said == name:
        return "do"
    return "skip" if said == "s" else "stop"


def _confirm(macro: Macro, found: Source, given: dict[str, str], steps: Collection[int]) -> None:
    """Ask once for a macro that destroys something."""
    planned = list(macro_run.dry_run(macro, found, given, steps))
    if not macro_run.destroys(planned):
        return
    for result in planned:
        output.note(f"will: {result.cli or result.text}")
    confirm(Plan(f"macro {macro.name}", f"memconsole macro run {macro.name}", Danger.DESTROYS, confirm=macro.name))


def _shown(results: Iterator[StepResult], *, quiet: bool) -> Iterator[StepResult]:
    for result in results:
        if not quiet:
            _show(result)
        yield result


def _show(result: StepResult) -> None:
    head = f"step {result.number}: "
    if result.error:
        output.text(f"{head}FAILED {result.text}: {result.error}")
    elif result.skipped:
        output.text(f"{head}{'left out' if result.code else 'not begun'}: {result.text}")
    elif result.outcome is not None:
        output.text(f"{head}{result.outcome.text}")
    elif result.plan is not None:
        output.text(head.rstrip())
        output.plan(result.plan)
    elif result.view:
        output.text(f"{head}{result.text} (opens in the console)")
    else:
        output.text(f"{head}{result.text}")
    if result.note:
        output.text(f"  note: {result.note}")
