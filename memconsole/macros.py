"""Macros: lists of Actions and views, with parameters, a key, and what to do on failure; one interpreter for all faces.

Grammar of a macro file (TOML)::

    title = "Reserve and map the web tier"      shown in the palette
    key = "ctrl+w"                              optional, binds it in the console
    on_failure = "stop"                         or "continue"; a step may have its own

    [params.size]                               a parameter; one without a default must be given
    default = "64M"
    help = "size of the region"

    [[step]]
    do = "reserve"                              an action id and its arguments, as the command line writes them
    name = "${name}"                            ${parameter}; $$ is a dollar sign
    size = "${size}"

    [[step]]
    do = "map"
    region = "${name}"
    guest = "db1"
    save = "grant"                              what the action made (a grant's id) becomes ${grant} for later steps

    [[step]]
    view = "regions"                            a view to open, and what to show in it
    subject = "region:${name}"

The file's name without ``.toml`` is the macro's name. Macros are looked for in ``macro_paths()``.
"""

from __future__ import annotations

import json
import os
import string
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from memconsole import actions
from memconsole.actions import Action
from memconsole.errors import BadFile, MacroError, MacroUsage, MemconsoleError
from memconsole.model import Outcome, Plan, Value
from memconsole.source import Source

OnFailure = Literal["stop", "continue"]
STEP_WORDS = {"do", "view", "subject", "save", "on_failure"}


class Param(Value, frozen=True):
    """A parameter; without a ``default`` it must be given."""

    default: str | None = None
    help: str = ""


class Step(Value, frozen=True):
    """One step as it is written: an action with unread arguments, or a view; ``save`` names what the action made."""

    do: str = ""
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    view: str = ""
    subject: str = ""
    save: str = ""
    on_failure: OnFailure | None = None

    @property
    def text(self) -> str:
        """The step in one line, parameters as they are written."""
        if self.view:
            return f"view {self.view} {self.subject}".rstrip()
        return " ".join([self.do, *(f"{name}={value}" for name, value in self.arguments.items())])


class Macro(Value, frozen=True):
    """A macro as it was read; ``path`` is empty for one that was never in a file."""

    name: str
    title: str = ""
    key: str = ""
    on_failure: OnFailure = "stop"
    params: dict[str, Param] = msgspec.field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    path: str = ""


class StepResult(Value, frozen=True):
    """What became of one step: a plan only (dry run), an outcome, a view, an error, or ``skipped`` after a failure."""

    number: int
    text: str
    cli: str = ""
    plan: Plan | None = None
    outcome: Outcome | None = None
    view: str = ""
    subject: str = ""
    error: str = ""
    code: str = ""
    skipped: bool = False
    note: str = ""


# --- reading and writing ------------------------------------------------------------------------------------------


def macro_paths() -> tuple[Path, ...]:
    """The directories macros are looked for in: the user's own, then the host's."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return (home / "memconsole" / "macros", Path("/etc/memconsole/macros"))


def _read_step(number: int, raw: Any) -> Step:
    where = f"step {number}"
    if not isinstance(raw, dict):
        raise MacroUsage(f"{where} is not a table", "", "write [[step]] above it")
    if ("do" in raw) == ("view" in raw):
        raise MacroUsage(f"{where} needs either do or view", "", "do names an action, view a view")
    on_failure = raw.get("on_failure")
    if on_failure not in {None, "stop", "continue"}:
        raise MacroUsage(f"{where}: on_failure is {on_failure!r}", "", "write stop or continue")
    words = {name: raw.get(name, "") for name in ("do", "view", "subject", "save")}
    if not all(isinstance(word, str) for word in words.values()):
        raise MacroUsage(f"{where}: do, view, subject and save are text", "", "put them in quotes")
    arguments = {name.replace("-", "_"): value for name, value in raw.items() if name not in STEP_WORDS}
    if "view" in raw:
        if arguments:
            raise MacroUsage(f"{where}: a view takes no {next(iter(arguments))}", "", "it takes a subject")
        return Step(view=words["view"], subject=words["subject"], on_failure=on_failure)
    return Step(
        do=words["do"], arguments=_checked(where, words["do"], arguments), save=words["save"], on_failure=on_failure
    )


def _checked(where: str, do: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an action, their names and the values that hold no parameter checked against the registry."""
    cls = actions.REGISTRY.get(do)
    if cls is None:
        raise MacroUsage(f"{where}: unknown action {do!r}", "", f"one of: {', '.join(sorted(actions.REGISTRY))}")
    known = {field.name: field for field in actions.fields(cls)}
    for name, value in arguments.items():
        if name not in known:
            raise MacroUsage(f"{where}: {do} has no argument {name!r}", "", f"its arguments: {', '.join(known)}")
        if isinstance(value, str) and "$" not in value:
            try:
                actions.read_value(known[name], value)
            except MemconsoleError as error:
                raise MacroUsage(f"{where}: {name}: {error.what}", error.why, error.remedy) from None
    missing = [field.name for field in known.values() if field.required and field.name not in arguments]
    if missing:
        raise MacroUsage(f"{where}: {do} lacks {', '.join(missing)}", "", cls.spec.help)
    return arguments


