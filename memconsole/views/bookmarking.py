"""The app's bookmarks: places, with the page of a map, that are remembered from one session to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import BindingType

from memconsole.errors import NotFound
from memconsole.views.bound import bound
from memconsole.views.places import Place
from memconsole.views.prompting import Prompting
from memconsole.views.remembering import Bookmark, Memory
from memconsole.views.screens.dialogs import Pick


class Bookmarking(Prompting):
    """An App in which one can remember where one is, and go there again."""

    BINDINGS: ClassVar[list[BindingType]] = [
        bound("bookmark", "bookmark", "Bookmark", show=False, tooltip="remember this place, or forget it"),
        bound("bookmarks", "bookmarks", "Bookmarks", show=False, tooltip="go to a place that is remembered"),
    ]
    memory: Memory
    trail: list[Place]

    def _go(self, trail: list[Place], *, back: bool = False) -> None:
        raise NotImplementedError

    @property
    def bookmark_names(self) -> Sequence[str]:
        """The names of the places that are remembered."""
        return [each.name for each in self.memory.bookmarks]

    @property
    def _here(self) -> Bookmark:
        """The place one is at, by a name that says it."""
        place, view = self.trail[-1], self.view
        name = " ".join(filter(None, [place.view, place.subject.partition(":")[2] or place.subject, view.spot]))
        return Bookmark(name, tuple((each.view, each.subject) for each in self.trail), view.page)

    def action_bookmark(self) -> None:
        """Remember where one is; where that is remembered already, forget it."""
        here = self._here
        same = [each for each in self.memory.bookmarks if (each.trail, each.page) == (here.trail, here.page)]
        if not same:
            self.add_bookmark("")
            return
        for each in same:
            self.memory.drop_bookmark(each.name)
        self.view.show_bookmarks()
        self.notify(same[0].name, title="Bookmark removed", timeout=3, markup=False)

    def add_bookmark(self, name: str) -> None:
        """Remember where one is, by this name or by one that says what is there."""
        here = self._here
        named = Bookmark(name.strip() or here.name, here.trail, here.page)
        self.memory.keep_bookmark(named)
        self.view.show_bookmarks()
        self.notify(f"' lists all, :go {named.name} goes there", title=f"✔ Bookmark {named.name}", markup=False)

    def action_bookmarks(self) -> None:
        """Choose a place that is remembered, and go there."""
        names = [each.name for each in self.memory.bookmarks]
        if not names:
            self.notify("b remembers the place one is at", title="There are no bookmarks", timeout=3, markup=False)
            return

        def go(at: str | None) -> None:
            if at is not None:
                self.go_to_bookmark(names[int(at)])

        self.push_screen(Pick("Go to", [(str(at), name) for at, name in enumerate(names)]), go)

    def go_to_bookmark(self, name: str) -> None:
        """Go to a place that is remembered.

        Raises:
            NotFound: none has this name.
        """
        found = next((each for each in self.memory.bookmarks if each.name == name.strip()), None)
        if found is None:
            known = ", ".join(each.name for each in self.memory.bookmarks) or "none; b remembers the place one is at"
            raise NotFound(f"there is no bookmark {name!r}", "none has this name", f"bookmarks: {known}")
        self._go([Place(view, subject) for view, subject in found.trail if self.is_view(view)] or [Place("overview")])
        self.view.aim(found.page)

    def is_view(self, name: str) -> bool:
        """Whether a view or a kind of subject has this name."""
        raise NotImplementedError
