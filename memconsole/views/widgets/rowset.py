"""The rows of a virtual table as values: order, filter, and what changed since the last Snapshot; no terminal.

Grammar of a filter: terms between blanks, all of which must hold. ``TEXT`` is found in any shown column, ``FIELD:TEXT``
in that field, ``!TERM`` must not be found; upper and lower case are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from memconsole.fields import Field, Table

Test = Callable[[int], bool]


class RowSet:
    """The entities of one table, sorted and filtered as the operator asked.

    Entities that did not change should be the same objects as before (see :func:`memconsole.views.refresh.settle`), or
    they are compared, one by one. Text is made only for rows that are shown or searched.
    """

    def __init__(self, table: Table, fields: Sequence[Field]) -> None:
        self.table = table
        self.fields = tuple(fields)
        self.items: Sequence[Any] = ()
        self.keys: list[str] = []
        self.before: dict[str, Any | None] = {}
        self.order: list[int] = []
        self.sort_field: Field | None = None
        self.reverse = False
        self.filter_text = ""
        self._at: dict[str, int] = {}
        self._sorted: list[int] = []
        self._texts: list[str | None] = []
        self.loaded = False

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int) -> Any:
        return self.items[self.order[row]]

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

    def load(self, items: Sequence[Any]) -> bool:
        """Take the entities of a new Snapshot; says whether anything that is shown may differ."""
        if items is self.items and self.loaded:
            faded, self.before = bool(self.before), {}
            return faded
        keys = [self.table.key(item) for item in items]
        old, old_at, old_texts = self.items, self._at, self._texts
        self.before = {}
        texts: list[str | None] = [None] * len(items)
        for index, (key, item) in enumerate(zip(keys, items, strict=True)):
            was = old_at.get(key)
            if was is None:
                self.before[key] = None
            elif old[was] is not item and old[was] != item:
                self.before[key] = old[was]
            else:
                texts[index] = old_texts[was]
        if not self.loaded:
            self.before = {}
        self.loaded = True
        self.items, self.keys, self._texts = items, keys, texts
        self._at = {key: index for index, key in enumerate(keys)}
        self._sort()
        return True

    def changed(self, key: str, field: Field) -> int:
        """0 if the field did not change with the last load, 1 if it rose, -1 if it fell, 2 if it changed otherwise."""
        old = self.before.get(key)
        if old is None:
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
        """Keep only the rows a filter (see the grammar above) finds."""
        narrower = text.startswith(self.filter_text) and not {"!", ":"} & set(text)
        self.filter_text = text
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
            get = self.sort_field.get
            values = [get(item) for item in self.items]
            known = [index for index in range(count) if values[index] is not None]
            known.sort(key=values.__getitem__, reverse=self.reverse)
            self._sorted = known + [index for index in range(count) if values[index] is None]
        self._filter(self._sorted)

    def _filter(self, among: Sequence[int]) -> None:
        tests = [self._test(term) for term in self.filter_text.lower().split()]
        if not tests:
            self.order = self._sorted
        else:
            self.order = [index for index in among if all(test(index) for test in tests)]

    def _test(self, term: str) -> Test:
        if term.startswith("!") and len(term) > 1:
            inner = self._test(term[1:])
            return lambda index: not inner(index)
        name, colon, value = term.partition(":")
        field = next((field for field in self.table.fields if field.id == name), None) if colon else None
        if field is not None:
            return lambda index: value in field.text(self.items[index]).lower()
        return lambda index: term in (self._texts[index] or self._text(index))

    def _text(self, index: int) -> str:
        item = self.items[index]
        text = self._texts[index] = "\x1f".join(field.text(item) for field in self.fields).lower()
        return text
