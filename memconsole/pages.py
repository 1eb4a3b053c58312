"""What each view of the console shows, as a page of blocks: for those who hear it, and for programs.

``PAGES`` has one for every view by its name, and for every kind of subject that can be opened; a test holds that the
console has no view without one. An audit's report is made of the same parts (:mod:`memconsole.report`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from html import escape as escape_markup
from typing import Any

from memconsole import hostmap, iovas, joined, readiness, timeline
from memconsole.document import Block, Heading, Paragraph, Picture, Rows
from memconsole.errors import MemconsoleError, NotFound, UsageError
from memconsole.extents import ExtentTable, Flag
from memconsole.field import Field
from memconsole.fields import REACHED, SPANS, TABLES
from memconsole.model import Condition, Snapshot
from memconsole.source import Source
from memconsole.units import PAGE, format_address, format_size, format_time

Page = Callable[[Snapshot, Source, str], Iterator[Block]]

MOST_EXTENTS = 200
"""Runs that a page lists of one map."""
EVENTS = 20
"""Events that a report has."""
CELLS = 256
"""Cells of a map's picture."""
_WIDTH, _HEIGHT = 960, 44
_COLOURS = (("huge", "#2c7fb8"), ("present", "#7fcdbb"), ("swapped", "#d95f0e"), ("absent", "#eeeeee"))


def _result(each: Condition) -> str:
    return "holds" if each.ok else "refuses" if each.refuses else "warns"


def _flags(bits: int) -> str:
    return ", ".join(flag.name.lower() for flag in Flag if bits & flag and flag.name) or "absent"


CONDITION_FIELDS = (
    Field("id", "Condition", "its id", lambda each: each.id),
    Field("result", "Result", "whether it holds", _result),
    Field("requirement", "Required", "what is required", lambda each: each.requirement),
    Field("observed", "Observed", "what was seen", lambda each: each.observed),
    Field("risk", "Risk", "what a handoff without it risks", lambda each: "" if each.ok else each.risk),
    Field("remedy", "Remedy", "what to do", lambda each: "" if each.ok else each.remedy),
)
UNREAD_FIELDS = (
    Field("source", "Source", "what was not read", lambda each: each.source),
    Field("why", "Why", "why", lambda each: each.why),
    Field("remedy", "Remedy", "what to do", lambda each: each.remedy),
)
EXTENT_FIELDS = (
    Field("offset", "Address", "gpa, offset or IOVA", lambda each: each.offset * PAGE, format_address, right=True),
    Field("pfn", "PFN", "page frame number", lambda each: each.pfn, lambda value: f"{value:#x}", right=True),
    Field("count", "Pages", "pages in the run", lambda each: each.count, right=True),
    Field("flags", "Flags", "what it is", lambda each: _flags(each.flags)),
)


# --- parts --------------------------------------------------------------------------------------------------------


def table(snapshot: Snapshot, id: str, *, every: bool = False) -> Rows:
    """A table of the Snapshot with its usual columns, or with ``every``."""
    found = TABLES[id]
    return Rows(found.title.rstrip("s"), tuple(found.pick("all" if every else None)), tuple(found.rows(snapshot)))


def host(snapshot: Snapshot) -> Iterator[Block]:
    """The machine, its kernel and its memory, and when this was seen."""
    machine, memory = snapshot.host, snapshot.memory
    kernel = f"kernel {machine.kernel} ({machine.arch})"
    yield Paragraph(
        (
            f"Host {machine.name}, {kernel}, {machine.cpus} CPUs, boot {machine.boot_id}",
            f"Memory: {format_size(memory.total)}, {format_size(memory.available)} available",
            f"Live update: {'/dev/liveupdate is there' if snapshot.survival.luo else 'not on this kernel'}",
            f"Seen at {format_time(snapshot.taken_ns)} by {machine.tool}",
        )
    )


def verdict(snapshot: Snapshot) -> Paragraph:
    """Whether the host is ready to hand off, in a line."""
    return Paragraph((readiness.line(snapshot),))


def conditions(values: tuple[Condition, ...]) -> Rows:
    """Conditions of a handoff."""
    return Rows("Condition", CONDITION_FIELDS, values)


def unread(snapshot: Snapshot) -> Iterator[Block]:
    """What was not seen, and why."""
    if snapshot.gaps:
        yield Heading("Not seen")
        yield Rows("Source", UNREAD_FIELDS, snapshot.gaps)


