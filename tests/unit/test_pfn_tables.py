"""PFN maps are made for those who ask, each by itself: a scan that takes long holds up nobody who wants another."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support.desks import desks, region
from support.waiting import LONG_S

from memconsole.backend.observe import pfn_tables
from memconsole.backend.observe.pfn_tables import PfnTables
from memconsole.extents import Extent, ExtentTable, Flag


class Groups:
    """Tables of devices' groups, of one row each; the one of ``slow`` is made once ``go`` is set."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.made: list[str] = []

    def make(self, _: PfnTables, name: str) -> ExtentTable:
        if name == "slow":
            self.begun.set()
            assert self.go.wait(LONG_S)
        self.made.append(name)
        return ExtentTable.from_rows([Extent(0, 5000, len(self.made), Flag.PRESENT)])


def test_a_long_scan_holds_up_neither_other_tables_nor_what_is_due_after_an_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = Groups()
    monkeypatch.setitem(pfn_tables._MAKE, "domain", groups.make)
    with desks(tmp_path, regions=(region(),)) as desk:
        tables = PfnTables(desk)
        got: list[ExtentTable] = []
        slow = threading.Thread(target=lambda: got.append(tables.get("domain:slow")))
        slow.start()
        try:
            assert groups.begun.wait(LONG_S)
            with tables.get("domain:other") as other:
                assert other.pages == 1
            tables.forget()
            assert groups.made == ["other"]
        finally:
            groups.go.set()
            slow.join()
        with got[0] as table:
            assert table.pages == 2
        tables.close()


def test_a_table_is_made_once_for_all_who_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups()
    monkeypatch.setitem(pfn_tables._MAKE, "domain", groups.make)
    monkeypatch.setattr(pfn_tables, "FRESH_S", LONG_S)
    with desks(tmp_path) as desk:
        tables = PfnTables(desk)
        wanted: list[ExtentTable] = []
        ask = [threading.Thread(target=lambda: wanted.append(tables.get("domain:slow"))) for _ in range(3)]
        for each in ask:
            each.start()
        assert groups.begun.wait(LONG_S)
        groups.go.set()
        for each in ask:
            each.join()
        assert groups.made == ["slow"]
        assert [list(table) for table in wanted] == [[Extent(0, 5000, 1, Flag.PRESENT)]] * 3
        for table in wanted:
            table.close()
        tables.close()
        with tables.get("domain:slow") as again:
            assert again.pages == 2
        tables.close()
