"""The handoff: what stands in its way, and the last one as it passes, phase by phase, with each guest's blackout."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message

from memconsole import readiness, timeline
from memconsole.model import HandoffReport, Readiness, Region, Snapshot
from memconsole.readiness import Verdict
from memconsole.units import format_duration, format_size
from memconsole.views.bound import bound
from memconsole.views.screens.overview import Panel
from memconsole.views.view import View
from memconsole.views.widgets.bars import Part, line

if TYPE_CHECKING:
    from textual.widget import Widget

_MARKS = {"phase": "━", "blackout": "█", "guest": "█", "device": "▒"}
_STYLES = {"phase": "$primary", "blackout": "$error", "guest": "$warning", "device": "$secondary"}
LABEL = 12


def condition_lines(found: Readiness | None, now_ns: int, width: int) -> list[Content]:
    """What stands in the way first, with risk and remedy; then how many conditions hold, and when that was judged."""
    if readiness.verdict(found) is Verdict.UNKNOWN or found is None:
        return [line([("? ", "bold $warning"), (readiness.sentence(found), "")])]
    lines: list[Content] = []
    for each in found.failing:
        mark: Part = ("✖ FAIL ", "bold $error") if each.refuses else ("▲ warn ", "bold $warning")
        first, *rest = textwrap.wrap(f"{each.id}: {each.observed}", max(width - 7, 20))
        lines.append(line([mark, (first, "")]))
        lines += [line([("       ", ""), (part, "")]) for part in rest]
        lines += _advice("risk: ", each.risk, "$text-muted", width)
        lines += _advice("▸ ", each.remedy, "", width)
    holds = f"{found.total - len(found.failing)} of {found.total} conditions hold"
    mark = ("✔ ", "$success") if readiness.verdict(found) is Verdict.READY else ("▸ ", "$text-muted")
    lines.append(line([mark, (holds, ""), (f"  {readiness.age(found, now_ns)}; r looks again", "$text-muted")]))
    return lines


def _advice(lead: str, text: str, style: str, width: int) -> list[Content]:
    wrapped = textwrap.wrap(text, max(width - 7 - len(lead), 20))
    return [
        line([(f"       {lead if not row else ' ' * len(lead)}", "$primary"), (part, style)])
        for row, part in enumerate(wrapped)
    ]


def report_lines(report: HandoffReport, width: int) -> list[Content]:
    """A report: how it ended, its phases and guests over time, and its regions."""
    tone = {"done": "$success", "failed": "$error"}.get(report.state, "$warning")
    back = sum(guest.back for guest in report.guests)
    words = f"{report.kind} {report.state}, {back} of {len(report.guests)} guests back"
    lines = [line([(words, f"bold {tone}"), (f"  {report.from_kernel} ▸ {report.to_kernel}", "$text-muted")])]
    if report.why:
        lines.append(line([("✖ ", "$error"), (report.why, "")]))
    room = max(10, width // 3)
    total = timeline.span(report)
    for bar in timeline.bars(report):
        left = min(bar.start * room // total, room - 1)
        right = max(left + 1, -(-(total if bar.end is None else bar.end) * room // total))
        drawn = " " * left + _MARKS[bar.kind] * (right - left)
        lines.append(
            line(
                [
                    (f"{bar.label[:LABEL]:<{LABEL}} ", "$secondary"),
                    (f"{drawn:<{room}} ", _STYLES[bar.kind]),
                    (bar.text, ""),
                ]
            )
        )
    for guest in report.guests:
        if said := timeline.clock(guest):
            shown = textwrap.shorten(said, max(width - LABEL - 8, 20), placeholder="…")
            lines.append(line([(f"{guest.name[:LABEL]:<{LABEL}} ", "$secondary"), (f"clock: {shown}", "")]))
    for region in report.regions:
        verdict: Part = (
            ("✖ pages moved", "$error") if region.same is False else ("✔ every page where it was", "$success")
        )
        if region.contents is False:
            verdict = ("✖ contents differ", "$error")
        words = f"{format_size(region.size)} in {region.runs:,} runs  "
        lines.append(line([(f"{region.name[:LABEL]:<{LABEL}} ", "$secondary"), (words, ""), verdict]))
    for device in report.devices:
        mark: Part = ("✔ ", "$success") if device.same else ("✖ ", "$error")
        lines.append(line([(f"{device.bdf[-LABEL:]:<{LABEL}} ", "$secondary"), mark, (timeline.device(device), "")]))
    for window in report.windows:
        mark = ("✔ ", "$success") if window.back else ("▲ ", "$warning")
        words = f"window {window.window} of {window.guest}: {'mapped again' if window.back else window.why}"
        lines.append(line([(f"{'':<{LABEL}} ", ""), mark, (words, "")]))
    lines += [line([("▲ ", "$warning"), (note, "")]) for note in report.notes]
    return lines


def kernel_lines(snapshot: Snapshot) -> list[Content]:
    """What the kernel itself says of live update: sessions and who holds them, KHO's tree, and each region in it."""
    survival = snapshot.survival
    if not survival.luo:
        why = f": {survival.detail}" if survival.detail else ""
        return [line([("○ ", "$text-muted"), (f"this kernel has no live update{why}", "$text-muted")])]
    came = f"booted by a kexec, number {survival.kexec_count}" if survival.kexec_count else "booted cold"
    lines = [line([(f"{'kernel':<{LABEL}} ", "$secondary"), (f"{survival.detail or came}", "")])]
    for session in survival.sessions:
        side = _SIDES.get(session.custody.partition(":")[0], "outside custody")
        held = ", ".join(map(str, session.holders))
        lines.append(
            line([(f"{'session':<{LABEL}} ", "$secondary"), (f"{session.name}  {side}, open in process {held}", "")])
        )
    if not survival.sessions:
        lines.append(
            line([(f"{'sessions':<{LABEL}} ", "$secondary"), ("no session is open: nothing is preserved", "")])
        )
    elif survival.preserved is None:
        lines.append(line([(f"{'tree':<{LABEL}} ", "$secondary"), (survival.unread or "reading…", "")]))
    else:
        words = f"{format_size(survival.preserved)} preserved in {survival.runs:,} runs, by all sessions together"
        lines.append(line([(f"{'tree':<{LABEL}} ", "$secondary"), (words, "")]))
    lines += [_kept_line(region) for region in snapshot.regions if region.seen is not None]
    return lines


