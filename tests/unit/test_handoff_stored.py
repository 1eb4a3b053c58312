"""The report of a handoff as it is kept from one control process to the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace as but
from support.handoffs import BDF, Desk, two_guests

from memconsole.backend.handoff import stored
from memconsole.errors import BadFile, GuestError
from memconsole.model import DeviceResult, GuestKind, GuestResult, HandoffReport, HandoffState


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with two_guests(tmp_path) as made:
        yield made


REPORT = HandoffReport(
    "run",
    HandoffState.DONE,
    5,
    guests=(GuestResult("web", GuestKind.CANARY, 1, back=True), GuestResult("vm", GuestKind.QEMU, 1, back=True)),
)


def test_canaries_say_how_long_they_stood_still_and_one_that_does_not_is_asked_again(desk: Desk) -> None:
    asked = stored.with_guests_blackouts(desk, REPORT)
    assert (asked.guests[0].blackout_ns, asked.guests[0].by, asked.guests[1].by) == (5_000_000, "guest", "")
    assert stored.with_guests_blackouts(desk, but(REPORT, state=HandoffState.RUNNING)).guests[0].by == ""
    desk.lives("web").fails["blackout"] = GuestError("it is silent", "", "")
    assert stored.with_guests_blackouts(desk, REPORT) == REPORT
    del desk.lives("web").fails["blackout"]
    desk.lives("web").away = (0, 0)
    assert stored.with_guests_blackouts(desk, REPORT) == REPORT


def test_a_report_is_kept_for_the_next_control_process_and_what_a_newer_one_wrote_in_it(desk: Desk) -> None:
    assert stored.stored_report(desk) is None
    stored.store_report(desk, REPORT)
    assert stored.stored_report(desk) == REPORT
    raw = desk.content("report").replace(b'"began_ns":5', b'"began_ns":5,"later":{"a":1}')
    desk.keep("report", raw)
    stored.store_report(desk, but(REPORT, why="more"))
    assert b'"later":{"a":1}' in desk.content("report")
    stored.store_report(desk, but(REPORT, began_ns=6))
    assert b"later" not in desk.content("report")
    desk.keep("report", b"{")
    with pytest.raises(BadFile):
        stored.stored_report(desk)


def test_a_report_is_amended_only_where_it_changes(desk: Desk) -> None:
    assert stored.amend_report(desk, lambda made: made) is None
    desk.handoff = REPORT
    assert stored.amend_report(desk, lambda made: made) == REPORT
    assert "report" not in desk.custody.names()
    changed = stored.amend_report(desk, lambda made: but(made, why="x"))
    assert changed is not None
    assert changed.why == "x"
    assert stored.stored_report(desk) == changed


def test_a_device_that_was_looked_at_again_takes_the_place_of_what_was_said_of_it() -> None:
    old = DeviceResult(BDF, "web", 1, 1, "ledger", "rebuilt", None, same=False)
    other = but(old, bdf="0000:00:05.0")
    assert stored.newest_devices((old, other), (but(old, same=True),)) == (but(old, same=True), other)
