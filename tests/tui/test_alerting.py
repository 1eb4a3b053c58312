"""New findings are told once, with the bell for errors, and counted in every header until they were looked at."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace
from support.console import SMALL, WIDE, console, refreshed, running, shown, toasts, until
from support.synthetic import NOW_NS, SyntheticSource, snapshot

from memconsole.model import Finding, Severity, Snapshot
from memconsole.views.alerting import AGAIN_NS, Alerts
from memconsole.views.widgets.bars import Tabs, fitting, shortened

ERROR = Finding("guest-corrupt", Severity.ERROR, "web0", "guest web0 found 3 wrong bytes in its memory")
WARNING = Finding("guest-silent", Severity.WARNING, "db1", "guest db1 does not answer")
INFO = Finding("region-moved", Severity.INFO, "spare", "it moved")


def host(*found: Finding, later_ns: int = 0) -> Snapshot:
    return replace(snapshot(), findings=found, taken_ns=NOW_NS + later_ns)


def ids(found: Sequence[Finding]) -> list[str]:
    return [finding.id for finding in found]


def test_what_is_there_at_first_is_no_news_and_info_never_is() -> None:
    alerts = Alerts()
    assert ids(alerts.note(host(WARNING))) == []
    assert ids(alerts.note(host(INFO, WARNING, ERROR))) == ["guest-corrupt"]
    assert alerts.unseen == 1


def test_a_finding_that_comes_and_goes_is_told_once_until_it_was_away_for_long() -> None:
    alerts = Alerts()
    alerts.note(host())
    assert ids(alerts.note(host(ERROR, later_ns=1))) == ["guest-corrupt"]
    alerts.note(host(later_ns=2))
    assert alerts.unseen == 0, "it is gone: there is nothing to look at"
    assert ids(alerts.note(host(ERROR, later_ns=AGAIN_NS))) == []
    alerts.note(host(later_ns=AGAIN_NS + 1))
    assert ids(alerts.note(host(ERROR, later_ns=3 * AGAIN_NS))) == ["guest-corrupt"]


async def test_a_new_error_rings_once_and_stays_in_the_header_until_audit_was_opened() -> None:
    app = console(SyntheticSource(host(WARNING)))
    rung: list[int] = []
    app.bell = lambda: rung.append(1)  # type: ignore[method-assign]
    async with running(app) as pilot:
        await pilot.press("2")
        await refreshed(pilot, app, host(WARNING, ERROR, replace(ERROR, subject="db1")))
        assert "✖ error guest-corrupt web0: guest web0 found 3 wrong bytes" in toasts(app)
        assert "guest-silent" not in toasts(app)
        assert rung == [1]
        assert "✖ 2 new" in shown(app).splitlines()[0]
        await refreshed(pilot, app, host(WARNING, ERROR, replace(ERROR, subject="db1"), later_ns=1))
        assert rung == [1]
        await pilot.press("9")
        assert "new" not in shown(app).splitlines()[0]


async def test_a_warning_is_told_without_the_bell_and_many_are_counted() -> None:
    app = console(SyntheticSource(host()))
    rung: list[int] = []
    app.bell = lambda: rung.append(1)  # type: ignore[method-assign]
    async with running(app) as pilot:
        await refreshed(pilot, app, host(*(replace(WARNING, subject=f"g{number}") for number in range(8))))
        await until(pilot, lambda: "5 more new findings" in toasts(app))
        assert "guest-silent g2" in toasts(app)
        assert "guest-silent g3" not in toasts(app)
        assert rung == []


def test_titles_are_cut_the_longest_first() -> None:
    assert shortened(["Overview", "PFN", "Guests"], 100) == ["Overview", "PFN", "Guests"]
    assert shortened(["Overview", "PFN", "Guests"], 15) == ["Overv…", "PFN", "Guests"]
    assert shortened(["Overview", "PFN", "Guests"], 1) == ["Ov…", "PFN", "Gu…"]


def test_counts_go_from_the_left_where_titles_need_their_room() -> None:
    assert fitting([":4", ":24", "", ":5"], 7) == [":4", ":24", "", ":5"]
    assert fitting([":4", ":24", "", ":5"], 6) == ["", ":24", "", ":5"]
    assert fitting([":4", ":24", "", ":5"], 4) == ["", "", "", ":5"]


async def test_every_tab_is_there_on_a_narrow_terminal_however_much_there_is_to_count() -> None:
    names = [(str(number), f"Title{number}", 1_000 * number) for number in range(10)]
    app = console()
    async with running(app, (60, 20)):
        tabs = app.query_one(Tabs)
        tabs.show([*names, ("M", "Host", None)], 0)
        line = "".join(segment.text for segment in tabs.render_line(0))
        assert line.rstrip().endswith("9Ti…:9k MHo…")
        assert [key for _, _, key in tabs.keys_at][-1] == "M"
        assert tabs.keys_at[-1][1] <= 60


@pytest.mark.parametrize(("size", "said"), [(WIDE, "Regions 10"), ((100, 30), "Regions:10"), (SMALL, "Reg…:10")])
async def test_tabs_keep_their_counts_at_every_width(size: tuple[int, int], said: str) -> None:
    app = console()
    async with running(app, size):
        assert said in shown(app).splitlines()[1]
        assert app.query_one(Tabs).size.width == size[0]
        assert "Han" in shown(app).splitlines()[1]
