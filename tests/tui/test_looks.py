"""Pictures of the console at the sizes it must fit; renew them with ``--snapshot-update`` and look at every one."""

import pytest
import textual
from support.console import SMALL, WIDE, console, until

from memconsole.views.screens.acting import Confirmation

PINNED = "8.2.8"
pytestmark = pytest.mark.skipif(
    textual.__version__ != PINNED,
    reason=f"the pictures are of textual {PINNED}, this is {textual.__version__}",
)

PICTURES = {
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


async def _arrive(pilot):
    await until(pilot, lambda: pilot.app.snapshot is not None)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_picture(snap_compare, monkeypatch, name):
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    size, keys = PICTURES[name]

    async def use(pilot):
        await _arrive(pilot)
        for key in keys:
            await pilot.press(key)

    assert snap_compare(console(), terminal_size=size, run_before=use)


def test_picture_of_a_confirmation(snap_compare, monkeypatch):
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    async def use(pilot):
        await _arrive(pilot)
        await pilot.press("2", "X")
        await until(pilot, lambda: isinstance(pilot.app.screen, Confirmation) and pilot.app.screen._plan is not None)

    assert snap_compare(console(), terminal_size=WIDE, run_before=use)


def test_picture_without_colours(snap_compare, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    async def use(pilot):
        await _arrive(pilot)
        await pilot.press("3", "down")

    assert snap_compare(console(), terminal_size=SMALL, run_before=use)
