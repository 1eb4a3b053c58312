"""Pictures of the console at the sizes it must fit; renew them with ``--snapshot-update`` and look at every one."""

from collections.abc import Callable

import pytest
import textual
from support.console import SMALL, WIDE, console, plan_in, until
from textual.pilot import Pilot

from memconsole.views.app import ConsoleApp

PINNED = "8.2.8"
pytestmark = pytest.mark.skipif(
    textual.__version__ != PINNED,
    reason=f"the pictures are of textual {PINNED}, this is {textual.__version__}",
)

Compare = Callable[..., bool]
"""What pytest-textual-snapshot gives a test: whether the console still looks as on its picture."""

PICTURES: dict[str, tuple[tuple[int, int], list[str]]] = {
    "overview": (WIDE, []),
    "overview-small": (SMALL, []),
    "regions": (WIDE, ["2", "down"]),
    "regions-small": (SMALL, ["2", "slash", "w", "e", "b", "enter"]),
    "guest": (WIDE, ["3", "down", "enter"]),
    "region-small": (SMALL, ["2", "enter"]),
    "mmio": (WIDE, ["6", "tab"]),
    "audit-small": (SMALL, ["9"]),
    "form-small": (SMALL, ["2", "m"]),
    "help-small": (SMALL, ["2", "question_mark"]),
}


async def _arrive(pilot: Pilot[None]) -> None:
    app = pilot.app
    assert isinstance(app, ConsoleApp)
    await until(pilot, lambda: app.snapshot is not None)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_picture(snap_compare: Compare, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    size, keys = PICTURES[name]

    async def use(pilot: Pilot[None]) -> None:
        await _arrive(pilot)
        for key in keys:
            await pilot.press(key)

    assert snap_compare(console(), terminal_size=size, run_before=use)


def test_picture_of_a_confirmation(snap_compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    async def use(pilot: Pilot[None]) -> None:
        await _arrive(pilot)
        await pilot.press("2", "X")
        await until(pilot, lambda: plan_in(pilot.app) is not None)

    assert snap_compare(console(), terminal_size=WIDE, run_before=use)


def test_picture_without_colours(snap_compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def use(pilot: Pilot[None]) -> None:
        await _arrive(pilot)
        await pilot.press("3", "down")

    assert snap_compare(console(), terminal_size=SMALL, run_before=use)
