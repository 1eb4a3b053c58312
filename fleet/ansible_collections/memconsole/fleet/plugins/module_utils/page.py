"""The report of a roll as a page: where each host is, and a picture of each one's blackouts, a file beside it."""

from __future__ import annotations

import html as escaping
import urllib.parse
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; font: 13px/1.4 ui-monospace, monospace; }
th, td { border: 1px solid #bbb; padding: .2rem .5rem; text-align: left; vertical-align: top; } th { background: #eee; }
td.n { text-align: right; } img { max-width: 100%; }
tr.failed td:nth-child(2), tr.refused td:nth-child(2) { font-weight: bold; }
"""
WIDTH = 240
"""Pixels of the longest blackout."""


def html(report: dict[str, Any]) -> str:
    """The page of a report: a row a host, with its longest blackout as a bar, and each host's timeline.

    What hosts say is shown as text; their pictures are images, in which nothing runs.
    """
    rows = report["hosts"]
    longest = max((row.get("blackout_ns") or 0 for row in rows), default=0) or 1
    counted = ", ".join(f"{count} {state}" for state, count in sorted(report["states"].items()))
    body = "".join(_row(row, longest) for row in rows)
    heads = "".join(f"<th>{name}</th>" for name in ("Host", "State", "Kernel", "Guests", "Longest blackout", "Why"))
    title = _text(report["title"])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n<p>{len(rows)} hosts: {_text(counted)}.</p>\n"
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>\n{_pictures(rows)}</body></html>\n"
    )


def _row(row: dict[str, Any], longest: int) -> str:
    ns = row.get("blackout_ns")
    bar = (
        f'<svg width="{WIDTH}" height="10"><rect width="{max(1, ns * WIDTH // longest)}" height="10"/></svg> '
        if ns
        else ""
    )
    said = f"{bar}{ns / 1e9:.3f} s" if ns is not None else "-"
    before, after = row.get("from_kernel", ""), row.get("to_kernel", "")
    kernel = f"{before} to {after}" if after and before != after else before
    cells = (row["host"], row["state"], kernel or "-", row.get("guests", 0))
    shown = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
    return (
        f'<tr class="{_text(row["state"])}">{shown}<td class="n">{said}</td><td>{_text(row.get("why", ""))}</td></tr>\n'
    )


def _pictures(rows: list[dict[str, Any]]) -> str:
    return "".join(
        f'<h2>{_text(row["host"])}</h2>\n<img loading="lazy" alt="timeline of the handoff of {_text(row["host"])}"'
        f' src="{urllib.parse.quote(row["picture"])}">\n'
        for row in rows
        if row.get("picture")
    )


def _text(value: object) -> str:
    """Text of anybody's: what a browser or a terminal would take for more than text is escaped."""
    plain = "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in str(value))
    return escaping.escape(plain)
