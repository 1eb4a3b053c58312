"""The one pen: what a control process appends to its ledger, what that amounts to, and the audit trail beside it.

Only :mod:`memconsole.backend.control` has one (an import contract holds it). What happens in a room below is handed up
as a value: the room is a generator that yields each record, at the moment when it must be in the ledger before the room
goes on, and :meth:`Writer.carry` appends it and resumes the room with its number. A record that cannot be appended is
raised where it was yielded, so that the room undoes what it must. A room that dies between two yields dies between two
records, and nothing can come between a record and the room's next line.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from memconsole.backend.ledger import log, opening
from memconsole.backend.ledger.opening import LEDGER
from memconsole.backend.ledger.state import KINDS, Record, Recorded, State, fold
from memconsole.model import Finding

if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody

__all__ = ["LEDGER", "Writer"]

T = TypeVar("T")


def carry(room: Recorded[T], record: Callable[[Record], int]) -> T:
    """Run a room to its end and record what it hands up before it goes on; what it returns."""
    try:
        handed_up = next(room)
        while True:
            try:
                number = record(handed_up)
            except BaseException as error:  # noqa: BLE001 - the room undoes what it must, and raises it again
                handed_up = room.throw(error)
            else:
                handed_up = room.send(number)
    except StopIteration as ended:
        result: T = ended.value
        return result


class Writer:
    """A ledger that is written; every method may be called from any thread, one record is appended at a time."""

    def __init__(self, custody: Custody, root: Path, state_dir: Path | None = None) -> None:
        """Open the ledger in custody, or begin one; the audit trail is in ``state_dir``, if there is one.

        Raises:
            BadFile: the ledger cannot be believed, or is of a newer version; or the audit trail is.
            KernelRefused: there is no memory for a ledger.
        """
        self._recording = threading.Lock()
        with contextlib.ExitStack() as undo:
            self._ledger = opening.in_custody(custody, root)
            undo.callback(self._ledger.close)
            self._state = fold(self._ledger.records())
            self._state.boot = opening.boot_of(self._state, self._ledger, custody)
            self._audit = opening.trail(state_dir, self._ledger, root) if state_dir is not None else None
            undo.pop_all()

    @property
    def state(self) -> State:
        """What the ledger means now; it never changes, the next record makes another."""
        return self._state

    @property
    def chain(self) -> str:
        """The boot in which the ledger was begun."""
        return self._ledger.chain

    def dropped(self) -> list[Finding]:
        """What of the ledger was lost before it was opened."""
        return [self._ledger.dropped.finding()] if self._ledger.dropped else []

    def findings(self) -> tuple[Finding, ...]:
        """What the audit trail lacks."""
        return tuple(self._audit.findings()) if self._audit is not None else ()

    def record(self, record: Record) -> int:
        """Append a record and fold it in; its number.

        Raises:
            KernelRefused: the ledger cannot grow; nothing is recorded.
        """
        with self._recording:
            return self._append(record)

    def record_if(self, made: Callable[[State], Record | None]) -> None:
        """Append what the present state makes due, if anything; no other record comes between."""
        with self._recording:
            record = made(self._state)
            if record is not None:
                self._append(record)

    def carry(self, room: Recorded[T]) -> T:
        """Run a room to its end and append each record that it hands up before it goes on; what it returns."""
        return carry(room, self.record)

    def compact(self) -> None:
        """Write a ledger that has grown long anew, unless an action is under way.

        Raises:
            KernelRefused: there is no memory for it; it stays as it is.
        """
        with self._recording:
            if self._ledger.worth_compacting and not (self._state.unfinished or self._state.unknown_intents):
                self._ledger.compact(self._state.compacted())

    def close(self) -> None:
        """Let go of ledger and trail; custody keeps what it holds."""
        self._ledger.close()
        if self._audit is not None:
            self._audit.close()

    def _append(self, record: Record) -> int:
        kind, payload = KINDS[type(record)], self._state.encode(record)
        seq = self._ledger.append(kind, payload)
        if self._audit is not None:
            self._audit.note(log.Record(seq, kind, payload))
        self._state = self._state.apply_record(seq, record)
        return seq
