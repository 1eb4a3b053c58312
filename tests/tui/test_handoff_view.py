"""The handoff screen: conditions on request, a report as it passes, and both keys that begin one."""

from __future__ import annotations

import msgspec
import pytest
from support import synthetic
from support.console import console, refreshed, running, toasts, until
from support.console import shown as screen_text
from support.synthetic import SyntheticSource, snapshot
from textual.strip import Strip

from memconsole import readiness, recording
from memconsole.model import (
    Condition,
    Danger,
    DeviceResult,
    GuestClock,
    GuestKind,
    GuestResult,
    HandoffReport,
    HandoffState,
    LiveSession,
    Phase,
    Plan,
    Readiness,
    RegionResult,
    Severity,
    Snapshot,
    Survival,
    WindowResult,
)
from memconsole.source import ReadOnly
from memconsole.views.headless import render
from memconsole.views.screens.acting import Form
from memconsole.views.screens.handoff import condition_lines, kernel_lines
from memconsole.views.screens.overview import Panel, VerdictPanel

MS = 1_000_000
RUNNING = HandoffReport(
    "run",
    HandoffState.RUNNING,
    1,
    "7.3.4",
    "7.3.5",
    phases=(Phase("preserve", "preserve", 0, 80 * MS), Phase("pause", "stop the guests", 80 * MS, None, blackout=True)),
    guests=(GuestResult("web0", GuestKind.CANARY, 64 << 20),),
)
DONE = msgspec.structs.replace(
    RUNNING,
    state=HandoffState.DONE,
    phases=(RUNNING.phases[0], Phase("pause", "stop the guests", 80 * MS, 90 * MS, blackout=True)),
    guests=(GuestResult("web0", GuestKind.CANARY, 64 << 20, back=True, blackout_ns=700 * MS, by="guest"),),
    regions=(RegionResult("web0", 64 << 20, 12, same=True), RegionResult("db", 64 << 20, 12, same=False)),
)


def shown(report: HandoffReport) -> Snapshot:
    return msgspec.structs.replace(snapshot(), handoff=report)


def test_a_handoff_under_way_shows_the_phase_it_is_in() -> None:
    text = render(SyntheticSource(shown(RUNNING)), "handoff", "text", (100, 30))
    assert "run running, 0 of 1 guests back" in text
    assert "preserve" in text
    assert "..." in text


def test_a_report_tells_of_clocks() -> None:
    clock = GuestClock(note="it has no channel for QEMU's guest agent")
    guest = msgspec.structs.replace(DONE.guests[0], kind=GuestKind.QEMU, clock=clock)
    made = msgspec.structs.replace(DONE, guests=(guest,))
    assert "clock: late by 700.0ms" in render(SyntheticSource(shown(made)), "handoff", "text", (100, 30))


def test_a_report_shows_its_devices_and_windows() -> None:
    devices = (
        DeviceResult("0000:00:04.0", "web0", 256, 3, "kernel", "rebuilt", 80 * MS, 90 * MS, same=True),
        DeviceResult("0000:00:05.0", "web0", 256, 3, "kernel", "rebuilt", 80 * MS, same=False),
    )
    windows = (WindowResult("0000:00:04.0:0", "web0", "g3", back=True),)
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
        Condition("base-pages", Severity.WARNING, False, "huge folios", "it is slow", "it is never", "echo advise"),
        Condition("custody", Severity.ERROR, True, "a keeper", "it is lost", "a keeper has it", ""),
        Condition("hugetlb", Severity.ERROR, False, "no hugetlb", "db is lost", "db has hugetlb", "reserve it again"),
    )
    found = readiness.judge(lambda _: Plan("handoff-run", "", Danger.DESTROYS, conditions=conditions))
    lines = [each.plain for each in condition_lines(found, found.checked_ns + 12_000_000_000, 80)]
    assert lines[:3] == [
        "✖ FAIL hugetlb: db has hugetlb",
        "       risk: db is lost",
        "       ▸ reserve it again",
    ]
    assert lines[3].startswith("▲ warn base-pages")
    assert lines[-1] == "▸ 1 of 3 conditions hold  checked 12s ago; r looks again"


