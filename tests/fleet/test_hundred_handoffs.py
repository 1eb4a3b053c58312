"""A hundred handoffs in rolls over three lab hosts, forth and back, with no guest lost and no byte wrong.

It takes hours: ``make soak`` runs it. ``MEMCONSOLE_SOAK_HANDOFFS`` says how many instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import lab
from support.lab_fleet import LabFleet, lab_fleet
from support.lab_rolls import CANARY, SOAK, engine
from support.remotes import SSHD

pytestmark = [
    SOAK,
    pytest.mark.skipif(not SSHD, reason="there is no sshd: apt install openssh-server"),
]
HOSTS = ("hv1", "hv2", "hv3")
HANDOFFS = int(os.environ.get("MEMCONSOLE_SOAK_HANDOFFS", "100"))
DEAF = 5
"""How many fleets may be given up because nothing ran in a host any more, which is the emulation's fault."""


def test_a_hundred_rolling_handoffs_lose_no_guest_and_no_byte(tmp_path: Path) -> None:
    made, deaf = 0, 0
    while made < HANDOFFS:
        with lab_fleet(tmp_path / str(deaf), HOSTS, more=CANARY) as fleet:
            made += rolled(tmp_path / str(deaf), fleet, HANDOFFS - made)
        if made < HANDOFFS:
            deaf += 1
            assert deaf < DEAF, f"hosts went deaf {deaf} times in {made} handoffs"
            lab.repeated.append(f"nothing ran in a host any more after {made} handoffs")


def rolled(directory: Path, fleet: LabFleet, wanted: int) -> int:
    """How many handoffs the fleet made: as many as are wanted at least, or those until a host went deaf."""
    made, beats, rolls, runs = engine(directory, fleet), counted(fleet), 0, [fleet.old]
    while rolls * len(HOSTS) < wanted:
        back = ("rollback", "-e", f"memconsole_rollback_from={fleet.new}")
        done = made.play(*(back if rolls % 2 else ("roll",)), "-e", "memconsole_serial=2")
        if done.returncode and any(host.deaf() for host in fleet.hosts.values()):
            break
        assert (done.returncode, made.states()) == (0, ["done"] * len(HOSTS)), (rolls, done.stdout)
        rolls += 1
        runs.append(fleet.new if rolls % 2 else fleet.old)
        assert [host.releases() for host in fleet.hosts.values()] == [runs] * len(HOSTS)
        before, beats = beats, counted(fleet)
        assert all(beats[name] > before[name] for name in HOSTS), (rolls, before, beats)
    return rolls * len(HOSTS)


def counted(fleet: LabFleet) -> dict[str, int]:
    """What each host's canary has counted so far: all of it right, and it still runs."""
    beats = {}
    for name in fleet.hosts:
        (canary,) = json.loads(fleet.run(name, "memconsole guests --json"))
        assert (canary["name"], canary["state"], canary["progress"]["wrong"]) == ("canary", "running", 0), (
            name,
            canary,
        )
        beats[name] = canary["progress"]["beats"]
    return beats
