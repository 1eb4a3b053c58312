"""What a verb makes of an Action: refusals, or steps and what the ledger will say once they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from memconsole.actions import Action
from memconsole.backend.ledger.state import Recorded, StateChange
from memconsole.backend.steps import Step
from memconsole.model import Condition, Finding, Refusal, RevokeReport


@dataclass
class PreparedAction:
    """An Action on its way: ``aims`` is known before the first step, the other fields are after the last.

    ``lasting`` is what stays changed even if a later step fails; ``after`` is called once the ledger knows it is done.
    With refusals there are no steps. ``note`` is what else its plan says. ``then`` is done after it, however it ended,
    as if somebody had asked for it.
    ``from_kernel`` and ``to_kernel``: see :class:`memconsole.model.Plan`.
    """

    subject: str
    text: str
    refusals: list[Refusal] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    aims: StateChange = field(default_factory=StateChange)
    change: StateChange = field(default_factory=StateChange)
    lasting: StateChange = field(default_factory=StateChange)
    revoke: RevokeReport | None = None
    conditions: tuple[Condition, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    after: Callable[[], None] | None = None
    then: list[Action] = field(default_factory=list)
    from_kernel: str = ""
    to_kernel: str = ""
    note: str = ""

    def refuse(self, code: str, what: str, why: str = "", remedy: str = "") -> None:
        """Add a reason not to do it."""
        self.refusals.append(Refusal(code, what, why, remedy))

    def step(
        self,
        id: str,
        text: str,
        do: Callable[[], Recorded[None] | None],
        undo: Callable[[], None] | None = None,
        undo_text: str = "",
    ) -> None:
        """Add a step."""
        self.steps.append(Step(id, text, do, undo, undo_text))
