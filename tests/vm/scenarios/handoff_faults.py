"""kill -9 of the control process at fault points of a real handoff: `handoff_faults all`, or N of them."""

from __future__ import annotations

import sys

from support import lab_guest as lab
from support import lab_host as host
from support.faultpoints import fault_points

from memconsole.actions import GuestStart
from memconsole.backend.handoff import image

GUESTS = ("c0", "c1")


def left() -> list[str]:
    return [name for name in host.held() if name.startswith(("session:", "state:")) or name == "manifest"]


def chosen(points: tuple[str, ...]) -> list[str]:
    """All but those the jump itself leaves nobody behind at; or as many as were asked for, from the first on."""
    before = [point for point in points if point != "handoff-run.jump.after"]
    if sys.argv[1] == "all":
        return before
    count = int(sys.argv[1])
    return [before[row * len(before) // count] for row in range(count)]


def main() -> None:
    client = host.serve()
    for name in GUESTS:
        client.apply(GuestStart(name, memory=8 << 20))
    points = fault_points(host.plan(client, host.action()))
    lab.say("points", len(points) >= 20, points=points)
    for point in chosen(points):
        client, died = host.killed_at(client, point)
        why = host.all_count_on(client, GUESTS)
        fine = not why and not left() and not image.loaded()
        lab.say(
            f"killed-{point}", fine and died == "ControlDied", died=died, why=why, left=left(), loaded=image.loaded()
        )
    lab.say("end")


main()
