"""How a Snapshot is taken: everybody is asked at once, and who does not answer in time is shown as silent.

    asked at once, each by a thread of its own (asked.py)
        guests            state, agent, progress
        custody           whether it is there, what waits in it, its sessions
        mount's server    whether it is there
        devices           what they reach
    survey of the kernel ─→ findings, steady while actions run (steady.py)

Looking changes nothing but what was last heard.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from msgspec.structs import replace

from memconsole.backend import needs, own_findings
from memconsole.backend.handoff.facets import HandoffChecks
from memconsole.backend.observe import survey
from memconsole.backend.observe.steady import SteadyFindings
from memconsole.backend.observe.survey import ScanResult, SurveyInput
from memconsole.backend.peers.asked import PATIENCE_S, Polled, Poller
from memconsole.errors import Gone
from memconsole.model import Faults, Finding, Severity, Snapshot, Unread
from memconsole.units import last_answer


class _Custody(NamedTuple):
    """What is wrong with custody, the guests that wait in it, and its sessions of live update."""

    findings: tuple[Finding, ...] = ()
    waiting: tuple[Finding, ...] = ()
    sessions: tuple[str, ...] = ()


class ShownMount(own_findings.Mount, needs.MountFiles, Protocol):
    """The mount, to look at and to write to."""


class Looked(HandoffChecks, needs.Borrowed, needs.Backed, needs.NotedArenas, Protocol):
    """What a Snapshot is made of."""

    @property
    def mount(self) -> ShownMount | None:
        """The mount, if there is one."""

    @property
    def guard(self) -> own_findings.Guard | None:
        """The guard, where guests outlive this process."""

    @property
    def hands_devices(self) -> bool:
        """Whether a VMM has a device that memconsole opened."""

    @property
    def faults(self) -> Mapping[str, Faults]:
        """What was served for each lazy grant."""


class SnapshotTaker:
    """What one control process takes Snapshots with; every method may be called from any thread."""

    def __init__(self, desk: Looked, root: Path, steady: SteadyFindings) -> None:
        self._desk = desk
        self._root = root
        self._steady = steady
        self._custody: Poller[_Custody] = Poller("custody", self._ask_custody)
        self._mount: Poller[bool] = Poller("mount-asked", self._ask_mount)
        self._devices: Poller[tuple[Finding, ...]] = Poller("devices", self._ask_devices)
        self._reached: tuple[Finding, ...] = ()
        self._closed = False

    def take_snapshot(self, standing: tuple[Finding, ...], scanned: Mapping[str, ScanResult]) -> Snapshot:
        """The present Snapshot; ``standing`` findings are in it as they are.

        Raises:
            NotFound, Denied, KernelRefused, BadFile: this host cannot be read at all.
        """
        since, desk, deadline = self._steady.change_count(), self._desk, time.monotonic() + PATIENCE_S
        state, backings = desk.state, desk.backings()
        here = own_findings.known_findings(desk) if not self._closed else ()
        truncated = tuple(own_findings.truncated_regions(state, backings)) if not self._closed else ()
        begun = self._begin() if not self._closed else {}
        answers = desk.guest_replies(deadline)
        heard = {asked: asked.poll(number, deadline) for asked, number in begun.items()}
        custody = heard.get(self._custody, _NOTHING).answer or _Custody()
        devices = heard.get(self._devices, _NOTHING).answer or ()
        firm = (*standing, *self._silent(heard), *custody.findings, *here)
        meant = SurveyInput(
            state,
            backings,
            answers,
            scanned,
            desk.exempt_processes,
            (*firm, *truncated, *custody.waiting, *devices),
            desk.fuse_aliases,
            desk.blocked_mappings,
            desk.faults,
            desk.handoff,
            custody.sessions,
        )
        taken = survey.survey(meant, self._root)
        findings = (*firm, *self._steady.stable_findings(taken.findings[len(firm) :], since))
        return replace(taken, findings=findings, gaps=(*taken.gaps, *self._late(heard)))

    def close(self) -> None:
        """Ask no more."""
        self._closed = True
        for asked in (self._custody, self._mount, self._devices):
            asked.end()

    # --- who is asked besides guests --------------------------------------------------------------------------------

    def _begin(self) -> dict[Poller[Any], int]:
        wanted: list[Poller[Any]] = [self._custody]
        if self._desk.mount is not None:
            wanted.append(self._mount)
        if own_findings.has_devices(self._desk):
            wanted.append(self._devices)
        return {asked: asked.begin() for asked in wanted}

    def _ask_custody(self) -> _Custody:
        desk = self._desk
        return _Custody(
            own_findings.custody_findings(desk),
            own_findings.waiting_guests(desk),
            own_findings.sessions_in_custody(desk),
        )

    def _ask_mount(self) -> bool:
        with contextlib.suppress(Gone):  # which is mended, or told by the mount itself
            if self._desk.mount is not None:
                self._desk.mount.ping()
        return True

    def _ask_devices(self) -> tuple[Finding, ...]:
        found = own_findings.device_findings(self._desk)
        if found is not None:  # else an action changes what they reach: what was found before stands
            self._reached = found
        return self._reached

    def _silent(self, heard: Mapping[Poller[Any], Polled[Any]]) -> list[Finding]:
        found = []
        custody = heard.get(self._custody, _NOTHING)
        if custody.why:
            remedy = "find what blocks it: kill -CONT, if a signal stopped it; do not end it, it holds the memory"
            found.append(_silent("custody", self._desk.custody.label, custody, remedy))
        mount = heard.get(self._mount, _NOTHING)
        if mount.why:
            pid = self._desk.mount.pid if self._desk.mount is not None else None
            remedy = "find what blocks it (kill -CONT, if a signal stopped it); what is mapped stays mapped"
            found.append(_silent("mount", f"the server of the mount, pid {pid},", mount, remedy))
        return found

    def _late(self, heard: Mapping[Poller[Any], Polled[Any]]) -> list[Unread]:
        devices = heard.get(self._devices, _NOTHING)
        return [Unread("devices", f"what devices reach is not known: {devices.why}")] if devices.why else []


_NOTHING: Polled[Any] = Polled(None, None)


def _silent(subject: str, who: str, heard: Polled[Any], remedy: str) -> Finding:
    what = f"{who} does not answer: {last_answer(heard.at_ns, time.time_ns())}"
    return Finding(f"{subject}-silent", Severity.WARNING, subject, what, heard.why, remedy)