def _names_in(value: Any) -> set[str]:
    if isinstance(value, str):
        template = string.Template(value)
        if not template.is_valid():
            raise MacroUsage(
                f"{value!r} has a stray dollar sign", "", "write $$ for a dollar sign, ${name} for a parameter"
            )
        return set(template.get_identifiers())
    if isinstance(value, list | tuple):
        return {name for item in value for name in _names_in(item)}
    return set()


def loads(text: str, name: str, path: str = "") -> Macro:
    """A macro from the text of its file.

    Raises:
        BadFile: not TOML.
        MacroUsage: an unknown key, action, argument or parameter, a missing one, or a value that does not fit.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadFile(f"macro {name} is not TOML", str(error), "see memconsole macro --help") from None
    steps_raw = raw.pop("step", [])
    if not isinstance(steps_raw, list) or not steps_raw:
        raise MacroUsage(f"macro {name} has no steps", "", "add a [[step]] with do or view")
    try:
        macro = msgspec.convert({"name": name, "path": path, **raw}, type=Macro)
    except msgspec.ValidationError as error:
        raise MacroUsage(
            f"macro {name} does not fit", str(error), "its keys: title, key, on_failure, params, step"
        ) from None
    steps = tuple(_read_step(number, step) for number, step in enumerate(steps_raw, 1))
    known = set(macro.params)
    for number, step in enumerate(steps, 1):
        unknown = {word for value in (*step.arguments.values(), step.subject) for word in _names_in(value)} - known
        if unknown:
            missing = min(unknown)
            raise MacroUsage(
                f"step {number} uses ${{{missing}}}",
                "no parameter or earlier save has that name",
                f"add [params.{missing}]",
            )
        if step.save:
            known.add(step.save)
    return msgspec.structs.replace(macro, steps=steps)


def load(path: Path) -> Macro:
    """The macro in a file.

    Raises:
        BadFile: it cannot be read.
        MacroUsage: it does not mean anything (see :func:`loads`).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"macro {path} cannot be read", str(error), "see memconsole macro list") from None
    return loads(text, path.name.removesuffix(".toml"), str(path))


def discover(paths: Sequence[Path] | None = None) -> tuple[tuple[Macro, ...], tuple[tuple[Path, MemconsoleError], ...]]:
    """Every macro of the macro directories, and the files that are none with their errors; a user's own win."""
    found: dict[str, Macro] = {}
    broken = []
    for directory in macro_paths() if paths is None else paths:
        for path in sorted(directory.glob("*.toml")) if directory.is_dir() else ():
            try:
                macro = load(path)
            except MemconsoleError as error:
                broken.append((path, error))
            else:
                found.setdefault(macro.name, macro)
    return tuple(found.values()), tuple(broken)


def find(name: str, paths: Sequence[Path] | None = None) -> Macro:
    """The macro in the file of this path, or else of this name in the macro directories.

    Raises:
        BadFile: there is none.
    """
    if "/" in name or name.endswith(".toml"):
        return load(Path(name))
    directories = macro_paths() if paths is None else tuple(paths)
    for directory in directories:
        path = directory / f"{name}.toml"
        if path.is_file():
            return load(path)
    looked = ", ".join(str(directory) for directory in directories)
    raise BadFile(
        f"there is no macro {name!r}", f"looked in {looked}", "see memconsole macro list, or give a file's path"
    )


