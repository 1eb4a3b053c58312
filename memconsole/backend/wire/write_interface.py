"""The types of the interface file, from the model: ``python -m memconsole.backend.wire.write_interface`` rewrites them.

What a person writes (methods, errors, the text above) stands before the line ``TYPES`` in the file; what follows it is
made here. An entity becomes a struct, a choice of words an enumeration; the actions are a comment, for Varlink has no
sum type to say them in.
"""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from memconsole import actions, model
from memconsole.backend.wire import delta, inline, protocol

TYPES = "# --- types, from memconsole/model/ ---"
ROOTS = (
    model.Snapshot,
    delta.Delta,
    model.Plan,
    model.Outcome,
    model.Event,
    model.Capability,
    model.Part,
    inline.InlinePart,
    model.FrameState,
)
NAMES = {"Plan": "ActionPlan"}
"""Types of another name than their class: a member of an interface has a name of its own, and Plan is a method."""

MAPS = {
    "fields": ("SnapshotFields", "Whole new values of a Snapshot's fields; those that are not there did not change."),
    "changed": ("ChangedEntities", "Entities that are new or changed, by table."),
    "removed": ("RemovedKeys", "The keys of entities that went, as text, by table."),
}
"""The members of a Delta that are maps: Varlink's maps have values of one type, so each becomes a struct of its own."""

_WORD = re.compile(r"[A-Za-z](_?[A-Za-z0-9])*")
_SIMPLE = {int: "int", str: "string", bool: "bool", float: "float"}


class _Types:
    """The types met so far, in the order they were first named."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts.values())

    def write(self, hint: Any) -> str:
        """A type expression for an annotation; structs and enumerations are named and written once."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is typing.Annotated:
            return self.write(arguments[0])
        if origin in {types.UnionType, typing.Union}:
            (inner,) = (argument for argument in arguments if argument is not type(None))
            return "?" + self.write(inner)
        if origin in {tuple, list}:
            return "[]" + self.write(arguments[0])
        if origin is typing.Literal:
            return _words(arguments)
        if hint in _SIMPLE:
            return _SIMPLE[hint]
        if hint is Any:
            return "object"
        name: str = NAMES.get(hint.__name__, hint.__name__)
        if name not in self._texts:
            self._declare(name, hint)
        return name

    def _declare(self, name: str, cls: type) -> None:
        self._texts[name] = ""  # holds its place while the types it names are written
        document = _comment(inspect.getdoc(cls) or "")
        if issubclass(cls, enum.StrEnum):
            self._texts[name] = f"{document}type {name} {_words([word.value for word in cls])}\n"
            return
        hints = get_type_hints(cls, include_extras=True)
        if cls is delta.Delta:
            members = {member: self._declare_map(member) for member in cls.__struct_fields__}
        else:
            members = {member: self.write(hints[member]) for member in cls.__struct_fields__}  # type: ignore[attr-defined]
        self._texts[name] = document + _struct(name, members)

    def _declare_map(self, member: str) -> str:
        """The struct for a map of a Delta, and its name."""
        name, says = MAPS[member]
        hints = get_type_hints(model.Snapshot, include_extras=True)
        keys = hints if member == "fields" else delta.KEYS
        written = {key: "[]string" if member == "removed" else self.write(hints[key]).lstrip("?") for key in keys}
        members = {key: f"?{kind}" for key, kind in written.items()}
        self._texts[name] = _comment(says) + _struct(name, members)
        return name


def _struct(name: str, members: dict[str, str]) -> str:
    return f"type {name} (\n" + ",\n".join(f"  {member}: {kind}" for member, kind in members.items()) + "\n)\n"


def _words(words: typing.Sequence[Any]) -> str:
    """An enumeration; one word alone, or words that cannot be members of one, are a string."""
    if len(words) > 1 and all(isinstance(word, str) and _WORD.fullmatch(word) for word in words):
        return "(" + ", ".join(words) + ")"
    return "string"


def _comment(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.replace("``", "").splitlines())


def _actions(found: _Types) -> str:
    lines = ["# An action is an object: do names it, its other members are its arguments (? may be left out).", "#"]
    for id, cls in actions.REGISTRY.items():
        hints = get_type_hints(cls, include_extras=True)
        written = [
            f"{field.name}{'' if field.required else '?'}: {found.write(hints[field.name]).lstrip('?')}"
            for field in actions.fields(cls)
        ]
        lines += [f"#   {id}({', '.join(written)})", f"#       {cls.spec.help}."]
    return "\n".join(lines) + "\n"


def generated() -> str:
    """The part of the interface file that is made from the model."""
    found = _Types()
    for root in ROOTS:
        found.write(root)
    return "\n".join([TYPES + "\n", _actions(found), *found])


def main() -> None:
    """Rewrite the generated part of the interface file."""
    path = Path(__file__).with_name(f"{protocol.INTERFACE}.varlink")
    written, _, _ = protocol.description().partition(TYPES)
    path.write_text(written + generated(), encoding="utf-8")


if __name__ == "__main__":
    main()
