"""Bad input: each is refused by name with a remedy, and nothing is half done."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.controls import M, controls, ours
from support.guests import AgentProcess
from support.open_fds import opened
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.embedded import embedded
from memconsole.errors import ExitCode, Gone, Refused
from memconsole.model import Access, GrantState, Snapshot

GONE = 2**22 + 1
"""A PID no Linux gives (PID_MAX_LIMIT is 2**22)."""


@pytest.fixture(scope="module")
def host() -> Iterator[Control]:
    """A region ``web`` of 4 MiB, and a process ``db`` that was granted its first MiB at gpa 0 as ``g1``; ``other``."""
    with (
        controls() as control,
        AgentProcess(control.runtime_dir / "agents") as process,
        AgentProcess(control.runtime_dir / "agents") as other,
    ):
        control.apply(do.Reserve("web", 4 * M))
        control.apply(do.Reserve("ram", 4 * M))
        control.apply(do.GuestAttach("db", process.pid))
        control.apply(do.GuestAttach("other", other.pid))
        control.apply(do.Map("web", "db", length=M, gpa=0))
        until(lambda: control.snapshot().grants[0].state is GrantState.MAPPED, "it is mapped")
        yield control


def essence(snapshot: Snapshot) -> tuple[object, ...]:
    return (
        tuple(region.name for region in snapshot.regions),
        tuple(ours(snapshot)),
        tuple(g.id for g in snapshot.grants),
    )


def thread_of_the_kernel() -> int:
    return 2


CASES: list[tuple[str, do.Action]] = [
    ("NameTaken", do.Reserve("web", M)),
    ("NameTaken", do.GuestStart("web")),
    ("NameTaken", do.GuestStart("db")),
    ("NameTaken", do.GuestAttach("db", os.getppid())),
    ("BadName", do.Reserve("", M)),
    ("BadName", do.Reserve("../etc", M)),
    ("BadName", do.Reserve("-x", M)),
    ("BadName", do.Reserve("x" * 56, M)),
    ("BadName", do.GuestStart("a b")),
    ("BadName", do.GuestAttach("a/b", os.getppid())),
    ("BadSize", do.Reserve("new", 0)),
    ("BadSize", do.Reserve("new", -4096)),
    ("BadSize", do.Reserve("new", 4097)),
    ("BadSize", do.Reserve("new", 1 << 63)),
    ("BadSize", do.Reserve("new", 3 * M, page_size=2 * M)),
    ("BadSize", do.GuestStart("new", memory=0)),
    ("BadPageSize", do.Reserve("new", M, page_size=8192)),
    ("BadPageSize", do.Reserve("new", M, page_size=0)),
    ("NoMemory", do.Reserve("new", 1 << 50)),
    ("NoMemory", do.GuestStart("new", memory=1 << 50)),
    ("NoHugePages", do.Reserve("new", 1 << 40, page_size=1 << 30)),
    ("NoNode", do.Reserve("new", M, node=999)),
    ("NoSuchStore", do.Reserve("new", M, store="tape")),
    ("NoSuchVmm", do.GuestStart("new", vmm="bochs")),
    ("NoSuchRegion", do.Release("none")),
    ("NoSuchRegion", do.Map("none", "db")),
    ("NoSuchGuest", do.Map("web", "none")),
    ("NoSuchGuest", do.GuestStop("none")),
    ("NoSuchGuest", do.GuestPause("none")),
    ("NoSuchGuest", do.GuestResume("qemu-1")),
    ("NoSuchGrant", do.Revoke("g99")),
    ("BadDeadline", do.Revoke("g1", within=0)),
    ("BadDeadline", do.Revoke("g1", within=float("nan"))),
    ("NoSuchProcess", do.GuestAttach("new", GONE)),
    ("NoSuchProcess", do.GuestAttach("new", 0)),
    ("NoSuchProcess", do.GuestAttach("new", -1)),
    ("NotAProcess", do.GuestAttach("new", thread_of_the_kernel())),
    ("Itself", do.GuestAttach("new", os.getpid())),
    ("NotPaused", do.GuestResume("db")),
    ("Granted", do.Release("web")),
    ("BadRange", do.Map("web", "db", offset=4 * M)),
    ("BadRange", do.Map("web", "db", offset=-4096)),
    ("BadRange", do.Map("web", "db", length=0)),
    ("BadRange", do.Map("web", "db", length=-4096)),
    ("BadRange", do.Map("web", "db", offset=100, length=4096)),
    ("BadRange", do.Map("web", "db", length=5 * M)),
    ("BadRange", do.Map("ram", "db", gpa=5)),
    ("BadRange", do.Map("ram", "db", gpa=-4096)),
    ("BadRange", do.Map("ram", "db", gpa=1 << 52)),
    ("Shared", do.Map("web", "db")),
    ("Shared", do.Map("web", "db", offset=M, length=M)),
    ("Shared", do.Map("web", "other", offset=2 * M, access=Access.RO)),
    ("Overlap", do.Map("ram", "db", gpa=0)),
    ("Overlap", do.Map("ram", "db", gpa=M - 4096)),
    ("NoSuchDevice", do.Map("ram", "db", dma="ffff:ff:1f.7")),
    ("NoSuchWindow", do.WindowMap("ffff:ff:1f.7:0", "db")),
    ("NoSuchWindow", do.WindowRevoke("ffff:ff:1f.7:0")),
]


@pytest.mark.parametrize(("code", "action"), CASES, ids=[f"{code}-{n}" for n, (code, _) in enumerate(CASES)])
def test_bad_input_is_refused_by_name_and_changes_nothing(host: Control, code: str, action: do.Action) -> None:
    before, events = essence(host.snapshot()), len(host.events(0))
    plan = host.plan(action)
    assert code in [refusal.code for refusal in plan.refusals]
    assert plan.effects == ()
    assert all(refusal.what and (refusal.remedy or refusal.why) for refusal in plan.refusals)
    with pytest.raises(Refused) as refused:
        host.apply(action)
    assert refused.value.code == plan.refusals[0].code
    assert refused.value.exit_code is ExitCode.REFUSED
    assert essence(host.snapshot()) == before
    assert len(host.events(0)) == events
    assert _opened(host, action, 5) < 5, "every refusal leaves an fd open"


def _opened(host: Control, action: do.Action, times: int) -> int:
    """How many more fds are open behind so many refusals; other threads may open one or two meanwhile."""
    before = opened()
    for _ in range(times):
        with pytest.raises(Refused):
            host.apply(action)
    return (opened() - before).total()


def test_a_region_sealed_against_writing_is_not_granted_for_writing(host: Control) -> None:
    import fcntl

    host.apply(do.Reserve("sealed", M))
    with host._desk.borrowed_fds("sealed") as fds:
        fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    codes = [refusal.code for refusal in host.plan(do.Map("sealed", "db")).refusals]
    assert codes == ["AccessTooWide"]
    host.apply(do.Release("sealed"))


def test_a_region_mapped_by_a_stranger_is_not_released(host: Control) -> None:
    host.apply(do.Reserve("shown", M))
    keeps = "import mmap, sys, time\nm = mmap.mmap(int(sys.argv[1]), 4096)\nprint(1, flush=True)\ntime.sleep(600)"
    with host._desk.borrowed_fds("shown") as fds:
        stranger = subprocess.Popen([sys.executable, "-c", keeps, str(fds[0])], pass_fds=fds, stdout=subprocess.PIPE)
    with stranger:
        try:
            assert stranger.stdout is not None
            stranger.stdout.readline()
            with pytest.raises(Refused, match="shown") as refused:
                host.apply(do.Release("shown"))
            assert refused.value.code == "StillMapped"
            assert str(stranger.pid) in str(refused.value)
        finally:
            stranger.kill()
    host.apply(do.Release("shown"))


def test_memory_that_is_promised_is_not_promised_twice(host: Control) -> None:
    memory = host.snapshot().memory
    half = memory.available * 6 // 10 // 4096 * 4096
    host.apply(do.Reserve("half", half))
    assert [refusal.code for refusal in host.plan(do.Reserve("other", half)).refusals] == ["NoMemory"]
    host.apply(do.Release("half"))
    assert host.plan(do.Reserve("other", half)).refusals == ()


def test_a_process_that_ends_between_plan_and_apply_is_named(host: Control) -> None:
    with AgentProcess(Path("/nowhere")) as process:
        action = do.GuestAttach("brief", process.pid)
        assert host.plan(action).refusals == ()
        process.end()
        with pytest.raises(Refused) as refused:
            host.apply(action)
        assert refused.value.code == "NoSuchProcess"


def test_a_guest_whose_process_ended_has_no_map(host: Control) -> None:
    with AgentProcess(host.runtime_dir / "agents") as process:
        host.apply(do.GuestAttach("brief", process.pid))
        process.end()
        with pytest.raises(Gone):
            host.extents("guest:brief")
        assert [refusal.code for refusal in host.plan(do.Map("ram", "brief")).refusals] == ["GuestGone"]
        host.apply(do.GuestStop("brief"))


@pytest.mark.parametrize("action", [do.Reserve("new", M), do.Release("none"), do.GuestStart("new")])
def test_a_read_only_control_process_plans_and_does_nothing(tmp_path: Path, action: do.Action) -> None:
    with closing(embedded(tmp_path / "r", read_only="--read-only was given")) as control:
        assert control.plan(action).refusals[0].code == "ReadOnly"
        with pytest.raises(Refused) as refused:
            control.apply(action)
        assert refused.value.code == "ReadOnly"
        assert control.snapshot().regions == ()
    assert not (tmp_path / "r").exists()


NOBODY = """
import ctypes, os, tempfile
from pathlib import Path
from memconsole import actions as do
from memconsole.backend.embedded import embedded
from memconsole.errors import MemconsoleError

control = embedded()  # what is imported is imported as root: the interpreter may not be anybody's to read
control.apply(do.Reserve("mine", 1 << 20, prefault=True))
control.extents("region:mine").close()
control.apply(do.Release("mine"))
control.close()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as in any process that was started by its user
with tempfile.TemporaryDirectory() as directory:
    control = embedded(Path(directory) / "r")
    snapshot = control.snapshot()
    sources = " ".join(gap.source for gap in snapshot.gaps)
    assert "/proc/iomem" in sources and "/proc/PID" in sources, sources
    assert all(gap.why for gap in snapshot.gaps), snapshot.gaps
    control.apply(do.Reserve("mine", 1 << 20, prefault=True))
    assert control.snapshot().regions[0].seen is not None
    try:
        control.extents("region:mine")
        raise AssertionError("PFNs are shown to nobody")
    except MemconsoleError as error:
        assert error.code == "Denied" and error.remedy, error
    control.apply(do.Release("mine"))
    assert control.snapshot().regions == ()
    control.close()
"""


def test_an_ordinary_user_sees_what_the_kernel_lets_it_see() -> None:
    """As nobody: a Snapshot with gaps that say what is missing and why, and memory of its own to act on."""
    done = subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
