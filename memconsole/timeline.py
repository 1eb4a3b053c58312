"""A handoff as a picture of time: its phases one below the other, and the guests' blackouts below them.

The same for terminals (:func:`lines`) and documents (:func:`svg`): a function of the report alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from memconsole.model import HandoffReport
from memconsole.units import format_duration

_LABEL = 14
_SVG_LABEL, _SVG_WIDTH, _ROW = 150, 900, 22
_COLOURS = {"phase": "#7aa2c8", "blackout": "#c8553d", "guest": "#333333"}


class Bar(NamedTuple):
    """One row: a phase, or the time a guest stood still; ns since the handoff began, ``end`` None while it lasts."""

    kind: str
    label: str
    start: int
    end: int | None
    text: str


def bars(report: HandoffReport) -> Iterator[Bar]:
    """The rows of a picture: phases in order, then guests."""
    for phase in report.phases:
        took = "..." if phase.end_ns is None else format_duration(phase.end_ns - phase.start_ns)
        yield Bar(
            "blackout" if phase.blackout else "phase", phase.id, phase.start_ns, phase.end_ns, f"{took}  {phase.text}"
        )
    stood = next((phase.start_ns for phase in report.phases if phase.blackout), 0)
    for guest in report.guests:
        if guest.blackout_ns is not None:
            by = f"blackout {format_duration(guest.blackout_ns)} (by {guest.by})"
            yield Bar("guest", guest.name, stood, stood + guest.blackout_ns, by)
        elif report.state != "running":
            yield Bar("guest", guest.name, stood, stood, f"is not back: {guest.why}" if guest.why else "ran on")


def span(report: HandoffReport) -> int:
    """Nanoseconds the picture covers."""
    return max((bar.end if bar.end is not None else bar.start for bar in bars(report)), default=0) or 1


def lines(report: HandoffReport, width: int = 100) -> list[str]:
    """The picture as text of at most ``width`` cells a line: ``=`` passes, ``#`` is blackout."""
    room = max(10, width // 3)
    total = span(report)
    drawn = []
    for bar in bars(report):
        left = bar.start * room // total
        right = max(left + 1, -(-(total if bar.end is None else bar.end) * room // total))
        mark = "=" if bar.kind == "phase" else "#"
        line = f"{bar.label[:_LABEL]:<{_LABEL}} {'':<{left}}{mark * (right - left):<{room - left}} {bar.text}"
        drawn.append(line[:width].rstrip())
    return drawn


def svg(report: HandoffReport) -> str:
    """The picture as an SVG document."""
    rows = list(bars(report))
    total = span(report)
    height = (len(rows) + 2) * _ROW
    scale = (_SVG_WIDTH - _SVG_LABEL - 340) / total
    title = f"{report.kind} of {report.from_kernel} to {report.to_kernel}: {format_duration(total)}"
    size = f'width="{_SVG_WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="12">',
        f'<rect {size} fill="white"/>',
        f'<text x="8" y="16">{escape(title)}</text>',
    ]
    for row, bar in enumerate(rows, 1):
        y = row * _ROW + 6
        start = _SVG_LABEL + bar.start * scale
        width = max(1.5, ((total if bar.end is None else bar.end) - bar.start) * scale)
        parts += [
            f'<text x="8" y="{y + 12}">{escape(bar.label)}</text>',
            f'<rect x="{start:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 6}" fill="{_COLOURS[bar.kind]}"/>',
            f'<text x="{start + width + 6:.1f}" y="{y + 12}">{escape(bar.text)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
