"""A handoff as a picture of time: its phases one below the other, and the guests' blackouts below them.

The same for terminals (:func:`lines`) and documents (:func:`svg`): a function of the report alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from memconsole.model import DeviceResult, GuestKind, GuestResult, HandoffReport
from memconsole.units import PAGE, format_duration, format_size

_LABEL = 14
_RIGHT_NS = 100_000_000
"""A clock that is off by less is right: the way to it and back is in the figure."""
_SOURCES = {
    "kvmclock": "its kvmclock continues from where it stood",
    "vmclock": "its vmclock reports the break",
}
_SVG_LABEL, _SVG_WIDTH, _MARGIN, _ROW, _CHARACTER = 110, 1000, 30, 22, 7.3
_COLOURS = {
    "phase": "#7aa2c8",
    "blackout": "#c8553d",
    "guest": "#333333",
    "device": "#7a6a3a",
    "scale": "#dddddd",
}


class TimelineBar(NamedTuple):
    """One row: a phase, or the time a guest stood still or a device was quiet.

    ns since the handoff began, ``end`` None while it lasts.
    """

    kind: str
    label: str
    start: int
    end: int | None
    text: str


def headline(report: HandoffReport) -> str:
    """A report in a line: what was made, between which kernels, and how many guests are back."""
    back = sum(guest.back for guest in report.guests)
    kernels = f"{report.from_kernel} to {report.to_kernel}"
    return f"{report.kind} {report.state}: {kernels}, {back} of {len(report.guests)} guests back"


def bars(report: HandoffReport) -> Iterator[TimelineBar]:
    """The rows of a picture: phases in order, then guests, then devices."""
    for phase in report.phases:
        took = "..." if phase.end_ns is None else format_duration(phase.end_ns - phase.start_ns)
        yield TimelineBar(
            "blackout" if phase.blackout else "phase", phase.id, phase.start_ns, phase.end_ns, f"{took}  {phase.text}"
        )
    stood = next((phase.start_ns for phase in report.phases if phase.blackout), 0)
    for guest in report.guests:
        if guest.blackout_ns is not None:
            by = f"blackout {format_duration(guest.blackout_ns)} (by {guest.by})"
            yield TimelineBar("guest", guest.name, stood, stood + guest.blackout_ns, by)
        elif report.state != "running":
            yield TimelineBar("guest", guest.name, stood, stood, f"is not back: {guest.why}" if guest.why else "ran on")
    for each in report.devices:
        if each.quiesced_ns is not None:
            text = "not back" if each.back_ns is None else f"quiet {format_duration(each.back_ns - each.quiesced_ns)}"
            yield TimelineBar(
                "device", each.bdf, each.quiesced_ns, each.back_ns, f"{text}  {each.how} for {each.guest}"
            )


def clock(guest: GuestResult) -> str:
    """What a guest's wall clock is after the handoff, in one line; empty where there is nothing to say."""
    if not guest.back:
        return ""
    found = guest.clock
    if found is None:
        return "not known yet" if guest.kind is GuestKind.QEMU else ""
    if guest.kind is GuestKind.CANARY:
        return found.note
    if found.was_ns is None:
        late = f" by {format_duration(guest.blackout_ns)}" if guest.blackout_ns is not None else " by the blackout"
        said = f"late{late} until something in the guest sets it: {found.note}"
    else:
        said = f"it was {_off(found.was_ns)}, and is {_off(found.late_ns)}: {found.note}"
    return "; ".join((said, *(_SOURCES[source] for source in found.sources if source in _SOURCES)))


def _off(late_ns: int | None) -> str:
    if late_ns is None:
        return "not known"
    if abs(late_ns) < _RIGHT_NS:
        return "right"
    return f"{format_duration(abs(late_ns))} {'late' if late_ns > 0 else 'ahead'}"


def device(value: DeviceResult) -> str:
    """How a device came along, in one line."""
    size = f"{format_size(value.pages * PAGE)} of IOVA in {value.runs} runs"
    place = {True: "every IOVA where it was", False: "IOVA DIFFER", None: "NOT BACK"}[value.same]
    who = "" if value.source == "kernel" else " (by the ledger)"
    return f"{value.how}, {size}, {place}{who}" + (f": {value.why}" if value.why else "")


def span(report: HandoffReport) -> int:
    """Nanoseconds the picture covers."""
    return max((bar.end if bar.end is not None else bar.start for bar in bars(report)), default=0) or 1


def lines(report: HandoffReport, width: int = 100) -> list[str]:
    """The picture as text of at most ``width`` cells a line: ``=`` passes, ``#`` is blackout, ``~`` a quiet device."""
    room = max(10, width // 3)
    total = span(report)
    drawn = []
    for bar in bars(report):
        left = bar.start * room // total
        right = max(left + 1, -(-(total if bar.end is None else bar.end) * room // total))
        mark = {"phase": "=", "device": "~"}.get(bar.kind, "#")
        line = f"{bar.label[:_LABEL]:<{_LABEL}} {'':<{left}}{mark * (right - left):<{room - left}} {bar.text}"
        drawn.append(line[:width].rstrip())
    return drawn


def svg(report: HandoffReport) -> str:
    """The picture as an SVG document: a row a phase and a guest, over a scale of time."""
    rows = list(bars(report))
    total = span(report)
    height = (len(rows) + 3) * _ROW
    scale = (_SVG_WIDTH - _SVG_LABEL - _MARGIN) / total
    title = f"{report.kind} of {report.from_kernel} to {report.to_kernel}: {format_duration(total)}"
    size = f'width="{_SVG_WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="12">',
        f'<rect {size} fill="white"/>',
        f'<text x="8" y="16">{escape(title)}</text>',
    ]
    for tick in _ticks(total):
        x = _SVG_LABEL + tick * scale
        ends = f'y1="{_ROW}" y2="{height - _ROW}"'
        parts += [
            f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{_COLOURS["scale"]}"/>',
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{escape(_round(tick))}</text>',
        ]
    for row, bar in enumerate(rows, 1):
        y = row * _ROW + 6
        start = _SVG_LABEL + bar.start * scale
        width = max(1.5, ((total if bar.end is None else bar.end) - bar.start) * scale)
        parts += [
            f'<text x="8" y="{y + 12}">{escape(bar.label)}</text>',
            f'<rect x="{start:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 6}" fill="{_COLOURS[bar.kind]}"/>',
            _written(bar.text, start, width, y + 12),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _written(text: str, start: float, width: float, y: int) -> str:
    """A bar's text: behind it, else before it, else in it, wherever there is room."""
    room = len(text) * _CHARACTER + 6
    if start + width + room <= _SVG_WIDTH:
        return f'<text x="{start + width + 6:.1f}" y="{y}">{escape(text)}</text>'
    if start - room >= _SVG_LABEL:
        return f'<text x="{start - 6:.1f}" y="{y}" text-anchor="end">{escape(text)}</text>'
    return f'<text x="{start + 6:.1f}" y="{y}" fill="white">{escape(text)}</text>'


def _ticks(total: int) -> range:
    """At most ten moments of 1, 2 or 5 times a power of ten of ns, from the beginning on."""
    step = next(each * 10**power for power in range(20) for each in (1, 2, 5) if each * 10**power * 10 >= total)
    return range(0, total + 1, step)


def _round(ns: int) -> str:
    """A tick's moment without what follows the point where that is zero."""
    return format_duration(ns).replace(".0", "") if ns else "0"
