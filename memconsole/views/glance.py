"""What the Overview says in lines: functions of a Snapshot and a width."""

from __future__ import annotations

import textwrap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from textual.content import Content

from memconsole import physical, readiness
from memconsole.model import (
    Grant,
    GrantState,
    Guest,
    GuestState,
    HandoffReport,
    Memory,
    Region,
    RegionState,
    Snapshot,
    Survival,
)
from memconsole.physical import Share
from memconsole.rates import guests_busy, usage_of
from memconsole.readiness import Verdict
from memconsole.units import format_duration, format_percent, format_size, spark
from memconsole.views.looks import bar, value_look
from memconsole.views.tallying import Tally
from memconsole.views.widgets.bars import Part, line
from memconsole.views.widgets.facts import STYLES
from memconsole.views.widgets.fitting import fit

LABEL = 9
NUMBERS = 21
METER = 36
"""The least width of a meter; two stand side by side where they fit."""
TREND = 38
"""... and of a trend."""
VALUE = 12

# --- ready? -----------------------------------------------------------------------------------------------------------


def verdict_lines(snapshot: Snapshot, width: int) -> list[Content]:
    """Whether this host is ready to hand off, the first reason where it is not, and how old that is."""
    found = snapshot.readiness
    mark, tone = {
        Verdict.READY: ("✔ ", "bold $success"),
        Verdict.REFUSED: ("✖ ", "bold $error"),
        Verdict.UNKNOWN: ("? ", "bold $warning"),
    }[readiness.verdict(found)]
    wrapped = textwrap.wrap(readiness.sentence(found), max(width - 2, 20))
    lines = [line([(mark if not row else "  ", tone), (part, tone)]) for row, part in enumerate(wrapped)]
    if found is not None:
        lines.append(line([("  ", ""), (readiness.age(found, snapshot.taken_ns), "$text-muted")]))
    return lines


def rehearsal_lines(snapshot: Snapshot, width: int) -> list[Content]:
    """The last rehearsal or handoff, how old it is, and each guest's blackout, the longest first."""
    made = snapshot.handoff
    first = readiness.last_handoff(made, snapshot.taken_ns)
    if made is None:
        words = f"{first}: memconsole handoff rehearse does all but the jump"
        return [line([(part, "$text-muted")]) for part in textwrap.wrap(words, max(width, 20))]
    tone = {"done": "$success", "failed": "$error"}.get(made.state, "$warning")
    lines = [line([(part, tone)]) for part in textwrap.wrap(first, max(width, 20))]
    back = _blackouts(made)
    if back:
        wrapped = textwrap.wrap(f"blackouts: {', '.join(back)}", max(width, 20), max_lines=2, placeholder=" …")
        lines += [line([(part, "")]) for part in wrapped]
    return lines


def _blackouts(made: HandoffReport) -> list[str]:
    known = [(guest.blackout_ns, guest.name) for guest in made.guests if guest.blackout_ns is not None]
    stayed = [f"{guest.name} is not back" for guest in made.guests if not guest.back and made.state != "running"]
    return [*stayed, *(f"{name} {format_duration(ns)}" for ns, name in sorted(known, reverse=True))]


# --- memory and CPUs --------------------------------------------------------------------------------------------------


class Meter(NamedTuple):
    """A part of a whole in bytes, and its tone; without one the tone says how full it is."""

    title: str
    part: int
    whole: int
    tone: str = ""


def use_lines(snapshot: Snapshot, width: int, resident: int) -> list[Content]:
    """The host's physical memory by what it is used for, and what the marks mean; ``resident`` as of :class:`Held`."""
    shares = physical.by_use(snapshot, resident)
    parts: list[Part] = [(fit("in use", LABEL), "$secondary")]
    for share, count in zip(shares, physical.cells(shares, max(width - LABEL, 10)), strict=True):
        parts.append((share.mark * count, STYLES[share.tone]))
    return [line(parts), *_legend(shares, width)]


def place_lines(snapshot: Snapshot, width: int) -> list[Content]:
    """The host's physical memory by where it lies, from address 0 to the end of RAM, and what the marks mean."""
    title = (fit("by place", LABEL), "$secondary")
    marks, kinds = physical.by_place(snapshot, max(width - LABEL, 10))
    if not marks:
        return [line([title, ("/proc/iomem does not show this user where memory lies", "$text-muted")])]
    tones = {share.mark: STYLES[share.tone] for share in kinds}
    return [line([title, *((mark, tones.get(mark, "")) for mark in marks)]), *_legend(kinds, width)]


