"""An IOMMU domain by IOVA: every page has the verdict that its grant, its translation and its reservations give it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from support.synthetic import PAGE, SyntheticSource, snapshot

from memconsole import iovas
from memconsole.errors import BadFile, NotFound
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.iovas import Verdict
from memconsole.model import Device, Domain, Reserved, Snapshot

HELD = int(Flag.PRESENT | Flag.FILE)
RW = int(Flag.PRESENT | Flag.READ | Flag.WRITE)
BDF = "0000:00:05.0"


@pytest.fixture
def host() -> Snapshot:
    """One region granted at 4 MiB to a device of group 7."""
    made = snapshot(regions=1, guests=1, windows=0, domains=0)
    grant = replace(made.grants[0], gpa=4 << 20, length=64 * PAGE, offset=16 * PAGE, dma=BDF)
    domain = Domain(7, "DMA-FQ", "dmar0", (BDF,), (Reserved(0xFEE00000, 0xFEF00000, "msi"),), 0, 0)
    return replace(
        made,
        grants=(grant,),
        domains=(domain,),
        devices=(Device(BDF, 1, 2, 3, group=7), Device("0000:00:06.0", 1, 2, 3)),
    )


def shown(host: Snapshot, rows: list[Extent]) -> iovas.IovaMap:
    source = SyntheticSource(host)
    source.show_rows(f"region:{host.regions[0].name}", [Extent(0, 0x1000, 48, HELD), Extent(48, 0x9000, 64, HELD)])
    source.show_rows("domain:7", rows)
    return iovas.survey(host, source, "7")


FIRST = (4 << 20) // PAGE
AS_GRANTED = [Extent(FIRST, 0x1010, 32, RW), Extent(FIRST + 32, 0x9000, 32, RW)]


def test_a_domain_that_leads_where_it_was_granted(host: Snapshot) -> None:
    found = shown(host, AS_GRANTED)
    totals = found.totals()
    assert {verdict: pages for verdict, pages in totals.items() if pages} == {Verdict.AS_GRANTED: 64, Verdict.MSI: 256}
    grant = found.grant_at(FIRST + 3)
    assert grant is not None
    assert grant.id == host.grants[0].id
    assert found.grant_at(FIRST - 1) is None
    assert found.blocks() == [(FIRST, 64), (0xFEE00, 256)]


def test_what_leads_elsewhere_what_is_missing_and_what_nothing_accounts_for(host: Snapshot) -> None:
    rows = [
        Extent(FIRST, 0x1010, 8, RW),
        Extent(FIRST + 8, 0x5555, 1, RW),
        Extent(FIRST + 40, 0x9008, 24, RW),
        Extent(FIRST + 100, 0x7000, 4, int(Flag.PRESENT | Flag.READ)),
    ]
    found = shown(host, rows)
    expected = {
        FIRST: Verdict.AS_GRANTED,
        FIRST + 8: Verdict.ELSEWHERE,
        FIRST + 9: Verdict.MISSING,
        FIRST + 39: Verdict.MISSING,
        FIRST + 40: Verdict.AS_GRANTED,
        FIRST + 64: Verdict.NOTHING,
        FIRST + 103: Verdict.UNACCOUNTED,
        0xFEE10: Verdict.MSI,
    }
    assert {page: found.verdict_at(page) for page in expected} == expected
    rows_of = {(row.start // PAGE, row.verdict): row for row in found.ranges()}
    elsewhere = rows_of[FIRST + 8, "elsewhere"]
    assert (elsewhere.pfn, elsewhere.wanted, elsewhere.size, elsewhere.access) == (0x5555, 0x1018, PAGE, "rw")
    assert rows_of[FIRST + 100, "unaccounted"].access == "r"
    missing = rows_of[FIRST + 9, "missing"]
    assert (missing.pfn, missing.wanted, missing.grant) == (None, 0x1019, host.grants[0].id)
    assert sum(row.size for row in found.ranges()) == sum(found.totals().values()) * PAGE


def test_a_region_that_cannot_be_seen_is_named_and_nothing_of_it_is_as_granted(host: Snapshot) -> None:
    class Hidden(SyntheticSource):
        def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
            if key.startswith("region:"):
                raise NotFound("no table", "PFNs are hidden", "run as root")
            return super().extents(key)

    source = Hidden(host)
    source.show_rows("domain:7", AS_GRANTED)
    found = iovas.survey(host, source, "7")
    assert [gap.why for gap in found.unseen] == ["PFNs are hidden"]
    assert found.totals()[Verdict.AS_GRANTED] == 0
    assert found.totals()[Verdict.UNACCOUNTED] == 64


def test_tables_are_given_back_where_one_of_them_cannot_be_made(
    host: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[ExtentTable] = []

    class Kept(SyntheticSource):
        def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
            opened.append(super().extents(key))
            return opened[-1]

    def refuse(*_: object) -> ExtentTable:
        raise BadFile("no verdicts", "the table is cut", "look again")

    source = Kept(host)
    source.show_rows("domain:7", AS_GRANTED)
    monkeypatch.setattr(iovas, "_judged", refuse)
    with pytest.raises(BadFile):
        iovas.survey(host, source, "7")
    assert len(opened) == 2
    for table in opened:
        with pytest.raises(ValueError, match="closed"):
            len(table)


def test_a_group_is_named_by_its_number_or_a_device(host: Snapshot) -> None:
    assert iovas.group_of(host, "7") == "7"
    assert iovas.group_of(host, "00:05.0") == iovas.group_of(host, BDF) == "7"
    with pytest.raises(NotFound, match="no IOVA map"):
        iovas.group_of(host, "00:06.0")
    with pytest.raises(NotFound, match="no IOMMU domain"):
        iovas.survey(host, SyntheticSource(host), "8")