def dumps(macro: Macro) -> str:
    """The text of a macro's file; :func:`loads` reads it back to the same macro."""

    def value(item: Any) -> str:
        if isinstance(item, list | tuple):
            return "[" + ", ".join(value(each) for each in item) + "]"
        return json.dumps(item, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # TOML's strings, numbers, booleans are JSON's

    def table(pairs: Mapping[str, Any]) -> list[str]:
        return [f"{name} = {value(item)}" for name, item in pairs.items() if item not in {None, ""}]

    lines = table({"title": macro.title, "key": macro.key, "on_failure": macro.on_failure})
    for name, param in macro.params.items():
        head = name if name.isidentifier() and name.isascii() else json.dumps(name)
        pairs = {"help": param.help} if param.default is None else {"default": param.default, "help": param.help}
        lines += ["", f"[params.{head}]", *(f"{key} = {value(item)}" for key, item in pairs.items())]
    for step in macro.steps:
        words = {"view": step.view, "subject": step.subject, "do": step.do}
        lines += ["", "[[step]]", *table(words)]
        lines += [f"{name} = {value(item)}" for name, item in step.arguments.items()]
        lines += table({"save": step.save, "on_failure": step.on_failure})
    return "\n".join(lines) + "\n"


def recorded(name: str, done: Sequence[Action | tuple[str, str]]) -> Macro:
    """A macro from what was done: Actions, and ``(view, subject)`` pairs for views that were opened."""
    steps = []
    for item in done:
        if isinstance(item, tuple):
            steps.append(Step(view=item[0], subject=_literal(item[1])))
            continue
        arguments = {
            field.name: _literal(actions.write_value(field, value))
            for field in actions.fields(type(item))
            if (value := getattr(item, field.name)) is not None and (field.required or value != field.default)
        }
        steps.append(Step(do=item.spec.id, arguments=arguments))
    return Macro(name, title=f"Recorded: {name}", steps=tuple(steps))


def _literal(text: str) -> str:
    return text.replace("$", "$$")


# --- running ------------------------------------------------------------------------------------------------------


def settings_for(macro: Macro, given: Mapping[str, str]) -> dict[str, str]:
    """The value of every parameter.

    Raises:
        MacroUsage: one that is unknown, or one without a default that was not given.
    """
    unknown = sorted(set(given) - set(macro.params))
    if unknown:
        takes = ", ".join(macro.params) or "none"
        raise MacroUsage(f"macro {macro.name} has no parameter {unknown[0]!r}", "", f"its parameters: {takes}")
    values = {name: param.default for name, param in macro.params.items()} | dict(given)
    missing = sorted(name for name, value in values.items() if value is None)
    if missing:
        raise MacroUsage(f"macro {macro.name} wants {', '.join(missing)}", "", f"add --set {missing[0]}=VALUE")
    return {name: value for name, value in values.items() if value is not None}


def _fill(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return string.Template(value).substitute(values)
    if isinstance(value, list | tuple):
        return tuple(_fill(item, values) for item in value)
    return value


def action_of(step: Step, values: Mapping[str, str]) -> Action:
    """The Action of a step with its parameters filled in.

    Raises:
        UsageError: a value that does not fit.
    """
    return actions.build(step.do, {name: _fill(value, values) for name, value in step.arguments.items()})


def dry_run(macro: Macro, source: Source, given: Mapping[str, str]) -> Iterator[StepResult]:
    """Every step's plan as things are now; a refusal may be lifted by what an earlier step would do, and says so."""
    values = settings_for(macro, given)
    made: dict[str, int] = {}
    for number, step in enumerate(macro.steps, 1):
        if step.view:
            yield StepResult(number, step.text, view=step.view, subject=_fill(step.subject, values))
            continue
        try:
            action = action_of(step, values)
            plan = source.plan(action)
        except MemconsoleError as error:
            yield StepResult(number, step.text, error=str(error), code=error.code)
            continue
        earlier = sorted({made[str(value)] for value in msgspec.structs.astuple(action) if str(value) in made})
        note = f"planned against things as they are; step {earlier[-1]} would change that" if earlier else ""
        yield StepResult(number, step.text, cli=plan.cli, plan=plan, note=note)
        if hasattr(action, "name"):
            made[action.name] = number
        if step.save:
            values[step.save] = f"{step.save}-of-step-{number}"
            made[values[step.save]] = number


def run(
    macro: Macro,
    source: Source,
    given: Mapping[str, str],
    on_view: Callable[[str, str], None] | None = None,
) -> Iterator[StepResult]:
    """Do every step in order; after a failure the rest is skipped, unless the step or the macro says ``continue``."""
    values = settings_for(macro, given)
    stopped = False
    for number, step in enumerate(macro.steps, 1):
        if stopped:
            yield StepResult(number, step.text, skipped=True)
            continue
        try:
            yield _do(number, step, source, values, on_view)
        except (MemconsoleError, KeyError) as error:
            stopped = (step.on_failure or macro.on_failure) == "stop"
            code = error.code if isinstance(error, MemconsoleError) else "NotSaved"
            why = (
                str(error)
                if isinstance(error, MemconsoleError)
                else f"{error} was never saved: the step that saves it failed"
            )
            yield StepResult(number, step.text, error=why, code=code)


def _do(
    number: int, step: Step, source: Source, values: dict[str, str], on_view: Callable[[str, str], None] | None
) -> StepResult:
    if step.view:
        subject = _fill(step.subject, values)
        if on_view is not None:
            on_view(step.view, subject)
        return StepResult(number, step.text, view=step.view, subject=subject)
    action = action_of(step, values)
    outcome = source.apply(action)
    if step.save:
        values[step.save] = outcome.subject
    return StepResult(number, step.text, cli=actions.cli_form(action), outcome=outcome)


def verdict(macro: Macro, results: Sequence[StepResult]) -> None:
    """Nothing, if every step was done.

    Raises:
        MacroError: a step failed; it says which were done, which failed and which were not begun.
    """
    failed = [result for result in results if result.error]
    if not failed:
        return

    def numbers(wanted: Sequence[StepResult]) -> str:
        return ", ".join(str(result.number) for result in wanted) or "none"

    done = [result for result in results if not result.error and not result.skipped]
    skipped = [result for result in results if result.skipped]
    raise MacroError(
        f"macro {macro.name}: step {failed[0].number} failed",
        failed[0].error,
        f"done: {numbers(done)}; failed: {numbers(failed)}; not begun: {numbers(skipped)}",
        code="MacroFailed",
    )
