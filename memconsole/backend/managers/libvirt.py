"""Domains of libvirt that run, from what its daemon (libvirtd, virtqemud) keeps for itself; no connection is made.

    /run/libvirt/qemu/NAME.xml              <domstatus>: state, reason, PID, monitor, vCPU threads, the live <domain>
    /etc/libvirt/qemu/NAME.xml              the domain is defined (persistent)
    /etc/libvirt/qemu/autostart/NAME.xml    ... and starts with the host

The daemon replaces a status file as a whole (rename) when anything in it changes, and removes it when the domain ends;
one that was left behind by a daemon that died names a PID that may be another's by now, so a process counts as the
domain's only if its own command line has the domain's UUID (``-uuid``).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from memconsole import decoding
from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import MemconsoleError, NotFound
from memconsole.model import Disk, Label, Managed, ManagedRam, ManagedVcpu, MemoryModule, NumaCell, Unread

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

STATUS = "/run/libvirt/qemu"
_DEFINED = "/etc/libvirt/qemu"
_LARGEST = 8 << 20
_MOST_LABELS = 32
_LONGEST_LABEL = 256
_DEEPEST_LABEL = 8
_MOST = 1 << 63
"""No number of a domain is as large, nor is one that JSON could not carry."""
_UNITS = {
    "b": 1,
    "bytes": 1,
    "KB": 10**3,
    "k": 1 << 10,
    "KiB": 1 << 10,
    "MB": 10**6,
    "M": 1 << 20,
    "MiB": 1 << 20,
    "GB": 10**9,
    "G": 1 << 30,
    "GiB": 1 << 30,
    "TB": 10**12,
    "T": 1 << 40,
    "TiB": 1 << 40,
}
"""Units of sizes in a domain's XML; without one it is KiB."""
_PASSED = "devices/hostdev[@type='{}']/source/address"
_INTERFACES = "devices/interface"
_SOURCES = ("file", "dev", "dir", "volume", "name", "path")
"""What a disk's source is called by, depending on what it is."""


class Domain(NamedTuple):
    """A domain that runs, and the PID of the QEMU that runs it."""

    pid: int
    managed: Managed


def domains(root: Root = "/", gaps: list[Unread] | None = None) -> dict[int, Managed]:
    """The domains that run, by the PID of their QEMU; a status file that cannot be read is a gap.

    Raises:
        NotFound: libvirt has started no QEMU since the host booted. Denied, KernelRefused: they are not shown.
    """
    found: dict[int, Managed] = {}
    for name in tree.names(root, STATUS):
        if not name.endswith(".xml"):
            continue
        path = f"{STATUS}/{name}"
        try:
            domain = _read(root, path)
        except NotFound:
            continue  # the domain has ended meanwhile
        except MemconsoleError as error:
            if gaps is not None:
                gaps.append(tree.gap(path, error))
            continue
        found[domain.pid] = domain.managed
    return found


def of_process(known: Mapping[int, Managed], pid: int, command: Sequence[str]) -> Managed | None:
    """The domain that a process runs: the status file names its PID, and its command line the domain's UUID."""
    managed = known.get(pid)
    return managed if managed is not None and managed.uuid in command else None


def _read(root: Root, path: str) -> Domain:
    """A status file, parsed again only after it was replaced."""
    place = tree.below(root, path)
    try:
        status = Path(place).stat()
    except OSError as error:
        raise tree.failure(path, error) from error
    domain = _parsed(str(root), path, status.st_ino, status.st_mtime_ns, status.st_size)
    file = f"{domain.managed.name}.xml"
    defined, started = (os.path.lexists(tree.below(root, f"{_DEFINED}/{each}{file}")) for each in ("", "autostart/"))
    managed = domain.managed
    if (managed.persistent, managed.autostart) == (defined, started):
        return domain
    return Domain(domain.pid, replace(managed, persistent=defined, autostart=started))


@lru_cache(maxsize=4096)
def _parsed(root: str, path: str, _inode: int, mtime_ns: int, _size: int) -> Domain:
    raw = tree.read(root, path, limit=_LARGEST)
    return parse(raw, path, mtime_ns)


def parse(raw: bytes, path: str = "a status file", since_ns: int = 0) -> Domain:
    """What a status file says.

    Raises:
        Undecodable: it is none.
    """
    remedy = "restart libvirtd, which writes it anew"
    status = decoding.xml(raw, what=path, remedy=remedy, limit=_LARGEST)
    with decoding.named(path, remedy):
        domain = _child(status, "domain")
        managed = Managed(
            manager="libvirt",
            name=_said(domain, "name"),
            uuid=_said(domain, "uuid"),
            id=_number(domain.attrib["id"]) if "id" in domain.attrib else None,
            title=domain.findtext("title", ""),
            labels=tuple(islice(_labels(domain), _MOST_LABELS)),
            state=status.get("state", ""),
            reason=status.get("reason", ""),
            since_ns=since_ns,
            monitor=_attribute(status, "monitor", "path"),
            ram=_ram(domain),
            vcpus=tuple(_vcpus(status, domain)),
            cells=tuple(_cell(index, each) for index, each in enumerate(domain.iterfind("cpu/numa/cell"))),
            modules=tuple(_module(each) for each in domain.iterfind("devices/memory")),
            host_devices=tuple(_bdf(each) for each in domain.iterfind(_PASSED.format("pci"))),
            mediated=tuple(each.get("uuid", "") for each in domain.iterfind(_PASSED.format("mdev"))),
            disks=tuple(_disk(each) for each in domain.iterfind("devices/disk")),
            taps=tuple(filter(None, (_attribute(each, "target", "dev") for each in domain.iterfind(_INTERFACES)))),
            helped=tuple(_helped(domain)),
            job=_job(status),
            block_jobs=tuple(
                f"{each.get('type', 'a job')} of {each.get('name', 'a disk')}"
                for each in status.iterfind("blockjobs/blockjob")
            ),
        )
        return Domain(_number(status.attrib["pid"]), managed)


