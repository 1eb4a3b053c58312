"""The one registry of the console's keys: what each key means, everywhere, and which bindings have that meaning.

A **meaning** has keys, an action of the console is a **binding** with an id; a key has one meaning in every view, and
several bindings may share it (``n`` is *new*: it reserves a region, starts a guest). Dialogs have meanings of their
own, because nothing below a dialog gets a key. Widgets take their keys from here (``views.bound``); ``console.toml``
gives other keys to a binding, or to all bindings of a meaning; :func:`keymap` says what comes of it, and what is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from memconsole import actions

CONSOLE, DIALOG = "console", "dialog"


class Meaning(NamedTuple):
    """What some keys mean; keys are named as in ``console.toml``, with commas between them. ``ids`` are its bindings
    (none: one that is called as the meaning is).
    """

    id: str
    keys: str
    help: str
    ids: tuple[str, ...] = ()
    scope: str = CONSOLE

    @property
    def bindings(self) -> tuple[str, ...]:
        """The ids of its bindings."""
        return self.ids or (self.id,)


def _acts(id: str, help: str, *ids: str) -> Meaning:
    """A meaning of actions, whose key stands in their registry."""
    return Meaning(id, actions.REGISTRY[ids[0]].spec.key, help, ids)


VIEWS = ("overview", "regions", "guests", "grants", "pfn", "mmio", "iommu", "events", "audit", "handoff", "host")
VIEW_KEYS = "1234567890M"

MEANINGS: tuple[Meaning, ...] = (
    *(Meaning(f"view-{name}", key, f"go to {name}") for name, key in zip(VIEWS, VIEW_KEYS, strict=True)),
    Meaning("open", "enter", "go into what the cursor is on", ("open", "map.open")),
    Meaning("back", "escape,backspace", "clear the marks, else the filter, else go back, else to the present"),
    Meaning("next-table", "tab", "the next table"),
    Meaning("former-table", "shift+tab", "the table before"),
    Meaning("up", "up,k", "up", ("up", "pfn.up")),
    Meaning("down", "down,j", "down", ("down", "pfn.down")),
    Meaning("left", "left,h", "left", ("columns-left", "pfn.left")),
    Meaning("right", "right,l", "right", ("columns-right", "pfn.right")),
    Meaning("page-up", "pageup", "a screen up", ("page-up", "pfn.page-up")),
    Meaning("page-down", "pagedown", "a screen down", ("page-down", "pfn.page-down")),
    Meaning("first", "home,g", "to the beginning", ("first", "pfn.first")),
    Meaning("last", "end,G", "to the end", ("last", "pfn.last")),
    Meaning("filter", "slash", "show only rows that match"),
    Meaning("sort", "s", "choose the column to sort by"),
    Meaning("sort-left", "less_than_sign", "sort by the column left"),
    Meaning("sort-right", "greater_than_sign", "sort by the column right"),
    Meaning("reverse", "i", "turn the order round"),
    Meaning("columns", "c", "choose the columns"),
    Meaning("mark", "space", "mark the row: an action takes all that are marked"),
    Meaning("mark-range", "V", "mark from the last mark to here"),
    Meaning("mark-all", "A", "mark every row that is shown"),
    Meaning("mark-invert", "I", "mark the others instead"),
    Meaning("copy", "y", "copy as text"),
    Meaning("copy-json", "Y", "copy as JSON"),
    Meaning("copy-any", "C", "copy a cell, the row or the table"),
    Meaning("export", "W", "write what is shown to a file"),
    Meaning("pfn", "f", "its frames: the PFN map"),
    Meaning("joined", "w", "its memory with frames, windows and IOVAs"),
    Meaning("other", "o", "go to what belongs to it", ("open-subject", "pfn.pick")),
    Meaning("zoom-in", "plus,equals_sign", "zoom in", ("pfn.zoom-in",)),
    Meaning("zoom-out", "minus", "zoom out", ("pfn.zoom-out",)),
    Meaning("whole", "z", "between one page and the whole", ("pfn.whole",)),
    Meaning("colour", "t", "colour a map by the next thing", ("map.colour",)),
    Meaning("former-colour", "T", "colour a map by the thing before", ("map.former-colour",)),
    Meaning("next-kind", "e", "to the edge of this kind of pages", ("pfn.next-kind",)),
    Meaning("former-kind", "E", "to the edge before", ("pfn.previous-kind",)),
    Meaning("next-run", "full_stop", "the next run of frames", ("pfn.next-run",)),
    Meaning("former-run", "comma", "the run of frames before", ("pfn.previous-run",)),
    Meaning("go-to", "at", "go to an address", ("pfn.go",)),
    Meaning("fragments", "F", "fragments: runs in each cell", ("pfn.fragments",)),
    Meaning("marks", "v", "show or hide what changed", ("pfn.marks",)),
    _acts("new", "make a new one", "reserve", "guest-start"),
    _acts("map", "map it", "map", "window-map"),
    _acts("revoke", "take it back", "revoke", "window-revoke"),
    _acts("release", "release it", "release"),
    _acts("move", "move it to another store", "move"),
    _acts("attach", "attach a process", "guest-attach"),
    _acts("service", "have a service (a daemon, a database) as a guest", "guest-service"),
    _acts("helper", "name a helper process", "guest-helper"),
    _acts("adopt", "adopt a VM that another program runs", "guest-adopt"),
    _acts("let-go", "let an adopted VM go", "guest-let-go"),
    _acts("stop", "stop it", "guest-stop"),
    _acts("hold", "pause it", "guest-pause"),
    _acts("run-on", "let it run on", "guest-resume"),
    _acts("hand-off", "hand off", "handoff-run"),
    _acts("rehearse", "rehearse a handoff", "handoff-rehearse"),
    Meaning("again", "r", "look again now", ("refresh", "pfn.rescan", "reach.again", "handoff-check")),
    Meaning("pause", "P", "freeze the picture, or let it go on"),
    Meaning("undo", "U", "plan what undoes the last action"),
    Meaning("earlier", "left_square_bracket", "one step into the past"),
    Meaning("later", "right_square_bracket", "one step to the present"),
    Meaning("much-earlier", "left_curly_bracket", "sixty steps into the past"),
    Meaning("event-before", "left_parenthesis", "into the past, to the event before"),
    Meaning("event-after", "right_parenthesis", "in the past, to the event behind; from the last to the present"),
    Meaning("present", "right_curly_bracket", "back to the present"),
    Meaning("bookmark", "b", "bookmark this place, or no longer"),
    Meaning("bookmarks", "apostrophe", "go to a bookmark"),
    Meaning("record", "Q", "record a macro, or end it"),
    Meaning("command", "colon", "type a command"),
    Meaning("palette", "ctrl+p", "everything by name"),
    Meaning("help", "question_mark", "keys, signs and words of what is shown"),
    Meaning("mouse", "number_sign", "leave the mouse to the terminal, or take it back"),
    Meaning("pane", "d", "show or hide the details of the row in front"),
    Meaning("quit", "q,ctrl+q", "leave"),
    Meaning("dialog-close", "escape", "close as it was", ("dialog-close", "prompt-cancel", "pfn.leave-go"), DIALOG),
    Meaning("help-close", "question_mark,q", "close what is only read", ("help-close", "output-close"), DIALOG),
    Meaning("choose", "space", "mark it, or show it, or no longer", ("columns-toggle", "said-mark"), DIALOG),
    Meaning("further-left", "K,shift+up", "further to the left", ("columns-left-one",), DIALOG),
    Meaning("further-right", "J,shift+down", "further to the right", ("columns-right-one",), DIALOG),
    Meaning("usual", "d", "as it is where nothing was chosen", ("columns-defaults",), DIALOG),
    Meaning("copy-told", "c", "copy what is told", ("output-copy", "said-copy"), DIALOG),
    Meaning("make-macro", "m", "make a macro of it", ("said-macro",), DIALOG),
    Meaning("take", "enter", "take what is written", ("prompt-enter", "columns-take", "said-take"), DIALOG),
    Meaning("complete", "tab", "take the next completion", ("prompt-complete",), DIALOG),
    Meaning("complete-back", "shift+tab", "take the completion before", ("prompt-complete-back",), DIALOG),
    Meaning("search", "ctrl+r", "search former lines for what is typed", ("prompt-search",), DIALOG),
    Meaning("former", "up", "the line or field before", ("prompt-up", "form-previous"), DIALOG),
    Meaning("next", "down", "the next line or field", ("prompt-down", "form-next"), DIALOG),
    Meaning("form-submit", "ctrl+s", "go on to the plan", scope=DIALOG),
    Meaning("macro-step", "ctrl+t", "run a macro a step at a time", scope=DIALOG),
    Meaning("plan-options", "o", "change the arguments", scope=DIALOG),
    Meaning("confirm-yes", "y", "yes", scope=DIALOG),
    Meaning("confirm-no", "n", "no", scope=DIALOG),
    Meaning("confirm-left", "left", "the answer at the left", scope=DIALOG),
    Meaning("confirm-right", "right", "the answer at the right", scope=DIALOG),
)
"""Every meaning, in the order in which the cheat sheet has them."""

BY_ID: Mapping[str, Meaning] = {meaning.id: meaning for meaning in MEANINGS}
OF_BINDING: Mapping[str, Meaning] = {id: meaning for meaning in MEANINGS for id in meaning.bindings}

KEYMAPS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "vim": {
        "page-up": "pageup,ctrl+u",
        "page-down": "pagedown,ctrl+d,ctrl+f",
        "back": "escape,backspace,ctrl+o",
        "filter": "slash,asterisk",
        "quit": "q,ctrl+q,Z",
    },
    "arrows": {
        "up": "up",
        "down": "down",
        "left": "left",
        "right": "right",
        "first": "home",
        "last": "end",
        "filter": "slash,f3",
        "help": "question_mark,f1",
        "again": "r,f5",
        "quit": "q,ctrl+q,f10",
    },
}
"""The maps one can choose: what each has other than the default one, by meaning. ``vim`` moves by vim's keys too,
``arrows`` leaves no letter to moving."""

_SIGNS = {
    "slash": "/",
    "less_than_sign": "<",
    "greater_than_sign": ">",
    "left_square_bracket": "[",
    "right_square_bracket": "]",
    "left_curly_bracket": "{",
    "right_curly_bracket": "}",
    "plus": "+",
    "equals_sign": "=",
    "minus": "-",
    "full_stop": ".",
    "comma": ",",
    "colon": ":",
    "semicolon": ";",
    "question_mark": "?",
    "at": "@",
    "dollar_sign": "$",
    "asterisk": "*",
    "exclamation_mark": "!",
    "apostrophe": "'",
    "quotation_mark": '"',
    "left_parenthesis": "(",
    "right_parenthesis": ")",
    "ampersand": "&",
    "number_sign": "#",
    "percent_sign": "%",
    "circumflex_accent": "^",
    "tilde": "~",
    "vertical_line": "|",
    "backslash": "\\",
    "underscore": "_",
    "grave_accent": "`",
}
_NAMES = {sign: name for name, sign in _SIGNS.items()}


def split(keys: str) -> tuple[str, ...]:
    """The keys of a list, each by its long name; ``,`` alone is the comma."""
    if keys.strip() == ",":
        return ("comma",)
    return tuple(_NAMES.get(key.strip(), key.strip()) for key in keys.split(",") if key.strip())


def shown(keys: str) -> str:
    """A list of keys as people read it: ``/``, ``Enter``, ``q ctrl+q``."""
    words = []
    for key in split(keys):
        sign = _SIGNS.get(key, key)
        words.append(sign if len(sign) == 1 or "+" in sign else sign.capitalize())
    return " ".join(words)


class Keymap(NamedTuple):
    """The keys of every binding by its id, and what is wrong with what was asked for, a sentence each."""

    keys: Mapping[str, str]
    complaints: tuple[str, ...]


def keymap(name: str = "", own: Mapping[str, str] | None = None, place: Callable[[str], str] = str) -> Keymap:
    """A keymap by its name, with the operator's own keys over it.

    ``own`` has a binding's or a meaning's id and its keys, ``place`` says where one of them stands (``keymap`` itself
    is one), for complaints. What is not known, and what would take a key from another meaning, does not hold.
    """
    own = own or {}
    complaints = []
    if name and name not in KEYMAPS:
        complaints.append(f"{place('keymap')}: there is no keymap {name!r}; there are {', '.join(KEYMAPS)}")
    chosen = KEYMAPS.get(name, {})
    base = {id: chosen.get(meaning.id, meaning.keys) for id, meaning in OF_BINDING.items()}
    asked: dict[str, tuple[str, str]] = {}
    for word, keys in own.items():
        if not split(keys):
            complaints.append(f'{place(word)}: {word} has no key; write at least one, as in {word} = "f5"')
        elif word in OF_BINDING:
            asked[word] = (word, keys)
        elif word in BY_ID:
            asked |= {id: (word, keys) for id in BY_ID[word].bindings if id not in own}
        else:
            complaints.append(f"{place(word)}: {_unknown(word)}")
    while True:
        held = base | {id: ",".join(split(keys)) for id, (_, keys) in asked.items()}
        clash = next(_clashes(held, asked), None)
        if clash is None:
            return Keymap(held, tuple(complaints))
        key, id, other = clash
        word = asked[id][0]
        complaints.append(
            f"{place(word)}: {shown(key)} cannot be {word}, it is {other.id} already ({other.help});"
            f" give {other.id} another key, or {word}"
        )
        asked = {each: wish for each, wish in asked.items() if wish[0] != word}


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, [*OF_BINDING, *BY_ID], n=1, cutoff=0.5)
    meant = f"; {near[0]} is near" if near else ""
    return f"no key has the id {word!r}{meant} (memconsole keys lists them)"


def _clashes(held: Mapping[str, str], asked: Iterable[str]) -> Iterator[tuple[str, str, Meaning]]:
    """Each key that a wish takes from another meaning: the key, the binding that wishes, and the other meaning."""
    taken: dict[tuple[str, str], list[str]] = {}
    for id, keys in held.items():
        for key in split(keys):
            taken.setdefault((OF_BINDING[id].scope, key), []).append(id)
    for id in asked:
        for key in split(held[id]):
            for other in taken[OF_BINDING[id].scope, key]:
                if OF_BINDING[other] is not OF_BINDING[id]:
                    yield key, id, OF_BINDING[other]


def taken(held: Mapping[str, str]) -> dict[str, Meaning]:
    """What each key of the views means in a keymap."""
    found: dict[str, Meaning] = {}
    for id, keys in held.items():
        if OF_BINDING[id].scope == CONSOLE:
            found |= dict.fromkeys(split(keys), OF_BINDING[id])
    return found


def shared(held: Mapping[str, str]) -> list[str]:
    """Every key that has more than one meaning in a keymap: there should be none."""
    meanings: dict[tuple[str, str], set[str]] = {}
    for id, keys in held.items():
        for key in split(keys):
            meanings.setdefault((OF_BINDING[id].scope, key), set()).add(OF_BINDING[id].id)
    return [f"{key} ({scope}): {', '.join(sorted(ids))}" for (scope, key), ids in meanings.items() if len(ids) > 1]


# --- the cheat sheet and the sample file ----------------------------------------------------------------------------

_HEAD = """\
# Keys

