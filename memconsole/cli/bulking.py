"""One action on several, ``each NAME ... -- ACTION``: one plan that lists each, one number to type."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from memconsole import actions, bulk, command, where
from memconsole.actions import Action
from memconsole.bulk import BulkItem
from memconsole.cli import confirming, output
from memconsole.cli.connect import source
from memconsole.errors import ExitCode, NotFound, Refused, UsageError
from memconsole.fields import TABLES
from memconsole.model import Snapshot


def each(options: argparse.Namespace) -> int:
    """Plan an action for each of several, have their number typed, and apply those that are not refused.

    What fails on one keeps no other; the exit code is then 1. It is 3 where all are refused, of a dry run where one is.
    """
    cls, rest = _action(options.rest)
    with source(options, need="plan" if options.dry_run else "act") as found:
        snapshot = found.snapshot(_parts(cls, options.where))
        rows = _rows(cls, snapshot, options.names, options.where)
        items = list(bulk.plans(found, [_for_row(cls, row, rest) for row in rows]))
        refused = [item for item in items if item.refused]
        if options.dry_run:
            _tell(options, items)
            return ExitCode.REFUSED if refused else ExitCode.DONE
        left = len(items) - len(refused)
        if not left:
            _tell(options, items)
            return ExitCode.REFUSED
        if not options.yes:
            _confirm(items, left)
        done = bulk.applied(found, items, _told_one if not options.json else lambda _: None)
    if options.json:
        output.json([_as_json(item) for item in [*refused, *done]])
    elif refused:
        output.note(f"{len(refused):,} were refused and stay as they are; --dry-run says why")
    return ExitCode.FAILED if any(item.error for item in done) else ExitCode.DONE


def _action(words: Sequence[str]) -> tuple[type[Action], tuple[str, ...]]:
    """The action that is meant, and the words behind its own.

    Raises:
        UsageError: there is none, or it is on no row.
    """
    for cls in actions.REGISTRY.values():
        spec = cls.spec
        if tuple(words[: len(spec.words)]) == spec.words:
            if spec.on not in bulk.ROW_KINDS:
                raise UsageError(f"{shlex.join(spec.words)} cannot be done on each", "it is not about one thing", "")
            return cls, tuple(words[len(spec.words) :])
    known = ", ".join(" ".join(cls.spec.words) for cls in actions.REGISTRY.values() if cls.spec.on in bulk.ROW_KINDS)
    said = f"{shlex.join(words)} is no action" if words else "each wants an action behind --"
    raise UsageError(said, "", f"memconsole each NAME ... -- ACTION [ARG ...]; actions: {known}")


def _parts(cls: type[Action], text: str | None) -> set[Any]:
    chosen = where.parse(text or "", TABLES[cls.spec.on].fields)
    return {field.part for field in chosen.fields if field.part is not None}


def _rows(cls: type[Action], snapshot: Snapshot, names: Sequence[str], text: str | None) -> list[Any]:
    """The rows that are named, or that a filter finds, in the order in which they are named.

    Raises:
        UsageError: neither names nor a filter are given, or both. NotFound: there is no such row.
    """
    table = TABLES[cls.spec.on]
    if bool(names) == (text is not None):
        raise UsageError(
            f"the command does not say which {table.title} are meant", "", "give NAME ..., or --where FILTER"
        )
    rows = table.rows(snapshot)
    if text is not None:
        found = where.choose(where.parse(text, table.fields), table.pick(None), rows)
        if not found:
            raise NotFound(f"no row of {table.title} matches {text}", "", f"memconsole {table.id} lists them")
        return found
    known = {table.key(row): row for row in rows}
    if missing := [name for name in names if name not in known]:
        raise NotFound(f"there is no {missing[0]} in {table.title}", "", f"memconsole {table.id} lists them")
    return [known[name] for name in dict.fromkeys(names)]


def _for_row(cls: type[Action], row: Any, rest: Sequence[str]) -> Action:
    """The action on a row: what the row answers stands first, where the command line has it.

    Raises:
        UsageError: the other arguments do not fit, or the row answers none of them.
    """
    given = bulk.answered(cls.spec.id, cls.spec.on, row)
    if not given:
        name = TABLES[cls.spec.on].key(row)
        raise UsageError(f"{' '.join(cls.spec.words)} cannot be done on {name}", "it takes nothing that the row is", "")
    words = list(cls.spec.words)
    for field in actions.fields(cls):
        if field.name in given:
            words += [given[field.name]] if field.arg.positional else [field.option, given[field.name]]
    return command.parse([*words, *rest])


def _tell(options: argparse.Namespace, items: Sequence[BulkItem]) -> None:
    """What each would see done, refused ones first."""
    if options.json:
        output.json([_as_json(item) for item in _refused_first(items)])
    else:
        _show(items)


def _show(items: Sequence[BulkItem]) -> None:
    for item in _refused_first(items):
        output.plan(item.plan)


def _refused_first(items: Sequence[BulkItem]) -> list[BulkItem]:
    return sorted(items, key=lambda item: not item.refused)


def _confirm(items: Sequence[BulkItem], left: int) -> None:
    """Show the plans, and have the number of those that would be done typed.

    Raises:
        UsageError: nobody is there to type it. Refused: something else was typed.
    """
    title = items[0].action.spec.title
    confirming.typed(
        str(left),
        f"{left} would be done, {len(items) - left} are refused; type {left} to go on: ",
        lambda: _show(items),
        what=f"{title} of {left:,}",
        refused=Refused(
            f"{title} was not confirmed",
            "something else was typed; nothing was changed",
            f"type {left}, or add --yes",
            code="NotConfirmed",
        ),
    )


def _told_one(item: BulkItem) -> None:
    if item.outcome is not None:
        output.outcome(item.outcome)
    elif item.error is not None:
        output.note(f"{actions.cli_form(item.action)}: {item.error}")


def _as_json(item: BulkItem) -> dict[str, Any]:
    error = None if item.error is None else {"code": item.error.code, "text": str(item.error)}
    return {"cli": actions.cli_form(item.action), "plan": item.plan, "outcome": item.outcome, "error": error}
