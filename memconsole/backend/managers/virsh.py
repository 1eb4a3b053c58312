"""What is asked of libvirt's QEMUs goes through libvirt, which has their monitor: ``virsh qemu-monitor-command``.

libvirt marks a domain whose monitor somebody else has used (taint ``custom-monitor``) and waits for the domain's job
lock; so a domain is asked once, when it is adopted. A domain is named by its UUID.
"""

from __future__ import annotations

import os
import shutil
import subprocess
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