def _legend(shares: Sequence[Share], width: int) -> list[Content]:
    """What the marks mean, in as many lines as that takes."""
    lines: list[list[Part]] = [[(" " * LABEL, "")]]
    used = LABEL
    for share in shares:
        words = f"{share.legend}  "
        if used + len(words) > width and used > LABEL:
            lines.append([(" " * LABEL, "")])
            used = LABEL
        lines[-1] += [(share.mark, STYLES[share.tone]), (words[1:], "")]
        used += len(words)
    return [line(parts) for parts in lines]


def meters(memory: Memory) -> list[Meter]:
    """The host's memory, its nodes where there are several, its pools and its swap."""
    found = [Meter("used", memory.total - memory.available, memory.total)]
    if memory.shmem:
        found.append(Meter("shared", memory.shmem, memory.total, "calm"))
    if memory.huge_shmem:
        found.append(Meter("  in 2M", memory.huge_shmem, memory.shmem or memory.total, "calm"))
    if len(memory.nodes) > 1:
        found += [Meter(f"node {node.number}", node.total - node.free, node.total) for node in memory.nodes]
    found += [
        Meter(f"{format_size(pool.page_size)} pool", (pool.total - pool.free) * pool.page_size, size)
        for pool in memory.pools
        if (size := pool.total * pool.page_size)
    ]
    if memory.swap_total:
        found.append(Meter("swap", memory.swap_total - memory.swap_free, memory.swap_total))
    return found


