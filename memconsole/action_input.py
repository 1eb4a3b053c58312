"""An Action from what somebody gave: text that a person wrote, or plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from memconsole import decoding
from memconsole.actions import REGISTRY, Action, AnyAction, fields
from memconsole.arguments import ActionField, ArgumentKind, read_value
from memconsole.errors import UsageError
from memconsole.units import parse_bdf


def build(id: str, arguments: Mapping[str, Any]) -> Action:
    """An Action from its id and arguments; text is read as a person writes it, other values are taken as they are.

    Raises:
        UsageError: an unknown action or argument, one that is missing, or a value that does not fit.
    """
    cls = REGISTRY.get(id)
    if cls is None:
        raise UsageError(f"unknown action {id!r}", "", f"one of: {', '.join(sorted(REGISTRY))}")
    known = {field.name: field for field in fields(cls)}
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        key = name.replace("-", "_")
        if key not in known:
            raise UsageError(f"{id} has no argument {name!r}", "", f"its arguments: {', '.join(known)}")
        values[key] = read_value(known[key], value) if isinstance(value, str) else value
    missing = [field.name for field in known.values() if field.required and field.name not in values]
    if missing:
        raise UsageError(f"{id} lacks {', '.join(missing)}", "", cls.spec.help)
    try:
        return decoding.convert({"do": id, **values}, cls, what=id)
    except decoding.Undecodable as error:
        raise UsageError(f"{id}: {error.why}", "", f"see memconsole {' '.join(cls.spec.words)} --help") from None


def encode(action: Action) -> dict[str, Any]:
    """An Action as plain JSON values, tagged by ``do``; :func:`decode` reads it back."""
    encoded: dict[str, Any] = msgspec.to_builtins(action)
    return encoded


def _without_nulls(value: Any) -> Any:
    """An action's values without those of arguments that may be left out and are null, which says the same."""
    cls = REGISTRY.get(value.get("do", "")) if isinstance(value, dict) and isinstance(value.get("do"), str) else None
    if cls is None:
        return value
    optional = {field.name for field in fields(cls) if not field.required}
    return {name: item for name, item in value.items() if item is not None or name not in optional}


def decode(value: Any) -> Action:
    """An Action from plain JSON values.

    Raises:
        UsageError: not an action, or one with arguments that do not fit.
    """
    try:
        action: Action = decoding.convert(_without_nulls(value), AnyAction, what="an action")
    except decoding.Undecodable as error:
        raise UsageError("not an action", error.why, f"one of: {', '.join(sorted(REGISTRY))}") from None
    for field in fields(type(action)):
        _meant_as_such(field, getattr(action, field.name))
    return action


def _meant_as_such(field: ActionField, value: Any) -> None:
    """Refuse text that would become another file's name than the one that it stands for.

    Raises:
        UsageError: a PCI address that is none, a NUL byte.
    """
    words = value if isinstance(value, tuple) else (value,)
    if any(isinstance(word, str) and "\0" in word for word in words):
        raise UsageError(
            f"{field.name} cannot have a NUL byte in it",
            "no system call takes a name with a NUL byte",
            "remove the NUL byte",
        )
    if field.arg.kind is ArgumentKind.BDF and value is not None and parse_bdf(value) != value:
        raise UsageError(f"{value!r} is not a whole PCI address", "on the wire it has its domain", "write 0000:00:04.0")
