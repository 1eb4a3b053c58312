"""A host of a fleet that says it is one and has no kernel to boot: a handoff changes what it says, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from memconsole.actions import Action, HandoffRun
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.model import Condition, GuestResult, HandoffReport, HandoffState, Outcome, Severity
from support.served import ServedSource
from support.synthetic import NOW_NS, snapshot

OLD, NEW = "7.3.4 #1 SMP", "7.3.5 #1 SMP"
CUSTODY = Condition("custody", Severity.ERROR, True, "custody is there", "memory is lost", "keeper", "serve")
HUGETLB = Condition("hugetlb", Severity.ERROR, False, "no hugetlb pages", "a region is lost", "web has some", "reserve")


class StubHost(ServedSource):
    """Runs ``OLD`` and would boot ``NEW``; ``jumps`` counts handoffs that were not left out."""

    def __init__(self) -> None:
        super().__init__(replace(snapshot(), handoff=None))
        self.conditions = (CUSTODY,)
        self.kernels = (OLD, NEW)
        self.jumps = 0

    def apply(self, action: Action, *, peer: str = "") -> Outcome:
        """A handoff boots the next kernel, unless it runs and that was asked for."""
        here, then = self.kernels
        outcome = super().apply(action, peer=peer)
        if isinstance(action, HandoffRun) and not (action.unless_running and here == then):
            guests = tuple(GuestResult(each.name, each.kind, each.memory, back=True) for each in self._snapshot.guests)
            made = HandoffReport("run", HandoffState.DONE, NOW_NS, here, then, guests=guests)
            self.show(replace(self._snapshot, handoff=made))
            self.kernels = (then, then)
            self.jumps += 1
        return outcome


@contextlib.contextmanager
def stub_host(path: Path) -> Iterator[StubHost]:
    """One that is served on a control socket at ``path``."""
    host = StubHost()
    handle = serve_in_thread(host, path)
    try:
        yield host
    finally:
        handle.close()
