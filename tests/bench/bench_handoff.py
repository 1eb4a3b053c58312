"""A handoff in the lab: its blackout by the guest's own clock, and what carrying memory costs.

The floor of a blackout is floor_handoff.c: what a kexec of the same VM costs at least, from the same init.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from harness import BUILD, ROOT, Result
from labs import RESUME, need, said

PAIRS = 4
COST_MB = 512
FLOOR = BUILD / "floor_handoff"
EARLY = f"""turn=none; read turn 2>/dev/null < /run/lab/turn
case $turn in
floor) {FLOOR} resume /run/lab/floor.ns > /run/early.log 2>&1;;
ours) {RESUME};;
esac"""
"""What a kernel begins with, before any Python: whoever made the jump into it goes on at once."""


def _build_floor() -> None:
    """floor_handoff.c, compiled with the canary's headers."""
    BUILD.mkdir(exist_ok=True)
    strict = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-static"]
    source, headers = Path(__file__).parent / "floor_handoff.c", ROOT / "memconsole" / "native"
    subprocess.run(["cc", *strict, "-I", headers, "-o", FLOOR, source], check=True)


def _blackouts(turns: list[str], memory: str) -> list[dict[str, Any]]:
    """What each turn of the scenario ``blackout`` came to, in order."""
    need()
    _build_floor()
    return said("blackout", "blackout", str(FLOOR), *turns, memory=memory, early=EARLY)


def _of_turn(found: list[dict[str, Any]], turn: str) -> list[dict[str, Any]]:
    return [each for each in found if f"{each['kind']}:{each['size'] >> 20}" == turn]


def _least(found: list[dict[str, Any]], turn: str) -> float:
    """The shortest blackout of one kind of turn, in s: what else the machine does only ever makes a boot longer."""
    return min(int(each["ns"]) for each in _of_turn(found, turn)) / 1e9


def _own(found: list[dict[str, Any]], turn: str) -> float:
    """The least that memconsole's own phases took of such blackouts, in s: all but the jump and the boot."""
    spans = (
        [int(phase["end_ns"] - phase["start_ns"]) for phase in each["phases"] if phase["blackout"] and _is_own(phase)]
        for each in _of_turn(found, turn)
    )
    return min(sum(each) for each in spans) / 1e9


def _is_own(phase: dict[str, Any]) -> bool:
    return phase["id"] not in {"jump", "boot"}


def bench_floor() -> list[Result]:
    """A 64 MiB canary carried by memconsole, and by a C program that only preserves, kexecs, retrieves, resumes."""
    found = _blackouts(["floor:64", "ours:64"] * PAIRS, "2G")
    name = f"blackout of a 64M guest, least of {PAIRS}, against the floor"
    return [Result(name, _least(found, "ours:64"), "s", _least(found, "floor:64"), 1.25)]


def bench_size() -> list[Result]:
    """A 1 GiB guest against one of 64 MiB."""
    found = _blackouts(["ours:64", "ours:1024"] * PAIRS, "4G")
    name = f"blackout of a 1G guest, least of {PAIRS}, against a 64M guest"
    return [
        Result(name, _least(found, "ours:1024"), "s", _least(found, "ours:64"), 1.1),
        Result("of it, all but the jump and the boot", _own(found, "ours:1024"), "s", _own(found, "ours:64")),
    ]


def bench_cost() -> list[Result]:
    """What a GiB costs to preserve, to retrieve, and to compare afterwards, in folios of 4 KiB and of 2 MiB."""
    rows = []
    for each in said("carry_cost", "cost", str(COST_MB), memory="4G"):
        took = {
            "preserve, the first time": each["preserve_ns"][0],
            "preserve": min(each["preserve_ns"][1:]),
            "retrieve": each["retrieve_ns"],
            "verify where its pages are": each["places_ns"],
            "verify its contents": each["contents_ns"],
        }
        scale = 1024 / COST_MB / 1e6
        rows += [Result(f"{what}, {each['kind']} folios", ns * scale, "ms/GiB") for what, ns in took.items()]
    return rows
