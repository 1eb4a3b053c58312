"""The acts of ``tests/support/acts.py``, slowly; with ``--hand-over`` the keyboard is the onlooker's then.

Usage: tour.py [--hand-over] [ACT ...] (``make tour``, ``make sandbox``)

A service with two canaries and a keeper of its own is started in a directory of its own, and ends with this.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.acts import ACTS
from support.person import Onlooker, person
from support.services import services
from support.sitting import guests_of, note_guests

ROOM = (100, 30)
"""Columns and lines of the least terminal."""


def main() -> int:
    """Show the acts; the exit code."""
    words = sys.argv[1:]
    names = [word for word in words if word != "--hand-over"]
    known = {act.__name__: act for act in ACTS}
    if unknown := set(names) - set(known):
        print(f"there is no act {min(unknown)}; acts: {', '.join(known)}", file=sys.stderr)
        return 2
    size = shutil.get_terminal_size()
    if not sys.stdout.isatty() or (size.columns, size.lines) < ROOM or os.geteuid() != 0:
        print(f"the tour wants a terminal of at least {ROOM[0]} columns, {ROOM[1]} lines, and root", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as config, services() as service:
        guests_of(service)
        onlooker = Onlooker()
        room = (size.columns, size.lines - 1)
        with person(service.command(), size=room, env={"XDG_CONFIG_HOME": config}, onlooker=onlooker) as found:
            for act in [known[name] for name in names] or ACTS:
                act(found, service)
                note_guests(service)
            if "--hand-over" in words:
                found.hands_over()
            else:
                found.caption("that was the tour")
        sys.stdout.write("\x1b[?1049l\x1b[?1000l\x1b[?1003l\x1b[?1006l\x1b[?25h\x1b[0m")
        sys.stdout.write(f"\x1b7\x1b[{size.lines};1H\x1b[2K\x1b8")  # the caption from before the console's own screen
    return 0


if __name__ == "__main__":
    sys.exit(main())
