"""The one writer: what a room hands up is in the ledger before the room goes on, and what cannot be is raised there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.trees import Tree

from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.ledger.log import Ledger
from memconsole.backend.ledger.state import EventRecord, Recorded, StateChange
from memconsole.backend.ledger.writer import LEDGER, Writer
from memconsole.errors import GuestError, KernelRefused
from memconsole.model import Region, RegionState

WEB = Region("web", "memfd", 4096, 4096, RegionState.RESERVED)
MADE = EventRecord(1, "made", "web", "web is there", change=StateChange(regions=(WEB,)))
GONE = EventRecord(2, "gone", "web", "web is gone", change=StateChange(without_regions=("web",)))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with contextlib.closing(writers(tmp_path, OwnCustody())) as made:
        yield made


def writers(directory: Path, custody: OwnCustody) -> Writer:
    tree = Tree(directory)
    tree.host()
    return Writer(custody, directory)


def test_a_room_goes_on_once_its_record_is_in_the_ledger(writer: Writer) -> None:
    seen: list[tuple[int, bool]] = []

    def room() -> Recorded[str]:
        number = yield MADE
        seen.append((number, "web" in writer.state.regions))
        number = yield GONE
        seen.append((number, "web" in writer.state.regions))
        return "done"

    assert writer.carry(room()) == "done"
    (first, there), (second, gone) = seen
    assert (there, gone) == (True, False)
    assert second == first + 1


def test_a_room_that_records_nothing_is_run_all_the_same(writer: Writer) -> None:
    def room() -> Recorded[int]:
        yield from ()
        return 7

    assert writer.carry(room()) == 7
    assert writer.state.events == []


def test_a_record_that_cannot_be_appended_is_raised_where_it_was_yielded(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    undone: list[str] = []

    def room() -> Recorded[None]:
        yield MADE
        try:
            yield GONE
        except KernelRefused:
            undone.append("web")
            raise

    append = Ledger.append

    def full(ledger: Ledger, kind: int, payload: bytes) -> int:
        if b"gone" in payload:
            raise KernelRefused("ftruncate", 28, what="the ledger cannot grow")
        return append(ledger, kind, payload)

    monkeypatch.setattr(Ledger, "append", full)
    with pytest.raises(KernelRefused, match="cannot grow"):
        writer.carry(room())
    assert undone == ["web"]
    assert "web" in writer.state.regions


def test_what_a_room_raises_is_raised(writer: Writer) -> None:
    def room() -> Recorded[None]:
        yield MADE
        raise GuestError("it does not answer")

    with pytest.raises(GuestError, match="does not answer"):
        writer.carry(room())
    assert "web" in writer.state.regions


def test_what_is_due_is_judged_by_the_state_it_changes(writer: Writer) -> None:
    for _ in range(2):
        writer.record_if(lambda state: None if "web" in state.regions else MADE)
    assert len(writer.state.events) == 1


def test_another_control_process_finds_what_was_written(tmp_path: Path) -> None:
    custody = OwnCustody()
    first = writers(tmp_path, custody)
    first.record(MADE)
    first.close()
    assert custody.names() == [LEDGER]
    with contextlib.closing(writers(tmp_path, custody)) as second:
        assert second.state.regions == {"web": WEB}
        assert second.chain == first.chain
        assert second.dropped() == []
        assert second.findings() == ()
