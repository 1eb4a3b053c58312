"""QEMU's command line: what memconsole gives it, and what the operator's own words say already."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from memconsole import decoding
from memconsole.backend.peers.handle import GIVEN_FD
from memconsole.native import program

BINARY = "qemu-system-x86_64"
KVM_SLOWEST = 32
"""How many times as long as this processor a vCPU may take, and KVM is still used: QEMU's TCG takes 10 to 30 times."""

AGENT = "org.qemu.guest_agent.0"
"""What QEMU's guest agent calls its channel."""

_ON = {"on", "yes", "true", "y"}
_OPTION = 64 << 10
_WAITING = ("-incoming", "defer")
_ALIGN = "align=2M"
"""Where QEMU maps the file: at any other address the kernel maps base pages alone, whatever the frames are."""
_RAM = re.compile(rf"memory-backend-file,id=ram,.*,mem-path=/proc/self/fd/{GIVEN_FD}(,|$)")
_OFFSET = re.compile(r",offset=\d+")
_KVM_FLAGS = {"enable-kvm", "no-kvm"}


@cache
def accelerator() -> str:
    """``kvm`` where a vCPU runs a guest's code at the processor's own speed, else ``tcg``; measured once, in 0.3 s."""
    probe = subprocess.run(
        [program("memconsole-canary"), "--probe"], capture_output=True, text=True, timeout=30, check=True
    )
    return judged(probe.stdout)


def judged(said: str) -> str:
    """The accelerator by what the probe said: ``kvm GUEST PROCESS`` in pages a second, or ``none WHY``."""
    verdict, *figures = said.split()
    if verdict != "kvm":
        return "tcg"
    guest, process = (int(figure) for figure in figures)
    return "kvm" if guest * KVM_SLOWEST >= process else "tcg"


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every option with the word after it: ``-accel kvm`` and ``--accel kvm`` are ("accel", "kvm")."""
    for option, value in pairwise((*words, "")):
        if option.startswith("-"):
            yield option.removeprefix("-").removeprefix("-"), value


def properties(value: str) -> dict[str, str]:
    """The properties of ``driver,key=value,flag...``, or of the same as JSON; the driver has an empty key."""
    if value.startswith("{"):
        return _of_json(value)
    first, *rest = _parts(value)
    key, equals, text = first.partition("=")
    found = {key: text} if equals else {"": first}
    for part in rest:
        key, equals, text = part.partition("=")
        found[key] = text if equals else "on"
    return found


def _of_json(value: str) -> dict[str, str]:
    try:
        told = decoding.json(value.encode(errors="replace"), dict[str, Any], what="an option of QEMU", limit=_OPTION)
    except decoding.Undecodable:
        return {}
    found = {key: str(each) for key, each in told.items() if isinstance(each, (str, int, float))}
    return {"": found.get("driver", found.get("qom-type", "")), **found}


def _parts(value: str) -> list[str]:
    """The parts between commas; QEMU writes a comma in a value twice."""
    return [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]


def chooses_accelerator(words: Sequence[str]) -> bool:
    """Whether words say how the guest's code is run: ``-accel``, ``-machine accel=`` or ``-enable-kvm``."""
    return any(
        option in {"accel", *_KVM_FLAGS} or (option in {"machine", "M"} and "accel" in properties(value))
        for option, value in options(words)
    )


def with_accelerator(words: Sequence[str]) -> tuple[str, ...]:
    """Words that say how the guest's code is run, as the probe found where they do not say it themselves.

    What one accelerator saved, another does not load, and the next kernel's probe may find another.
    """
    return tuple(words) if chooses_accelerator(words) else ("-accel", accelerator(), *words)


def agent_channel(words: Sequence[str]) -> str | None:
    """The path of the socket on which QEMU offers its guest's agent; None where it offers none, or in another way."""
    ports = [properties(value) for option, value in options(words) if option == "device"]
    ids = {each.get("chardev") for each in ports if each.get("") == "virtserialport" and each.get("name") == AGENT}
    for option, value in options(words):
        found = properties(value) if option == "chardev" else {}
        serves = found.get("server") in _ON and found.get("abstract") not in _ON
        if found.get("") == "socket" and found.get("id") in ids and serves and found.get("path"):
            return found["path"]
    return None


def with_agent(directory: Path) -> tuple[str, ...]:
    """The words that give a guest a channel for its agent, which is the socket ``agent`` in a directory."""
    path = str(directory / "agent").replace(",", ",,")
    return (
        *("-device", "virtio-serial,id=memconsole-serial"),
        *("-chardev", f"socket,id=memconsole-agent,path={path},server=on,wait=off"),
        *("-device", f"virtserialport,bus=memconsole-serial.0,chardev=memconsole-agent,name={AGENT}"),
    )


def has_vmclock(words: Sequence[str]) -> bool:
    """Whether the guest has a device that tells it of a break in its time."""
    return any(option == "device" and properties(value).get("") == "vmclock" for option, value in options(words))


def given_a_device(words: Sequence[str]) -> bool:
    """Whether a QEMU's command line has a VFIO device, in either form of ``-device``."""
    return any(option == "device" and "vfio-" in value for option, value in options(words))


def started(
    name: str, memory: int, socket: Path, args: Sequence[str], *, devices: int = 0, offset: int = 0
) -> list[str]:
    """A command line for so many bytes of RAM, the fd that every guest is given; an iommufd and devices follow it.

    ``offset``: where in the file behind the fd its RAM begins, which is a device then.
    """
    place = f",offset={offset}" if offset else ""
    return [
        BINARY,
        *("-name", name, "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "q35,memory-backend=ram"),
        *("-m", f"size={memory}B", "-object", f"{_backend(memory)},{_ALIGN}{place}"),
        *("-qmp", f"unix:{socket},server=on,wait=off"),
        *(("-object", f"iommufd,id=memconsole,fd={GIVEN_FD + 1}") if devices else ()),
        *(word for number in range(devices) for word in ("-device", _device(number))),
        *with_accelerator(args),
    ]


def waiting(words: Sequence[str]) -> list[str]:
    """The same command line for one that waits for its state; one of an earlier memconsole gets what it lacks."""
    memory = next((properties(value).get("size", "") for option, value in options(words) if option == "m"), "")
    ours = _backend(int(memory.removesuffix("B"))) if memory.removesuffix("B").isdecimal() else None
    found = [f"{word},{_ALIGN}" if word == ours else word for word in words]
    return found if tuple(found[-2:]) == _WAITING else [*found, *_WAITING]


def placed(words: Sequence[str], offset: int) -> list[str]:
    """The same command line where the RAM begins elsewhere in the file behind its fd, or in another file."""
    place = f",offset={offset}" if offset else ""
    return [f"{_OFFSET.sub('', word)}{place}" if _RAM.match(word) else word for word in words]


def _backend(memory: int) -> str:
    # QEMU opens the path itself: through its own copy of the fd it reaches the memfd, which has no other name.
    return f"memory-backend-file,id=ram,size={memory},mem-path=/proc/self/fd/{GIVEN_FD},share=on"


def _device(number: int) -> str:
    return f"vfio-pci,id=memconsole-{number},iommufd=memconsole,fd={GIVEN_FD + 2 + number}"
