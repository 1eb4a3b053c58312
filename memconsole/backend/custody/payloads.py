"""What custody says of the files it holds: payloads, read leniently and rewritten without loss (:mod:`.newer`).

A payload is JSON of one value. A field with a default may be added to it by any version; what else is added, or means
something else, goes under a name of its own kind (``KINDS``), which an older memconsole keeps and tells of.
"""

from __future__ import annotations

import os
from typing import TypeVar

from memconsole import decoding, newer
from memconsole.backend.custody.holder import Custody
from memconsole.errors import BadFile, NotFound
from memconsole.model import Finding, Severity, Value

KINDS = frozenset(
    {
        "again",
        "aside",
        "aside-plan",
        "board",
        "carried",
        "fast",
        "fresh",
        "group",
        "halted",
        "incoming",
        "iommu",
        "iova",
        "landed",
        "ledger",
        "manifest",
        "mount",
        "quarantine",
        "region",
        "report",
        "resume",
        "session",
        "started",
        "state",
        "told",
        "uffd",
        "vfio",
    }
)
"""What stands before the colon of every name that this memconsole puts into custody."""

_REMEDY = "start the memconsole that put it there; until then it is kept as it is"

T = TypeVar("T", bound=Value)


def read(name: str, payload: bytes, kind: type[T]) -> T:
    """A payload as a value.

    Raises:
        Undecodable: it is none of this kind.
    """
    return decoding.json(payload, kind, what=f"what custody says of {name}", remedy=_REMEDY)


def held(custody: Custody, name: str, kind: type[T]) -> T:
    """What custody says of a file, as a value; the file itself is not wanted.

    Raises:
        NotFound: custody holds no such file. Undecodable: its payload is none of this kind.
    """
    fd, payload = custody.get(name)
    os.close(fd)
    return read(name, payload, kind)


def put(custody: Custody, name: str, fd: int, value: Value, *, like: str = "") -> None:
    """Hold an fd with a value as its payload, and with what a newer memconsole wrote of it under ``name`` or ``like``.

    Raises:
        UsageError, Refused, Gone: see :meth:`Custody.put`.
    """
    custody.put(name, fd, newer.encode(value, _rest(custody, like or name, type(value))))


def unknown(name: str, error: BadFile) -> Finding:
    """That custody holds something which this memconsole cannot read, and keeps."""
    return Finding("custody-unknown", Severity.WARNING, name, error.what, error.why, error.remedy)


def unknown_kinds(custody: Custody) -> list[Finding]:
    """What custody holds of kinds that this memconsole does not know, one finding a kind."""
    found: dict[str, list[str]] = {}
    for name in custody.names():
        kind = name.partition(":")[0]
        if kind not in KINDS:
            found.setdefault(kind, []).append(name)
    return [
        Finding(
            "custody-unknown",
            Severity.WARNING,
            kind,
            f"custody holds {len(names)} files of a kind that this memconsole does not know: {kind}",
            ", ".join(names[:8]),
            _REMEDY,
        )
        for kind, names in found.items()
    ]


def _rest(custody: Custody, name: str, kind: type[Value]) -> object:
    try:
        fd, payload = custody.get(name)
    except NotFound:
        return None
    os.close(fd)
    try:
        return newer.rest(payload, read(name, payload, kind))
    except BadFile:
        return None
