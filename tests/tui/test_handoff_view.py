"""The handoff screen: conditions on request, a report as it passes, and both keys that begin one."""

from __future__ import annotations

import msgspec
from support.synthetic import SyntheticSource, snapshot

from memconsole.model import (
    Carried,
    CarriedDevice,
    CarriedWindow,
    Condition,
    GuestKind,
    HandoffReport,
    HandoffState,
    Kept,
    LiveSession,
    Phase,
    Severity,
    Snapshot,
    Survival,
)
from memconsole.views.app import ConsoleApp
from memconsole.views.headless import render
from memconsole.views.screens.acting import Form
from memconsole.views.screens.handoff import condition_lines, kernel_lines

MS = 1_000_000
RUNNING = HandoffReport(
    "run",
    HandoffState.RUNNING,
    1,
    "7.3.4",
    "7.3.5",
    phases=(Phase("preserve", "preserve", 0, 80 * MS), Phase("pause", "stop the guests", 80 * MS, None, blackout=True)),
    guests=(Carried("web0", GuestKind.CANARY, 64 << 20),),
)
DONE = msgspec.structs.replace(
    RUNNING,
    state=HandoffState.DONE,
    phases=(RUNNING.phases[0], Phase("pause", "stop the guests", 80 * MS, 90 * MS, blackout=True)),
    guests=(Carried("web0", GuestKind.CANARY, 64 << 20, back=True, blackout_ns=700 * MS, by="guest"),),
    regions=(Kept("web0", 64 << 20, 12, same=True), Kept("db", 64 << 20, 12, same=False)),
)


def shown(report: HandoffReport) -> Snapshot:
    return msgspec.structs.replace(snapshot(), handoff=report)


def test_a_handoff_under_way_shows_the_phase_it_is_in() -> None:
    text = render(SyntheticSource(shown(RUNNING)), "handoff", "text", (100, 30))
    assert "run running, 0 of 1 guests back" in text
    assert "preserve" in text
    assert "..." in text


def test_a_report_shows_its_devices_and_windows() -> None:
    devices = (
        CarriedDevice("0000:00:04.0", "web0", 256, 3, "kernel", "rebuilt", 80 * MS, 90 * MS, same=True),
        CarriedDevice("0000:00:05.0", "web0", 256, 3, "kernel", "rebuilt", 80 * MS, same=False),
    )
    windows = (CarriedWindow("0000:00:04.0:0", "web0", "g3", back=True),)
    made = msgspec.structs.replace(DONE, devices=devices, windows=windows)
    text = render(SyntheticSource(shown(made)), "handoff", "text", (120, 40))
    assert "0000:00:04.0 ✔ rebuilt, 1M of IOVA in 3 runs, every IOVA where it was" in text
    assert "0000:00:05.0 ✖ rebuilt, 1M of IOVA in 3 runs, IOVA DIFFER" in text
    assert "quiet 10.0ms" in text
    assert "window 0000:00:04.0:0 of web0: mapped again" in text


def test_a_report_shows_blackout_and_moved_pages() -> None:
    text = render(SyntheticSource(shown(DONE)), "handoff", "text", (100, 30))
    assert "blackout 700.0ms" in text
    assert "✔ every page where it was" in text
    assert "✖ pages moved" in text


def test_what_refuses_comes_first_and_what_holds_is_counted() -> None:
    conditions = (
        Condition("base-pages", Severity.WARNING, False, "huge folios", "never", "echo advise"),
        Condition("custody", Severity.ERROR, True, "a keeper"),
        Condition("hugetlb", Severity.ERROR, False, "no hugetlb", "db", "reserve it again"),
    )
    lines = [each.plain for each in condition_lines(conditions, 80)]
    assert lines[0].startswith("✖ hugetlb")
    assert "  ▸ reserve it again" in lines
    assert lines[-1] == "✔ 1 of 3 conditions hold"


def test_the_kernels_word_stands_beside_the_ledgers() -> None:
    before = snapshot()
    assert "no live update" in kernel_lines(before)[0].plain
    name = before.regions[0].name
    regions = tuple(
        msgspec.structs.replace(each, seen=each.seen and msgspec.structs.replace(each.seen, preserved=each.size // 2))
        for each in before.regions[:1]
    )
    session = LiveSession("memconsole:web", (77,), "session:memconsole:web")
    survival = Survival(kho=True, luo=True, sessions=(session,), preserved=64 << 20, runs=3)
    told = msgspec.structs.replace(before, survival=survival, regions=regions)
    lines = [each.plain for each in kernel_lines(told)]
    assert any("memconsole:web  of this kernel, in custody, its file held by 77" in each for each in lines)
    assert any("64M preserved in 3 runs" in each for each in lines)
    assert any(each.startswith(name[:12]) and "▲" in each and "of it preserved" in each for each in lines)
    unread = msgspec.structs.replace(told, survival=Survival(kho=True, luo=True, sessions=(session,), unread="locked"))
    assert any("locked" in each.plain for each in kernel_lines(unread))


async def test_keys_open_the_view_check_and_begin() -> None:
    app = ConsoleApp(SyntheticSource(shown(DONE)))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause()
        await pilot.press("0")
        assert app.trail[-1].view == "handoff"
        await pilot.press("c")
        await pilot.press("B")
        await pilot.pause()
        assert isinstance(app.screen, Form)
