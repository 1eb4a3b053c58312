"""Where Snapshots come from and Actions go: one protocol for this process, another process, and a file.

The embedded control process, the wire client and a recorded snapshot all are Sources; console, command line and
macros know nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from memconsole.actions import Action
    from memconsole.errors import NotFound
    from memconsole.extents import ExtentTable
    from memconsole.model import Event, FrameState, Outcome, Part, Plan, Snapshot


class Source(Protocol):
    """What every face of memconsole is built on; every method may be called from any thread."""

    @property
    def label(self) -> str:
        """Where this comes from, in a few words for a title bar (``embedded``, a socket's path, a file's name)."""

    @property
    def read_only(self) -> str:
        """Why no Action can be applied here (``a recorded snapshot``, ``--read-only``), or an empty string."""

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        """The present Snapshot with these parts, or more (of a file: the recorded one, with those it has)."""

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """The PFN map of ``region:NAME`` (by offset) or ``guest:NAME`` (by gpa, or hva where no gpa is known).

        With a time, ns since the epoch, the last one that was scanned until then and recorded; ``scanned_ns`` is when.
        Every call makes a new table; it is the caller's, and closed with its last reference.

        Raises:
            NotFound: there is no such region or guest, the file holds no table for it, or none was recorded.
            Denied: the kernel does not show PFNs to this user.
            Gone: the process ended.
        """

    def frame(self, pfn: int) -> FrameState:
        """What the kernel says of a page frame at present.

        Raises:
            NotFound: there is no such frame, or this is the past, which has none.
            Denied: the kernel does not show it to this user.
        """

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        """What the Action would do, in order, or by what name it is refused; nothing is changed.

        ``after``: as if these had been done before, in order; one of them that would be refused counts for nothing.
        """

    def apply(self, action: Action) -> Outcome:
        """Plan once more and do it.

        Raises:
            Refused: the first refusal of the plan.
            MemconsoleError: a step failed; those before it were undone.
        """

    def events(self, after: int) -> Sequence[Event]:
        """The events with a sequence number above ``after``, oldest first."""

    def history(self, after: int = 0) -> Sequence[int]:
        """When Snapshots were recorded, ns since the epoch, oldest first; only times above ``after``."""

    def at(self, time_ns: int) -> Snapshot:
        """The Snapshot that was current at ``time_ns``: the last one recorded until then.

        Raises:
            NotFound: none was (``NotRecorded``).
            BadFile: it was, and its file is damaged.
        """

    def close(self) -> None:
        """Let go of what this source holds; an embedded control process ends its guests and frees its regions."""


def no_map_at(key: str, at_ns: int, first_ns: int | None = None) -> NotFound:
    """The error for a PFN map that was not recorded until a time; ``first_ns`` is when it was, later."""
    from memconsole.errors import NotFound
    from memconsole.units import format_time

    later = f"; the first of it was at {format_time(first_ns)}" if first_ns is not None else ""
    return NotFound(
        f"no PFN map of {key} is recorded of {format_time(at_ns)}",
        f"a map is recorded when it is looked at, and this one was not by then{later}",
        "look at maps that you want to compare later; memconsole snapshot --pfn -o FILE keeps all of a moment",
        code="NotRecorded",
    )


def no_frame_at(pfn: int) -> NotFound:
    """The error for what the kernel said of a frame in the past."""
    from memconsole.errors import NotFound

    why = "what the kernel says of frames is not recorded"
    return NotFound(f"the flags of frame {pfn:#x} are not known", why, "ask in the present", code="NotRecorded")


def nothing_at(times: Sequence[int]) -> NotFound:
    """The error for a time before the first of those at which something was recorded."""
    from memconsole.errors import NotFound
    from memconsole.units import format_time

    why = f"the first snapshot is of {format_time(times[0])}" if times else "no snapshot was recorded"
    remedy = "see memconsole history list" if times else "memconsole serve records, and so does an open console"
    return NotFound("nothing is recorded of that time", why, remedy, code="NotRecorded")


class ReadOnly:
    """Another Source without its actions: plans are shown, nothing is applied."""

    def __init__(self, source: Source, reason: str) -> None:
        self._source = source
        self._reason = reason

    @property
    def label(self) -> str:
        """The other source's label."""
        return self._source.label

    @property
    def read_only(self) -> str:
        """Why nothing is applied."""
        return self._source.read_only or self._reason

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        """The other source's Snapshot."""
        return self._source.snapshot(parts)

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """The other source's table."""
        return self._source.extents(key, at_ns)

    def frame(self, pfn: int) -> FrameState:
        """What the other source says of a frame."""
        return self._source.frame(pfn)

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        """The other source's plan, refused as read-only."""
        from msgspec.structs import replace

        from memconsole.model import Refusal

        plan = self._source.plan(action, after)
        refusal = Refusal(
            "ReadOnly", f"{action.spec.title} is refused here", self.read_only, "open it without --read-only"
        )
        return replace(plan, refusals=(refusal, *plan.refusals))

    def apply(self, action: Action) -> Outcome:
        """Refuse.

        Raises:
            Refused: always, as ``ReadOnly``.
        """
        from memconsole.errors import Refused

        raise Refused(
            f"{action.spec.title} is refused here", self.read_only, "open it without --read-only", code="ReadOnly"
        )

    def events(self, after: int) -> Sequence[Event]:
        """The other source's events."""
        return self._source.events(after)

    def history(self, after: int = 0) -> Sequence[int]:
        """The other source's history."""
        return self._source.history(after)

    def at(self, time_ns: int) -> Snapshot:
        """What the other source recorded."""
        return self._source.at(time_ns)

    def close(self) -> None:
        """Let go of the other source."""
        self._source.close()


