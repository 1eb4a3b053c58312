"""What the manager of a VM (libvirt) says of it; the kernel's word on the same VM stands under ``seen``."""

from __future__ import annotations

import shlex

from memconsole.model.base import Value


class ManagedVcpu(Value, frozen=True):
    """A vCPU by its manager's number, the thread that runs it, and the CPUs it is pinned to (empty: any)."""

    index: int
    tid: int | None = None
    cpus: str = ""


class NumaCell(Value, frozen=True):
    """A NUMA node that the guest is shown: ``size`` in bytes, ``cpus`` those of its vCPUs, as a list of ranges."""

    id: int
    size: int
    cpus: str = ""


class MemoryModule(Value, frozen=True):
    """A memory device that can be plugged: ``model`` dimm, nvdimm, virtio-mem, virtio-pmem; ``gpa`` where it is."""

    model: str
    size: int
    node: int | None = None
    gpa: int | None = None
    source: str = ""


class Disk(Value, frozen=True):
    """A disk: the name the guest's bus gives it, and the file, device or volume behind it."""

    target: str
    source: str = ""


class Label(Value, frozen=True):
    """A text that others keep with a VM: ``name`` where it stands in the metadata, the elements that lead to it."""

    name: str
    text: str


class ManagedRam(Value, frozen=True):
    """What backs a VM's RAM: ``backing`` anonymous, memfd, file; ``discard``: QEMU empties the file when it ends."""

    backing: str = "anonymous"
    shared: bool = False
    huge_pages: bool = False
    discard: bool = False


class Managed(Value, frozen=True):
    """A VM as its manager has it written down; of libvirt's domains, /run/libvirt/qemu/NAME.xml.

    ``state`` and ``reason`` are the manager's own words, written at ``since_ns``. ``labels`` are what others (Nova,
    oVirt) keep in the domain's metadata. ``host_devices`` are PCI functions that are passed through, ``mediated`` UUIDs
    of mdevs, ``taps`` its network interfaces on the host. ``persistent``: it is defined, and would be there after a
    reboot. ``helped`` are devices that another process of this host works for (virtiofs, vhost-user, TPM), in words.
    ``job``: what the manager does with it now (a migration, a save), ``block_jobs`` what is done with its disks; empty
    while there is none. ``user``: the UID of the user whose session daemon runs it; None: the system's daemon does.
    """

    manager: str
    name: str
    uuid: str
    id: int | None = None
    title: str = ""
    labels: tuple[Label, ...] = ()
    state: str = ""
    reason: str = ""
    since_ns: int = 0
    persistent: bool = False
    autostart: bool = False
    monitor: str = ""
    ram: ManagedRam = ManagedRam()
    vcpus: tuple[ManagedVcpu, ...] = ()
    cells: tuple[NumaCell, ...] = ()
    modules: tuple[MemoryModule, ...] = ()
    host_devices: tuple[str, ...] = ()
    mediated: tuple[str, ...] = ()
    disks: tuple[Disk, ...] = ()
    taps: tuple[str, ...] = ()
    helped: tuple[str, ...] = ()
    job: str = ""
    block_jobs: tuple[str, ...] = ()
    user: int | None = None

    def is_systems(self, uuid: str) -> bool:
        """Whether it is the system's domain that has this UUID; a user may give one of his own the same."""
        return self.user is None and self.uuid == uuid

    def by_virsh(self, verb: str) -> str:
        """The command that has its manager do something to it; a session daemon's is its user's to type."""
        if self.user is None:
            return f"virsh {verb} {shlex.quote(self.name)}"
        return f"virsh -c qemu:///session {verb} {self.uuid} (as user {self.user})"
