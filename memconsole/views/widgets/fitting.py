"""Text in the cells it has."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size

from memconsole.escaping import escape


def fit(text: str, width: int, *, right: bool = False) -> str:
    """The text in exactly ``width`` cells, cut with an ellipsis where it is longer."""
    text = escape(text)
    length = len(text) if text.isascii() else cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + "…" if width > 0 else ""
    return " " * (width - length) + text if right else text + " " * (width - length)
