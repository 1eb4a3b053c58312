"""What is asked of libvirt's QEMUs goes through libvirt, which has their monitor: ``virsh qemu-monitor-command``.

libvirt marks a domain whose monitor somebody else has used (taint ``custom-monitor``) and waits for the domain's job
lock; so a domain is asked once, when it is adopted. A domain is named by its UUID.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec

from memconsole import decoding
from memconsole.backend.managers.guest_memory import LARGEST, Ask
from memconsole.errors import GuestError
from memconsole.model.base import Value

BINARY = "virsh"
URI = "qemu:///system"
WITHIN_S = 40.0
"""Seconds an answer may take: libvirt itself waits 30 s for its lock on the domain."""


class _Error(Value, frozen=True):
    desc: str = ""


class _Answer(Value, frozen=True):
    error: _Error | None = None
    returned: Any = msgspec.field(default=None, name="return")


def installed() -> bool:
    """Whether there is a virsh to ask with."""
    return shutil.which(BINARY) is not None


def monitor(uuid: str) -> Ask:
    """The monitor of a domain's QEMU, through libvirt."""
    return partial(_execute, uuid)


def _execute(uuid: str, command: str, arguments: Mapping[str, object]) -> Any:
    """What QEMU returns.

    Raises:
        GuestError: libvirt or QEMU refused, or did not answer in time. Undecodable: the answer is none.
    """
    asked = msgspec.json.encode({"execute": command, "arguments": dict(arguments)}).decode()
    words = [BINARY, "-q", "-c", URI, "qemu-monitor-command", "--domain", uuid, asked]
    what = f"libvirt does not hand {command} on to domain {uuid}"
    try:
        said = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=WITHIN_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        why = f"{BINARY} did not end within {WITHIN_S:g} s"
        raise GuestError(what, why, "see what the domain waits for: virsh domjobinfo NAME") from None
    except OSError as error:
        raise GuestError(what, f"{BINARY}: {error.strerror}", "apt install libvirt-clients") from None
    if said.returncode:
        why = " ".join(decoding.text(said.stderr[:1000]).split()) or f"{BINARY} ended with {said.returncode}"
        raise GuestError(what, why, "systemctl status libvirtd virtqemud: one of them must run")
    answer = decoding.json(said.stdout, _Answer, what=f"the answer to {command}", limit=LARGEST)
    if answer.error is not None:
        raise GuestError(f"QEMU refused {command}", answer.error.desc, "see the domain's log in /var/log/libvirt/qemu")
    return answer.returned
