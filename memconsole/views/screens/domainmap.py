"""The map of an IOMMU domain by IOVA: what leads where it should, what elsewhere, what is missing, what reserved."""

from __future__ import annotations

from collections.abc import Sequence

from memconsole import hostmap, iovas, labels
from memconsole.errors import NotFound
from memconsole.hostmap import HostMap, Use
from memconsole.iovas import IovaMap, Verdict
from memconsole.joined import access_of
from memconsole.model import Snapshot
from memconsole.source import Source
from memconsole.units import PAGE, format_address, format_size, parse_address
from memconsole.views.screens.hostmap import use_meaning
from memconsole.views.screens.mapmodel import Goal, Mode
from memconsole.views.widgets.facts import Fact
from memconsole.views.widgets.layers import LabelLayer, Layer, Meaning
from memconsole.views.widgets.pagefacts import asked_frame
from memconsole.views.widgets.pagegrid import ABSENT, APART, BAD, ELSEWHERE, NO, ODD, OUTSIDE, YES, Block

_WORDS = {
    Verdict.NOTHING: Meaning(OUTSIDE, ""),
    Verdict.AS_GRANTED: Meaning(YES, "leads where a grant says", brief="as granted"),
    Verdict.ELSEWHERE: Meaning(ELSEWHERE, "leads elsewhere than granted", loud=True, brief="elsewhere"),
    Verdict.MISSING: Meaning(BAD, "granted, and leads nowhere", loud=True, brief="missing"),
    Verdict.UNACCOUNTED: Meaning(ODD, "leads somewhere, no grant accounts for it", brief="unaccounted"),
    Verdict.RESERVED: Meaning(APART, "reserved by firmware or IOMMU", brief="reserved"),
    Verdict.MSI: Meaning(NO, "interrupts (MSI)", brief="MSI"),
}
TONES = {Verdict.ELSEWHERE: "bad", Verdict.MISSING: "bad", Verdict.UNACCOUNTED: "warn", Verdict.AS_GRANTED: "good"}


def verdict_words(verdict: Verdict) -> str:
    """A verdict as people read it."""
    return _WORDS[verdict].title or "nothing is mapped"