def test_what_was_never_judged_is_not_green() -> None:
    for found in (None, Readiness(1), Readiness(1, trouble="the control process is busy")):
        text = "\n".join(each.plain for each in condition_lines(found, 2, 80))
        assert "not known to be ready" in text
        assert "✔" not in text


CUSTODY = Condition("custody", Severity.ERROR, False, "a keeper", "it is lost", "no keeper has it", "start a keeper")


def judged(*failing: Condition, total: int = 46) -> Snapshot:
    return msgspec.structs.replace(synthetic.snapshot(), readiness=Readiness(synthetic.NOW_NS, 1, failing, total))


async def test_the_verdict_stands_in_every_view_and_enter_leads_to_its_reason() -> None:
    app = console(SyntheticSource(judged(CUSTODY)))
    async with running(app) as pilot:
        assert "✖ not ready to hand off: custody: no keeper has it" in screen_text(app)
        for key in "1234567890":
            await pilot.press(key)
            assert "✖ not ready" in screen_text(app).splitlines()[0]
        await pilot.press("1")
        app.view.query_one(VerdictPanel).focus()
        await pilot.press("enter")
        assert app.trail[0].view == "handoff"
        assert "✖ FAIL custody: no keeper has it" in screen_text(app)
        await refreshed(pilot, app, judged())
        assert "✔ ready" in screen_text(app).splitlines()[0]
        assert "46 of 46 conditions hold" in screen_text(app)


async def test_a_snapshot_that_was_never_checked_is_not_called_ready() -> None:
    app = console()
    async with running(app) as pilot:
        assert "? unchecked" in screen_text(app).splitlines()[0]
        assert "✔ ready" not in screen_text(app)
        await pilot.press("0")
        assert "not known to be ready: the conditions of a handoff were not checked" in screen_text(app)


async def test_nothing_is_checked_where_nothing_can_be_done() -> None:
    app = console(ReadOnly(SyntheticSource(), recording.REASON))
    async with running(app) as pilot:
        await pilot.press("0", "r")
        assert "Nothing can be checked here" in toasts(app)
        assert "not known to be ready" in screen_text(app)


async def test_what_is_asked_for_stands_until_the_host_has_looked_later() -> None:
    source = SyntheticSource(judged(CUSTODY))
    source.conditions = (msgspec.structs.replace(CUSTODY, ok=True),)
    app = console(source)
    async with running(app) as pilot:
        await pilot.press("0", "r")
        await until(pilot, lambda: "1 of 1 conditions hold" in screen_text(app))


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
    assert any("memconsole:web  of this kernel, in custody, open in process 77" in each for each in lines)
    assert any("64M preserved in 3 runs" in each for each in lines)
    assert any(each.startswith(name[:12]) and "▲" in each and "of it preserved" in each for each in lines)
    unread = msgspec.structs.replace(told, survival=Survival(kho=True, luo=True, sessions=(session,), unread="locked"))
    assert any("locked" in each.plain for each in kernel_lines(unread))


async def test_keys_open_the_view_check_and_begin() -> None:
    app = console(SyntheticSource(shown(DONE)))
    async with running(app, (100, 30)) as pilot:
        await pilot.press("0")
        await until(pilot, lambda: app.trail[-1].view == "handoff")
        await pilot.press("c", "B")
        await until(pilot, lambda: isinstance(app.screen, Form))


async def test_only_the_line_that_says_how_old_the_check_is_is_painted_as_it_ages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = judged(CUSTODY)
    app = console(SyntheticSource(first))
    async with running(app) as pilot:
        await pilot.press("0")
        panel = app.view.query_one("#conditions", Panel)
        assert "checked just now" in panel.render().plain
        rows = panel.render().plain.count("\n") + 1
        assert rows > 3
        painted: set[int] = set()
        build = panel.render_line

        def render_line(y: int) -> Strip:
            painted.add(y)
            return build(y)

        monkeypatch.setattr(panel, "render_line", render_line)
        await refreshed(pilot, app, msgspec.structs.replace(first, taken_ns=first.taken_ns + 5_000_000_000))
        assert "checked 5s ago" in panel.render().plain
        assert painted == {rows - 1}
        painted.clear()
        await refreshed(pilot, app, msgspec.structs.replace(judged(), taken_ns=first.taken_ns + 6_000_000_000))
        assert "46 of 46 conditions hold" in panel.render().plain
        assert 0 in painted
