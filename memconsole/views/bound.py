"""How a widget binds a key: by the id that the registry of keys knows."""

from __future__ import annotations

from textual.binding import Binding

from memconsole import keys


def bound(
    id: str, action: str, word: str = "", *, show: bool = True, tooltip: str = "", priority: bool = False
) -> Binding:
    """A binding with the keys that the registry gives to its id; ``word`` stands in the line of keys, if it is shown.

    Raises:
        KeyError: the registry has no such id.
    """
    meaning = keys.OF_BINDING[id]
    return Binding(meaning.keys, action, word, show=show, id=id, tooltip=tooltip, priority=priority)
