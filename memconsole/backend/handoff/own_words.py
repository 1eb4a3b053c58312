"""libvirt's own words for a QEMU, so that it can be started again without libvirt: those that can be said again.

    said again as they are   machine, processors, devices, disks that are files, ptys, what QEMU listens on itself
    said otherwise           RAM: a file behind a number; a socket that libvirt listened on: its path; a log: its path
    not given back           taps and other networks, devices of the host, helpers (swtpm, virtiofs, passt, D-Bus),
                             block devices, labels, cgroups, pinning: what libvirt makes beside QEMU
    not in the words         what came, went or was set since (plugged devices, snapshots, limits, passwords)

One that has anything of the latter two is restored by libvirt. What is not known here counts as that, by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from memconsole import decoding

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_LARGEST = 1 << 20
_AGAIN = frozenset(
    {
        "S", "accel", "acpitable", "append", "bios", "boot", "compat", "cpu", "enable-kvm", "global", "initrd", "k",
        "kernel", "m", "machine", "mon", "msg", "name", "no-acpi", "no-hpet", "no-reboot", "no-shutdown",
        "no-user-config", "nodefaults", "numa", "overcommit", "rtc", "sandbox", "smbios", "smp", "uuid",
        "watchdog-action",
    }
)  # fmt: skip
"""Options whose words are said again as they are."""
_ALONE = frozenset(
    {"S", "enable-kvm", "no-acpi", "no-hpet", "no-reboot", "no-shutdown", "no-user-config", "nodefaults"}
)
_OBJECTS = frozenset({"iothread", "rng-builtin", "throttle-group"})
_RANDOM = frozenset({"/dev/urandom", "/dev/random"})
_RAM = frozenset({"memory-backend-memfd", "memory-backend-file"})
_OF_MEMFDS = frozenset({"seal", "hugetlb", "hugetlbsize"})
_FORMATS = frozenset({"raw", "qcow2", "copy-on-read", "throttle", "null-co", "luks", "vdi", "vmdk", "vpc", "vhdx"})
_PASSED = ("vfio-", "vhost-", "usb-host", "scsi-block", "scsi-generic", "tpm-", "ivshmem", "pci-assign", "u2f-passthru")
_NOTED = frozenset(
    {
        "agentTimeout", "allowReboot", "blockjobs", "channelTargetDir", "chardevStdioLogd", "cpu", "devices", "domain",
        "fdset", "job", "libDir",
        "memoryBackingDir", "monitor", "namespaces", "nodename", "qemuCaps", "rememberOwner", "taint", "vcpus",
    }
)  # fmt: skip
"""What libvirt notes down of a domain that runs, and that is no less true of one that was started again."""
_MADE = {
    "blkiotune": "limits of its disks (blkiotune)",
    "cputune": "limits or pinning of its processors (cputune)",
    "launchSecurity": "launch security",
    "memtune": "limits of its memory (memtune)",
    "numatune": "RAM bound to NUMA nodes (numatune)",
    "vcpu[@current]": "vCPUs that may come and go",
    "vcpus": "vCPUs that may come and go",
    "devices/disk/iotune": "limits of a disk (iotune)",
    "devices/interface/bandwidth": "limits of an interface (bandwidth)",
    "devices/interface/link": "an interface whose link was set",
    "devices/lease": "a lease",
    "devices/shmem": "shared memory (shmem)",
    "devices/hostdev": "a device of the host",
    "devices/redirdev": "a redirected device",
    "devices/smartcard": "a smartcard",
    "devices/memory": "memory devices",
    "devices/vsock": "a vsock",
}


@dataclass(frozen=True)
class Noted:
    """What a status file says of a domain besides its words: where QEMU's sockets and logs are, by the chardev's id.

    ``nodes``: the files of its disks by the name of QEMU's node, empty where the node is no file. ``devices``: those it
    has now. ``made``: what libvirt made for it that cannot be given back, in words.
    """

    directory: str
    channels: str
    sockets: Mapping[str, str]
    logs: Mapping[str, str]
    nodes: Mapping[str, str]
    devices: frozenset[str]
    made: tuple[str, ...]


def noted(status: Element) -> Noted:
    """What libvirt's status file says."""
    domain = status.find("domain")
    if domain is None:
        return Noted("", "", {}, {}, {}, frozenset(), ("its status file has no domain",))
    sockets, logs = {"charmonitor": _told(status, "monitor", "path")}, {}
    for device in domain.iterfind("devices/*"):
        alias = f"char{_told(device, 'alias', 'name')}"
        source = device.find("source")
        if device.get("type") == "unix" and source is not None and source.get("mode") == "bind":
            sockets[alias] = source.get("path", "")
        if log := _told(device, "log", "file"):
            logs[alias] = log
    nodes: dict[str, str] = {}
    for source in domain.iterfind("devices/disk//source"):
        for each in source.iterfind("privateData/nodenames/nodename"):
            nodes[each.get("name", "")] = source.get("file", "") if each.get("type") == "storage" else ""
    return Noted(
        _told(status, "libDir", "path"),
        _told(status, "channelTargetDir", "path"),
        sockets,
        logs,
        nodes,
        frozenset(each.get("alias", "") for each in status.iterfind("devices/device")),
        tuple(_made(status, domain)),
    )


