"""Macros are run: every step in order, planned or done, with the values that its parameters have.

A dry run plans each step as if those before it had been done. A run ends at the first failure, unless a step or the
macro says ``continue``; :func:`rest_of` is what is left of it then, with the values that are known, to be run again.
"""

from __future__ import annotations

import shlex
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from memconsole import action_input, actions, unforeseen
from memconsole.actions import Action
from memconsole.arguments import read_value
from memconsole.errors import ExitCode, MacroError, MacroUsage, MemconsoleError
from memconsole.macros import Macro, MacroStep, fields_of
from memconsole.model import Danger, Outcome, Plan, Value
from memconsole.source import Source

Decision = Literal["do", "skip", "stop"]


class Ran(Value, frozen=True):
    """How a command that a step runs ended: its exit code, and what it wrote."""

    code: int
    text: str = ""


class Face(msgspec.Struct, frozen=True):
    """What the face that runs a macro does for its steps.

    ``open`` opens a view; ``command`` runs the words of a command; ``decide`` is asked before every step, with its text
    and its plan, if it has one.
    """

    open: Callable[[str, str], None] | None = None
    command: Callable[[Sequence[str]], Ran] | None = None
    decide: Callable[[int, str, Plan | None], Decision] | None = None


class StepResult(Value, frozen=True):
    """What became of one step: a plan only (dry run), an outcome, a view, what a command wrote, an error, or
    ``skipped``: not begun, after a failure or because it was decided so.
    """

    number: int
    text: str
    cli: str = ""
    plan: Plan | None = None
    outcome: Outcome | None = None
    view: str = ""
    subject: str = ""
    ran: Ran | None = None
    error: str = ""
    code: str = ""
    skipped: bool = False
    note: str = ""

    @property
    def done(self) -> bool:
        """Whether it was done."""
        return not self.error and not self.skipped


class Rest(Value, frozen=True):
    """What is left of a macro: the numbers of its steps, and the values they need."""

    steps: tuple[int, ...]
    given: Mapping[str, str]

    def cli(self, macro: str, *, yes: bool = False) -> str:
        """The command that runs it."""
        settings = [word for name, value in self.given.items() for word in ("--set", f"{name}={value}")]
        numbers = ",".join(str(number) for number in self.steps)
        words = ["memconsole", "macro", "run", macro, "--steps", numbers, *settings, *(["--yes"] if yes else [])]
        return shlex.join(words)


# --- values -------------------------------------------------------------------------------------------------------


def settings_for(macro: Macro, given: Mapping[str, str], steps: Collection[int] = ()) -> dict[str, str]:
    """The value of every parameter, each one that its steps can read; ``steps``: only these of them are run.

    What an earlier step saves may be given too, where that step is not among ``steps``.

    Raises:
        MacroUsage: one that is unknown or does not fit, or one without a default that was not given.
    """
    saved = {step.save for number, step in enumerate(macro.steps, 1) if steps and number not in steps and step.save}
    unknown = sorted(set(given) - set(macro.params) - saved)
    if unknown:
        takes = ", ".join(macro.params) or "none"
        raise MacroUsage(
            f"macro {macro.name} has no parameter {unknown[0]!r}",
            "--set names one that the macro does not declare",
            f"its parameters: {takes}",
        )
    values = {name: param.default for name, param in macro.params.items()} | dict(given)
    missing = sorted(name for name, value in values.items() if value is None)
    if missing:
        raise MacroUsage(
            f"macro {macro.name} needs {', '.join(missing)}",
            "the parameter has no default",
            f"add --set {missing[0]}=VALUE",
        )
    for name, field in fields_of(macro).items():
        try:
            read_value(field, values[name] or "")
        except MemconsoleError as error:
            raise MacroUsage(f"{name}: {error.what}", error.why, error.remedy) from None
    return {name: value for name, value in values.items() if value is not None}


