"""What the tests of the control process share: an embedded one in a short directory, and what the kernel says."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from memconsole.backend.control import Control
from memconsole.backend.embedded import embedded
from memconsole.model import Finding, Grant, Guest, GuestKind, GuestState, Region, Snapshot
from support.waiting import until

M = 1 << 20


@contextlib.contextmanager
def runtime_dir() -> Iterator[Path]:
    """A short directory: a path of a unix socket has 107 bytes at most."""
    directory = Path(tempfile.mkdtemp(prefix="mc-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def controls() -> Iterator[Control]:
    """An embedded control process; every guest it has is ended with it."""
    with runtime_dir() as directory, contextlib.closing(embedded(directory / "run")) as control:
        yield control


def region(snapshot: Snapshot, name: str) -> Region:
    """The region of a name."""
    return next(region for region in snapshot.regions if region.name == name)


def guest(snapshot: Snapshot, name: str) -> Guest:
    """The guest of a name."""
    return next(guest for guest in snapshot.guests if guest.name == name)


def ours(snapshot: Snapshot) -> list[str]:
    """The names of the guests that are not somebody else's."""
    return [guest.name for guest in snapshot.guests if guest.kind is not GuestKind.FOREIGN]


def grant(snapshot: Snapshot, id: str) -> Grant:
    """The grant of an id."""
    return next(grant for grant in snapshot.grants if grant.id == id)


def beats(control: Control, name: str) -> int:
    """How far a canary has counted."""
    progress = guest(control.snapshot(), name).progress
    return progress.beats if progress is not None else 0


def goes_on(control: Control, name: str) -> None:
    """Wait until a canary has counted on, and hold it to having found no wrong byte."""
    before = beats(control, name)
    until(lambda: beats(control, name) > before, f"{name} counts")
    progress = guest(control.snapshot(), name).progress
    assert progress is not None
    assert progress.wrong == 0


def pages_of(path: Path, inode: int) -> list[str]:
    """The lines of a maps file that are mappings of an inode: the ten-line independent reader."""
    return [line for line in path.read_text().splitlines() if line.split()[4] == str(inode)]


def is_gone(control: Control, name: str) -> bool:
    """Whether the Snapshot shows a guest as gone."""
    return guest(control.snapshot(), name).state is GuestState.GONE


def raised(snapshot: Snapshot) -> list[Finding]:
    """Its findings, but for a keeper that this host does not exempt from its OOM killer, which is the host's affair."""
    return [finding for finding in snapshot.findings if finding.id != "custody-unguarded"]
