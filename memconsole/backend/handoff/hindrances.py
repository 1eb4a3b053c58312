"""What speaks against carrying a domain into another kernel, as libvirt has it written down."""

from __future__ import annotations

from memconsole.model import Managed


def hindrances(managed: Managed) -> list[str]:
    """What speaks against carrying a domain into another kernel, as libvirt has it written down, each in words."""
    found = []
    if managed.ram.huge_pages:
        found.append("hugetlb RAM")
    elif not managed.ram.shared:
        found.append("private RAM")
    passed = (*managed.host_devices, *managed.mediated)
    found += [f"host devices {', '.join(passed)}"] if passed else []
    found += managed.helped
    found += [f"{managed.job} under way"] if managed.job else []
    found += [f"{', '.join(managed.block_jobs)} under way"] if managed.block_jobs else []
    return found
