"""What the first line says: whose memory this is, whether it is live, paused, lost or past, and what is under way."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from memconsole import recording
from memconsole.model import Snapshot
from memconsole.source import Moment
from memconsole.units import format_duration
from memconsole.views.widgets.bars import Part

if TYPE_CHECKING:
    from memconsole.views.app import ConsoleApp

SECOND = 1_000_000_000


def headline(app: ConsoleApp) -> tuple[list[Part], list[Part]]:
    """The parts at the left and at the right end."""
    past = isinstance(app.source, Moment)
    left: list[Part] = [(" memconsole ", "bold reverse $primary"), (" ", "")]
    if past:
        left += [(" PAST ", "bold reverse $accent"), (" ", "")]
    elif app.source.read_only:
        left += [(" READ-ONLY ", "bold reverse $warning"), (" ", "")]
    if app.snapshot is not None:
        left.append((f" {app.snapshot.host.name}", "bold"))
    left.append((f"  {app.source.label}", "$secondary"))
    if app.snapshot is not None:
        left.append((f"  {app.snapshot.host.kernel}", "$text-muted"))
    if app.source.read_only not in {"", recording.REASON} and not past:
        left.append((f"  {app.source.read_only}", "$warning"))
    right: list[Part] = []
    if app.recording_from is not None:
        right.append((f" ● REC {len(app.journal) - app.recording_from} ", "bold $error"))
    right += [(f" ◌ {title}… ", "bold $accent") for title in app.busy]
    right.append(_liveness(app))
    if app.snapshot is not None:
        right.append((f"{_moment(app, app.snapshot)} ", "bold $accent" if past else ""))
    return left, right


def _liveness(app: ConsoleApp) -> Part:
    if isinstance(app.source, Moment) and app.snapshot is not None:
        age = max(app.clock() - app.snapshot.taken_ns, 0)
        return (f" ◂ {format_duration(age // SECOND * SECOND)} ago ", "bold reverse $accent")
    age = max(app.clock() - app.arrived_ns, 0)
    if app.trouble:
        old = f", {format_duration(age // SECOND * SECOND)} old" if app.snapshot is not None else ""
        return (f" ✖ {app.trouble}{old} ", "bold reverse $error")
    if app.snapshot is None:
        return (" ◌ waiting ", "$warning")
    if app.source.read_only == recording.REASON:
        return (" ■ recorded ", "$warning")
    return (" ‖ paused ", "bold $warning") if app.paused else (" ● live ", "$success")


def _moment(app: ConsoleApp, snapshot: Snapshot) -> str:
    taken = datetime.datetime.fromtimestamp(snapshot.taken_ns // SECOND, datetime.UTC)
    today = datetime.datetime.fromtimestamp(app.clock() // SECOND, datetime.UTC).date()
    return taken.strftime("%H:%M:%S UTC" if taken.date() == today else "%Y-%m-%d %H:%M:%S UTC")
