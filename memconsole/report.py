"""An audit's report on one page, for those who were not there: verdict, conditions, findings, entities, maps."""

from __future__ import annotations

from collections.abc import Iterator

from memconsole import pages
from memconsole.actions import HandoffRun
from memconsole.document import Block, Heading, Paragraph
from memconsole.errors import MemconsoleError
from memconsole.fields import TABLES
from memconsole.model import Condition, Snapshot
from memconsole.source import Source

LISTED = ("guests", "regions", "grants", "quarantine", "windows", "domains", "devices")


def of(source: Source, snapshot: Snapshot) -> tuple[str, list[Block]]:
    """The report on a Snapshot of a Source: its title and its blocks."""
    title = f"Memory audit of {snapshot.host.name}"
    return title, [Heading(title, 1), *_blocks(source, snapshot)]


def _blocks(source: Source, snapshot: Snapshot) -> Iterator[Block]:
    yield pages.verdict(snapshot)
    yield from pages.host(snapshot)
    yield Heading("Findings")
    if snapshot.findings:
        yield pages.table(snapshot, "findings", every=True)
    else:
        yield Paragraph(("None: what was meant is what the kernel shows, as far as it was seen.",))
    yield from pages.unread(snapshot)
    yield Heading("Conditions of a handoff")
    values, why = _conditions(source, snapshot)
    if why:
        yield Paragraph((why,))
    if values:
        yield pages.conditions(values)
    yield Heading("The last handoff")
    yield from pages.handoff(snapshot)
    for id in LISTED:
        rows = pages.table(snapshot, id)
        if rows.rows:
            yield Heading(TABLES[id].title)
            yield rows
    if pages.map_keys(snapshot):
        yield Heading("Maps")
        yield from pages.maps(snapshot, source)
    yield Heading("Last events")
    events = pages.table(snapshot, "events")
    yield type(events)(events.name, events.fields, events.rows[-pages.EVENTS :])


def _conditions(source: Source, snapshot: Snapshot) -> tuple[tuple[Condition, ...], str]:
    """Every condition where a handoff can be planned, else those that did not hold when they were judged last."""
    if not source.read_only:
        try:
            plan = source.plan(HandoffRun())
        except MemconsoleError as error:
            return (), f"They could not be judged: {error}"
        if plan.conditions:
            return plan.conditions, ""
    if snapshot.readiness is None:
        return (), "They were not judged."
    holding = snapshot.readiness.total - len(snapshot.readiness.failing)
    return snapshot.readiness.failing, f"{holding} of {snapshot.readiness.total} held when they were judged last."