def handoff(snapshot: Snapshot) -> Iterator[Block]:
    """The last handoff: its time as a picture, and its lines."""
    made = snapshot.handoff
    if made is None:
        yield Paragraph(("No handoff was made or rehearsed.",))
        return
    yield Paragraph((timeline.headline(made), *([made.why] if made.why else [])))
    yield Picture(timeline.svg(made), "; ".join(f"{bar.label}: {bar.text}" for bar in timeline.bars(made)))


def map_of(source: Source, key: str) -> Iterator[Block]:
    """The PFN map of a region, guest or domain as a picture, or why there is none."""
    try:
        with contextlib.closing(source.extents(key)) as found:
            yield _strip(key, found)
    except MemconsoleError as error:
        yield Paragraph((f"no map of {key}: {error}",))


def _strip(key: str, found: ExtentTable) -> Picture:
    """A map from left to right: each cell has the kind that most of its pages are of."""
    pages = max(1, found.pages)
    cells = min(CELLS, pages)
    bins = found.bin(found.first, pages, cells)
    stats = found.stats()
    kinds = []
    for present, swapped, huge in zip(bins.present, bins.swapped, bins.huge, strict=True):
        size = pages / cells
        kinds.append(0 if huge * 2 > size else 1 if present * 2 > size else 2 if swapped * 2 > size else 3)
    width = _WIDTH / cells
    boxes = "".join(
        f'<rect x="{at * width:.2f}" width="{run * width:.2f}" height="24" fill="{_COLOURS[kind][1]}"/>'
        for at, run, kind in _runs(kinds)
    )
    shares = (stats.huge, stats.present - stats.huge, stats.swapped, pages - stats.present - stats.swapped)
    named = zip(_COLOURS, shares, strict=True)
    told = ", ".join(f"{format_size(share * found.page_size)} {name}" for (name, _), share in named if share)
    text = f"{key}: {format_size(pages * found.page_size)} in {len(found)} runs: {told or 'nothing'}"
    begin, end = format_address(found.first * found.page_size), format_address((found.first + pages) * found.page_size)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">'
        f"<title>{escape_markup(text)}</title>{boxes}"
        f'<g font-family="monospace" font-size="12" fill="#1a1a1a"><text y="40">{begin}</text>'
        f'<text x="{_WIDTH}" y="40" text-anchor="end">{end}</text></g></svg>'
    )
    return Picture(svg, text)


def _runs(kinds: list[int]) -> Iterator[tuple[int, int, int]]:
    """Where each run of equal cells begins, how many it has, and of what kind."""
    begin = 0
    for at in range(1, len(kinds) + 1):
        if at == len(kinds) or kinds[at] != kinds[begin]:
            yield begin, at - begin, kinds[begin]
            begin = at


def maps(snapshot: Snapshot, source: Source) -> Iterator[Block]:
    """Every map of a Snapshot."""
    for key in map_keys(snapshot):
        yield from map_of(source, key)


def map_keys(snapshot: Snapshot) -> list[str]:
    """What has a map: regions, guests with memory that is not a region, domains that map anything."""
    regions = {region.name for region in snapshot.regions}
    keys = [f"region:{region.name}" for region in snapshot.regions]
    keys += [f"guest:{guest.name}" for guest in snapshot.guests if guest.name not in regions]
    return keys + [f"domain:{domain.group}" for domain in snapshot.domains if domain.mapped]


# --- pages --------------------------------------------------------------------------------------------------------


def _listing(*tables: str) -> Page:
    def page(snapshot: Snapshot, source: Source, subject: str) -> Iterator[Block]:
        del source, subject
        for id in tables:
            if len(tables) > 1:
                yield Heading(TABLES[id].title)
            yield table(snapshot, id)

    return page


def _overview(snapshot: Snapshot, source: Source, subject: str) -> Iterator[Block]:
    del source, subject
    yield verdict(snapshot)
    yield from host(snapshot)
    for id in ("findings", "guests", "regions"):
        yield Heading(TABLES[id].title)
        yield table(snapshot, id)
    yield from unread(snapshot)


def _audit(snapshot: Snapshot, source: Source, subject: str) -> Iterator[Block]:
    del source, subject
    yield table(snapshot, "findings", every=True)
    yield from unread(snapshot)


