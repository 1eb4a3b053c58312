"""What a PFN map can be coloured by beside kinds of pages: node, sharing, writes, what is preserved, who reaches it.

Each is a function of the map's table, a Snapshot and the tables of a Source; what cannot be told is an error with its
reason, never a colour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from memconsole import hostmap, labels
from memconsole.errors import MemconsoleError, NotFound
from memconsole.extents import ExtentTable, Flag
from memconsole.joined import TableSource
from memconsole.model import Snapshot
from memconsole.units import PAGE
from memconsole.views.widgets.layers import LabelLayer, Layer, Meaning
from memconsole.views.widgets.pagegrid import ABSENT, BAD, FIRST_LETTER, FIRST_NUMBER, LETTERS, NO, NUMBERS, YES

_ABSENT = Meaning(ABSENT, "absent")


def node_frames(ranges: Iterable[tuple[int, int, int]]) -> tuple[Sequence[int], ExtentTable]:
    """The nodes there are, sorted, and a table of their frames, labelled with 1 + the node, out of their ranges
    (first frame, frame behind it, node).

    Raises:
        NotFound: there is no range.
    """
    parts = [(first, end - first, 1 + node) for first, end, node in ranges]
    if not parts:
        raise NotFound(
            "the addresses of NUMA nodes are not known",
            "this kernel has no memory blocks (/sys/devices/system/memory), or the Snapshot was taken without them",
            "",
        )
    return sorted({label - 1 for _, _, label in parts}), labels.painted(parts)


def node_meanings(numbers: Sequence[int]) -> Sequence[Meaning]:
    """How frames of nodes are drawn."""
    return [Meaning(FIRST_NUMBER + number % len(NUMBERS), f"node {number}") for number in numbers]


def by_node(table: ExtentTable, snapshot: Snapshot) -> Layer:
    """The NUMA node of every page's frame.

    Raises:
        NotFound: the Snapshot does not say which addresses are of which node.
    """
    numbers, nodes = node_frames(
        (each.start // PAGE, each.end // PAGE, node.number) for node in snapshot.memory.nodes for each in node.ranges
    )
    meanings = [_ABSENT, Meaning(BAD, "on no node"), *node_meanings(numbers)]
    with nodes:
        return LabelLayer(
            "NUMA node",
            labels.classified(table, nodes),
            meanings,
            {0: 1} | {1 + n: 2 + at for at, n in enumerate(numbers)},
        )


def by_flag(table: ExtentTable, title: str, flag: Flag, words: tuple[str, str], why: str) -> Layer:
    """Whether pages have a flag; ``words`` say what it means to have it, and to lack it.

    Raises:
        NotFound: no page has it, and ``why`` that says nothing.
    """
    marked = labels.flagged(table, flag)
    meanings = [_ABSENT, Meaning(NO, words[1]), Meaning(YES, words[0])]
    if why and not any(labels.label_of(row) == 2 for row in marked):
        raise NotFound(f"no page of this map is known to be {title}", why, "")
    return LabelLayer(title, marked, meanings, [0, 1, 2])


def by_preserved(table: ExtentTable, tables: TableSource) -> Layer:
    """Whether the next kernel leaves a page's frame alone.

    Raises:
        MemconsoleError: KHO's tree cannot be read.
    """
    with contextlib.closing(tables.extents(hostmap.PRESERVED)) as kept, labels.labelled(kept, 1) as frames:
        marked = labels.classified(table, frames)
    meanings = [_ABSENT, Meaning(NO, "not preserved", loud=True), Meaning(YES, "preserved over the next kexec")]
    return LabelLayer("preserved", marked, meanings, [1, 2])


def by_device(table: ExtentTable, snapshot: Snapshot, tables: TableSource) -> Layer:
    """Which devices reach a page's frame through an IOMMU; one that several reach has the last one's letter.

    Raises:
        NotFound: no IOMMU shows what devices reach. MemconsoleError: its tables cannot be read.
    """
    shown = [domain for domain in snapshot.domains if domain.mapped and domain.devices]
    if not shown:
        raise NotFound(
            "what devices reach is not known",
            "no domain of this host shows page tables with anything mapped",
            "memconsole domains says why of each",
        )
    layers, failed = [], None
    for number, domain in enumerate(shown[: len(LETTERS)], 1):
        try:
            with contextlib.closing(tables.extents(f"domain:{domain.group}")) as iovas, iovas.by_frame() as frames:
                layers.append(labels.labelled(frames, number))
        except MemconsoleError as error:
            failed = error
    if not layers and failed is not None:
        raise failed
    with labels.stacked(layers) as frames:
        marked = labels.classified(table, frames)
    meanings = [_ABSENT, Meaning(NO, "reached by no device whose tables are shown")]
    meanings += [
        Meaning(FIRST_LETTER + number, f"{domain.devices[0]}{' and its group' * (len(domain.devices) > 1)}", loud=True)
        for number, domain in enumerate(shown[: len(LETTERS)])
    ]
    return LabelLayer("devices", marked, meanings, range(1, len(meanings)))
