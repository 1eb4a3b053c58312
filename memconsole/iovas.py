"""An IOMMU domain by IOVA: what leads where a grant says, what leads elsewhere, what is missing, what is reserved.

::

    what devices were granted      grants with ``dma`` at their gpa: the region's frames   ─┐
    what the IOMMU translates      domain:GROUP                                            ─┴→ by IOVA, a verdict
    what nothing may use           reserved_regions of the group

Everything here is a function of a Snapshot and of tables, so that it is the same of this host and of a file.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from memconsole import labels
from memconsole.errors import MemconsoleError, NotFound
from memconsole.field import Field, or_dash
from memconsole.joined import TableSource
from memconsole.model import Domain, Grant, Snapshot, Unread, Value
from memconsole.units import PAGE, format_address, format_size

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable


class Verdict(enum.IntEnum):
    """What a page of IOVA is; the label it has."""

    NOTHING = 0
    AS_GRANTED = 1
    ELSEWHERE = 2
    MISSING = 3
    UNACCOUNTED = 4
    RESERVED = 5
    MSI = 6


class IovaRange(Value, frozen=True):
    """A range of IOVA, bytes: its verdict, the first frame it leads to and that it should, the grant behind it."""

    start: int
    end: int
    size: int
    verdict: str
    pfn: int | None = None
    wanted: int | None = None
    grant: str = ""
    access: str = ""


FIELDS = (
    Field("start", "IOVA", "first IOVA", lambda r: r.start, format_address, right=True),
    Field("end", "End", "IOVA behind it", lambda r: r.end, format_address, right=True),
    Field("size", "Size", "bytes", lambda r: r.size, format_size, right=True),
    Field("verdict", "Verdict", "as granted, elsewhere, missing, unaccounted, reserved, msi", lambda r: r.verdict),
    Field("pfn", "PFN", "first frame it leads to", lambda r: r.pfn, or_dash(hex), right=True),
    Field("wanted", "Granted", "first frame it should lead to", lambda r: r.wanted, or_dash(hex), right=True),
    Field("access", "Access", "r, w, rw", lambda r: r.access or None, or_dash(str)),
    Field("grant", "Grant", "by which grant", lambda r: r.grant or None, or_dash(str)),
)
"""The columns of an :class:`IovaRange`."""


class Wanted(NamedTuple):
    """A grant to a device of the domain, in pages: where it begins, how long it is."""

    first: int
    pages: int
    grant: Grant


class IovaMap:
    """A domain: ``table`` is what the IOMMU translates, ``wanted`` what was granted, ``verdicts`` by IOVA; close it."""

    def __init__(
        self, domain: Domain, table: ExtentTable, wanted: ExtentTable, verdicts: ExtentTable, grants: Sequence[Wanted]
    ) -> None:
        self.domain = domain
        self.table = table
        self.wanted = wanted
        self.verdicts = verdicts
        self.grants = tuple(grants)
        self.unseen: tuple[Unread, ...] = ()

    def close(self) -> None:
        """Give the tables back."""
        for table in (self.table, self.wanted, self.verdicts):
            table.close()

    def verdict_at(self, page: int) -> Verdict:
        """What a page of IOVA is."""
        row = self.verdicts.lookup(page)
        return Verdict.NOTHING if row is None else Verdict(labels.label_of(self.verdicts[row]))

    def grant_at(self, page: int) -> Grant | None:
        """The grant that a page belongs to."""
        return next((each.grant for each in self.grants if each.first <= page < each.first + each.pages), None)

    def blocks(self) -> list[tuple[int, int]]:
        """Where there is anything: runs of pages (first, pages), small holes within them."""
        return labels.blocks(self.verdicts)

    def totals(self) -> dict[Verdict, int]:
        """Pages of each verdict."""
        found = dict.fromkeys(Verdict, 0)
        for row in self.verdicts:
            found[Verdict(labels.label_of(row))] += row.count
        return found

    def ranges(self) -> Iterator[IovaRange]:
        """The domain by IOVA, in order: a range as long as frames, verdict, access and grant go on alike."""
        from memconsole.joined import access_of

        for row in self.verdicts:
            at, end = row.offset, row.offset + row.count
            verdict = Verdict(labels.label_of(row)).name.lower().replace("_", " ")
            while at < end:
                held, until = _run(self.table, at, end)
                want, stop = _run(self.wanted, at, until)
                grant = self.grant_at(at)
                access = "" if held is None else access_of(self.table[held])
                pfn, wanted = _frame(self.table, held, at), _frame(self.wanted, want, at)
                size = (stop - at) * PAGE
                yield IovaRange(at * PAGE, stop * PAGE, size, verdict, pfn, wanted, grant.id if grant else "", access)
                at = stop


def _frame(table: ExtentTable, row: int | None, page: int) -> int | None:
    return None if row is None else table[row].pfn + page - table[row].offset


def _run(table: ExtentTable, page: int, end: int) -> tuple[int | None, int]:
    """The row that holds a page, or None, and the page behind what goes on alike, at most ``end``."""
    row = table.lookup(page)
    if row is not None:
        return row, min(end, table[row].offset + table[row].count)
    low, high = 0, len(table)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if table[middle].offset <= page else (low, middle)
    return None, min(end, table[low].offset) if low < len(table) else end


def group_of(snapshot: Snapshot, target: str) -> str:
    """The number of an IOMMU group, of itself or of a device in it.

    Raises:
        NotFound: there is no such group or device, or the device is in none.
    """
    device = next((each for each in snapshot.devices if target in {each.bdf, each.bdf.removeprefix("0000:")}), None)
    if device is not None and device.group is None:
        raise NotFound(f"{device.bdf} has no IOVA map", "it is in no IOMMU group: nothing confines its DMA", "")
    return target if device is None else str(device.group)


def survey(snapshot: Snapshot, tables: TableSource, group: str) -> IovaMap:
    """A domain of a Snapshot, by the number of its group.

    Raises:
        NotFound: there is no such domain, or its page tables are not shown.
        MemconsoleError: they cannot be read.
    """
    domain = next((each for each in snapshot.domains if str(each.group) == group), None)
    if domain is None:
        raise NotFound(f"there is no IOMMU domain {group}", "no group has this number", "memconsole domains lists them")
    grants = _wanted(snapshot, domain)
    unseen: list[Unread] = []
    with contextlib.ExitStack() as made:
        table = made.enter_context(contextlib.closing(tables.extents(f"domain:{group}")))
        wanted = made.enter_context(contextlib.closing(_granted_frames(tables, grants, unseen)))
        found = IovaMap(domain, table, wanted, _judged(domain, table, wanted), grants)
        made.pop_all()
    found.unseen = tuple(unseen)
    return found


def _wanted(snapshot: Snapshot, domain: Domain) -> list[Wanted]:
    found = [
        Wanted(grant.gpa // PAGE, grant.length // PAGE, grant)
        for grant in snapshot.grants
        if grant.gpa is not None and grant.dma is not None and grant.dma in domain.devices
    ]
    return sorted(found, key=lambda each: each.first)


def _granted_frames(tables: TableSource, grants: Sequence[Wanted], unseen: list[Unread]) -> ExtentTable:
    """The frames that grants put at each IOVA, by the tables of their regions."""
    from memconsole.extents import ExtentTable, Flag, Part

    with contextlib.ExitStack() as stack:
        opened: dict[str, ExtentTable] = {}
        parts, end = [], 0
        for first, pages, grant in grants:
            key = f"region:{grant.region}"
            try:
                if key not in opened:
                    opened[key] = stack.enter_context(contextlib.closing(tables.extents(key)))
            except MemconsoleError as error:
                unseen.append(Unread(key, error.why or error.what, error.remedy))
                continue
            skip = max(0, end - first)
            if skip < pages:
                start = grant.offset // PAGE + skip
                parts.append(Part(opened[key], start, pages - skip, first + skip, keep=Flag.PRESENT))
                end = first + pages
        return ExtentTable.of_parts(parts)


def _judged(domain: Domain, table: ExtentTable, wanted: ExtentTable) -> ExtentTable:
    """The verdicts by IOVA: what differs laid over what is translated, over what is reserved."""
    from memconsole.extents import ChangeKind

    reserved = labels.painted(
        (
            each.start // PAGE,
            -(-each.end // PAGE) - each.start // PAGE,
            int(Verdict.MSI if "msi" in each.kind else Verdict.RESERVED),
        )
        for each in domain.reserved
    )
    verdict_of = {
        ChangeKind.APPEARED: Verdict.UNACCOUNTED,
        ChangeKind.VANISHED: Verdict.MISSING,
        ChangeKind.MOVED: Verdict.ELSEWHERE,
        ChangeKind.FLAGS: Verdict.ELSEWHERE,
    }
    with labels.labelled(table, 0) as there, labels.labelled(wanted, 0) as asked:
        changes = asked.diff(there)
    differ = labels.painted((each.offset, each.count, int(verdict_of[each.kind])) for each in changes)
    return labels.stacked([reserved, labels.labelled(table, Verdict.AS_GRANTED), differ])
