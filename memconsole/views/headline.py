"""What the bars say: whose memory it is, whether it is live, paused, lost or past, what is under way; where one is."""

from __future__ import annotations

import datetime
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from textual.content import Content

from memconsole import readiness, recording
from memconsole.fleet import Fleet
from memconsole.model import Snapshot
from memconsole.readiness import Verdict
from memconsole.source import PastSource
from memconsole.units import format_age
from memconsole.views.console import Console
from memconsole.views.places import Place
from memconsole.views.widgets.bars import Part, plain

SECOND = 1_000_000_000
MISSED = 3
"""Intervals without an answer after which what is shown is stale."""


def headline(app: Console) -> tuple[list[Part], list[Part]]:
    """The parts at the left and at the right end."""
    past = isinstance(app.source, PastSource)
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
    if app.alerts.unseen:
        right.append((f" ✖ {app.alerts.unseen} new ", "bold reverse $error"))
    right += _all_ready(app.source.verdicts()) if isinstance(app.source, Fleet) else [_ready(app.snapshot)]
    right.append(_liveness(app))
    if app.snapshot is not None:
        right.append((f"{_moment(app, app.snapshot)} ", "bold $accent" if past else ""))
    return left, right


def _ready(snapshot: Snapshot | None) -> Part:
    """The verdict on a handoff, which is in the header of every view."""
    judged = readiness.verdict(snapshot.readiness) if snapshot is not None else Verdict.UNKNOWN
    if judged is Verdict.READY:
        return (" ✔ ready ", "$success")
    return (" ✖ not ready ", "$error") if judged is Verdict.REFUSED else (" ? unchecked ", "$text-muted")


def _all_ready(verdicts: Counter[Verdict]) -> list[Part]:
    """How many hosts are not ready, and of how many it is not known; that all are, where it is so."""
    if verdicts[Verdict.READY] == verdicts.total():
        return [(f" ✔ all {verdicts.total():,} ready ", "$success")]
    refused, unknown = verdicts[Verdict.REFUSED], verdicts[Verdict.UNKNOWN]
    found: list[Part] = [(f" ✖ {refused:,} not ready ", "$error")] if refused else []
    return [*found, *([(f" ? {unknown:,} unchecked ", "$text-muted")] if unknown else [])]


def whole_seconds(age: int) -> str:
    """An age in ns as people say it: in whole seconds."""
    return format_age(age) if age >= SECOND else "under a second"


def trouble_lines(app: Console, width: int) -> list[Content]:
    """Why nothing newer came, what to do about it and how old the picture is; nothing while there is no trouble."""
    if not app.trouble:
        return []
    old = f", {whole_seconds(max(app.clock() - app.arrived_ns, 0))} old" if app.snapshot is not None else ""
    return [plain(part) for part in textwrap.wrap(f"✖ {app.trouble}{old}", max(width, 20))]


def _liveness(app: Console) -> Part:
    if isinstance(app.source, PastSource) and app.snapshot is not None:
        age = max(app.clock() - app.snapshot.taken_ns, 0)
        return (f" ◂ {whole_seconds(age)} ago ", "bold reverse $accent")
    age = max(app.clock() - app.arrived_ns, 0)
    if app.trouble:  # which a line of its own tells in full
        old = f"{whole_seconds(age)} old" if app.snapshot is not None else "no answer"
        return (f" ✖ {old} ", "bold reverse $error")
    if app.snapshot is None:
        return (" ◌ waiting ", "$warning")
    if app.source.read_only == recording.REASON:
        return (" ■ recorded ", "$warning")
    if app.paused:
        return (f" ‖ paused, {whole_seconds(age)} old ", "bold $warning")
    if age > MISSED * max(app.interval, app.took_s) * SECOND:
        return (f" ▲ stale, {whole_seconds(age)} old ", "bold reverse $warning")
    return (" ● live ", "$success")


def _moment(app: Console, snapshot: Snapshot) -> str:
    taken = datetime.datetime.fromtimestamp(snapshot.taken_ns // SECOND, datetime.UTC)
    today = datetime.datetime.fromtimestamp(app.clock() // SECOND, datetime.UTC).date()
    return taken.strftime("%H:%M:%S UTC" if taken.date() == today else "%Y-%m-%d %H:%M:%S UTC")


def crumbs(trail: Sequence[Place], titles: Mapping[str, str]) -> list[Part]:
    """Where one is, and the way there; ``titles`` of views by their names."""
    parts: list[Part] = [(" ", "")]
    for index, place in enumerate(trail):
        text = titles.get(place.view, "")
        if place.subject:
            text = f"{text} {place.subject.replace(':', ' ', 1)}".lstrip()
        parts += [(" ▸ ", "$text-muted")] if index else []
        parts.append((text, "bold $primary" if index == len(trail) - 1 else "$text-muted"))
    return parts
