"""Names taken out of what is handed on: one way for listings, snapshots, pictures and reports.

What is a name: of hosts, guests, regions and processes, of users, of files outside of the kernel's own directories,
the command lines of guests and the boot id. In its place stands a pseudonym (``guest-3``): the same name has the same
one throughout a :class:`Redactor`, so throughout a file, and another Redactor gives others. Numbers, addresses, sizes,
words of the kernel and what memconsole itself calls things (grants, findings, PCI addresses) stay.

A name is found wherever it stands as a word of a text, or as a part of one that ``-`` sets apart; so a text about an
entity that neither the Snapshot nor its events know any more keeps that one's name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from memconsole.actions import REGISTRY, refused_plan
from memconsole.actions import fields as action_fields
from memconsole.arguments import ArgumentKind
from memconsole.errors import Refused
from memconsole.model import FrameState, Refusal, Snapshot

if TYPE_CHECKING:
    from memconsole.actions import Action
    from memconsole.extents import ExtentTable
    from memconsole.model import Event, Outcome, Part, Plan
    from memconsole.source import Source

T = TypeVar("T")

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_PATH = re.compile(r"(?<![A-Za-z0-9._/])/(?!(?:proc|sys|dev)(?:/|\b))[^\s\"',;:()]+")
_UID = re.compile(r"\buid (\d+)\b")
_VCPU_THREAD = re.compile(r"CPU \d+/(KVM|TCG)")

_OURS = {
    ("Finding", "id"),
    ("Condition", "id"),
    ("Phase", "id"),
    ("Event", "kind"),
    ("Host", "kernel"),
    ("Host", "arch"),
    ("Host", "tool"),
    ("Capability", "id"),
}
"""Fields whose texts are words of memconsole or of the kernel, and never a name."""

_COMMANDS = {("Guest", "command"), ("Helper", "command")}
_PROCESSES = {("GuestSeen", "comm"), ("ThreadUsage", "name")}
_WHOLE = {
    ("Managed", "title"): "title",
    ("Managed", "uuid"): "uuid",
    ("Label", "text"): "label",
    ("Managed", "taps"): "tap",
    ("Managed", "monitor"): "path",
    ("Disk", "source"): "path",
    ("MemoryModule", "source"): "path",
}
"""Fields whose texts are names from end to end, and what kind of."""
_OF_DOMAINS = frozenset({"domain-started", "domain-ended"})
"""Events of guests that nobody did anything to: their manager started or ended them."""
_KINDS = {ArgumentKind.REGION: "region", ArgumentKind.GUEST: "guest", ArgumentKind.NEW_NAME: ""}


class Redactor:
    """The pseudonyms of one file."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._phrases: dict[str, str] = {}  # names that are more than one word
        self._counts: dict[str, int] = {}

    def learn(self, snapshot: Snapshot) -> None:
        """Know the names that a Snapshot has."""
        self._name("host", snapshot.host.name)
        self._name("boot", snapshot.host.boot_id)
        for guest in snapshot.guests:
            self._name("guest", guest.name)
            if guest.managed is not None:
                self._name("guest", guest.managed.name)
        for region in snapshot.regions:
            self._name("region", region.name)
        for event in snapshot.events:
            kind = _subject_kind(event.kind)
            if kind:
                self._name(kind, event.subject)

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        """A Snapshot with pseudonyms for its names."""
        self.learn(snapshot)
        return self.value(snapshot)

    def value(self, value: T) -> T:
        """A value of the model (or a tuple, list or dict of them) with pseudonyms for the names that are known."""
        return self._value(value)  # type: ignore[no-any-return]

    def text(self, text: str) -> str:
        """A text with pseudonyms for the names that are known, for paths and for users."""
        kind, colon, name = text.partition(":")
        if name in self._names:  # with whatever is in it: region:NAME
            return kind + colon + self._names[name]
        if text in self._names:
            return self._names[text]
        for phrase, pseudonym in self._phrases.items():
            text = text.replace(phrase, pseudonym)
        if "/" in text:
            text = _PATH.sub(lambda found: self._name("path", found[0]), text)
        if "uid " in text:
            text = _UID.sub(lambda found: "uid " + self._name("user", found[1], key=f"uid {found[1]}"), text)
        return _WORD.sub(self._word, text)

    def name_of(self, pseudonym: str) -> str:
        """The name behind a pseudonym; a text that is none stays."""
        back = {told: name for name, told in self._names.items()}
        return _WORD.sub(lambda found: back.get(found[0], found[0]), pseudonym)

    def _name(self, kind: str, name: str, *, key: str = "") -> str:
        """The pseudonym of a name, made where it has none yet."""
        key = key or name
        known = self._names.get(key)
        if known is None and name:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            known = self._names[key] = f"{kind}-{self._counts[kind]}"
            if key == name and kind in {"guest", "region"} and not _WORD.fullmatch(name):
                self._phrases[name] = known
        return known or name

    def _word(self, found: re.Match[str]) -> str:
        word = found[0]
        if word in self._names:
            return self._names[word]
        bare = word.rstrip("._-")
        if bare in self._names:
            return self._names[bare] + word[len(bare) :]
        for at in (index for index, char in enumerate(word) if char == "-"):
            before, after = word[:at], word[at + 1 :]
            if after in self._names:
                return f"{before}-{self._names[after]}"
            if before in self._names:
                return f"{self._names[before]}-{after}"
        return word

    def _value(self, value: Any) -> Any:
        if type(value) is str:  # an enumeration's words are no names
            return self.text(value)
        if isinstance(value, msgspec.Struct):
            return self._struct(value)
        if isinstance(value, dict):
            return {self._value(key): self._value(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_make"):
            return value._make(map(self._value, value))
        if isinstance(value, list | tuple):
            return type(value)(map(self._value, value))
        return value

    def _struct(self, value: msgspec.Struct) -> msgspec.Struct:
        changed: dict[str, Any] = {}
        for name, treat in _texts_of(type(value)):
            old = getattr(value, name)
            new = treat(self, old) if treat is not None else self._value(old)
            if new is not old and new != old:
                changed[name] = new
        return msgspec.structs.replace(value, **changed) if changed else value

    def _command(self, words: Sequence[str]) -> tuple[str, ...]:
        return (self._name("command", "\0".join(words)),) if words else ()

    def _process(self, name: str) -> str:
        return name if _VCPU_THREAD.fullmatch(name) else self._name("process", name, key=f"process {name}")

    def _whole(self, value: Any, kind: str) -> Any:
        """A text, or the texts of a tuple, each a name as a whole."""
        if isinstance(value, str):
            return self._name(kind, value) if value else value
        return tuple(self._whole(each, kind) for each in value)


Treat = Callable[[Redactor, Any], Any]


@functools.cache
def _texts_of(cls: type[msgspec.Struct]) -> tuple[tuple[str, Treat | None], ...]:
    """The fields of a type in which names may stand, each with what is done to it if not the usual."""
    found: list[tuple[str, Treat | None]] = []
    for name, hint in get_type_hints(cls).items():
        place = (cls.__name__, name)
        if name.startswith("_") or name not in cls.__struct_fields__ or place in _OURS or not _may_hold(hint):
            continue
        treat: Treat | None = None
        if place in _COMMANDS:
            treat = Redactor._command  # noqa: SLF001 - its own
        elif place in _WHOLE:
            treat = functools.partial(Redactor._whole, kind=_WHOLE[place])  # noqa: SLF001 - its own
        elif place in _PROCESSES:
            treat = Redactor._process  # noqa: SLF001 - its own
        found.append((name, treat))
    return tuple(found)


def _may_hold(hint: Any) -> bool:
    """Whether a value of a type can have a text in it."""
    if hint in {int, float, bool, type(None)} or get_origin(hint) is Literal:
        return False
    parts = [part for part in get_args(hint) if part is not Ellipsis]
    return any(map(_may_hold, parts)) if parts else True


@functools.cache
def _subject_kind(event_kind: str) -> str:
    """Of what an event's subject is the name: a region, a guest; empty where it is something else."""
    if event_kind in _OF_DOMAINS:
        return "guest"
    cls = REGISTRY.get(event_kind)
    if cls is None:
        return ""
    fields = action_fields(cls)
    if not fields:
        return ""
    first = fields[0].arg.kind
    if first is ArgumentKind.NEW_NAME:
        return cls.spec.on.removesuffix("s")
    return _KINDS.get(first, "") if cls.spec.id != "map" else ""


class RedactedSource:
    """Another Source with pseudonyms for its names; nothing can be changed through it."""

    def __init__(self, source: Source, redactor: Redactor | None = None) -> None:
        self._source = source
        self.redactor = redactor or Redactor()

    @property
    def label(self) -> str:
        """Nothing of the other source's label, which is a path."""
        return "redacted"

    @property
    def read_only(self) -> str:
        """Why nothing is applied."""
        return "its names are redacted"

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        """The other source's Snapshot, redacted."""
        return self.redactor.snapshot(self._source.snapshot(parts))

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """The other source's table of what a pseudonym stands for."""
        return self._source.extents(self.redactor.name_of(key), at_ns)

    def frame(self, pfn: int) -> FrameState:
        """What the other source says of a frame."""
        return self._source.frame(pfn)

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:  # noqa: ARG002 - refused all the same
        """A plan that refuses."""
        what = f"{action.spec.title} is refused here"
        return refused_plan(action, Refusal("ReadOnly", what, self.read_only, "act without --redact"))

    def apply(self, action: Action) -> Outcome:
        """Refuse.

        Raises:
            Refused: always, as ``ReadOnly``.
        """
        raise Refused(f"{action.spec.title} is refused here", self.read_only, "act without --redact", code="ReadOnly")

    def events(self, after: int) -> Sequence[Event]:
        """The other source's events, redacted."""
        return self.redactor.value(tuple(self._source.events(after)))

    def history(self, after: int = 0) -> Sequence[int]:
        """The other source's history."""
        return self._source.history(after)

    def at(self, time_ns: int) -> Snapshot:
        """What the other source recorded, redacted."""
        return self.redactor.snapshot(self._source.at(time_ns))

    def close(self) -> None:
        """Let go of the other source."""
        self._source.close()