def _told(element: Element, child: str, name: str) -> str:
    found = element.find(child)
    return "" if found is None else found.get(name, "")


def _made(status: Element, domain: Element) -> Iterator[str]:
    for child in status:
        if child.tag not in _NOTED:
            yield f"libvirt notes {child.tag} of it, which is not known here"
    yield from (said for path, said in _MADE.items() if domain.find(path) is not None)
    for label in domain.iterfind("seclabel"):
        if label.get("model") != "dac" and label.find("label") is not None:
            yield f"a label of {label.get('model', 'a security module')}"
    for graphics in domain.iterfind("devices/graphics"):
        if "passwd" in graphics.attrib:
            yield "a password of its screen"


@dataclass
class Words:
    """Words of a QEMU, to be said again: ``said``, and what keeps them from it, ``unsayable``.

    ``ram``: under which number it finds each block of its RAM.
    """

    noted: Noted
    ram: Mapping[str, int]
    said: list[str] = field(default_factory=list)
    unsayable: list[str] = field(default_factory=list)
    _found: set[str] = field(default_factory=set)
    _nodes: dict[str, str] = field(default_factory=dict)

    def take(self, words: Sequence[str]) -> None:
        """Say all of a command line again, but for how it was started."""
        self.said = [*words[:1]]
        each = iter(pairwise((*words[1:], "")))
        for word, value in each:
            option = word.removeprefix("-").removeprefix("-")
            if not word.startswith("-"):
                self._keep(f"word {word}")
            elif option in _ALONE:
                self.said.append(f"-{option}")
            else:
                next(each, None)
                self._option(option, value)
        gone = [name for name in self.ram if name not in self._found]
        if gone:
            self._keep(f"RAM that its words do not have ({', '.join(gone)})")
        self.unsayable += self.noted.made
        self._since()

    def _option(self, option: str, value: str) -> None:
        takes = {
            "object": self._object, "chardev": self._chardev, "netdev": self._netdev, "device": self._device,
            "blockdev": self._blockdev, "vnc": self._vnc, "audiodev": self._audiodev, "display": self._display,
        }  # fmt: skip
        if option in {"incoming", "add-fd"}:
            return  # how it was started; a set of fds counts where something names it
        if option in takes:
            value = takes[option](value)
        elif option not in _AGAIN:
            self._keep(f"option -{option}")
        elif "/dev/" in value:
            self._keep(f"a device of the host ({value})")
        self.said += [f"-{option}", value]

    def _keep(self, why: str) -> None:
        if why not in self.unsayable:
            self.unsayable.append(why)

    def _object(self, value: str) -> str:
        found = _properties(value, "qom-type")
        kind, name = found.get("qom-type", ""), str(found.get("id", ""))
        if kind in _RAM:
            return self._backend(found, name)
        if kind == "secret":
            if not str(found.get("file", self.noted.directory)).startswith(self.noted.directory):
                self._keep(f"secret {name} of a file")
        elif not (kind in _OBJECTS or (kind == "rng-random" and found.get("filename") in _RANDOM)):
            self._keep(f"object {kind}")
        return value

    def _backend(self, found: dict[str, Any], name: str) -> str:
        if name not in self.ram:
            self._keep(f"RAM that is not in custody ({name})")
        if "host-nodes" in found or "policy" in found:
            self._keep("RAM bound to NUMA nodes")
        self._found.add(name)
        kept = {key: each for key, each in found.items() if key not in _OF_MEMFDS}
        kept |= {"qom-type": "memory-backend-file", "mem-path": f"/proc/self/fd/{self.ram.get(name, 0)}"}
        return _json(kept)

    def _chardev(self, value: str) -> str:
        found = _properties(value, "backend")
        kind, name = str(found.get("backend")), str(found.get("id", ""))
        if kind == "socket":
            value = self._socket(found, name)
        elif kind not in {"pty", "null"}:
            self._keep(f"character device {kind}")
        if "logfile" in found:
            path = self.noted.logs.get(name, "")
            if not path:
                self._keep(f"the log of {name}, whose path is not known")
            value = _joined({**_properties(value, "backend"), "logfile": path}, "backend")
        return value

    def _socket(self, found: dict[str, Any], name: str) -> str:
        path = str(found.get("path") or self.noted.sockets.get(name, ""))
        if found.get("server") not in {"on", "yes"} or not path.startswith("/"):
            self._keep(f"socket {name}, which is another's")
        kept = {key: each for key, each in found.items() if key not in {"fd", "path"}}
        return _joined({**kept, "path": path}, "backend")

    def _netdev(self, value: str) -> str:
        found = _properties(value, "type")
        if found.get("type") != "user":
            self._keep(f"network {found.get('type')}")
        return value

    def _device(self, value: str) -> str:
        found = _properties(value, "driver")
        kind, name = str(found.get("driver")), str(found.get("id", ""))
        if kind.startswith(_PASSED) or any("fd" in key for key in found):
            self._keep(f"device {kind}")
        self._found.add(name)
        return value

    def _blockdev(self, value: str) -> str:
        found = _properties(value, "driver")
        kind, path = found.get("driver"), str(found.get("filename", ""))
        if kind == "file":
            if path.startswith("/dev/") or not path.startswith("/"):
                self._keep(f"disk {path}")
        elif kind not in _FORMATS:
            self._keep(f"disk by {kind}")
        self._nodes[str(found.get("node-name", ""))] = path
        return value

    def _vnc(self, value: str) -> str:
        found = _properties(value, "vnc")
        if not set(found) <= {"vnc", "audiodev", "power-control", "share"} or "/" in str(found.get("vnc")):
            self._keep("a screen (vnc) with more than an address")
        return value

    def _audiodev(self, value: str) -> str:
        found = _properties(value, "driver")
        if found.get("driver") != "none":
            self._keep(f"sound by {found.get('driver')}")
        return value

    def _display(self, value: str) -> str:
        if value != "none":
            self._keep(f"display {value}")
        return value

    def _since(self) -> None:
        """What came and went since the words were said."""
        more = sorted(name for name in self.noted.devices if name and name not in self._found)
        if more:
            self._keep(f"devices that came since it started ({', '.join(more)})")
        disks = {name: path for name, path in self._nodes.items() if not name.startswith("libvirt-pflash")}
        known = self.noted.nodes
        if set(disks) != set(known) or any(path != disks[name] for name, path in known.items() if path):
            self._keep("disks that changed since it started (a medium, a snapshot, a disk that came or went)")


def _properties(value: str, first: str) -> dict[str, Any]:
    """The properties of ``FIRST,key=value,flag``, or of the same as JSON."""
    if value.startswith("{"):
        try:
            return decoding.json(value.encode(), dict[str, Any], what="an option of QEMU", limit=_LARGEST)
        except (decoding.Undecodable, UnicodeEncodeError):
            return {}
    head, *rest = (part.replace("\0", ",") for part in value.replace(",,", "\0").split(","))
    found: dict[str, Any] = {}
    for part in ((head,) if "=" in head else ()) + tuple(rest):
        key, equals, text = part.partition("=")
        found[key] = text if equals else "on"
    return found if "=" in head else {first: head, **found}


def _joined(found: Mapping[str, Any], first: str) -> str:
    parts = [str(found[first]), *(f"{key}={_text(value)}" for key, value in found.items() if key != first)]
    return ",".join(part.replace(",", ",,") for part in parts)


def _text(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _json(found: Mapping[str, object]) -> str:
    import json

    return json.dumps(found, separators=(",", ":"))
