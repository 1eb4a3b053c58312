"""The first view: the host's memory in bars, what is held in it, what would survive, what is wrong, what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content

from memconsole.fields import TABLES
from memconsole.model import Memory, Snapshot, Survival
from memconsole.units import format_duration, format_size
from memconsole.views import tables
from memconsole.views.looks import bar, look
from memconsole.views.view import View, entitle
from memconsole.views.widgets.bars import line
from memconsole.views.widgets.facts import STYLES, Lines
from memconsole.views.widgets.table import VirtualTable, fit

if TYPE_CHECKING:
    from textual.widget import Widget

LABEL = 9
NUMBERS = 21
MOST_ROWS = 8
METER = 36
"""The least width of a meter; two stand side by side where they fit."""


class Meter(NamedTuple):
    """A part of a whole in bytes, and its tone; without one the tone says how full it is."""

    title: str
    part: int
    whole: int
    tone: str = ""


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
        lines.append(line([(fit("pools", LABEL), "$secondary"), ("no huge pages are set aside", "$text-muted")]))
    return lines


def _drawn(meter: Meter, width: int) -> Content:
    """One meter: title, bar, ``PART of WHOLE`` and per cent."""
    full = meter.part / meter.whole if meter.whole else 0.0
    filled, empty = bar(full, max(width - LABEL - NUMBERS, 4))
    tone = meter.tone or ("bad" if full > 0.95 else "warn" if full > 0.85 else "good")
    numbers = f" {format_size(meter.part):>6} of {format_size(meter.whole):<5}{full * 100:>4.0f}%"
    return line([(fit(meter.title, LABEL), "$secondary"), (filled, STYLES[tone]), (empty, "$border"), (numbers, "")])


def held_lines(snapshot: Snapshot) -> list[Content]:
    """What is held: regions, guests and grants, counted by state."""
    size = sum(region.size for region in snapshot.regions)
    resident = sum(region.seen.resident for region in snapshot.regions if region.seen)
    memory = sum(guest.memory for guest in snapshot.guests)
    wrong = sum(guest.progress.wrong for guest in snapshot.guests if guest.progress)
    gap = max((guest.progress.gap_ns for guest in snapshot.guests if guest.progress), default=0)
    lines = [
        _count("regions", len(snapshot.regions), f"{format_size(size)}, {format_size(resident)} in place"),
        _states(region.state for region in snapshot.regions),
        _count("guests", len(snapshot.guests), f"{format_size(memory)} of RAM"),
        _states(guest.state for guest in snapshot.guests),
        _count("grants", len(snapshot.grants), ""),
        _states(grant.state for grant in snapshot.grants),
    ]
    lazy = [(grant.length, grant.faults) for grant in snapshot.grants if grant.faults]
    if lazy:
        size, there = sum(length for length, _ in lazy), sum(faults.present for _, faults in lazy)
        rate = sum(faults.rate for _, faults in lazy)
        lines.append(_count("lazy", len(lazy), f"{rate:,} faults/s, {format_size(there)} of {format_size(size)}"))
    if any(guest.progress for guest in snapshot.guests):
        verdict = ("✖ ", "$error") if wrong else ("✔ ", "$success")
        words = f"{wrong:,} wrong, longest gap {format_duration(gap)}"
        lines.append(line([(fit("canaries", LABEL), "$secondary"), verdict, (words, "")]))
    return [each for each in lines if each.plain]


def _count(title: str, number: int, words: str) -> Content:
    return line([(fit(title, LABEL), "$secondary"), (f"{number:,}", "bold"), (f"  {words}" if words else "", "")])


def _states(states: Iterable[str]) -> Content:
    parts = []
    for state, number in Counter(states).most_common():
        glyph, tone = look("state", state)
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
    verdict = (
        ("◆ guest memory can outlive this kernel", "bold $success")
        if survival.kho and survival.luo
        else ("▲ guest memory ends with this kernel", "bold $warning")
    )
    lines.insert(0, line([verdict]))
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


class Panel(Lines):
    """Lines in a frame with a title."""

    DEFAULT_CSS = """
    Panel { border: round $border; border-title-color: $primary; border-title-style: bold; padding: 0 1; height: auto; }
    Panel { text-wrap: nowrap; text-overflow: ellipsis; }
    """


class Overview(View):
    """The host at a glance; Tab goes to findings, events and gaps, Enter opens one."""

    DEFAULT_CSS = """
    Overview > VerticalScroll { scrollbar-size-vertical: 1; }
    Overview .-pair { height: auto; }
    Overview VirtualTable {
        border: round $border; border-title-color: $primary; border-title-style: bold;
        min-height: 4; max-height: 100%;
    }
    Overview #events { height: 1fr; min-height: 7; }
    Overview VirtualTable:focus { border: round $primary; }
    Overview #survival { width: 1fr; }
    Overview #held { width: 1fr; }
    Overview .-pair > Panel { height: 100%; }
    """

    _shown: tuple[Snapshot, int] | None = None
    """What the panels were last filled with: a Snapshot and a width."""

    def compose(self) -> ComposeResult:
        """Panels above, tables below."""
        with VerticalScroll(can_focus=False):
            yield Panel(id="memory")
            with Horizontal(classes="-pair"):
                yield Panel(id="held")
                yield Panel(id="survival")
            yield VirtualTable(
                TABLES["findings"],
                columns="severity,subject,what,id,remedy",
                empty="✔ what should be is what is",
                id="findings",
            )
            yield VirtualTable(
                TABLES["events"],
                columns="at,subject,text,peer",
                empty="nothing has happened yet",
                stay_on_top=True,
                id="events",
            )
            yield VirtualTable(tables.GAPS, empty="✔ everything could be read", id="gaps")

    def on_mount(self) -> None:
        """Titles that do not change."""
        self.query_one("#memory", Panel).border_title = "Memory"
        self.query_one("#held", Panel).border_title = "Held"
        self.query_one("#survival", Panel).border_title = "Survival"
        events = self.query_one("#events", VirtualTable)
        events.set_sort(TABLES["events"].fields[0], reverse=True)

    def show(self, snapshot: Snapshot) -> None:
        """Fill panels and tables."""
        was, self._shown = self._shown, (snapshot, max(self.room - 5, 40))
        if was is None or was[0] is not snapshot or was[1] != self._shown[1]:
            self._say(*self._shown)
        self._fill("findings", snapshot.findings, "Findings")
        self._fill("events", snapshot.events, "Events")
        self._fill("gaps", snapshot.gaps, "What could not be read")

    def _say(self, snapshot: Snapshot, width: int) -> None:
        memory = self.query_one("#memory", Panel)
        memory.say(memory_lines(snapshot.memory, width))
        thp = f"shmem huge pages: {snapshot.memory.shmem_thp}" if snapshot.memory.shmem_thp else ""
        memory.border_subtitle = thp
        held, survival = held_lines(snapshot), survival_lines(snapshot.survival)
        self.query_one("#held", Panel).say(held)
        self.query_one("#survival", Panel).say(survival)
        self.query_one(".-pair").styles.height = max(len(held), len(survival)) + 2

    def _fill(self, id: str, rows: tuple[Any, ...], title: str) -> None:
        table = self.query_one(f"#{id}", VirtualTable)
        table.load(rows)
        if id != "events":
            table.styles.height = min(max(len(rows), 1), MOST_ROWS) + 3
        entitle(table, f"{title} {len(rows):,}" if rows else title)

    def on_resize(self) -> None:
        """Draw the bars anew."""
        if self.console.snapshot is not None:
            self.show(self.console.snapshot)

    @property
    def status(self) -> str:
        """How long the host has been up."""
        snapshot = self.console.snapshot
        return "" if snapshot is None else f"up {format_duration(int(snapshot.host.uptime_s * 1e9))}"

    @property
    def first_focus(self) -> Widget | None:
        """The findings."""
        return self.query_one("#findings", VirtualTable)
