"""What helps with a line while it is typed: the words that may stand there, the argument that is meant, the plan."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

from memconsole.model import Plan
from memconsole.views.completing import Completions
from memconsole.views.widgets.bars import line
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.fitting import fit

WORDS = 7
"""Completions that are shown at once."""
EFFECTS = 5
LEAD = 25
"""Columns that padding, mark and word take of a completion's line."""


class Assist(Lines):
    """The lines above the prompt."""

    DEFAULT_CSS = """
    Assist { layer: prompt; dock: bottom; margin-bottom: 2; height: auto; max-height: 15; background: $surface; }
    Assist { display: none; padding: 0 1; border-top: solid $border; }
    """

    def __init__(self) -> None:
        super().__init__(id="assist")
        self._words: list[Content] = []
        self._plan: list[Content] = []

    def show_words(self, found: Completions, at: int | None) -> None:
        """Show the completions around number ``at``, and the argument that is meant."""
        room = min(self.app.size.width - LEAD, 60)
        start = max(0, min((at or 0) - WORDS // 2, len(found.words) - WORDS))
        self._words = [
            line(
                [
                    ("▸ " if number == at else "  ", "bold $primary"),
                    (f"{each.word:<20} ", "bold $accent" if number == at else "bold"),
                    (fit(each.help, room).rstrip(), "$text-muted"),
                ]
            )
            for number, each in list(enumerate(found.words))[start : start + WORDS]
        ]
        if len(found.words) > WORDS:
            self._words.append(line([(f"  {len(found.words):,} in all; Tab goes through them", "$text-muted")]))
        if found.argument:
            self._words.append(line([("  ", ""), (found.argument, "$secondary")]))
        self._show()

    def show_plan(self, plan: Plan | None) -> None:
        """Show what the action that stands there would do, or that it would be refused; None: there is none."""
        self._plan = [] if plan is None else [*_plan_lines(plan)]
        self._show()

    def close(self) -> None:
        """Show nothing."""
        self._words, self._plan = [], []
        self._show()

    def _show(self) -> None:
        lines = [*self._words, *self._plan]
        self.show_lines(lines)
        self.display = bool(lines)


def _plan_lines(plan: Plan) -> Sequence[Content]:
    head = line([("$ ", "$success"), (plan.cli, "$text-muted")])
    if plan.refusals:
        told = [line([("✖ ", "bold $error"), (f"{each.code}: {each.what}", "$error")]) for each in plan.refusals]
        remedies = [line([("  ▸ ", "bold $primary"), (each.remedy, "")]) for each in plan.refusals if each.remedy]
        return [head, *told[:EFFECTS], *remedies[:1]]
    steps = [
        line([(f"{number:>2} ", "bold $primary"), (effect.text, "")]) for number, effect in enumerate(plan.effects, 1)
    ]
    more = len(steps) - EFFECTS
    return [head, *steps[:EFFECTS], *([line([(f"   and {more} more steps", "$text-muted")])] if more > 0 else [])]
