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

    [[step]]
    run = "audit --where 'severity=error'"      a command that looks and changes nothing, as the command line has it
    on_failure = "continue"                     it fails with any exit code but 0

The file's name without ``.toml`` is the macro's name. Macros are looked for in ``macro_paths()``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from memconsole import actions, decoding
from memconsole.actions import Action
from memconsole.arguments import ActionField, read_value, write_value
from memconsole.decoding import Undecodable
from memconsole.errors import BadFile, MacroUsage, MemconsoleError
from memconsole.fields import TABLES
from memconsole.model import Request, Value

OnFailure = Literal["stop", "continue"]
STEP_KINDS = ("do", "view", "run")
STEP_WORDS = {*STEP_KINDS, "subject", "save", "on_failure"}
LOOKING = frozenset(
    {*(table for table in TABLES if table != "findings"), "audit", "bugreport", "diff", "doctor", "handoff", "history"}
    | {"hostmap", "inspect", "iovamap", "pfn", "reach", "report", "snapshot", "status"}
)
"""The commands that a step may run: those that look."""

LIBRARY = Path(__file__).parent / "library"
"""The macros that come with memconsole."""


class Param(Request, frozen=True):
    """A parameter; without a ``default`` it must be given."""

    default: str | None = None
    help: str = ""


class MacroStep(Value, frozen=True):
    """One step as it is written: an action with unread arguments, a view, or the command that it runs.

    ``save`` names what the action made.
    """

    do: str = ""
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    view: str = ""
    subject: str = ""
    save: str = ""
    run: str = ""
    on_failure: OnFailure | None = None

    def text(self, values: Mapping[str, str]) -> str:
        """The step in one line, with the values its parameters have; one that is not known yet stays as written."""
        if self.view:
            return f"view {self.view} {shown(self.subject, values)}".rstrip()
        if self.run:
            return f"run {shown(self.run, values)}"
        return " ".join([self.do, *(f"{name}={shown(value, values)}" for name, value in self.arguments.items())])


class Macro(Request, frozen=True):
    """A macro as it was read; ``path`` is empty for one that was never in a file."""

    name: str
    title: str = ""
    key: str = ""
    on_failure: OnFailure = "stop"
    params: dict[str, Param] = msgspec.field(default_factory=dict)
    steps: tuple[MacroStep, ...] = ()
    path: str = ""


# --- reading and writing ------------------------------------------------------------------------------------------


def macro_paths() -> tuple[Path, ...]:
    """The directories macros are looked for in: the user's own, the host's, and those that come with memconsole."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return (home / "memconsole" / "macros", Path("/etc/memconsole/macros"), LIBRARY)


def _read_step(number: int, raw: Any) -> MacroStep:
    where = f"step {number}"
    if not isinstance(raw, dict):
        raise MacroUsage(f"{where} is not a table", "a step is a TOML table", "write [[step]] above it")
    if sum(kind in raw for kind in STEP_KINDS) != 1:
        why = "it has none or several of them"
        remedy = "do names an action, view a view, run a command that looks"
        raise MacroUsage(f"{where} needs either do, view or run", why, remedy)
    on_failure = raw.get("on_failure")
    if on_failure not in {None, "stop", "continue"}:
        raise MacroUsage(
            f"{where}: on_failure is {on_failure!r}", "it is neither stop nor continue", "write stop or continue"
        )
    words = {name: raw.get(name, "") for name in (*STEP_KINDS, "subject", "save")}
    if not all(isinstance(word, str) for word in words.values()):
        raise MacroUsage(
            f"{where}: do, view, run, subject and save must be strings", "one of them is not", "put them in quotes"
        )
    arguments = {name.replace("-", "_"): value for name, value in raw.items() if name not in STEP_WORDS}
    if "view" in raw:
        if arguments:
            raise MacroUsage(
                f"{where}: a view takes no {next(iter(arguments))}", "a view has no arguments", "it takes a subject"
            )
        return MacroStep(view=words["view"], subject=words["subject"], on_failure=on_failure)
    if "run" in raw:
        _check_command(where, words["run"], arguments)
        return MacroStep(run=words["run"], on_failure=on_failure)
    return MacroStep(
        do=words["do"], arguments=_checked(where, words["do"], arguments), save=words["save"], on_failure=on_failure
    )


def _check_command(where: str, command: str, arguments: dict[str, Any]) -> None:
    """Refuse what is no command that only looks."""
    if arguments:
        name = next(iter(arguments))
        raise MacroUsage(
            f"{where}: run takes no {name}", "its arguments stand in its own text", f"write --{name} there"
        )
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise MacroUsage(f"{where}: {command!r} has an open quote", str(error), "close the quote") from None
    acts = {cls.spec.words for cls in actions.REGISTRY.values()}
    if not words or words[0] not in LOOKING or tuple(words[:2]) in acts:
        looking = ", ".join(sorted(LOOKING))
        raise MacroUsage(
            f"{where}: {command!r} is no command that looks",
            "run takes commands that change nothing",
            f"one of: {looking}",
        )


def _checked(where: str, do: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an action, their names and the values that hold no parameter checked against the registry."""
    cls = actions.REGISTRY.get(do)
    if cls is None:
        raise MacroUsage(
            f"{where}: unknown action {do!r}", "no action has this id", f"one of: {', '.join(sorted(actions.REGISTRY))}"
        )
    known = {field.name: field for field in actions.fields(cls)}
    for name, value in arguments.items():
        if name not in known:
            raise MacroUsage(
                f"{where}: {do} has no argument {name!r}",
                "the action does not take it",
                f"its arguments: {', '.join(known)}",
            )
        if isinstance(value, str) and "$" not in value:
            try:
                read_value(known[name], value)
            except MemconsoleError as error:
                raise MacroUsage(f"{where}: {name}: {error.what}", error.why, error.remedy) from None
    missing = [field.name for field in known.values() if field.required and field.name not in arguments]
    if missing:
        raise MacroUsage(
            f"{where}: {do} lacks {', '.join(missing)}",
            "the action needs it",
            f"see memconsole {' '.join(cls.spec.words)} --help",
        )
    return arguments