def _kept_line(region: Region) -> Content:
    seen = region.seen
    preserved = seen.preserved if seen is not None else None
    came = "retrieved from the previous kernel" if seen is not None and seen.retrieved else "made under this kernel"
    words: list[Part] = [(f"{region.name[:LABEL]:<{LABEL}} ", "$secondary"), (f"{format_size(region.size)} {came}", "")]
    if preserved is not None:
        whole = preserved == region.size
        tone = "$success" if whole else "$warning"
        words.append((f"  {'✔' if whole else '▲'} {format_size(preserved)} of it preserved", tone))
    return line(words)


_SIDES = {"session": "of this kernel, in custody", "incoming": "of the previous kernel, kept in custody"}


class Handoff(View):
    """What a handoff would meet (key ``r`` looks again), how the last one went, and what the kernel says now."""

    DEFAULT_CSS = """
    Handoff > VerticalScroll { scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("handoff-check", "check", "Check", tooltip="check every condition"),
        bound("handoff-run", "begin('handoff-run')", "Hand off"),
        bound("handoff-rehearse", "begin('handoff-rehearse')", "Rehearse"),
    ]

    _asked: Readiness | None = None
    """What key ``r`` found, until the control process has looked later than that."""

    class Checked(Message):
        """The source has looked."""

        def __init__(self, found: Readiness) -> None:
            super().__init__()
            self.found = found

    def compose(self) -> ComposeResult:
        """The last handoff above, conditions and the kernel's word below."""
        with VerticalScroll(id="handoff-scroll"):
            yield Panel(id="last")
            yield Panel(id="conditions")
            yield Panel(id="kernel")

    def on_mount(self) -> None:
        """Titles."""
        self.query_one("#last", Panel).border_title = "Last handoff"
        self.query_one("#conditions", Panel).border_title = "Conditions"
        self.query_one("#kernel", Panel).border_title = "What the kernel says"

    def show(self, snapshot: Snapshot) -> None:
        """Show the report of a Snapshot."""
        made = snapshot.handoff
        nothing = [Content("no handoff was made since this memory was reserved; press B to rehearse one")]
        self.query_one("#last", Panel).show_lines(nothing if made is None else report_lines(made, self._width))
        self.query_one("#kernel", Panel).show_lines(kernel_lines(snapshot))
        self._show_conditions(snapshot)

    def _show_conditions(self, snapshot: Snapshot) -> None:
        found, asked = snapshot.readiness, self._asked
        if (
            asked is not None
            and not self.console.source.read_only
            and (not found or found.checked_ns < asked.checked_ns)
        ):
            found = asked
        now = max(snapshot.taken_ns, found.checked_ns if found is not None else 0)
        self.query_one("#conditions", Panel).show_lines(condition_lines(found, now, self._width))

    @property
    def _width(self) -> int:
        return max(self.size.width - 6, 40)

    def action_check(self) -> None:
        """Ask what a handoff would meet now."""
        if why := self.console.source.read_only:
            self.notify(why, title="Nothing can be checked here", severity="warning", markup=False)
            return
        self.query_one("#conditions", Panel).show_lines([Content("looking…")])
        self._check_in_thread()

    def action_begin(self, id: str) -> None:
        """Begin a handoff: its arguments, its plan, its confirmation."""
        self.console.begin(id, {}, options=True)

    @work(thread=True, group="check", exclusive=True, description="check")
    def _check_in_thread(self) -> None:
        self.post_message(self.Checked(readiness.judge(self.console.source.plan)))

    def on_handoff_checked(self, event: Checked) -> None:
        """Show what was found."""
        self._asked = event.found
        if self.console.snapshot is not None:
            self._show_conditions(self.console.snapshot)

    def on_resize(self) -> None:
        """Draw the picture anew."""
        if self.console.snapshot is not None:
            self.show(self.console.snapshot)

    @property
    def status(self) -> str:
        """The longest blackout of the last handoff."""
        snapshot = self.console.snapshot
        if snapshot is None or snapshot.handoff is None:
            return ""
        known = [guest.blackout_ns for guest in snapshot.handoff.guests if guest.blackout_ns is not None]
        return f"blackout {format_duration(max(known))}" if known else snapshot.handoff.state

    @property
    def first_focus(self) -> Widget | None:
        """What scrolls."""
        return self.query_one("#handoff-scroll", VerticalScroll)
