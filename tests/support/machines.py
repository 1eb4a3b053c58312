"""Every VM of a host, whoever started it: what the survey reads of one process, of all."""

from __future__ import annotations

from memconsole.backend.kernel import kvm
from memconsole.backend.kernel.census import Census
from memconsole.errors import Gone


def machines(census: Census) -> tuple[kvm.Machine, ...]:
    """By PID; one that ends meanwhile is left out."""
    found = []
    for process in census.processes.values():
        if process.holds("anon_inode:kvm-vm"):
            try:
                found.append(kvm.machine(census, process))
            except Gone:
                continue
    return tuple(found)