def _handoff(snapshot: Snapshot, source: Source, subject: str) -> Iterator[Block]:
    del source, subject
    yield verdict(snapshot)
    if snapshot.readiness is not None:
        yield Heading("Conditions that do not hold")
        yield conditions(snapshot.readiness.failing)
    yield Heading("The last handoff")
    yield from handoff(snapshot)


def _pfn(snapshot: Snapshot, source: Source, subject: str) -> Iterator[Block]:
    keys = [subject] if subject else map_keys(snapshot)
    for key in keys:
        yield Heading(key)
        yield from map_of(source, key)
        if key.startswith("domain:"):
            with contextlib.suppress(MemconsoleError):
                yield from _verdicts(snapshot, source, key.removeprefix("domain:"))
            continue
        with contextlib.suppress(MemconsoleError), contextlib.closing(source.extents(key)) as found:
            yield Rows("Run at", EXTENT_FIELDS, tuple(found.rows(0, min(len(found), MOST_EXTENTS))))
            if len(found) > MOST_EXTENTS:
                yield Paragraph((f"and {len(found) - MOST_EXTENTS} more runs: memconsole pfn {key}",))


def _verdicts(snapshot: Snapshot, source: Source, group: str) -> Iterator[Block]:
    with contextlib.closing(iovas.survey(snapshot, source, group)) as found:
        rows = tuple(itertools.islice(found.ranges(), MOST_EXTENTS + 1))
        yield Rows("IOVA", iovas.FIELDS, rows[:MOST_EXTENTS])
        if len(rows) > MOST_EXTENTS:
            yield Paragraph((f"and more ranges: memconsole iovamap {group}",))


def _host_map(snapshot: Snapshot, source: Source, subject: str) -> Iterator[Block]:
    del subject
    with contextlib.closing(hostmap.survey(snapshot, source)) as found:
        yield Rows("Owner", hostmap.FIELDS, tuple(found.totals()))
        if found.unseen:
            yield Rows("Not seen", UNREAD_FIELDS, found.unseen)


def _reach(snapshot: Snapshot, source: Source, subject: str) -> Iterator[Block]:
    answer = joined.resolve_target(snapshot, source, subject.removeprefix("reach:"))
    if isinstance(answer, joined.Joined):
        yield Rows("Span", tuple(SPANS.pick("all")), answer.spans)
    else:
        yield Paragraph(tuple(joined.frame_lines(answer)))
        yield Rows("Reached by", tuple(REACHED.pick("all")), answer.reached)


def _detail(id: str) -> Page:
    """All fields of one entity, and its map where it has one."""

    def page(snapshot: Snapshot, source: Source, subject: str) -> Iterator[Block]:
        found = TABLES[id]
        name = subject.partition(":")[2] or subject
        rows = tuple(each for each in found.rows(snapshot) if str(found.key(each)) == name)
        if not rows:
            kind = id.removesuffix("s")
            raise NotFound(f"there is no {kind} {name!r}", "none has this name", f"memconsole snapshot --view {id}")
        yield Rows(found.title.rstrip("s"), tuple(found.pick("all")), rows)
        if id in {"regions", "guests"}:
            yield from map_of(source, f"{id.removesuffix('s')}:{name}")

    return page


PAGES: Mapping[str, Page] = {
    "overview": _overview,
    "regions": _listing("regions", "quarantine"),
    "guests": _listing("guests"),
    "grants": _listing("grants"),
    "pfn": _pfn,
    "mmio": _listing("windows", "devices"),
    "iommu": _listing("domains", "devices"),
    "events": _listing("events"),
    "audit": _audit,
    "handoff": _handoff,
    "host": _host_map,
    "reach": _reach,
    **{id.removesuffix("s"): _detail(id) for id in TABLES},
}
"""The page of every view, and of every kind of subject, by its name."""


def of(source: Source, view: str, subject: str = "", parts: tuple[Any, ...] = ()) -> tuple[str, list[Block]]:
    """The page of a view of a Source, about a subject: its title and its blocks.

    Raises:
        UsageError: there is no such view.
        NotFound: there is no such subject.
    """
    kind = subject.partition(":")[0]
    name = kind if kind in PAGES and view != "pfn" else view
    if name not in PAGES:
        raise UsageError(f"there is no view {view!r}", "none has this name", f"views: {', '.join(PAGES)}")
    title = f"{view} {subject}".strip()
    return title, [Heading(title, 1), *PAGES[name](source.snapshot(parts), source, subject)]
