"""The views of many hosts: the hosts, and tables of all of them with the host as the first column."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult

from memconsole.fields import TABLES
from memconsole.fleet import HOSTS, Fleet, HostState, hosted
from memconsole.model import Part, Snapshot
from memconsole.views.screens import listing
from memconsole.views.view import View
from memconsole.views.widgets.bars import plain
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.table import VirtualTable


class OfFleet(listing.Listing):
    """Tables of many hosts, laid out apart from those of one."""

    def on_mount(self) -> None:
        """Lay the tables out as they were."""
        for widget in self.query(VirtualTable):
            if (layout := self.console.memory.layouts.get(f"fleet-{widget.table.id}")) is not None:
                widget.lay_out_as(layout)

    def on_virtual_table_arranged(self, event: VirtualTable.Arranged) -> None:
        """Remember how a table is laid out."""
        event.stop()
        self.console.memory.arrange(f"fleet-{event.table.table.id}", event.table.layout_now)

    @property
    def parts(self) -> frozenset[Part]:
        """None: what is asked of every host is what every host has at hand."""
        return frozenset()


class Hosts(OfFleet):
    """A row a host."""

    TABLES = ((HOSTS, "no hosts"),)

    def show(self, snapshot: Snapshot) -> None:
        """Show the hosts as they are now."""
        del snapshot
        fleet = self.console.source
        if isinstance(fleet, Fleet):
            self._rows = fleet.hosts()
            self.query_one(VirtualTable).load(self._rows)

    @property
    def status(self) -> str:
        """How many there are, and how many of them do not answer."""
        rows = getattr(self, "_rows", ())
        lost = sum(row.state in {HostState.LOST, HostState.SILENT} for row in rows)
        return super().status + (f" · {lost:,} do not answer" if lost else "")


class Regions(OfFleet):
    """Regions of every host."""

    TABLES = ((hosted(TABLES["regions"]), "no host has a region"),)


class Guests(OfFleet):
    """Guests of every host."""

    TABLES = ((hosted(TABLES["guests"]), "no host has a guest"),)
    COLUMNS = "host,name,kind,state,pid,memory,rss,vcpus,beats,wrong,gap,huge,grants"


class Grants(OfFleet):
    """Grants of every host, and what revoked ones left behind."""

    TABLES = (
        (hosted(TABLES["grants"]), "no host has a grant"),
        (hosted(TABLES["quarantine"]), "✔ no revoked frames are pinned"),
    )


class Mmio(OfFleet):
    """MMIO windows and devices of every host."""

    TABLES = (
        (hosted(TABLES["windows"]), "no host has MMIO windows"),
        (hosted(TABLES["devices"]), "no PCI devices"),
    )


class Events(OfFleet):
    """Events of every host, the newest first."""

    TABLES = ((hosted(TABLES["events"]), "nothing has happened yet"),)
    COLUMNS = "at,host,text,subject,kind,peer"
    NEWEST_FIRST = False
    STAY_ON_TOP = True


class Audit(OfFleet):
    """Findings of every host."""

    TABLES = ((hosted(TABLES["findings"]), "✔ no findings"),)


class OnOneHost(View):
    """What is one host's alone."""

    SAYS: ClassVar[str] = "This is one host's alone: choose a host in Hosts (1) and press Enter; q comes back."

    def compose(self) -> ComposeResult:
        """The words."""
        yield Lines()

    def show(self, snapshot: Snapshot) -> None:
        """Say where it is to be seen."""
        del snapshot
        self.query_one(Lines).show_lines([plain(self.SAYS)])
