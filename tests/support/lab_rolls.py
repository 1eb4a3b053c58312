"""Rolls over lab hosts: the engine over them, and the guest that each of them has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.lab_fleet import LabFleet
from support.playbooks import Engine

SOAK = pytest.mark.skipif(not os.environ.get("MEMCONSOLE_SOAK"), reason="a fleet of labs takes long: MEMCONSOLE_SOAK=1")
CANARY = (
    "[ -e /var/lib/begun ] || { memconsole serve --record 30; memconsole guest start canary --memory 8M; :"
    " >/var/lib/begun; }"
)
"""What a host does before its first service: a guest, which counts."""


def engine(directory: Path, fleet: LabFleet, **shared: object) -> Engine:
    """An engine over lab hosts; each look costs an emulated processor ten seconds."""
    told = {
        "ansible_remote_tmp": "/tmp/ansible",
        "ansible_timeout": 120,  # an emulated sshd of a busy machine takes long until it greets
        "memconsole_interval": 45,
        "memconsole_least_timeout": 1200,
        **shared,
    }
    return Engine(directory, fleet.variables(), told)
