"""What the help says: it is gathered from what has the keys, and from what stands on the screen."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from memconsole import glossary, keys
from memconsole.views.looks import signs_of
from memconsole.views.private import painted
from memconsole.views.screens.help import Helped, KeyHelp, Sign
from memconsole.views.widgets.bars import rank
from memconsole.views.widgets.table import VirtualTable

if TYPE_CHECKING:
    from textual.screen import Screen

    from memconsole.views.view import View

Reason = Callable[[Any, str], str]

MARKS = (
    Sign("▸", "the cursor; ▹ where keys do not go at present"),
    Sign("■", "marked: actions take all that are; ◇ the cursor on one where keys do not go, ◆ where they do"),
    Sign("+", "new since the last refresh"),
    Sign("•", "changed since the last refresh"),
    Sign("↑", "rose since the last refresh"),
    Sign("↓", "fell since the last refresh"),
    Sign("▲", "in a title: sorted, the smallest first"),
    Sign("▼", "in a title: sorted, the largest first"),
    Sign("…", "cut here; Enter, the side pane or a wider terminal shows the rest"),
)


def screen_text(screen: Screen[Any]) -> str:
    """All that is on a screen, as text."""
    width, height = screen.app.size
    console = Console(
        width=width, height=height, file=io.StringIO(), record=True, color_system=None, legacy_windows=False
    )
    console.print(painted(screen))
    return console.export_text()


def helped(screen: Screen[Any], view: View, reason: Reason) -> Helped:
    """The help for a screen as it stands, a view in front; ``reason`` says why a binding of a node does nothing."""
    text = screen_text(screen)
    focused = screen.focused
    table = focused if isinstance(focused, VirtualTable) else None
    columns = tuple(Sign(field.title, field.help) for field in table.rows.fields) if table is not None else ()
    known = [*MARKS, *(Sign(look, said) for look, said in signs_of()), *(Sign(*each) for each in view.legend)]
    signs = {sign.glyph: sign for sign in known if sign.glyph in text or " " in sign.glyph}
    return Helped(_groups(screen, reason), tuple(signs.values()), columns, tuple(words_in(text, columns)))


def words_in(text: str, columns: tuple[Sign, ...] = ()) -> Iterator[glossary.Term]:
    """The words of the glossary that stand in a text, or in what columns say of themselves."""
    said = " ".join([text, *(column.text for column in columns)]).lower()
    seen = set(re.findall(r"[a-z][a-z-]*", said))
    for term in glossary.TERMS:
        for word in term.word.lower().split(", "):
            # several words that belong together are looked for as they stand
            found = word in said if " " in word else bool({word, f"{word}s", f"{word}ed", f"{word}d"} & seen)
            if found:
                yield term
                break


def _groups(screen: Screen[Any], reason: Reason) -> list[tuple[str, list[KeyHelp]]]:
    """The keys that work, by what they work on, the most particular first."""
    groups: dict[str, dict[str, KeyHelp]] = {}
    for key, active in screen.active_bindings.items():
        binding = active.binding
        if not (binding.description and (binding.id or binding.action.startswith("macro("))):
            continue
        everywhere = active.node in {screen.app, screen}
        where = "Everywhere" if everywhere else str(getattr(active.node, "help_title", "") or "Here")
        text = binding.tooltip or binding.description
        why = "" if active.enabled else reason(active.node, binding.id or "") or "no row is chosen"
        group = groups.setdefault(where, {})
        id = binding.id or text
        before = group[id].keys + " " if id in group else ""
        group[id] = KeyHelp(before + keys.shown(key), text, why, binding.id or "")
    return [(where, sorted(group.values(), key=lambda each: rank(each.id))) for where, group in groups.items()]
