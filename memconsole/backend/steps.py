"""A verb is a list of steps: plan shows them, apply runs exactly those, and a failure undoes them in reverse.

Every step boundary is a fault point, ``ACTION.STEP.before`` or ``ACTION.STEP.after``: a process whose environment has
``MEMCONSOLE_FAULT=NAME`` kills itself (SIGKILL) there. Tests find the points of an action in its plan. With
``MEMCONSOLE_FAULT=@FILE`` it is the first point whose name is not in the file yet, once it was added: started again and
again, a process dies at each of its points in turn (native/faultpoint.h is the same for programs in C).

Every step is logged, with its time and how it ended (:mod:`.steplog`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memconsole.backend import steplog
from memconsole.backend.ledger.state import Recorded
from memconsole.errors import MemconsoleError
from memconsole.model import Effect

FAULT_VARIABLE = "MEMCONSOLE_FAULT"


@dataclass(frozen=True)
class Step:
    """One step: ``do`` does all of it or nothing; ``undo`` (none: there is no way back) takes it back.

    A ``do`` that has something to record is a generator of records.
    """

    id: str
    text: str
    do: Callable[[], Recorded[None] | None]
    undo: Callable[[], None] | None = None
    undo_text: str = ""

    @property
    def effect(self) -> Effect:
        """The step as a plan shows it."""
        return Effect(self.id, self.text, self.undo_text)


def run(action: str, steps: Sequence[Step]) -> Recorded[None]:
    """Run the steps in order; if one fails, undo those before it in reverse and raise its error.

    The records of the steps are handed up as they come.

    Raises:
        MemconsoleError: the error of the step that failed; what could not be undone is added to its ``why``.
    """
    done: list[Step] = []
    with steplog.running(action):
        for step in steps:
            try:
                point(f"{action}.{step.id}.before")
                with steplog.passing(action, step.id, step.text):
                    records = step.do()
                    if records is not None:
                        yield from records
                done.append(step)
                point(f"{action}.{step.id}.after")
            except BaseException as error:
                left = _undo(action, done)
                if left and isinstance(error, MemconsoleError):
                    error.why = "; ".join(filter(None, [error.why, *left]))
                elif left:
                    error.add_note("; ".join(left))
                raise


def _undo(action: str, done: Sequence[Step]) -> list[str]:
    left = []
    for step in reversed(done):
        if step.undo is None:
            continue
        try:
            with steplog.passing(action, step.id, step.undo_text, undo=True):
                step.undo()
        except (MemconsoleError, OSError) as error:
            left.append(f"and not undone: {step.text} ({error})")
    return left


def passed(name: str) -> None:
    """A fault point that is logged: one inside of a step, or of an adoption."""
    steplog.passed(name)
    point(name)


def point(name: str) -> None:
    """A fault point: the process ends here if its environment says so."""
    fault = os.environ.get(FAULT_VARIABLE, "")
    if fault == name or (fault.startswith("@") and _first(Path(fault[1:]), name)):
        os.kill(os.getpid(), signal.SIGKILL)


def _first(seen: Path, name: str) -> bool:
    """Whether a point's name is new to a file of them; then it is added."""
    if seen.exists() and name in seen.read_text(encoding="utf-8", errors="replace").splitlines():
        return False
    with seen.open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")
    return True
