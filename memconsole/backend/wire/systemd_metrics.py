"""Metrics by ``io.systemd.Metrics``, the Varlink interface by which newer systemds' own services tell theirs.

A family is called ``io.memconsole.NAME``; what a sample is about (a guest, a region) is its object, other labels are
its fields. An info is a string: its first label, the others are fields.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from memconsole.backend.wire.families import Family, Labels, families
from memconsole.backend.wire.protocol import INTERFACE as OWN
from memconsole.model import Snapshot

INTERFACE = "io.systemd.Metrics"
DESCRIPTION = """\
# Metrics, as services of systemd tell theirs
interface io.systemd.Metrics

type MetricFamilyType (counter, gauge, string)

# Every metric, one a reply (more): its value, what it is about, and what tells it from others of its family
method List() -> (name: string, value: object, object: ?string, fields: ?[string]string)

# Every family of metrics, one a reply (more)
method Describe() -> (name: string, description: string, type: MetricFamilyType)

# There is none
error NoSuchMetric ()
"""
_TYPES = {"info": "string"}
_OBJECTS = ("guest", "region")


def listed(snapshot: Snapshot) -> list[bytes]:
    """The parameters of each reply to ``List``."""
    return [
        msgspec.json.encode(_metric(family, labels, value))
        for family in families(snapshot)
        for labels, value in family.samples
    ]


def described(snapshot: Snapshot) -> list[bytes]:
    """The parameters of each reply to ``Describe``."""
    return [
        msgspec.json.encode(
            {"name": _name(family), "description": family.help, "type": _TYPES.get(family.kind, family.kind)}
        )
        for family in families(snapshot)
    ]


def _name(family: Family) -> str:
    return f"{OWN}.{family.name}{'' if family.kind == 'info' else family.suffix}"


def _metric(family: Family, labels: Labels, value: float) -> Mapping[str, object]:
    left = {name: str(label) for name, label in labels.items()}
    told: object = int(value) if value.is_integer() else value
    if family.kind == "info":
        told = left.pop(next(iter(left)))
    about = next((left.pop(name) for name in _OBJECTS if name in left), None)
    parts = (("object", about), ("fields", left))
    return {"name": _name(family), "value": told, **{name: part for name, part in parts if part}}
