"""One action on many things: what each of them would see done, then each of them done, one failing or not.

The items are independent of each other: each has a plan of its own, made as things are before any is applied, and what
fails on one does not keep the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from memconsole import actions, unforeseen
from memconsole.actions import Action
from memconsole.arguments import ArgumentKind
from memconsole.errors import MemconsoleError
from memconsole.fields import TABLES
from memconsole.model import Outcome, Plan, Refusal
from memconsole.source import Source

ROW_KINDS = {
    "regions": ArgumentKind.REGION,
    "guests": ArgumentKind.GUEST,
    "grants": ArgumentKind.GRANT,
    "windows": ArgumentKind.WINDOW,
}
"""What an argument that a row of each table answers is called."""


def answered(action_id: str, table_id: str, item: Any) -> dict[str, str]:
    """The arguments of an action that a row answers: its own name, or the process of a guest that is not ours."""
    kind = ROW_KINDS.get(table_id)
    if item is None:
        return {}
    if action_id == "guest-attach":
        foreign = item.kind == "foreign" and item.pid is not None
        return {"name": item.name, "pid": str(item.pid)} if foreign else {}
    fields = actions.fields(actions.REGISTRY[action_id])
    named = next((field.name for field in fields if field.required and field.arg.kind is kind), None)
    return {} if named is None else {named: TABLES[table_id].key(item)}


class BulkItem(NamedTuple):
    """An action of many: its plan, then what became of it, or what kept it."""

    action: Action
    plan: Plan
    outcome: Outcome | None = None
    error: MemconsoleError | None = None

    @property
    def refused(self) -> bool:
        """Whether its plan cannot be applied."""
        return bool(self.plan.refusals)


def plan_one(source: Source, action: Action) -> Plan:
    """An action's plan; one that cannot be made is a plan that is refused."""
    plan = unforeseen.attempt("the plan", "console", partial(source.plan, action))
    if isinstance(plan, MemconsoleError):
        return actions.refused_plan(action, Refusal(plan.code, plan.what, plan.why, plan.remedy))
    return plan


def plans(source: Source, many: Iterable[Action]) -> Iterator[BulkItem]:
    """Each action with its plan."""
    for action in many:
        yield BulkItem(action, plan_one(source, action))


def applied(source: Source, items: Iterable[BulkItem], told: Callable[[BulkItem], object]) -> list[BulkItem]:
    """The items that are not refused, each applied and told of, or with the error that kept it."""
    done = []
    for item in items:
        if item.refused:
            continue
        found = unforeseen.attempt(item.action.spec.title, "console", partial(source.apply, item.action))
        if isinstance(found, MemconsoleError):
            done.append(item._replace(error=found))
        else:
            done.append(item._replace(outcome=found))
        told(done[-1])
    return done


def rest(items: Sequence[BulkItem]) -> list[Action]:
    """The actions that were not done."""
    return [item.action for item in items if item.outcome is None]
