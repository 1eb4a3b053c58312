"""What it costs to let a device reach a region that is populated, beside IOMMU_IOAS_MAP_FILE alone.

dma_cost MB ROUNDS
"""

from __future__ import annotations

import json
import os
import sys
import time

from support import lab_guest as lab
from support import lab_host as host
from support.edu import BDF as EDU
from support.timing import timed

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.dma import iommufd

SIZE, ROUNDS = int(sys.argv[1]) << 20, int(sys.argv[2])
SMALL, LARGE, BARE = 0x10000000, 1 << 32, 1 << 36
"""Where in the guest's address space is what."""


def bare(control: Control) -> int:
    """Nanoseconds of the call alone, in the same address space."""
    space, payload = control._desk.custody.get("iommu:vm")
    number = json.loads(payload)["space"]
    file = host.filled(SIZE)
    began = time.perf_counter_ns()
    iommufd.map_file(space, number, iommufd.Mapping(file, 0, SIZE, BARE, True))
    took = time.perf_counter_ns() - began
    assert iommufd.unmap(space, number, BARE, SIZE) == SIZE
    os.close(file)
    os.close(space)
    return took


def ours(control: Control) -> tuple[int, int]:
    """Nanoseconds of the step that maps it for the device, and of the whole of ``map --dma``."""
    control.apply(do.Reserve("large", SIZE, prefault=True))
    steps: list[int] = []
    back = timed(control._desk.address_spaces, "map", steps)
    began = time.perf_counter_ns()
    grant = control.apply(do.Map("large", "vm", gpa=LARGE, dma=EDU)).subject
    took = time.perf_counter_ns() - began
    back()
    control.apply(do.Revoke(grant))
    control.apply(do.Release("large"))
    return steps[0], took


def main() -> None:
    with host.embedded() as control:
        control.apply(do.GuestStart("vm", memory=8 << 20))
        control.apply(do.Reserve("small", 1 << 20))
        control.apply(do.Map("small", "vm", gpa=SMALL, dma=EDU))  # its device is attached from now on
        for page in host.page_sizes():
            floors, found = [], []
            for _ in range(ROUNDS):
                floors.append(bare(control))
                found.append(ours(control))
            steps, whole = zip(*found, strict=True)
            lab.say("dma", page=page, bare_ns=floors, step_ns=steps, whole_ns=whole)
    lab.say("end")


main()