class PastSource:
    """Another Source, ``live``, at a past time: its recorded Snapshot and nothing that was not recorded."""

    def __init__(self, source: Source, snapshot: Snapshot) -> None:
        from memconsole.units import format_time

        self.live = source
        self._snapshot = snapshot
        self.when = format_time(snapshot.taken_ns)

    @property
    def label(self) -> str:
        """The other source's label."""
        return self.live.label

    @property
    def read_only(self) -> str:
        """Why nothing is applied."""
        return f"this is the past, {self.when}"

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:  # noqa: ARG002 - it has what was recorded
        """The recorded Snapshot."""
        return self._snapshot

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """The last table that was scanned until then and recorded, if it is of the region or guest of this Snapshot.

        Raises:
            NotFound: none was recorded.
        """
        from memconsole.errors import NotFound

        taken = self._snapshot.taken_ns
        table = self.live.extents(key, taken if at_ns is None else min(at_ns, taken))
        kind, _, name = key.partition(":")
        named = self._snapshot.regions if kind == "region" else self._snapshot.guests if kind == "guest" else ()
        made = max((each.created_ns for each in named if each.name == name), default=0)
        if table.scanned_ns < made:
            table.close()
            raise NotFound(
                f"no PFN map of {key} is recorded of {self.when}",
                "the last one before is of another that had its name",
                "( and ) go to other moments",
                code="NotRecorded",
            )
        return table

    def frame(self, pfn: int) -> FrameState:
        """Nothing: what the kernel says of frames is not recorded.

        Raises:
            NotFound: always.
        """
        raise no_frame_at(pfn)

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:  # noqa: ARG002 - refused all the same
        """A plan that refuses."""
        from memconsole.actions import refused_plan
        from memconsole.model import Refusal

        what = f"{action.spec.title} is refused here"
        return refused_plan(action, Refusal("ReadOnly", what, self.read_only, "return to the present"))

    def apply(self, action: Action) -> Outcome:
        """Refuse.

        Raises:
            Refused: always, as ``ReadOnly``.
        """
        from memconsole.errors import Refused

        what = f"{action.spec.title} is refused here"
        raise Refused(what, self.read_only, "return to the present", code="ReadOnly")

    def events(self, after: int) -> Sequence[Event]:
        """The recorded events above ``after``."""
        return [event for event in self._snapshot.events if event.seq > after]

    def history(self, after: int = 0) -> Sequence[int]:
        """The other source's history."""
        return self.live.history(after)

    def at(self, time_ns: int) -> Snapshot:
        """What the other source recorded."""
        return self.live.at(time_ns)

    def close(self) -> None:
        """The other source stays open."""
