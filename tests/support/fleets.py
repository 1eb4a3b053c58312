"""Fleets of synthetic hosts for tests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from memconsole.errors import NoControl
from memconsole.fleet import Fleet, Member
from memconsole.model import Part, Snapshot
from memconsole.source import Source
from support.synthetic import NOW_NS, SyntheticSource, snapshot
from support.waiting import LONG_S


class Failing(SyntheticSource):
    """A host that answers until ``fails``."""

    fails = False

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        if self.fails:
            raise NoControl("the connection to h was lost", "it was cut", "see whether it is up", code="ControlDied")
        return super().snapshot(parts)


def member(name: str, opened: Callable[[], Source] | Source) -> Member:
    """A host by its name; asked once, unless it is to be opened later."""
    made = Member(name, opened if callable(opened) else partial(lambda found: found, opened), clock=lambda: NOW_NS)
    if not callable(opened):
        made.ask((), join=True)
    return made


def fleet_of(count: int = 3, *, guests: int = 3, regions: int = 4) -> tuple[Fleet, list[Failing]]:
    """So many hosts h1, h2..., each asked once; nothing asks them again, and none is silent for that."""
    sources = [Failing(snapshot(regions, guests)) for _ in range(count)]
    return Fleet([member(f"h{n}", each) for n, each in enumerate(sources, 1)], interval=LONG_S), sources
