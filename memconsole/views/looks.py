"""How values look: a glyph and a tone for each word, so that colour is never the only sign."""

from __future__ import annotations

from typing import Any, NamedTuple


class Look(NamedTuple):
    """A glyph of one cell (or none) and a tone: ``good``, ``warn``, ``bad``, ``dim``, ``calm`` or nothing."""

    glyph: str = ""
    tone: str = ""


_WORDS = {
    "state": {
        "reserved": Look("○", ""),
        "mapped": Look("●", "good"),
        "restored": Look("◇", "calm"),
        "starting": Look("◌", "warn"),
        "running": Look("▶", "good"),
        "paused": Look("‖", "warn"),
        "suspended": Look("‥", "warn"),
        "stopped": Look("■", "dim"),
        "gone": Look("✖", "bad"),
        "silent": Look("?", "warn"),
        "offered": Look("◌", "warn"),
    },
    "severity": {"error": Look("✖", "bad"), "warning": Look("▲", "warn"), "info": Look("·", "calm")},
    "level": {"yes": Look("✔", "good"), "partly": Look("▲", "warn"), "no": Look("✖", "bad")},
}
PLAIN = Look()


def words_of(field_id: str) -> dict[str, Look]:
    """The looks of a field's words."""
    return _WORDS.get(field_id, {})


def signs_of() -> list[tuple[str, str]]:
    """Every glyph before a word, with the words it stands before."""
    found: dict[str, list[str]] = {}
    for words in _WORDS.values():
        for word, look in words.items():
            found.setdefault(look.glyph, []).append(word)
    return [(glyph, ", ".join(words)) for glyph, words in found.items()]


def value_look(field_id: str, value: Any) -> Look:
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
