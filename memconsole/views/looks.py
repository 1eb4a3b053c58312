"""How values look: a glyph and a tone for each word, so that colour is never the only sign; and the console's theme."""

from __future__ import annotations

from typing import Any, NamedTuple

from textual.theme import Theme

THEME = Theme(
    name="memconsole",
    primary="#5fafff",
    secondary="#87afd7",
    accent="#ffaf5f",
    warning="#ffd75f",
    error="#ff5f5f",
    success="#87d75f",
    foreground="#d0d4dc",
    background="#14171c",
    surface="#1a1e25",
    panel="#232933",
    boost="#232933",
    dark=True,
    variables={
        "border": "#3a4352",
        "border-blurred": "#3a4352",
        "block-cursor-background": "#2c4058",
        "text-muted": "#8b95a5",
        "text-disabled": "#6f7886",
    },
)
"""The console's own colours; ``ansi-dark`` stands in where the terminal has only 16."""


class Look(NamedTuple):
    """A glyph of one cell (or none) and a tone: ``good``, ``warn``, ``bad``, ``dim``, ``calm`` or nothing."""

    glyph: str = ""
    tone: str = ""


_WORDS = {
    "state": {
        "reserved": Look("○", ""),
        "mapped": Look("●", "good"),
        "frozen": Look("◈", "calm"),
        "preserved": Look("◆", "calm"),
        "restored": Look("◇", "calm"),
        "released": Look("✕", "dim"),
        "starting": Look("◌", "warn"),
        "running": Look("▶", "good"),
        "paused": Look("‖", "warn"),
        "suspended": Look("‥", "warn"),
        "stopped": Look("■", "dim"),
        "gone": Look("✖", "bad"),
        "offered": Look("◌", "warn"),
        "revoked": Look("✕", "dim"),
    },
    "severity": {"error": Look("✖", "bad"), "warning": Look("▲", "warn"), "info": Look("·", "calm")},
    "level": {"yes": Look("✔", "good"), "partly": Look("▲", "warn"), "no": Look("✖", "bad")},
}
PLAIN = Look()


def look(field_id: str, value: Any) -> Look:
    """The look of one field's value."""
    words = _WORDS.get(field_id)
    if words is not None:
        return words.get(value, PLAIN)
    if field_id == "wrong" and value:
        return Look("✖", "bad")
    if field_id == "access" and value == "ro":
        return Look("", "dim")
    return Look("", "dim") if value is None or value == () else PLAIN


def glyphs(field_id: str) -> int:
    """How many cells a glyph before a field's words takes."""
    return 2 if field_id in _WORDS else 0


EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(part: float, width: int) -> tuple[str, str]:
    """The filled and the empty text of a bar ``width`` cells wide for a part between 0 and 1."""
    cells = min(max(part, 0.0), 1.0) * width
    whole = int(cells)
    filled = "█" * whole
    if whole < width and (eighth := int((cells - whole) * 8)):
        filled += EIGHTHS[eighth]
    return filled, "░" * (width - len(filled))
