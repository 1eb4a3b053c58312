"""VMMs of others that memconsole-resume starts: files say who runs a guest before it goes on, and never two do."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest
from support.resume_stage import LINES, Monitor, Stage, of, vmms
from support.waiting import until

from memconsole.backend.handoff import bootplan
from memconsole.backend.handoff.bootplan import BootPlan, GuestFile, MonitorLines

GO_ON = (LINES[0], ('{"execute": "cont"}', "return"), LINES[1])
GOES_ON: list[str | None] = ['{"return": {}}', '{"return": {}}', '{"return": {"status": "running"}}']


def told_of(stage: Stage, **more: object) -> tuple[BootPlan, Path, Path]:
    """A plan of a guest that a file tells of; where its monitor is, and the file."""
    path, file = stage.directory / "qmp", stage.directory / "state" / "vm.xml"
    start = msgspec.structs.replace(stage.start("vm"), **more)
    files = (GuestFile("vm", str(file), b"<pid a='@PID@'>@PID@</pid>", 0o640, os.geteuid(), os.getegid()),)
    return BootPlan((), (), (start,), (MonitorLines("vm", str(path), GO_ON, 30_000),), files=files), path, file


def test_a_file_tells_of_a_guest_before_it_goes_on(stage: Stage) -> None:
    plan, path, file = told_of(stage)
    monitor = Monitor(path, GOES_ON, lambda line: "cont" not in line or file.exists())
    code, _, resume = stage.resume(plan)
    monitor.end()
    found = of(resume, "vm")
    assert (code, found.state, found.told, monitor.wrong) == (0, "resumed", True, [])
    assert file.read_text() == f"<pid a='{found.pid}'>@PID@</pid>"
    assert (file.stat().st_mode & 0o777, list(file.parent.iterdir())) == (0o640, [file])


@pytest.mark.parametrize("whose", ["file", "daemon"])
def test_a_guest_that_somebody_else_runs_or_may_run_is_not_started(stage: Stage, whose: str) -> None:
    daemon = stage.directory / "daemon.pid"
    plan, _, file = told_of(stage, unless=(str(daemon),))
    other = file if whose == "file" else daemon
    other.parent.mkdir(exist_ok=True)
    other.write_text("others")
    code, _, resume = stage.resume(plan)
    found = of(resume, "vm")
    assert (code, found.state, found.pid, found.told) == (4, "held", 0, False)
    assert f"{other} is there" in found.why
    assert (vmms(stage, "vm"), other.read_text()) == ([], "others")


def test_a_guest_that_somebody_else_may_run_by_now_does_not_go_on(stage: Stage) -> None:
    """Who looks for files after it said that it is there finds none, or is seen before the guest goes on."""
    daemon = stage.directory / "daemon.pid"
    plan, path, file = told_of(stage, unless=(str(daemon),))
    monitor = Monitor(path, GOES_ON, lambda _line: daemon.write_text("1") == 1)
    code, _, resume = stage.resume(plan)
    monitor.end()
    found = of(resume, "vm")
    assert (code, found.state, found.pid, found.told) == (4, "held", 0, False)
    assert f"{daemon} is there" in found.why
    assert (vmms(stage, "vm"), file.exists(), len(monitor.heard)) == ([], False, 1)


def test_killed_once_a_file_tells_of_a_guest_it_is_told_of_anew(stage: Stage) -> None:
    plan, path, file = told_of(stage)
    stage.put(bootplan.MANIFEST, bootplan.encode(plan))
    before = Monitor(path, GOES_ON)
    assert stage.run("resume.files.vm.written")[0] == -signal.SIGKILL
    before.end()
    told = file.read_text()
    path.unlink()
    again = Monitor(path, GOES_ON)
    assert stage.run()[0] == 0
    again.end()
    found = of(stage.record(), "vm")
    assert (found.state, vmms(stage, "vm")) == ("resumed", [found.pid])
    assert file.read_text() == f"<pid a='{found.pid}'>@PID@</pid>" != told


def test_a_vmm_has_its_environment_its_groups_and_what_it_needs_on_the_disk(stage: Stage) -> None:
    said = "os.environ.get('A'), os.environ.get('HOME'), os.getgroups()"
    code = f"import os, time; print({said}, flush=True); time.sleep(600)"
    place, key = stage.directory / "more" / "place", stage.directory / "key"
    key.write_text("of before")
    root = os.geteuid() == 0
    start = msgspec.structs.replace(
        stage.start("vm", sys.executable, "-c", code, gid=1 if root else 0),
        groups=(5, 6),
        variables=("A=b",),
        directories=(str(place),),
    )
    files = (GuestFile("vm", str(key), b"key", 0o600, os.geteuid(), os.getegid(), early=True),)
    assert stage.resume(BootPlan((), (), (start,), files=files))[0] == 0
    until(lambda: stage.log("vm").endswith("\n"), "its words")
    assert stage.log("vm").startswith("b None ")
    if root:
        assert stage.log("vm") == "b None [5, 6]\n"
    assert place.is_dir()
    assert key.read_text() == "key"
