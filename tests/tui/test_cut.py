"""Nothing is cut without an ellipsis, in any view from 60x20 to 200x60."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pytest
from support.console import console, running, shown, until
from textual.containers import VerticalScroll

from memconsole.views.helping import MARKS

SIZES = ((60, 20), (80, 24), (132, 50), (200, 60))
ENOUGH = (480, 200)
"""A terminal in which there is room for everything."""
ASKED = {
    "a filter that is none": ("slash", *"foo:bar"),
    "commands": (":",),
    "a command and its plan": (":", *"release web0-ram0"),
    "a form": ("n",),
    "a plan": ("X",),
    "what is copied": ("C",),
    "what is written": ("W",),
    "columns": ("c",),
}
"""What asks for something, and the keys that lead there from the regions."""
WORD = re.compile(r"[A-Za-z][A-Za-z-]{3,}…?")


def words(text: str) -> set[str]:
    """The words of a screen; one that ends in an ellipsis says that it is cut."""
    found = {word for word in WORD.findall(text) if not word.endswith("…")}
    return {word for word in found if len(set(word)) > 1}  # a run of one letter is pages on a map


def cut(small: Iterable[str], whole: set[str]) -> Iterator[str]:
    """Words that are the beginnings of words, and not whole ones themselves."""
    for word in small:
        if word not in whole and any(each.startswith(word) for each in whole):
            yield word


async def every_view(size: tuple[int, int]) -> dict[str, str]:
    """What every view shows, and the help, by its name."""
    app = console()
    found = {}
    async with running(app, size) as pilot:
        places = [(view.name, "") for view in app.VIEWS]
        places += [
            ("region", "web0-ram0"),
            ("guest", "web0"),
            ("grant", "g1"),
            ("pfn", "guest:web0"),
            ("reach", "web0"),
        ]
        for name, subject in places:
            app.open_view(name, subject)
            await until(pilot, lambda: all(worker.is_finished for worker in app.workers if worker.node is app.view))
            await pilot.pause()
            found[f"{name} {subject}".strip()] = shown(app)
        for name, keys in ASKED.items():
            await pilot.press("2", *keys)
            await until(pilot, lambda: all(worker.is_finished for worker in app.workers if worker.group != "follow"))
            await pilot.pause()
            found[name] = shown(app)
            await pilot.press("escape", "escape")
        await pilot.press("2", "question_mark")
        scroll = app.screen.query_one(VerticalScroll)
        while True:
            await pilot.pause()
            found["help"] = found.get("help", "") + shown(app)
            if scroll.scroll_offset.y >= scroll.max_scroll_y:
                return found
            scroll.scroll_page_down(animate=False)


@pytest.mark.parametrize("size", SIZES)
async def test_no_view_cuts_a_word_without_saying_so(size: tuple[int, int]) -> None:
    whole = set().union(*(words(text) for text in (await every_view(ENOUGH)).values()))
    whole |= words(" ".join(sign.text for sign in MARKS))  # the help tells of those that are on the screen
    found = {name: sorted(cut(words(text), whole)) for name, text in (await every_view(size)).items()}
    assert {name: said for name, said in found.items() if said} == {}


def test_a_word_that_is_cut_is_found() -> None:
    assert list(cut(["Overv", "Guests", "Regi"], {"Overview", "Guests", "Guest", "Regions"})) == ["Overv", "Regi"]
    assert words("Overv… Guests 1") == {"Guests"}
