"""The rows of a virtual table as values: order, filter, and what changed since the last Snapshot; no terminal.

The language of a filter is that of :mod:`memconsole.where`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from memconsole import where
from memconsole.differ import in_place
from memconsole.field import Field, Table, in_order


class RowSet:
    """The entities of one table, sorted and filtered as the operator asked.

    Entities that did not change should be the same objects as before (see :func:`memconsole.differ.settled`), or
    they are compared, one by one; of equal ones the one before stays, by which what was painted of it is known. Text
    is made only for rows that are shown or searched.
    """

    def __init__(self, table: Table, fields: Sequence[Field]) -> None:
        self.table = table
        self.fields = tuple(fields)
        self.items: Sequence[Any] = ()
        self._given: Sequence[Any] = ()
        self.keys: list[str] = []
        self.before: dict[str, Any | None] = {}
        self.order: list[int] = []
        self.sort_field: Field | None = None
        self.reverse = False
        self._where = where.EVERYTHING
        self._at: dict[str, int] = {}
        self._sorted: list[int] = []
        self._texts: list[str | None] = []
        self.loaded = False
        self.marked: set[str] = set()
        self._marked_last: str | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int) -> Any:
        return self.items[self.order[row]]

    @property
    def filter_text(self) -> str:
        """The filter that the rows are chosen by; empty: all are shown."""
        return self._where.text

    @property
    def needed(self) -> Iterator[Field]:
        """The fields whose values are wanted: those that are shown, sorted by, or named by the filter."""
        yield from (*self.fields, *self._where.fields)
        if self.sort_field is not None:
            yield self.sort_field

    @property
    def total(self) -> int:
        """How many rows there are without the filter."""
        return len(self.items)

    def key(self, row: int) -> str:
        """The name of the entity in a row."""
        return self.keys[self.order[row]]

    def row_of(self, key: str) -> int | None:
        """The row an entity is shown in, or None where it is gone or filtered out."""
        index = self._at.get(key)
        if index is None:
            return None
        try:
            return self.order.index(index)
        except ValueError:
            return None

    # --- marks ------------------------------------------------------------------------------------------------------

    def is_marked(self, row: int) -> bool:
        """Whether the entity in a row is marked."""
        return bool(self.marked) and self.key(row) in self.marked

    @property
    def hidden_marks(self) -> int:
        """How many marked entities the filter hides."""
        return len(self.marked) - sum(map(self.is_marked, range(len(self)))) if self.marked and self._where else 0

    @property
    def last_marked(self) -> int | None:
        """The row that was marked last, if it is shown."""
        return self.row_of(self._marked_last) if self._marked_last is not None else None

    def toggle(self, row: int) -> None:
        """Mark the entity in a row, or take its mark away."""
        key = self.key(row)
        self.marked ^= {key}
        self._marked_last = key

    def mark(self, rows: Iterable[int], *, keep: bool = True) -> None:
        """Mark these rows, those that are marked stay so unless told otherwise."""
        keys = {self.key(row) for row in rows}
        self.marked = self.marked | keys if keep else keys

    # --- what is there ----------------------------------------------------------------------------------------------

    def load(self, items: Sequence[Any]) -> bool:
        """Take the entities of a new Snapshot; says whether anything that is shown may differ."""
        if items is self._given and self.loaded:
            faded, self.before = bool(self.before), {}
            return faded
        self._given = items
        others = in_place(self.table.key, self.items, items) if self.loaded else None
        if others is not None:
            self._renew(items, [at for at, _ in others])
            return True
        keys = [self.table.key(item) for item in items]
        old, old_at, old_texts = self.items, self._at, self._texts
        self.before = {}
        kept = [*items]
        texts: list[str | None] = [None] * len(items)
        for index, (key, item) in enumerate(zip(keys, items, strict=True) if self.loaded else ()):
            was = old_at.get(key)
            if was is None:
                self.before[key] = None
            elif old[was] is not item and old[was] != item:
                self.before[key] = old[was]
            else:
                texts[index], kept[index] = old_texts[was], old[was]
        self.loaded = True
        self.items, self.keys, self._texts = kept, keys, texts
        self._at = dict(zip(keys, range(len(keys)), strict=True))
        self.marked &= self._at.keys()
        self._sort()
        return True

    def _renew(self, items: Sequence[Any], others: Sequence[int]) -> None:
        """Take the entities of a Snapshot in which none came, went or moved, and only these may be others."""
        old, self.items = self.items, items
        changed = [at for at in others if old[at] != items[at]]
        if len(changed) < len(others):
            kept = [*old]
            for at in changed:
                kept[at] = items[at]
            self.items = kept
        self.before = {self.keys[at]: old[at] for at in changed}
        for at in changed:
            self._texts[at] = None
        get = self.sort_field.get if self.sort_field is not None else None
        if get is not None and any(get(old[at]) != get(items[at]) for at in changed):
            self._sort()
        elif self._where:
            shown = set(self.order)
            if any(bool(self._where(items[at], partial(self._text, at))) != (at in shown) for at in changed):
                self._filter(self._sorted)

    def is_news(self, key: str) -> bool:
        """Whether more of an entity changed with the last load than what always runs on."""
        old = self.before.get(key)
        plain = self.table.plain
        return old is not None and plain(old) != plain(self.items[self._at[key]])

    def changed(self, key: str, field: Field) -> int:
        """0 if the field did not change with the last load, 1 if it rose, -1 if it fell, 2 if it changed otherwise."""
        old = self.before.get(key)
        if old is None or not field.news:
            return 0
        was, now = field.get(old), field.get(self.items[self._at[key]])
        if was == now:
            return 0
        if isinstance(was, int | float) and isinstance(now, int | float):
            return 1 if now > was else -1
        return 2

    def show(self, fields: Sequence[Field]) -> None:
        """Show these columns; a filter looks into what is shown."""
        self.fields = tuple(fields)
        self._texts = [None] * len(self.items)
        self._filter(self._sorted)

    def sort(self, field: Field | None, *, reverse: bool = False) -> None:
        """Sort by a field's value, the unknown always last; by None, in the Snapshot's own order."""
        self.sort_field, self.reverse = field, reverse
        self._sort()

    def filter(self, text: str) -> None:
        """Keep only the rows a filter finds.

        Raises:
            UsageError: it is none; the one before stays.
        """
        found = where.parse(text, self.table.fields)
        narrower = self._where.plain and found.plain and text.startswith(self.filter_text)
        self._where = found
        self._filter(self.order if narrower else self._sorted)

    def warm(self, budget: int) -> bool:
        """Make the text of up to ``budget`` rows that a filter will need; says whether any are left."""
        for index, text in enumerate(self._texts):
            if text is None:
                if budget == 0:
                    return True
                self._text(index)
                budget -= 1
        return False

    def _sort(self) -> None:
        count = len(self.items)
        if self.sort_field is None:
            self._sorted = list(range(count - 1, -1, -1) if self.reverse else range(count))
        else:
            self._sorted = in_order(self.sort_field, self.items, reverse=self.reverse)
        self._filter(self._sorted)

    def _filter(self, among: Sequence[int]) -> None:
        if not self._where:
            self.order = self._sorted
        elif self._where.plain:  # word by word: a call for each of ten thousand rows would be half a frame
            texts: Any = self._texts
            for index in [at for at in among if texts[at] is None]:
                self._text(index)
            for word in self._where.words:
                among = [at for at in among if word in texts[at]]
            self.order = [*among]
        else:
            chosen, items = self._where, self.items
            self.order = [index for index in among if chosen(items[index], partial(self._text, index))]

    def _text(self, index: int) -> str:
        text = self._texts[index]
        if text is None:
            text = self._texts[index] = where.row_text(self.fields, self.items[index])
        return text
