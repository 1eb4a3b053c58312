"""What is asked of libvirt's QEMUs goes through libvirt, which has their monitor: ``virsh qemu-monitor-command``.

libvirt marks a domain whose monitor somebody else has used (taint ``custom-monitor``) and waits for the domain's job
lock; so a domain is asked once, when it is adopted. A domain is named by its UUID.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from memconsole import decoding
from memconsole.backend.managers.guest_memory import LARGEST
from memconsole.errors import GuestError
from memconsole.model.base import Value

BINARY = "virsh"
URI = "qemu:///system"
WITHIN_S = 40.0
"""Seconds an answer may take: libvirt itself waits 30 s for its lock on the domain."""


_NO_OPTION = "doesn't support option"
_LOOK_S = 0.1


class _Error(Value, frozen=True):
    desc: str = ""


class _Answer(Value, frozen=True):
    error: _Error | None = None
    returned: Any = msgspec.field(default=None, name="return")


def installed() -> bool:
    """Whether there is a virsh to ask with."""
    return shutil.which(BINARY) is not None


class Monitor(Protocol):
    """The monitor of a domain's QEMU: what it returns for a QMP command; ``fd`` is handed to it (``getfd``).

    Raises:
        GuestError: libvirt or QEMU refused, or did not answer in time. Undecodable: the answer is none.
    """

    def __call__(self, command: str, arguments: Mapping[str, object], fd: int | None = None) -> Any:  # noqa: D102
        ...


def monitor(uuid: str) -> Monitor:
    """The monitor of a domain's QEMU, through libvirt."""
    return partial(_execute, uuid)


def _execute(uuid: str, command: str, arguments: Mapping[str, object], fd: int | None = None) -> Any:
    asked = msgspec.json.encode({"execute": command, "arguments": dict(arguments)}).decode()
    passed = () if fd is None else ("--pass-fds", str(fd))
    what = f"libvirt does not hand {command} on to domain {uuid}"
    words = ("qemu-monitor-command", *passed, "--domain", uuid, asked)
    said = run(*words, what=what, fds=() if fd is None else (fd,))
    answer = decoding.json(said, _Answer, what=f"the answer to {command}", limit=LARGEST)
    if answer.error is not None:
        raise GuestError(f"QEMU refused {command}", answer.error.desc, "see the domain's log in /var/log/libvirt/qemu")
    return answer.returned


def run(*words: str, what: str, within: float = WITHIN_S, fds: Sequence[int] = ()) -> bytes:
    """What virsh says to a command of the system's libvirt; ``what`` is what was not done where it does not end well.

    Raises:
        GuestError: it did not end well (``TooOld``: it knows no such option), or not within so many seconds.
    """
    try:
        said = subprocess.run(
            [BINARY, "-q", "-c", URI, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=within,
            env={**os.environ, "LC_ALL": "C"},
            pass_fds=tuple(fds),
        )
    except subprocess.TimeoutExpired:
        why = f"{BINARY} did not end within {within:g} s"
        raise GuestError(what, why, "see what the domain waits for: virsh domjobinfo NAME") from None
    except OSError as error:
        raise GuestError(what, f"{BINARY}: {error.strerror}", "apt install libvirt-clients") from None
    if not said.returncode:
        return said.stdout
    why = " ".join(decoding.text(said.stderr[:1000]).split()) or f"{BINARY} ended with {said.returncode}"
    if _NO_OPTION in why:
        raise GuestError(what, why, "install libvirt 8.2 or newer", code="TooOld")
    raise GuestError(what, why, "systemctl status libvirtd virtqemud: one of them must run")


def description(uuid: str) -> bytes:
    """The XML of a domain that runs, as it would be migrated, with what is secret in it.

    Raises:
        GuestError: libvirt does not say it.
    """
    what = f"libvirt does not describe domain {uuid}"
    return run("dumpxml", "--migratable", "--security-info", "--domain", uuid, what=what).strip()


def state(uuid: str, within: float = WITHIN_S) -> str:
    """The state of a domain, in libvirt's words ("running", "paused", "shut off").

    Raises:
        GuestError: libvirt does not say it, or knows no such domain.
    """
    said = run("domstate", "--domain", uuid, what=f"libvirt does not say the state of domain {uuid}", within=within)
    return decoding.text(said[:200]).strip()


def was_destroyed(uuid: str) -> bool:
    """Whether somebody has ended a domain by libvirt (``virsh destroy``); not, where its process ended.

    Raises:
        GuestError: libvirt does not say it, or knows no such domain.
    """
    said = run("domstate", "--reason", "--domain", uuid, what=f"libvirt does not say the state of domain {uuid}")
    return "(destroyed)" in decoding.text(said[:200])


def is_off(uuid: str, within: float) -> bool:
    """Whether libvirt says within so many seconds that a domain does not run; one that it does not know does not.

    Raises:
        GuestError: libvirt does not answer.
    """
    deadline = time.monotonic() + within
    while uuid in running():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def running() -> frozenset[str]:
    """The UUIDs of the domains that run, or are paused.

    Raises:
        GuestError: libvirt does not say it.
    """
    said = run("list", "--uuid", what="libvirt does not list its domains")
    return frozenset(decoding.text(said).split())


def is_saved(uuid: str) -> bool:
    """Whether libvirt has a managed save of a domain, and starts it from there.

    Raises:
        GuestError: libvirt does not say it.
    """
    said = run("list", "--all", "--with-managed-save", "--uuid", what="libvirt does not list its domains")
    return uuid in decoding.text(said).split()


def start(uuid: str, within: float) -> None:
    """Start a domain, from its managed save where it has one.

    Raises:
        GuestError: it was not started.
    """
    run("start", "--domain", uuid, what=f"libvirt does not start domain {uuid}", within=within)


def restore(image: str, within: float, *, paused: bool | None = None) -> None:
    """Restore a domain from an image, as it was when it was saved, or paused, or running.

    Raises:
        GuestError: it was not restored.
    """
    state = () if paused is None else ("--paused" if paused else "--running",)
    run("restore", image, *state, what=f"libvirt does not restore {image}", within=within)
