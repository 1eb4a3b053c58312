"""The console of many hosts: tables of all of them, and from each row into the console of its host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from memconsole.errors import UsageError
from memconsole.fleet import Fleet, split
from memconsole.views.app import ConsoleApp
from memconsole.views.places import Place
from memconsole.views.screens import fleet as screens
from memconsole.views.tabbed import VIEWS, Named
from memconsole.views.view import subject_of
from memconsole.views.widgets.table import VirtualTable


class Into(NamedTuple):
    """A host that is to be opened, and where in it one wants to be."""

    host: str
    place: Place = Place("overview")


_OWN = {
    "overview": Named("overview", "Hosts", screens.Hosts),
    "regions": Named("regions", "Regions", screens.Regions, "regions"),
    "guests": Named("guests", "Guests", screens.Guests, "guests"),
    "grants": Named("grants", "Grants", screens.Grants, "grants"),
    "mmio": Named("mmio", "MMIO", screens.Mmio, "windows"),
    "events": Named("events", "Events", screens.Events),
    "audit": Named("audit", "Audit", screens.Audit, "findings"),
}


class FleetApp(ConsoleApp):
    """A console over a :class:`Fleet`; it ends with the host that is to be opened, or with nothing."""

    VIEWS: ClassVar[tuple[Named, ...]] = tuple(
        _OWN.get(view.name, Named(view.name, view.title, screens.OnOneHost)) for view in VIEWS
    )
    ALIASES: ClassVar[Mapping[str, str]] = {**ConsoleApp.ALIASES, "hosts": "overview"}

    def __init__(self, source: Fleet, **options: Any) -> None:
        super().__init__(source, **options)
        self.parts = frozenset()
        self.into: Into | None = None

    def open_host(self, host: str, place: Place | None = None) -> None:
        """End, so that the console of this host is opened."""
        fleet = self.live
        assert isinstance(fleet, Fleet)  # noqa: S101 - it is made of one
        try:
            fleet.source_of(host)
        except Exception as error:
            if not hasattr(error, "what"):
                raise
            self.notify(str(error), title=host, severity="warning", markup=False)
            return
        self.into = Into(host, place or Place("overview"))
        self.exit()

    def on_virtual_table_row_opened(self, event: VirtualTable.RowOpened) -> None:
        """Open the host of a row, at what the row is."""
        event.stop()
        table_id, item = event.table.table.id, event.item
        if table_id == "hosts":
            self.open_host(item.host)
            return
        self.drill(Place(table_id.removesuffix("s"), subject_of(table_id, item)))

    def drill(self, place: Place) -> None:
        """Open what a place is about on its host."""
        kind, _, name = place.subject.partition(":")
        host, rest = split(name.rpartition(" ")[2] if kind == "finding" else name)
        if not host:
            self.notify("it names no host", title=place.subject or place.view, severity="warning", markup=False)
            return
        goal = Place("audit") if kind == "finding" else Place("events") if kind == "event" else place
        self.open_host(host, Place(goal.view, f"{kind}:{rest}" if goal is place else ""))

    def open_view(self, name: str, subject: str = "") -> None:
        """Open a view of all hosts; with a subject, that subject's host.

        Raises:
            UsageError: there is no such view, or it is one host's alone.
        """
        if split(subject)[0]:
            self.drill(Place(name, subject if ":" in subject else f"{name}:{subject}"))
            return
        if not any(view.name == self.ALIASES.get(name, name) for view in self.VIEWS):
            raise UsageError(f"{name} is one host's alone", "these are many", "open a host: 1, Enter")
        super().open_view(name, subject)

    def open_pfn(self, table_id: str, item: Any) -> None:
        """Open the map of an entity on its host."""
        self.drill(Place("pfn" if table_id in {"regions", "guests"} else table_id, subject_of(table_id, item)))

    def open_reach(self, target: str) -> None:
        """Open who reaches a guest, on its host."""
        self.drill(Place("reach", f"reach:{target}"))
