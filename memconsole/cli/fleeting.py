"""Commands on many hosts: the list of them, their tables as one, and an action on each."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from memconsole import bulk, exporting, where
from memconsole.actions import Action
from memconsole.bulk import BulkItem
from memconsole.cli import confirming, connect, listing, output
from memconsole.command import action_of
from memconsole.errors import ExitCode, NotFound, Refused, UsageError
from memconsole.field import Field, Table
from memconsole.fields import TABLES
from memconsole.fleet import HOSTS, Fleet, Member, Pair, with_host
from memconsole.model import Danger

WITHIN_S = 30.0


@contextlib.contextmanager
def answered(options: argparse.Namespace, within: float = WITHIN_S) -> Iterator[Fleet]:
    """The hosts, each asked once; those that neither answered nor failed in so many seconds are not waited for."""
    with contextlib.closing(connect.fleet_of(options)) as fleet:
        fleet.start(once=True)
        fleet.wait(within)
        yield fleet


def hosts(options: argparse.Namespace) -> int:
    """A row a host; exit code 1 when one did not answer."""
    fields = HOSTS.pick(options.columns)
    chosen = where.parse(options.where, HOSTS.fields)
    sort = HOSTS.field(options.sort) if options.sort else None
    with answered(options, options.within) as fleet:
        rows = fleet.hosts()
    silent = any(row.errors is None or row.why for row in rows)
    shown = listing.in_its_order(where.choose(chosen, fields, rows), sort, reverse=options.reverse)
    _write(options, fields, shown, shown)
    return ExitCode.FAILED if silent else ExitCode.DONE


def table(options: argparse.Namespace) -> int:
    """One table of one host (:func:`listing.listing`), or of several, with the host as its first column."""
    if not connect.are_many(options):
        return listing.listing(options)
    if options.redact or options.over:
        raise UsageError("several hosts are listed as they are", "--redact and --over are for one", "name one host")
    shown = with_host(TABLES[options.table])
    fields = shown.pick(_with_host_first(options.columns))
    chosen = where.parse(options.where, shown.fields)
    sort = shown.field(options.sort) if options.sort else None
    with answered(options) as fleet:
        pairs = [pair for member in fleet.members.values() for pair in _pairs(member, TABLES[options.table])]
        missing = _note_missing(fleet)
    rows = listing.in_its_order(where.choose(chosen, fields, pairs), sort, reverse=options.reverse)
    _write(options, fields, rows, [{"host": each.host, **msgspec.to_builtins(each.item)} for each in rows])
    if missing:
        return ExitCode.FAILED
    return ExitCode.FINDINGS if options.table == "findings" and rows else ExitCode.DONE


def _with_host_first(columns: str | None) -> str | None:
    return columns if not columns or columns == "all" or "host" in columns.split(",") else f"host,{columns}"


def _pairs(member: Member, of: Table) -> list[Pair]:
    return [] if member.snapshot is None else [Pair(member.name, item) for item in of.rows(member.snapshot)]


def _note_missing(fleet: Fleet) -> int:
    """Say which hosts are not in what is listed; how many."""
    missing = [row for row in fleet.hosts() if row.errors is None]
    for row in missing:
        output.note(f"memconsole: {row.host} is not listed: {row.why or 'it did not answer in time'}")
    return len(missing)


def _write(options: argparse.Namespace, fields: Sequence[Field], rows: list[Any], whole: list[Any]) -> None:
    if options.format == "json" and not options.columns:
        output.json(whole)
    else:
        output.document(exporting.FORMATS[options.format](fields, rows))


def act(options: argparse.Namespace) -> int:
    """One Action on each of several hosts: a plan a host, their number typed, then each done, one failing or not.

    Raises:
        Refused: a host refuses it (its plan says why), or it was not confirmed; nothing was done.
        NotFound: a host did not answer; nothing was done.
    """
    action = action_of(options, options.rest)
    with answered(options) as fleet:
        if (missing := _note_missing(fleet)) and not options.dry_run:
            raise NotFound(
                f"nothing was done: {missing} of {len(fleet.members)} hosts did not answer",
                "an action on several hosts wants all of them",
                "leave them out, or see memconsole hosts",
            )
        asked = {name: member.source for name, member in fleet.members.items() if member.source is not None}
        items = {name: BulkItem(action, bulk.plan_one(found, action)) for name, found in asked.items()}
        if options.dry_run or not options.yes:
            _tell_plans(options, items)
        if options.dry_run:
            return ExitCode.REFUSED if any(item.refused for item in items.values()) else ExitCode.DONE
        _refuse(items)
        if not options.yes:
            _confirm(action, len(items))
        done = {name: bulk.applied(asked[name], [item], lambda _: None)[0] for name, item in items.items()}
    _tell_outcomes(options, done)
    return ExitCode.FAILED if any(item.error for item in done.values()) else ExitCode.DONE


def _tell_plans(options: argparse.Namespace, items: dict[str, BulkItem]) -> None:
    if options.json:
        if options.dry_run:
            output.json([{"host": name, "plan": item.plan} for name, item in items.items()])
        return
    for name, item in items.items():
        output.text(f"{name}:")
        output.plan(item.plan)


def _refuse(items: dict[str, BulkItem]) -> None:
    for name, item in items.items():
        if item.refused:
            first = item.plan.refusals[0]
            raise Refused(f"{name}: {first.what}; nothing was done", first.why, first.remedy, code=first.code)


def _confirm(action: Action, count: int) -> None:
    danger = ", which destroys" if action.spec.danger is Danger.DESTROYS else ""
    confirming.typed(
        str(count),
        f"{action.spec.title} on {count} hosts{danger}: type {count} to go on: ",
        lambda: None,  # the plans of all hosts were told before any was judged
        what=f"{action.spec.id} on {count} hosts",
        refused=Refused(
            f"{action.spec.id} was not confirmed",
            "another number was typed; nothing was changed",
            "type the number as it is shown, or add --yes",
            code="NotConfirmed",
        ),
    )


def _tell_outcomes(options: argparse.Namespace, done: dict[str, BulkItem]) -> None:
    if options.json:
        output.json([{"host": name, "outcome": each.outcome, "error": _error(each)} for name, each in done.items()])
        return
    for name, each in done.items():
        output.text(f"{name}: {each.outcome.text if each.outcome is not None else f'failed: {each.error}'}")


def _error(item: BulkItem) -> dict[str, str] | None:
    error = item.error
    return None if error is None else {
        "code": error.code, "what": error.what, "why": error.why, "remedy": error.remedy,
    }  # fmt: skip
