"""Actions as command words: one parser for the command line and the console's ``:`` line.

It is built from the registry, so that an action that is registered can be typed. ``parse(shlex.split(line))`` reads
what :func:`memconsole.actions.cli_form` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from memconsole import actions
from memconsole.actions import Action, Field, Kind
from memconsole.errors import MemconsoleError, UsageError

Subparsers = Any  # argparse keeps the type of add_subparsers' result to itself


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of leaving the process."""

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


def _add_field(parser: argparse.ArgumentParser, field: Field) -> None:
    arg = field.arg
    if arg.kind is Kind.FLAG:
        parser.add_argument(field.option, dest=field.name, action="store_true", help=arg.help)
        return
    shown = "|".join(arg.choices) if arg.choices else arg.kind.value.upper().replace("NEW-", "")
    options: dict[str, Any] = {"help": arg.help, "metavar": shown}
    if arg.kind is Kind.CHOICE:
        options["choices"] = arg.choices
    else:
        options["type"] = reader(lambda text: actions.read_value(field, text))
    if arg.positional:
        parser.add_argument(field.name, **options)
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
        parser = where.add_parser(spec.words[-1], help=spec.help, description=spec.help, parents=list(parents))
        for field in actions.fields(cls):
            if field.arg.kind is Kind.WORDS:
                parser.usage = "%(prog)s [options] NAME [-- ARG ...]"
                parser.epilog = f"-- ARG ...: {field.arg.help}"
            else:
                _add_field(parser, field)
        parser.set_defaults(action=spec.id, **defaults)
    return groups


def split_rest(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words before a ``--`` and those behind it."""
    words = list(words)
    if "--" in words:
        at = words.index("--")
        return words[:at], tuple(words[at + 1 :])
    return words, ()


def action_of(namespace: argparse.Namespace, rest: Sequence[str] = ()) -> Action:
    """The Action a parsed command line means; ``rest`` are the words after ``--``.

    Raises:
        UsageError: words after ``--`` for an action that takes none, or a value that does not fit.
    """
    cls = actions.REGISTRY[namespace.action]
    values: dict[str, Any] = {}
    takes_words = None
    for field in actions.fields(cls):
        if field.arg.kind is Kind.WORDS:
            takes_words = field
        elif hasattr(namespace, field.name):
            values[field.name] = getattr(namespace, field.name)
    if rest and takes_words is None:
        raise UsageError(f"{' '.join(cls.spec.words)} takes no words after --", "", "leave them out")
    if takes_words is not None and rest:
        values[takes_words.name] = tuple(rest)
    return actions.build(namespace.action, values)


def parse(words: Sequence[str]) -> Action:
    """The Action that command words mean, with or without a leading ``memconsole``.

    Raises:
        UsageError: no such command, or arguments that do not fit.
    """
    words, rest = split_rest(words)
    if words and words[0] == "memconsole":
        words = words[1:]
    parser = Parser(prog="memconsole", add_help=False)
    add_actions(parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser))
    return action_of(parser.parse_args(words), rest)
