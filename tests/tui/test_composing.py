"""What is painted of a frame: what Textual's own compositor would show, and of it what the terminal has not."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from support.console import SMALL, WIDE, console, running
from textual._compositor import Compositor
from textual.strip import Strip

from memconsole.views.composing import Picture, Piece, Sparing, difference

STYLES = (Style(), Style(color="#ff0000"), Style(bold=True, bgcolor="#000080"))
TEXTS = st.text("ab c█▸✔é\u0301漢", min_size=1, max_size=6)
SEGMENTS = st.lists(st.builds(Segment, TEXTS, st.sampled_from(STYLES), st.none()), max_size=6)


def cells(strip: Strip) -> list[tuple[str, Style | None]]:
    """What stands in each cell: a character with all that combines with it; nothing behind one of two cells."""
    found: list[tuple[str, Style | None]] = []
    for text, style, _ in strip:
        for char in text:
            width = Strip([Segment(char)]).cell_length
            if width == 0 and found:
                found[-1] = (found[-1][0] + char, found[-1][1])
            found += [(char, style), *[("", style)] * (width - 1)][: max(width, 0)]
    return found


@given(SEGMENTS, SEGMENTS)
def test_what_differs_written_over_what_was_there_is_what_shall_be_there(
    old: list[Segment], new: list[Segment]
) -> None:
    width = max(Strip(old).cell_length, Strip(new).cell_length)
    before, after = (Strip(each).adjust_cell_length(width, STYLES[0]) for each in (old, new))
    column, part = difference(before, Piece(0, 7, after))
    shown = cells(before)
    shown[column - 7 : column - 7 + part.cell_length] = cells(part)
    assert shown == cells(after)


def test_one_digit_that_differs_is_all_that_is_written() -> None:
    picture, terminal = Picture(), Console(file=io.StringIO(), color_system="truecolor")
    line = Strip([Segment("guest web0 ", STYLES[1]), Segment("1,024 beats", STYLES[2])])
    later = Strip([Segment("guest web0 ", STYLES[1]), Segment("1,025 beats", STYLES[2])])
    assert "1,024 beats" in picture.change(Piece(4, 0, line), terminal)
    assert picture.change(Piece(4, 0, line), terminal) == ""
    assert picture.change(Piece(4, 0, later), terminal) == "\x1b[5;16H" + Strip([Segment("5", STYLES[2])]).render(
        terminal
    )
    picture.forget()
    assert "guest web0" in picture.change(Piece(4, 0, later), terminal)


def test_a_piece_over_others_makes_them_unknown() -> None:
    picture, terminal = Picture(), Console(file=io.StringIO(), color_system="truecolor")
    picture.change(Piece(0, 0, Strip([Segment("left ")])), terminal)
    picture.change(Piece(0, 5, Strip([Segment("right")])), terminal)
    assert "whole line" in picture.change(Piece(0, 0, Strip([Segment("whole line")])), terminal)
    assert "right" in picture.change(Piece(0, 5, Strip([Segment("right")])), terminal)


@pytest.mark.parametrize("size", [WIDE, SMALL])
async def test_every_view_is_shown_as_textual_would_show_it(size: tuple[int, int]) -> None:
    app = console()
    async with running(app, size) as pilot:
        for key in [*"1234567890M?", "escape", "n", "escape", ":", "escape", "ctrl+p", "escape"]:
            await pilot.press(key)
            compositor = app.screen._compositor
            assert isinstance(compositor, Sparing)
            region = compositor.size.region
            theirs = Compositor._render_chops(compositor, region, lambda _: True)
            ours = compositor.compose(range(region.height))
            for line, (left, right) in enumerate(zip(theirs, ours, strict=True)):
                assert cells(Strip.join(left.values())) == cells(Strip.join(right.values())), (key, line)