def _number(text: str, base: int = 10) -> int:
    found = int(text, base)
    if not 0 <= found < _MOST:
        raise ValueError(f"{text} is no number of a domain")
    return found


def _child(element: Element, name: str) -> Element:
    found = element.find(name)
    if found is None:
        raise ValueError(f"<{element.tag}> has no <{name}>")
    return found


def _said(element: Element, name: str) -> str:
    text = _child(element, name).text
    if not text:
        raise ValueError(f"<{name}> is empty")
    return text


def _attribute(element: Element, child: str, name: str) -> str:
    found = element.find(child)
    return "" if found is None else found.get(name, "")


def _size(text: str, element: Element) -> int:
    unit = element.get("unit", "KiB")
    if unit not in _UNITS:
        raise ValueError(f"{unit!r} is no unit of memory")
    return _number(str(_number(text) * _UNITS[unit]))


def _labels(domain: Element) -> Iterator[Label]:
    """What others keep in the metadata, each text by the names of the elements that lead to it, namespaces left out."""
    below: deque[tuple[tuple[str, ...], Element]] = deque(
        ((_local(each),), each) for each in domain.iterfind("metadata/*")
    )
    while below:
        names, element = below.popleft()
        said = (element.text or "").strip() or element.get("name", "")
        if said:
            yield Label(".".join(names), said[:_LONGEST_LABEL])
        if len(names) < _DEEPEST_LABEL:
            below += [((*names, _local(each)), each) for each in element]


def _local(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _ram(domain: Element) -> ManagedRam:
    backing = domain.find("memoryBacking")
    if backing is None:
        return ManagedRam()
    return ManagedRam(
        _attribute(backing, "source", "type") or "anonymous",
        _attribute(backing, "access", "mode") == "shared",
        backing.find("hugepages") is not None,
        backing.find("discard") is not None,
    )


def _cell(index: int, cell: Element) -> NumaCell:
    return NumaCell(_number(cell.get("id", str(index))), _size(cell.get("memory", "0"), cell), cell.get("cpus", ""))


def _vcpus(status: Element, domain: Element) -> Iterator[ManagedVcpu]:
    pinned = {each.get("vcpu"): each.get("cpuset", "") for each in domain.iterfind("cputune/vcpupin")}
    everywhere = _child(domain, "vcpu").get("cpuset", "")
    for each in status.iterfind("vcpus/vcpu"):
        tid = _number(each.get("pid", "0"))
        yield ManagedVcpu(_number(each.attrib["id"]), tid or None, pinned.get(each.get("id"), everywhere))


def _module(device: Element) -> MemoryModule:
    target = _child(device, "target")
    size, node = _child(target, "size"), target.findtext("node")
    base = _attribute(device, "address", "base") or _attribute(target, "address", "base")
    return MemoryModule(
        device.get("model", ""),
        _size(size.text or "0", size),
        _number(node) if node is not None else None,
        _number(base, 0) if base else None,
        device.findtext("source/path", ""),
    )


def _helped(domain: Element) -> Iterator[str]:
    """The devices that another process works for, by what they are and what they are called."""
    for each in domain.iterfind("devices/filesystem"):
        if _attribute(each, "driver", "type") == "virtiofs":
            yield f"virtiofs {_attribute(each, 'target', 'dir')}".strip()
    for kind, name in (("interface", "mac"), ("disk", "target")):
        for each in domain.iterfind(f"devices/{kind}[@type='vhostuser']"):
            yield f"vhost-user {kind} {_attribute(each, name, 'address' if name == 'mac' else 'dev')}".strip()
    for _ in domain.iterfind("devices/tpm/backend[@type='emulator']"):
        yield "TPM (swtpm)"


def _job(status: Element) -> str:
    """What libvirt does with the domain, as it notes it down: a job of its own kind, or one that goes on beside."""
    job = status.find("job")
    words = (job.get("async", ""), job.get("type", "")) if job is not None else ()
    return next((word for word in words if word not in {"", "none", "query"}), "")


def _bdf(address: Element) -> str:
    domain, bus, slot, function = (_number(address.get(name, "0"), 0) for name in ("domain", "bus", "slot", "function"))
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"


def _disk(disk: Element) -> Disk:
    source = disk.find("source")  # an empty drive has none
    words = {} if source is None else source.attrib
    return Disk(_attribute(disk, "target", "dev"), next((words[each] for each in _SOURCES if each in words), ""))
