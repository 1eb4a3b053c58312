"""What a map is of: the model behind a map on the screen, as guests, the host and IOMMU domains have one each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from memconsole.model import Snapshot
from memconsole.units import format_size
from memconsole.views.widgets.facts import Fact
from memconsole.views.widgets.layers import Layer
from memconsole.views.widgets.pagegrid import Block, Marks


class Goal(NamedTuple):
    """Where Enter leads: a view, what it is about, and the page there (for a map)."""

    view: str
    subject: str = ""
    page: int | None = None


class Mode(NamedTuple):
    """A way to colour a map: ``make`` reads what it needs, in a thread unless it is ``quick``.

    ``marked``: whether marks of what changed are drawn over it.
    """

    title: str
    make: Callable[[], Layer]
    quick: bool = False
    marked: bool = False


class MapModel(Protocol):
    """What a map is of, and what there is to say of it."""

    @property
    def page_size(self) -> int:
        """Bytes of a page."""

    @property
    def scanned_ns(self) -> int:
        """When it was scanned, ns since the epoch; 0: when it was read."""

    @property
    def modes(self) -> Sequence[Mode]:
        """The ways to colour it, the first one first."""

    @property
    def marks(self) -> Marks | None:
        """What changed since it was read before."""

    def blocks(self) -> Sequence[Block]:
        """The address space."""

    def words(self, cell_bytes: int) -> Sequence[str]:
        """The map as a whole, for the title; a cell stands for so many bytes."""

    def frame_of(self, page: int) -> int | None:
        """The frame that a page is in or leads to; None where there is none."""

    def facts(self, page: int) -> Sequence[Fact]:
        """What there is to say of a page; of every page the same facts in the same order."""

    def cell_facts(self, first: int, pages: int) -> Sequence[Fact]:
        """What there is to say of a cell."""

    def find(self, text: str) -> int:
        """The page a person asks for.

        Raises:
            UsageError, NotFound: it is none, or not there.
        """

    def goal(self, page: int) -> Goal | str:
        """Where Enter leads from a page, or why nowhere."""

    def take(self, snapshot: Snapshot) -> bool:
        """Take what a newer Snapshot says; whether anything shown may differ."""

    def close(self) -> None:
        """Give its tables back."""


def size_words(pages: int, page_size: int) -> str:
    """Pages as bytes."""
    return format_size(pages * page_size)