def _names_in(value: Any) -> set[str]:
    if isinstance(value, str):
        template = string.Template(value)
        if not template.is_valid():
            raise MacroUsage(
                f"{value!r} has a stray dollar sign",
                "a dollar sign begins a parameter",
                "write $$ for a dollar sign, ${name} for a parameter",
            )
        return set(template.get_identifiers())
    if isinstance(value, list | tuple):
        return {name for item in value for name in _names_in(item)}
    return set()


def loads(text: str | bytes, name: str, path: str = "") -> Macro:
    """A macro from the text of its file.

    Raises:
        BadFile: not TOML.
        MacroUsage: an unknown key, action, argument or parameter, a missing one, or a value that does not fit.
    """
    raw = decoding.toml(text, what=f"macro {name}", remedy="see memconsole macro --help")
    steps_raw = raw.pop("step", [])
    if not isinstance(steps_raw, list) or not steps_raw:
        raise MacroUsage(f"macro {name} has no steps", "it would do nothing", "add a [[step]] with do or view")
    try:
        macro = decoding.convert({"name": name, "path": path, **raw}, Macro, what=f"macro {name}")
    except Undecodable as error:
        raise MacroUsage(
            f"macro {name} does not fit", error.why, "its keys: title, key, on_failure, params, step"
        ) from None
    steps = tuple(_read_step(number, step) for number, step in enumerate(steps_raw, 1))
    known = set(macro.params)
    for number, step in enumerate(steps, 1):
        written = (*step.arguments.values(), step.subject, step.run)
        unknown = {word for value in written for word in _names_in(value)} - known
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
    raw = decoding.contents(path, limit=decoding.SETTINGS, remedy="see memconsole macro list")
    return loads(raw, path.name.removesuffix(".toml"), str(path))


def fields_of(macro: Macro) -> dict[str, ActionField]:
    """What each parameter is where it stands alone for an argument of an action: so it is checked and completed."""
    found: dict[str, ActionField] = {}
    for step in macro.steps:
        known = {field.name: field for field in actions.fields(actions.REGISTRY[step.do])} if step.do else {}
        for name, value in step.arguments.items():
            alone = re.fullmatch(r"\$\{(\w+)\}|\$(\w+)", value) if isinstance(value, str) else None
            param = (alone[1] or alone[2]) if alone is not None else ""
            if param in macro.params:
                found.setdefault(param, known[name])
    return found


def stamp(paths: Sequence[Path] | None = None) -> tuple[tuple[str, int, int], ...]:
    """What tells that a file of the macro directories is new, gone or another: its path, time and size."""
    found = []
    for directory in macro_paths() if paths is None else paths:
        for path in sorted(directory.glob("*.toml")) if directory.is_dir() else ():
            with contextlib.suppress(OSError):  # it went while we looked, which the next look tells
                seen = path.stat()
                found.append((str(path), seen.st_mtime_ns, seen.st_size))
    return tuple(found)


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
    import tomli_w

    def said(pairs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: item for name, item in pairs.items() if item not in {None, ""}}

    head = said({"title": macro.title, "key": macro.key, "on_failure": macro.on_failure})
    params = {
        name: ({} if param.default is None else {"default": param.default}) | {"help": param.help}
        for name, param in macro.params.items()
    }
    parts = [head, *([{"params": params}] if params else [])]
    steps = [
        said({"view": step.view, "subject": step.subject, "do": step.do, "run": step.run})
        | dict(step.arguments)
        | said({"save": step.save, "on_failure": step.on_failure})
        for step in macro.steps
    ]
    # One by one: short tables of an array would be written on one line each.
    return "\n".join([*map(tomli_w.dumps, parts), *(f"[[step]]\n{tomli_w.dumps(step)}" for step in steps)])


def recorded(name: str, done: Sequence[Action | tuple[str, str]]) -> Macro:
    """A macro from what was done: Actions, and ``(view, subject)`` pairs for views that were opened."""
    steps = []
    for item in done:
        if isinstance(item, tuple):
            steps.append(MacroStep(view=item[0], subject=_literal(item[1])))
            continue
        arguments = {
            field.name: _literal(write_value(field, value))
            for field in actions.fields(type(item))
            if (value := getattr(item, field.name)) is not None and (field.required or value != field.default)
        }
        steps.append(MacroStep(do=item.spec.id, arguments=arguments))
    return Macro(name, title=f"Recorded: {name}", steps=tuple(steps))


def _literal(text: str) -> str:
    return text.replace("$", "$$")


def shown(value: Any, values: Mapping[str, str]) -> str:
    """A value as it is written, with those of its parameters that are known."""
    if isinstance(value, list | tuple):
        return " ".join(shown(item, values) for item in value)
    return string.Template(value).safe_substitute(values) if isinstance(value, str) else str(value)
