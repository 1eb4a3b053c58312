"""No finding comes or goes because an action happens to run.

A Snapshot reads the ledger at one moment and the kernel at others: what an action changes in between looks like a
difference, and a difference that was there may be out of sight. So of what an action touches that is under way while
a Snapshot is taken, the Snapshot says what was found before; once it has ended, what there is to find is found.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from memconsole import actions
from memconsole.actions import Action
from memconsole.backend.ledger.state import State, StateChange
from memconsole.model import Finding

ALWAYS = frozenset({"guest-corrupt"})
"""What a guest says of its memory is true whatever is done meanwhile."""
FOREIGN = "ram-not-preserved"
"""Said of a VM under a name of its own, also of one that is a guest in a moment."""


_KEPT = 64
"""Actions that ended of which it is remembered when: more than end while one Snapshot is taken."""


class ActionScope(NamedTuple):
    """The names of what an action changes; ``all``: of everything. ``starts``: processes that become guests."""

    names: frozenset[str] = frozenset()
    all: bool = False
    starts: bool = False

    def concerns(self, finding: Finding) -> bool:
        """Whether a finding is about what the action changes."""
        if finding.id in ALWAYS:
            return False
        return self.all or finding.subject in self.names or (self.starts and finding.id == FOREIGN)


def action_scope(state: State, action: Action, subject: str, aims: StateChange) -> ActionScope:
    """What an action changes: its subject and what it makes, and all that is joined to these by grants."""
    names = {subject, *(region.name for region in aims.regions), *(guest.name for guest in aims.guests)}
    grants = {(each.id, each.region, each.guest) for each in (*state.grants.values(), *aims.grants)}
    grants |= {(each.id, each.window, each.guest) for each in (*state.windows.values(), *aims.windows)}
    joined = [set(grant) for grant in grants if names & set(grant)]
    near = names.union(*joined)
    return ActionScope(
        frozenset(near.union(*(set(grant) for grant in grants if near & set(grant)))),
        isinstance(action, actions.HandoffAction),
        isinstance(action, actions.GuestStart | actions.GuestResume | actions.GuestStop),
    )


class SteadyFindings:
    """What was found while nothing was done; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment = 0
        self._under_way: list[ActionScope] = []
        self._ended: deque[tuple[ActionScope, int]] = deque(maxlen=_KEPT)
        self._stood: tuple[Finding, ...] = ()

    @contextlib.contextmanager
    def acting(self, what: ActionScope) -> Iterator[None]:
        """While an action changes ``what``."""
        with self._lock:
            self._under_way.append(what)
        try:
            yield
        finally:
            with self._lock:
                self._moment += 1
                self._under_way.remove(what)
                self._ended.append((what, self._moment))

    def change_count(self) -> int:
        """Now, as a Snapshot that begins remembers it."""
        with self._lock:
            return self._moment

    def stable_findings(self, found: Iterable[Finding], since: int) -> tuple[Finding, ...]:
        """The findings of a Snapshot that began at ``since``."""
        with self._lock:
            acts = [*self._under_way, *(what for what, ended in self._ended if ended > since)]
            if acts:
                stood = [each for each in self._stood if any(act.concerns(each) for act in acts)]
                found = (*stood, *(each for each in found if not any(act.concerns(each) for act in acts)))
            self._stood = tuple(found)
            return self._stood