A key has one meaning in every view. `?` in the console shows those that work where one is; `memconsole keys` prints
this list, `memconsole keys --sample` the file that gives other keys, with every id in it.

Three keymaps: `default`; `vim`, which moves by vim's keys too; `arrows`, which leaves no letter to moving.
`keymap = "vim"` in `console.toml` (in `$XDG_CONFIG_HOME/memconsole`, else `/etc/memconsole`) chooses one. Under
`[keys]` there, an id of the table and its keys: the id of a meaning for all of its bindings, or that of a single
binding. A key that has another meaning, and an id that does not exist, are refused with the line they stand on and the
nearest id there is; `memconsole keys --check FILE` says the same of a file before a console is opened.

"""


def markdown() -> str:
    """The cheat sheet, as docs/keys.md has it."""
    text = _HEAD
    for scope, title in ((CONSOLE, "In every view"), (DIALOG, "In dialogs and on the line")):
        text += f"## {title}\n\n| key | meaning | id | bindings | vim | arrows |\n|---|---|---|---|---|---|\n"
        for meaning in MEANINGS:
            if meaning.scope == scope:
                ids = " ".join(f"`{id}`" for id in meaning.ids)
                maps = [_cell(KEYMAPS[name].get(meaning.id, "")) for name in ("vim", "arrows")]
                row = (_cell(meaning.keys), meaning.help, f"`{meaning.id}`", ids, *maps)
                text += "| " + " | ".join(row) + " |\n"
        text += "\n"
    return text.rstrip("\n") + "\n"


def _cell(keys: str) -> str:
    return " ".join(f"`{key}`" for key in shown(keys).split())


def lines(name: str = "") -> list[str]:
    """The cheat sheet for a terminal, in one of the keymaps.

    Raises:
        KeyError: there is no such keymap.
    """
    chosen = KEYMAPS[name or "default"]
    found = []
    for meaning in MEANINGS:
        keys = shown(chosen.get(meaning.id, meaning.keys))
        where = "" if meaning.scope == CONSOLE else "  (dialogs)"
        found.append(f"{keys:<18} {meaning.id:<14} {meaning.help}{where}")
    return found


def sample() -> str:
    """A ``console.toml`` in which everything stands, and nothing is changed yet."""
    text = "# console.toml, in $XDG_CONFIG_HOME/memconsole or /etc/memconsole. A line without # holds.\n\n"
    text += f'# keymap = "default"    # or: {", ".join(list(KEYMAPS)[1:])}\n'
    text += '# theme = "memconsole"    # the palette (ctrl+p) lists the others\n\n[keys]\n'
    for meaning in MEANINGS:
        text += f"# {meaning.help}\n"
        text += "".join(f'# "{id}" = "{meaning.keys}"\n' for id in dict.fromkeys((meaning.id, *meaning.ids)))
    return text
