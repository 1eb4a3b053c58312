"""PFN maps are made for those who ask, each by itself: a scan that takes long holds up nobody who wants another."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from support.desks import desks, grant, guest, region
from support.waiting import LONG_S

from memconsole.backend.kernel import census, host, patient
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.observe import pfn_tables
from memconsole.backend.observe.pfn_tables import PfnTables
from memconsole.errors import Gone, NotFound, Silent
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.model import Guest, GuestKind, GuestState


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


def test_a_process_whose_map_was_not_shown_is_asked_again_and_is_never_one_without_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = guest()
    process = Process(held.pid or 0, "qemu", "S", 1, held.start_ticks or 0, 0, False, {}, b"", held.pid or 0, 1)
    seen = Census("/", {process.pid: process}, (process.pid,))
    monkeypatch.setattr(census, "take", lambda *_, **__: seen)
    said: list[bytes | Silent] = [Silent("process 4000 does not show its memory", "its lock is held")]

    def asked(*_: object) -> bytes:
        answer = said.pop()
        if isinstance(answer, Silent):
            raise answer
        return answer

    monkeypatch.setattr(patient, "call", asked)
    monkeypatch.setattr(host, "page_size", lambda _: 4096)
    with desks(tmp_path, regions=(region(),), guests=(held,), grants=(grant(),)) as desk:
        tables = PfnTables(desk)
        with pytest.raises(Silent, match="does not show its memory"):
            tables.get("guest:db")
        segment = desk.state.regions["web"].segments[0]
        device = f"{os.major(segment.device):02x}:{os.minor(segment.device):02x}"
        said.append(f"7f0000000000-7f0000800000 rw-s 00000000 {device} {segment.inode} /memfd:x (deleted)\n".encode())
        _, (part,) = tables._parts(held)
        assert part.span.length == segment.size
        said.append(b"")
        with pytest.raises(NotFound, match="no memory mapped"):
            tables.get("guest:db")
        tables.close()


def test_a_map_looks_at_its_own_process_and_asks_who_it_is_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Guest("qemu-4001", GuestKind.FOREIGN, GuestState.RUNNING, pid=4001, start_ticks=7)
    started = {4001: 7}
    looked: list[object] = []

    def take(_root: object, *, among: tuple[int, ...] | None = None, **_: object) -> Census:
        looked.append(among)
        pid = (among or (0,))[0]
        return Census("/", {pid: Process(pid, "qemu", "S", 1, started[pid], 0, False, {}, b"", pid, 1)}, ())

    monkeypatch.setattr(census, "take", take)
    monkeypatch.setattr(host, "page_size", lambda _: 4096)
    with desks(tmp_path) as desk:
        asked: list[str] = []

        def all_processes() -> tuple[Guest, ...]:
            asked.append("all processes")
            return (stranger,)

        monkeypatch.setattr(desk, "foreign_guests", all_processes)
        tables = PfnTables(desk)
        for _ in range(3):
            with pytest.raises(NotFound, match="its process maps nothing that is a VM's RAM"):
                tables.get("guest:qemu-4001")
        assert len(asked) == 1
        assert set(looked) == {(4001,)}
        started[4001] = 8  # another process has its number
        with pytest.raises(Gone):
            tables.get("guest:qemu-4001")
        assert len(asked) == 3
