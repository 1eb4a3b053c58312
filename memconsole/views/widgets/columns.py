"""Where the columns of a table stand on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memconsole.field import Field
from memconsole.views.looks import glyphs

GUTTER = 2
GAP = 2
LEAST = 6


class Column(NamedTuple):
    """A field in its place on the screen."""

    field: Field
    x: int
    width: int


def columns_for(fields: Sequence[Field], left: int, width: int, sorted_by: Field | None = None) -> tuple[Column, ...]:
    """The columns that have room in ``width`` cells: the first field always, then those from number ``left`` on.

    What is left over goes to columns of text.
    """
    chosen = [fields[0], *fields[left:]]
    room = width - GUTTER
    widths: list[int] = []
    for field in chosen:
        wanted = max(field.width + glyphs(field.id), len(field.title) + 2 * (field is sorted_by))
        if widths and room < min(LEAST, wanted):
            break
        widths.append(min(wanted, max(room, LEAST)))
        room -= widths[-1] + GAP
    shown = chosen[: len(widths)]
    spare = room + GAP
    stretchy = [index for index, field in enumerate(shown) if not field.right and field.width > LEAST]
    if spare > 0 and stretchy and len(shown) == len(chosen):
        total = sum(shown[index].width for index in stretchy)
        for index in stretchy:
            widths[index] += spare * shown[index].width // total
    x = GUTTER
    columns = []
    for field, cells in zip(shown, widths, strict=True):
        columns.append(Column(field, x, cells))
        x += cells + GAP
    return tuple(columns)
