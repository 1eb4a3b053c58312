"""Values of the model with the texts that others chose replaced, as somebody hostile would choose them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
FREE = frozenset(
    {
        "comm",
        "command",
        "observed",
        "risk",
        "why",
        "evidence",
        "remedy",
        "text",
        "path",
        "driver",
        "kernel",
        "detail",
        "source",
    }
)
"""The fields that hold text of others; what the rest holds are words of the model."""


def spoiled(value: T, spoil: Callable[[str], str], also: Collection[str] = ()) -> T:
    """The same value with the texts of those fields, and of ``also``, spoiled at any depth."""

    def of(item: Any, key: str) -> Any:
        if isinstance(item, dict):
            return {name: of(each, name) for name, each in item.items()}
        if isinstance(item, list | tuple):
            return [of(each, key) for each in item]
        return spoil(item) if isinstance(item, str) and (key in FREE or key in also) else item

    return msgspec.convert(of(msgspec.to_builtins(value), ""), type=type(value))
