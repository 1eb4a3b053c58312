"""The fault points of a plan: where :mod:`memconsole.backend.steps` lets a test end the process."""

from __future__ import annotations

from memconsole.model import Plan


def fault_points(plan: Plan) -> tuple[str, ...]:
    """The names of every fault point an apply of this plan passes, in order."""
    return tuple(f"{plan.action}.{effect.id}.{when}" for effect in plan.effects for when in ("before", "after"))
