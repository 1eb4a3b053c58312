"""Actions as command words: one parser for the command line and the console's ``:`` line.

It is built from the registry, so that an action that is registered can be typed. ``parse(shlex.split(line))`` reads
what :func:`memconsole.actions.cli_form` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, NoReturn, Protocol

from memconsole import action_input, actions
from memconsole.actions import Action
from memconsole.arguments import ActionField, Arg, ArgumentKind, read_value
from memconsole.errors import MemconsoleError, UsageError
from memconsole.source import Source

Subparsers = Any  # argparse keeps the type of add_subparsers' result to itself


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of leaving the process.

    It is made when it is first asked for anything: of a command line's seventy, one or two are.
    """

    def __init__(self, *args: Any, fill: Callable[[Parser], None] | None = None, **options: Any) -> None:
        """As argparse's; ``fill`` gives it its arguments once it is made."""
        vars(self)["_later"] = [partial(super().__init__, *args, **options)]
        if fill is not None:
            self._later.append(partial(fill, self))

    def __getattr__(self, name: str) -> Any:
        """Any attribute of a parser that was not made."""
        later = vars(self).pop("_later", None)
        if later is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        for do in later:
            do()
        return getattr(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Set it, at once or once the parser is made."""
        later = vars(self).get("_later")
        if later is None:
            super().__setattr__(name, value)
        else:
            later.append(partial(setattr, self, name, value))

    def add_argument(self, *args: Any, **options: Any) -> Any:
        """As argparse's; None where the parser is not made yet."""
        later = vars(self).get("_later")
        if later is None:
            return super().add_argument(*args, **options)
        later.append(partial(self.add_argument, *args, **options))
        return None

    def set_defaults(self, **options: Any) -> None:
        """As argparse's."""
        later = vars(self).get("_later")
        if later is None:
            super().set_defaults(**options)
        else:
            later.append(partial(self.set_defaults, **options))

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into the project's own error."""
        raise UsageError(message, "", f"see {self.prog} --help")


def reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse ``type`` that keeps the sentence of a UsageError."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except MemconsoleError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _add_field(parser: argparse.ArgumentParser, field: ActionField) -> None:
    arg = field.arg
    if arg.kind is ArgumentKind.FLAG:
        parser.add_argument(field.option, dest=field.name, action="store_true", help=arg.help)
        return
    shown = "|".join(arg.choices) if arg.choices else arg.kind.value.upper().replace("NEW-", "")
    options: dict[str, Any] = {"help": arg.help, "metavar": shown}
    if arg.kind is ArgumentKind.CHOICE:
        options["choices"] = arg.choices
    else:
        options["type"] = reader(lambda text: read_value(field, text))
    if arg.positional and field.required:
        parser.add_argument(field.name, **options)
    elif arg.positional:
        parser.add_argument(field.name, nargs="?", default=field.default, **options)
    else:
        parser.add_argument(
            field.option, dest=field.name, required=field.required, default=argparse.SUPPRESS, **options
        )


def add_actions(
    subparsers: Subparsers, parents: Sequence[argparse.ArgumentParser] = (), **defaults: Any
) -> dict[str, Subparsers]:
    """Add a command for every action of the registry, ``defaults`` set on each; the groups of two-word ones by name."""
    groups: dict[str, Subparsers] = {}
    for cls in actions.REGISTRY.values():
        spec = cls.spec
        where = subparsers
        if len(spec.words) > 1:
            group = spec.words[0]
            if group not in groups:
                head = subparsers.add_parser(group, help=f"{group} actions")
                groups[group] = head.add_subparsers(dest=f"{group}_command", required=True, metavar="ACTION")
            where = groups[group]
        parser = where.add_parser(
            spec.words[-1], help=spec.help, description=spec.help, parents=list(parents), fill=partial(_fill, cls)
        )
        parser.set_defaults(action=spec.id, **defaults)
    return groups


def _fill(cls: type[Action], parser: Parser) -> None:
    for field in actions.fields(cls):
        if field.arg.kind is ArgumentKind.WORDS:
            parser.usage = "%(prog)s [options] NAME [-- ARG ...]"
            parser.epilog = f"-- ARG ...: {field.arg.help}"
        else:
            _add_field(parser, field)


@cache
def _takers() -> tuple[tuple[str, ...], ...]:
    """The words of commands that hand words on."""
    takes = (
        cls.spec.words
        for cls in actions.REGISTRY.values()
        if any(field.arg.kind is ArgumentKind.WORDS for field in actions.fields(cls))
    )
    return (("each",), *takes)


def split_rest(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words before a ``--`` and those behind it, for what hands words on (``guest start``, ``each``).

    For every other command ``--`` ends the options, as in other programs: it stays where it is, for argparse.
    """
    words = list(words)
    if "--" in words:
        at = words.index("--")
        before = words[:at]
        if any(tuple(before[n : n + len(taker)]) == taker for taker in _takers() for n in range(at)):
            return before, tuple(words[at + 1 :])
    return words, ()


def action_of(namespace: argparse.Namespace, rest: Sequence[str] = ()) -> Action:
    """The Action a parsed command line means; ``rest`` are the words after ``--``.

    Raises:
        UsageError: a value that does not fit.
    """
    cls = actions.REGISTRY[namespace.action]
    values: dict[str, Any] = {}
    takes_words = None
    for field in actions.fields(cls):
        if field.arg.kind is ArgumentKind.WORDS:
            takes_words = field
        elif hasattr(namespace, field.name):
            values[field.name] = getattr(namespace, field.name)
    if takes_words is not None and rest:
        values[takes_words.name] = tuple(rest)
    return action_input.build(namespace.action, values)


def parse(words: Sequence[str]) -> Action:
    """The Action that command words mean, with or without a leading ``memconsole``.

    Raises:
        UsageError: no such command, or arguments that do not fit.
    """
    words, rest = split_rest(words)
    if words and words[0] == "memconsole":
        words = words[1:]
    return action_of(_actions_parser().parse_args(words), rest)


@cache
def _actions_parser() -> Parser:
    """The parser of every action; made once, since a log of command lines is read by it line by line."""
    parser = Parser(prog="memconsole", add_help=False)
    add_actions(parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser))
    return parser


class ArgumentForm(NamedTuple):
    """An argument of a command: its name as it is typed (``--sort``) or called (``SIZE``), its help, its choices.

    ``value`` is what its value is called; ``takes``: it is an option that a value follows. ``kind`` is that of an
    action's argument, where it is one.
    """

    name: str
    value: str
    help: str
    option: bool = False
    takes: bool = False
    required: bool = False
    choices: tuple[str, ...] = ()
    kind: ArgumentKind | None = None


class CommandForm(NamedTuple):
    """A command: its words, what it does, its arguments, and the id of the action that it is, if it is one."""

    words: tuple[str, ...]
    help: str
    arguments: tuple[ArgumentForm, ...] = ()
    action: str = ""

    @property
    def positional(self) -> list[ArgumentForm]:
        """The arguments that are told apart by their place."""
        return [each for each in self.arguments if not each.option]

    @property
    def options(self) -> list[ArgumentForm]:
        """The others."""
        return [each for each in self.arguments if each.option]


class CommandResult(NamedTuple):
    """What a command line said, and the exit code that it would have."""

    code: int
    text: str


class CommandLine(Protocol):
    """The commands of memconsole, for a face that has a line to type them on."""

    @property
    def forms(self) -> Sequence[CommandForm]:
        """Every command."""

    def run(self, words: Sequence[str], source: Source) -> CommandResult:
        """Run one on a Source; it asks nothing, and applies no action.

        Raises:
            UsageError: it needs a terminal of its own.
        """


def forms(parser: argparse.ArgumentParser, words: tuple[str, ...] = (), help: str = "") -> list[CommandForm]:
    """The commands that a parser understands."""
    found: list[CommandForm] = []
    arguments: list[ArgumentForm] = []
    action = str(parser.get_default("action") or "")
    known = {field.name: field.arg for field in actions.fields(actions.REGISTRY[action])} if action else {}
    for each in parser._actions:  # noqa: SLF001 - argparse shows its arguments in no other way
        if isinstance(each, argparse._SubParsersAction):  # noqa: SLF001 - likewise
            helps = {choice.dest: choice.help or "" for choice in each._choices_actions}  # noqa: SLF001 - likewise
            for name, below in each.choices.items():
                found += forms(below, (*words, name), helps.get(name, ""))
        elif each.dest != "help":
            arguments.append(_argument(each, known.get(each.dest)))
    return found or [CommandForm(words, help, tuple(arguments), action)]


def _argument(each: argparse.Action, arg: Arg | None) -> ArgumentForm:
    choices = arg.choices if arg is not None else tuple(map(str, each.choices or ()))
    option = bool(each.option_strings)
    shown = each.metavar if isinstance(each.metavar, str) else each.dest.upper()
    name = each.option_strings[-1] if option else shown
    kind = arg.kind if arg is not None else None
    return ArgumentForm(name, shown, each.help or "", option, option and each.nargs != 0, each.required, choices, kind)
