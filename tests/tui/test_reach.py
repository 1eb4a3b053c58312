"""The joined view: a guest's memory beside its frames and IOVAs, and from a row to everybody who reaches its frame."""

import pytest
from support.console import SMALL, WIDE, console, running, shown, until

from memconsole.views.headless import render
from memconsole.views.places import Place


@pytest.mark.parametrize("size", [SMALL, WIDE])
async def test_from_a_guest_to_its_memory_to_who_reaches_a_frame_and_back(size: tuple[int, int]) -> None:
    app = console()
    async with running(app, size) as pilot:
        await pilot.press("3", "w")
        await until(pilot, lambda: "Memory, frames" in shown(app))
        assert app.trail[-1] == Place("reach", "reach:web0")
        assert "0x00000000" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: "Reached by" in shown(app))
        assert "guest web0, at 0x00000000" in shown(app)
        assert "kernel" in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: "Memory, frames" in shown(app))


async def test_what_is_nothing_is_said() -> None:
    app = console()
    async with running(app) as pilot:
        app.open_view("reach", "nobody")
        await until(pilot, lambda: "it is neither a guest nor a page frame number" in shown(app))


def test_a_picture_of_it() -> None:
    picture = render(console().source, "reach", "text", size=(132, 20), subject="web0")
    assert "Memory, frames, windows and IOVAs" in picture