def memory_lines(memory: Memory, width: int) -> list[Content]:
    """The meters in lines of ``width`` cells, side by side where there is room."""
    found = meters(memory)
    columns = 2 if len(found) > 2 and width >= 2 * METER + 2 else 1
    cell = (width - 2 * (columns - 1)) // columns
    height = -(-len(found) // columns)
    drawn = [_drawn(meter, cell) for meter in found]
    lines = [Content("  ").join(drawn[row::height]) for row in range(height)]
    if not any(pool.total for pool in memory.pools):
        lines.append(line([(fit("pools", LABEL), "$secondary"), ("no hugetlb pages are reserved", "$text-muted")]))
    return lines


def _drawn(meter: Meter, width: int) -> Content:
    """One meter: title, bar, ``PART of WHOLE`` and per cent."""
    full = meter.part / meter.whole if meter.whole else 0.0
    filled, empty = bar(full, max(width - LABEL - NUMBERS, 4))
    tone = meter.tone or ("bad" if full > 0.95 else "warn" if full > 0.85 else "good")
    numbers = f" {format_size(meter.part):>6} of {format_size(meter.whole):<5}{full * 100:>4.0f}%"
    return line([(fit(meter.title, LABEL), "$secondary"), (filled, STYLES[tone]), (empty, "$border"), (numbers, "")])


def processor_lines(snapshot: Snapshot, width: int) -> list[Content]:
    """What the host's CPUs do, and below it load, guests and the control process; what is not known is ``-``."""
    used, cpus = snapshot.usage, snapshot.host.cpus
    title = (fit("CPUs", LABEL), "$secondary")
    if used is None:
        return [line([title, ("-  this snapshot does not say what they do", "$text-muted")])]
    busy = used.rates.busy if used.rates is not None else None
    if busy is None:
        first = line([title, ("-  a second snapshot is needed to tell how busy they are", "$text-muted")])
    else:
        full = busy / cpus if cpus else 0.0
        numbers = f" {busy:>6.1f} of {cpus:<5}{full * 100:>4.0f}%"
        filled, empty = bar(full, max(width - LABEL - NUMBERS, 4))
        first = line([title, (filled, STYLES["warn" if full > 0.95 else "good"]), (empty, "$border"), (numbers, "")])
    words = ["load " + " ".join(f"{each:.2f}" for each in used.load)] if used.load else []
    words.append(f"guests {_cpus(guests_busy(snapshot.guests))}")
    if used.service is not None:
        words.append(f"control process {_cpus(used.service.rates.busy if used.service.rates is not None else None)}")
    if used.service_rss is not None:
        words.append(format_size(used.service_rss))
    wrapped = textwrap.wrap(" · ".join(words), max(width - LABEL, 20))
    return [first, *(line([(" " * LABEL, ""), (part, "$text-muted")]) for part in wrapped)]


def _cpus(busy: float | None) -> str:
    return "-" if busy is None else f"{100 * busy:.0f}%"


# --- trends -----------------------------------------------------------------------------------------------------------


class TrendRow(NamedTuple):
    """A trend: what of, its values, oldest first, the last one in words, and what fills a cell (0: its largest)."""

    title: str
    values: Sequence[float]
    text: str
    whole: float = 0.0


LEAST_STALL = 0.1
"""The part of the time that fills the column of a stall, where none was longer."""


def host_trends(snapshot: Snapshot) -> list[TrendRow]:
    """The trends of the host; those of lazy grants where there are any."""
    used = snapshot.usage
    if used is None or used.rates is None:
        return []
    cpus, found, memory = snapshot.host.cpus, used.rates.trends, snapshot.memory
    rows = [
        TrendRow("CPUs", used.rates.trend, f"{_last(used.rates.trend):.1f} of {cpus}", cpus),
        TrendRow("guests", found.guests, f"{100 * _last(found.guests):.0f}% CPU", max(cpus, _last(found.guests))),
        TrendRow("memory", found.memory, format_size(round(_last(found.memory))), memory.total),
        _stall("CPU stall", found.cpu),
        _stall("mem stall", found.memory_wait),
        _stall("I/O stall", found.io),
        TrendRow("faults", found.faults, f"{_last(found.faults):,.0f}/s"),
        TrendRow("WSS", found.touched, format_size(round(_last(found.touched))), _lazy_length(snapshot)),
    ]
    return [row for row in rows if row.values]


def guest_trends(guest: Guest) -> list[TrendRow]:
    """The trends of a guest: CPU, waits for one, memory, page faults, and the working set of its lazy grants."""
    used = usage_of(guest)
    if guest.seen is None or used is None or used.rates is None:
        return []
    found, busy = used.rates.trends, used.rates.trend
    vcpus = len(guest.seen.vcpus or ()) or 1
    rows = [
        TrendRow("CPU", busy, f"{format_percent(100 * _last(busy))}%", vcpus),
        _stall("stall", found.cpu),
        TrendRow("memory", found.memory, format_size(round(_last(found.memory))), guest.memory),
        TrendRow("faults", found.faults, f"{_last(found.faults):,.0f}/s"),
        TrendRow("WSS", found.touched, format_size(round(_last(found.touched))), guest.memory),
    ]
    return [row for row in rows if row.values]


def _stall(title: str, values: Sequence[float]) -> TrendRow:
    return TrendRow(title, values, f"{format_percent(100 * _last(values))}%", max(LEAST_STALL, *values, 0.0))


def _last(values: Sequence[float]) -> float:
    return values[-1] if values else 0.0


def _lazy_length(snapshot: Snapshot) -> int:
    return sum(grant.length for grant in snapshot.grants if grant.faults is not None)


def trend_lines(rows: Sequence[TrendRow], width: int) -> list[Content]:
    """The trends in lines of ``width`` cells, side by side where there is room; or why there are none."""
    if not rows:
        return [line([("trends need a second snapshot that says what is used", "$text-muted")])]
    columns = max(1, min(width // TREND, len(rows)))
    height = -(-len(rows) // columns)
    cell = (width - 2 * (columns - 1)) // columns
    drawn = [_trend(row, cell) for row in rows]
    return [Content("  ").join(drawn[at::height]) for at in range(height)]


def _trend(row: TrendRow, width: int) -> Content:
    room = max(width - LABEL - 1 - VALUE, 4)
    graph = spark(row.values[-room:], row.whole)
    return line(
        [
            (fit(row.title, LABEL + 1), "$secondary"),
            (f"{graph:>{room}}", "$primary"),
            (fit(row.text, VALUE, right=True), ""),
        ]
    )


def trend_span(snapshot: Snapshot) -> str:
    """How far apart the cells of a trend are; empty where there is none."""
    rates = snapshot.usage.rates if snapshot.usage is not None else None
    return "" if rates is None else f"a cell each {max(round(rates.over_ns / 1e9), 1)}s"


# --- what is held, and what would survive -----------------------------------------------------------------------------


def _of_region(region: Region) -> Iterable[tuple[Hashable, int]]:
    resident = region.seen.resident if region.seen is not None else 0
    return ("size", region.size), ("resident", resident), (region.page_size, resident), (region.state, 1)


def _of_guest(guest: Guest) -> Iterable[tuple[Hashable, int]]:
    return ("memory", guest.memory), (guest.state, 1)


def _of_grant(grant: Grant) -> Iterable[tuple[Hashable, int]]:
    return ((grant.state, 1),)


class Held:
    """What is held, counted: of ten thousand regions only those again that changed."""

    def __init__(self) -> None:
        self._regions = Tally(_of_region)
        self._guests = Tally(_of_guest)
        self._grants = Tally(_of_grant)

    def resident(self, snapshot: Snapshot) -> int:
        """Bytes of regions that are in memory in the host's own pages."""
        sums = self._regions.follow(snapshot.regions)
        return sum(sums[size] for size in {*sums} if isinstance(size, int) and size <= snapshot.host.page_size)

    def lines(self, snapshot: Snapshot) -> list[Content]:
        """What is held: regions, guests and grants, counted by state."""
        regions, guests = self._regions.follow(snapshot.regions), self._guests.follow(snapshot.guests)
        grants = self._grants.follow(snapshot.grants)
        size = f"{format_size(regions['size'])}, {format_size(regions['resident'])} resident"
        lines = [
            _count("regions", len(snapshot.regions), size),
            _states({state: regions[state] for state in RegionState}),
            _count("guests", len(snapshot.guests), f"{format_size(guests['memory'])} of RAM"),
            _states({state: guests[state] for state in GuestState}),
            _count("grants", len(snapshot.grants), ""),
            _states({state: grants[state] for state in GrantState}),
        ]
        lazy = [(grant.length, grant.faults) for grant in snapshot.grants if grant.faults]
        if lazy:
            length, there = sum(length for length, _ in lazy), sum(faults.present for _, faults in lazy)
            rate = sum(faults.rate for _, faults in lazy)
            words = f"{rate:,} faults/s, {format_size(there)} of {format_size(length)}"
            lines.append(_count("lazy", len(lazy), words))
        progress = [guest.progress for guest in snapshot.guests if guest.progress]
        if progress:
            wrong, gap = sum(each.wrong for each in progress), max(each.gap_ns for each in progress)
            verdict = ("✖ ", "$error") if wrong else ("✔ ", "$success")
            words = f"{wrong:,} wrong, longest gap {format_duration(gap)}"
            lines.append(line([(fit("canaries", LABEL), "$secondary"), verdict, (words, "")]))
        return [each for each in lines if each.plain]


def _count(title: str, number: int, words: str) -> Content:
    return line([(fit(title, LABEL), "$secondary"), (f"{number:,}", "bold"), (f"  {words}" if words else "", "")])


def _states(numbers: Mapping[str, int]) -> Content:
    parts = []
    for state, number in sorted(numbers.items(), key=lambda pair: -pair[1]):
        if number:
            glyph, tone = value_look("state", state)
            parts += [(f"{glyph} {number:,} {state}  ", STYLES[tone])]
    return line([(" " * LABEL, ""), *parts]) if parts else Content("")


def survival_lines(survival: Survival) -> list[Content]:
    """Whether memory here would survive a kexec, in words."""
    lines = [
        _yes_no("KHO", survival.kho, "the kernel hands over", _missing(survival.kho_cmdline, "kho=on")),
        _yes_no("LUO", survival.luo, "/dev/liveupdate is there", _missing(survival.luo_cmdline, "liveupdate=on")),
    ]
    if survival.scratch:
        size = sum(item.end - item.start for item in survival.scratch)
        lines.append(_plain("scratch", f"{format_size(size)} in {len(survival.scratch)}"))
    if survival.incoming:
        lines.append(_plain("handed in", ", ".join(survival.incoming)))
    if survival.outgoing:
        lines.append(_plain("to hand on", ", ".join(survival.outgoing)))
    lines.append(_plain("kexecs", f"{survival.kexec_count} since power-on"))
    if survival.detail:
        lines.append(Content.styled(survival.detail, "$text-muted"))
    return lines


def _missing(on_cmdline: bool, word: str) -> str:
    return "asked for, but not there" if on_cmdline else f"absent (no {word})"


def _yes_no(title: str, there: bool, yes: str, no: str) -> Content:
    mark = ("✔ ", "$success") if there else ("✖ ", "$error")
    return line([(fit(title, LABEL), "$secondary"), mark, (yes if there else no, "")])


def _plain(title: str, text: str) -> Content:
    return line([(fit(title, LABEL), "$secondary"), (text, "")])
