"""A host of a fleet that says it is one and has no kernel to boot: a handoff changes what it says, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from memconsole.actions import Action, HandoffRun
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.model import Condition, GuestResult, HandoffReport, HandoffState, Outcome, Refusal, Severity, Snapshot
from support.served import ServedSource
from support.synthetic import NOW_NS, snapshot

OLD, NEW = "7.3.4 #1 SMP", "7.3.5 #1 SMP"
CUSTODY = Condition("custody", Severity.ERROR, True, "custody is there", "memory is lost", "keeper", "serve")
HUGETLB = Condition("hugetlb", Severity.ERROR, False, "no hugetlb pages", "a region is lost", "web has some", "reserve")


class StubHost(ServedSource):
    """Runs ``OLD`` and would boot ``NEW``; ``jumps`` counts handoffs that were not left out.

    ``lands`` is what a jump ends in: the next kernel, with all guests or without one; the ``old`` kernel, guests and
    all; or a ``cold`` boot, in which nothing is left.
    """

    def __init__(self) -> None:
        super().__init__(replace(snapshot(), handoff=None))
        self.conditions = (CUSTODY,)
        self.kernels = (OLD, NEW)
        self.jumps = 0
        self.lands: Literal["whole", "torn", "old", "cold"] = "whole"
        self.outdated: Callable[[], object] = lambda: None
        """Called when what it shows is another: a test acts beside its service, which may still give out the last."""

    def show(self, shown: Snapshot) -> None:
        """Make this the present Snapshot, of its service too."""
        super().show(shown)
        self.outdated()

    def refuses(self, condition: Condition | None) -> None:
        """Refuse handoffs by this condition from now on, or by none."""
        self.conditions = (condition or CUSTODY,)
        self.refuse = (
            (Refusal("Hugetlb", condition.observed, condition.risk, condition.remedy),) if condition is not None else ()
        )

    def apply(self, action: Action, *, peer: str = "") -> Outcome:
        """A handoff boots the next kernel, unless it runs and that was asked for."""
        here, then = self.kernels
        outcome = super().apply(action, peer=peer)
        if isinstance(action, HandoffRun) and not (action.unless_running and here == then):
            self.jumps += 1
            self._land(here, then)
        return outcome

    def _land(self, here: str, then: str) -> None:
        shown = self._snapshot
        booted = replace(shown.host, boot_id=f"boot-{self.jumps}")
        guests = tuple(GuestResult(each.name, each.kind, each.memory, True, 7, 250_000_000) for each in shown.guests)
        if self.lands == "torn":
            guests = (replace(guests[0], back=False, why="its memory is not whole"), *guests[1:])
        began = NOW_NS + self.jumps
        made = HandoffReport("run", HandoffState.DONE, began, release(here), release(then), guests=guests)
        self.show(replace(shown, host=booted, handoff=made if self.lands != "cold" else None))
        if self.lands != "old":
            self.kernels = (then, then)


def release(kernel: str) -> str:
    """A kernel as ``uname -r`` names it."""
    return kernel.split(" ", 1)[0]


@contextlib.contextmanager
def stub_host(path: Path) -> Iterator[StubHost]:
    """One that is served on a control socket at ``path``."""
    host = StubHost()
    handle = serve_in_thread(host, path)
    host.outdated = lambda: handle.loop.call(handle.service.survey.outdate)
    try:
        yield host
    finally:
        handle.close()