class DomainModel:
    """A domain by IOVA."""

    marks = None
    page_size = PAGE
    scanned_ns = 0

    def __init__(self, source: Source, snapshot: Snapshot, group: str) -> None:
        self._source = source
        self._snapshot = snapshot
        self.iovas: IovaMap = iovas.survey(snapshot, source, group)
        self._totals = self.iovas.totals()
        self._blocks = self.iovas.blocks()
        self._host: HostMap | None = None
        if not self._blocks:
            raise NotFound(
                f"the map of domain {group} is empty",
                self.iovas.domain.why_not or "nothing is mapped and nothing reserved",
                "memconsole map REGION GUEST --gpa ADDRESS --dma BDF",
            )

    @property
    def modes(self) -> Sequence[Mode]:
        """By verdict, by what the frames are."""
        return (Mode("verdict", self._by_verdict, quick=True), Mode("frames", self._by_use))

    def _by_verdict(self) -> Layer:
        meanings = [_WORDS[verdict] for verdict in Verdict]
        return LabelLayer("verdict", self.iovas.verdicts, meanings, range(len(meanings)))

    def _by_use(self) -> Layer:
        if self._host is None:
            self._host = hostmap.survey(self._snapshot, self._source)
        owners = self._host.owners
        uses = [use for use in Use if use in {owner.use for owner in owners} and use is not Use.BUS]
        meanings = [
            Meaning(ABSENT, "leads nowhere"),
            Meaning(BAD, "leads to no memory", loud=True),
            *map(use_meaning, uses),
        ]
        kinds = [1 if owner.use is Use.BUS else 2 + uses.index(owner.use) for owner in owners]
        return LabelLayer("frames", labels.classified(self.iovas.table, self._host.table), meanings, kinds)

    def blocks(self) -> Sequence[Block]:
        """Where anything is mapped, granted or reserved."""
        return [Block(first, pages) for first, pages in self._blocks]

    def words(self, cell_bytes: int) -> Sequence[str]:
        """Pages by verdict."""
        told = (Verdict.AS_GRANTED, Verdict.ELSEWHERE, Verdict.MISSING, Verdict.UNACCOUNTED)
        spanned = sum(pages for _, pages in self._blocks) * PAGE
        found = [f"{format_size(self._totals[each] * PAGE)} {_WORDS[each].brief}" for each in told]
        unseen = [f"▲ not seen: {gap.source}" for gap in self.iovas.unseen]
        return [f"{format_size(spanned)} in {format_size(cell_bytes)}", *found, *unseen]

    def frame_of(self, page: int) -> int | None:
        """The frame an IOVA leads to."""
        row = self.iovas.table.lookup(page)
        return None if row is None else self.iovas.table[row].pfn + page - self.iovas.table[row].offset

    def facts(self, page: int) -> Sequence[Fact]:
        """The IOVA: where it leads, where it should, how, and by which grant."""
        held, wanted = self.iovas.table.lookup(page), self.iovas.wanted.lookup(page)
        row = None if held is None else self.iovas.table[held]
        want = None if wanted is None else self.iovas.wanted[wanted]
        grant, verdict = self.iovas.grant_at(page), self.iovas.verdict_at(page)
        pfn = self.frame_of(page)
        should = None if want is None else want.pfn + page - want.offset
        return [
            Fact("IOVA", f"{page * PAGE:#x}"),
            Fact("PFN", "-" if pfn is None else f"{pfn:#x}", "calm"),
            Fact("Granted", "-" if should is None else f"{should:#x}"),
            Fact("Verdict", verdict_words(verdict), TONES.get(verdict, "")),
            Fact("Access", "-" if row is None else access_of(row) or "-"),
            Fact("Grant", "-" if grant is None else f"{grant.id} {grant.access} to {grant.guest}"),
            Fact(
                "Region", "-" if grant is None else f"{grant.region}+{grant.offset + page * PAGE - (grant.gpa or 0):#x}"
            ),
            Fact("Devices", ", ".join(self.iovas.domain.devices) or "-"),
        ]

    def cell_facts(self, first: int, pages: int) -> Sequence[Fact]:
        """The cell: its size, and its runs."""
        if pages <= 0:
            return [Fact("Cell", "-"), Fact("In it", "-")]
        bins = self.iovas.table.bin(first, pages, 1)
        return [
            Fact("Cell", f"{format_size(pages * PAGE)}, {bins.runs[0]:,} run{'s' * (bins.runs[0] != 1)}"),
            Fact("In it", f"{100 * bins.present[0] // pages}% mapped"),
        ]

    def find(self, text: str) -> int:
        """The page of an IOVA, or of a frame (``pfn NUMBER``).

        Raises:
            UsageError, NotFound: it is none, or not there.
        """
        pfn = asked_frame(text)
        if pfn is not None:
            page = self.iovas.table.lookup_pfn(pfn)
        else:
            page = parse_address(text) // PAGE
            page = page if any(first <= page < first + pages for first, pages in self._blocks) else None
        if page is None:
            raise NotFound(
                f"{text.strip()} is not in domain {self.iovas.domain.group}",
                "nothing is mapped there, granted or reserved",
                "the left margin shows what is",
            )
        return page

    def goal(self, page: int) -> Goal | str:
        """The frame on the host map."""
        held = self.iovas.table.lookup(page)
        if held is None:
            return f"{format_address(page * PAGE)} leads nowhere"
        row = self.iovas.table[held]
        return Goal("host", "host", row.pfn + page - row.offset)

    def take(self, snapshot: Snapshot) -> bool:
        """What was read is of its time: nothing differs before it is read again."""
        self._snapshot = snapshot
        return False

    def close(self) -> None:
        """Give the tables back."""
        self.iovas.close()
        if self._host is not None:
            self._host.close()