def _fill(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        try:
            return string.Template(value).substitute(values)
        except KeyError as error:
            why = "the step that saves it was not done"
            raise MacroError(f"{error.args[0]} was never saved", why, code="NotSaved") from None
    if isinstance(value, list | tuple):
        return tuple(_fill(item, values) for item in value)
    return value


def action_of(step: MacroStep, values: Mapping[str, str]) -> Action:
    """The Action of a step with its parameters filled in.

    Raises:
        UsageError: a value that does not fit.
    """
    return action_input.build(step.do, {name: _fill(value, values) for name, value in step.arguments.items()})


def words_of(step: MacroStep, values: Mapping[str, str]) -> list[str]:
    """The words of the command that a step runs; a value is part of one word, whatever is in it."""
    return [str(_fill(word, values)) for word in shlex.split(step.run)]


def _text(macro: Macro, step: MacroStep, values: Mapping[str, str]) -> str:
    """A step in one line; of a value that is not known yet, where it comes from."""
    saves = {each.save: f"<{each.save} of step {n}>" for n, each in enumerate(macro.steps, 1) if each.save}
    return step.text({**saves, **values})


def _chosen(macro: Macro, steps: Collection[int]) -> list[tuple[int, MacroStep]]:
    """The steps to run, by number.

    Raises:
        MacroUsage: there is no such step.
    """
    unknown = sorted(set(steps) - set(range(1, len(macro.steps) + 1)))
    if unknown:
        what = f"macro {macro.name} has no step {unknown[0]}"
        raise MacroUsage(what, f"it has {len(macro.steps)}", "--steps names steps by number, for example 2-4,6")
    return [(number, step) for number, step in enumerate(macro.steps, 1) if not steps or number in steps]


# --- planning -----------------------------------------------------------------------------------------------------


def dry_run(
    macro: Macro, source: Source, given: Mapping[str, str], steps: Collection[int] = ()
) -> Iterator[StepResult]:
    """Every step's plan, as if those before it had been done; one that is refused counts for nothing."""
    values = settings_for(macro, given, steps)
    before: list[Action] = []
    stopper = 0
    for number, step in _chosen(macro, steps):
        planned = unforeseen.attempt(
            f"the plan of step {number}", "call", partial(_foresee, macro, number, source, values, before)
        )
        if isinstance(planned, MemconsoleError):
            planned = StepResult(number, _text(macro, step, values), error=str(planned), code=planned.code)
        if stopper:
            note = f"not begun where step {stopper} is refused"
            planned = msgspec.structs.replace(planned, note="; ".join(filter(None, [note, planned.note])))
        elif _is_refused(planned) and _stops(macro, step):
            stopper = number
        yield planned


def _foresee(macro: Macro, number: int, source: Source, values: dict[str, str], before: list[Action]) -> StepResult:
    """The plan of one step after those before it; ``values`` and ``before`` go on to the next."""
    step = macro.steps[number - 1]
    text = _text(macro, step, values)
    if step.view:
        return StepResult(number, text, view=step.view, subject=_fill(step.subject, values))
    if step.run:
        return StepResult(number, text, cli=shlex.join(["memconsole", *words_of(step, values)]))
    action = action_of(step, values)
    plan = source.plan(action, tuple(before))
    if not plan.refusals:
        before.append(action)
        if step.save:
            values[step.save] = plan.subject
    return StepResult(number, text, cli=plan.cli, plan=plan, note=plan.note)


def _is_refused(planned: StepResult) -> bool:
    return bool(planned.error or (planned.plan is not None and planned.plan.refusals))


def _stops(macro: Macro, step: MacroStep) -> bool:
    return (step.on_failure or macro.on_failure) == "stop"


def destroys(planned: Collection[StepResult]) -> bool:
    """Whether a macro destroys anything: then it wants its name typed, once for all of it."""
    return any(each.plan is not None and each.plan.danger is Danger.DESTROYS for each in planned)


# --- running ------------------------------------------------------------------------------------------------------


def run(
    macro: Macro,
    source: Source,
    given: Mapping[str, str],
    face: Face = Face(),  # noqa: B008 - a value
    steps: Collection[int] = (),
) -> Iterator[StepResult]:
    """Do every step in order; after a failure the rest is skipped, unless the step or the macro says ``continue``."""
    values = settings_for(macro, given, steps)
    stopped = False
    for number, step in _chosen(macro, steps):
        if stopped:
            yield StepResult(number, _text(macro, step, values), skipped=True)
            continue
        during = f"step {number} of macro {macro.name}"
        done = unforeseen.attempt(during, "call", partial(_do, macro, number, source, values, face))
        if isinstance(done, MemconsoleError):
            done = StepResult(number, _text(macro, step, values), error=str(done), code=done.code)
        stopped = done.code == "Stopped" or bool(done.error and _stops(macro, step))
        yield done


def _do(macro: Macro, number: int, source: Source, values: dict[str, str], face: Face) -> StepResult:
    step = macro.steps[number - 1]
    text = _text(macro, step, values)
    action = action_of(step, values) if step.do else None
    if face.decide is not None:
        decided = face.decide(number, text, source.plan(action) if action is not None else None)
        if decided != "do":
            return StepResult(number, text, skipped=True, code="Stopped" if decided == "stop" else "Skipped")
    if step.run:
        return _run_command(step, number, text, values, face)
    if action is None:
        subject = _fill(step.subject, values)
        if face.open is not None:
            face.open(step.view, subject)
        return StepResult(number, text, view=step.view, subject=subject)
    outcome = source.apply(action)
    if step.save:
        values[step.save] = outcome.subject
    return StepResult(number, text, cli=actions.cli_form(action), outcome=outcome)


def _run_command(step: MacroStep, number: int, text: str, values: Mapping[str, str], face: Face) -> StepResult:
    """A step that runs a command: an exit code that is not 0 is its failure."""
    words = words_of(step, values)
    cli = shlex.join(["memconsole", *words])
    if face.command is None:
        raise MacroError("no command can be run here", "there is no command line behind this", f"run {cli}")
    ran = face.command(words)
    if ran.code == ExitCode.DONE:
        return StepResult(number, text, cli=cli, ran=ran)
    named = {code.value: code.name.lower().replace("_", " ") for code in ExitCode}.get(ran.code, "unknown")
    return StepResult(number, text, cli=cli, ran=ran, error=f"{cli} ended with {ran.code} ({named})", code="Command")


# --- what became of it --------------------------------------------------------------------------------------------


def rest_of(macro: Macro, results: Sequence[StepResult], given: Mapping[str, str]) -> Rest | None:
    """What is left of a macro that did not come to its end, or None."""
    left = tuple(result.number for result in results if not result.done)
    if not left:
        return None
    saved = {
        macro.steps[result.number - 1].save: result.outcome.subject
        for result in results
        if result.outcome is not None and macro.steps[result.number - 1].save
    }
    return Rest(left, {**given, **saved})


def verdict(macro: Macro, results: Sequence[StepResult]) -> None:
    """Nothing, if every step was done.

    Raises:
        MacroError: a step failed or was not begun; it says which were done, which failed and which were not begun.
    """
    failed = [result for result in results if result.error]
    skipped = [result for result in results if result.skipped]
    if not failed and not skipped:
        return

    def numbers(wanted: Sequence[StepResult]) -> str:
        return ", ".join(str(result.number) for result in wanted) or "none"

    done = [result for result in results if result.done]
    first = failed[0] if failed else skipped[0]
    raise MacroError(
        f"macro {macro.name}: step {first.number} {'failed' if failed else 'was left out'}",
        first.error or first.text,
        f"done: {numbers(done)}; failed: {numbers(failed)}; not begun: {numbers(skipped)}",
        code="MacroFailed",
    )


def exit_code(results: Sequence[StepResult]) -> int:
    """What a command that ran a macro ends with: what the first command that failed in it ended with, else 1."""
    failed = next((result for result in results if result.error), None)
    return failed.ran.code if failed is not None and failed.ran is not None else ExitCode.FAILED
