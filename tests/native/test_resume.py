"""memconsole-resume on this host: the same program, the keeper in LUO's place, under ASan and UBSan."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.guests import given, hubs, own_frames, region, sweep
from support.resume_stage import LINES, M, Monitor, Stage, of, vmms
from support.waiting import until

from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.handoff import bootplan
from memconsole.backend.handoff.bootplan import BootPlan, Hold, MonitorLines, Resume, Start, Verify
from memconsole.backend.peers.handle import Handle
from memconsole.extents import ExtentTable

PHASES = ["begun", "planned", "retrieved", "verified", "started", "resumed"]


def ids(resume: Resume) -> list[tuple[str, str]]:
    return [(finding.id, finding.subject) for finding in resume.findings]


def test_without_a_manifest_there_is_nothing_to_adopt(stage: Stage) -> None:
    code, err = stage.run()
    assert (code, err) == (6, "memconsole-resume: nothing was handed over\n")
    assert stage.custody.names() == []


def test_without_a_keeper_a_rehearsal_fails(resume_program: Path, tmp_path: Path) -> None:
    command = [str(resume_program), "--rehearse", "--runtime", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "for the plan: No such file or directory" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--bird"], ["--runtime"], ["--runtime", "here"], ["--runtime", "/" + "x" * 200]]
)
def test_bad_arguments_are_a_usage_error(resume_program: Path, arguments: list[str]) -> None:
    done = subprocess.run([resume_program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_vmms_get_their_fds_by_number_and_nothing_else(stage: Stage) -> None:
    stage.put("a", b"first")
    stage.put("b", b"second")
    code = """
import os, time
fds = {int(name) for name in os.listdir("/proc/self/fd")}
said = [os.pread(4, 9, 0).decode(), os.pread(3, 9, 0).decode(), os.pread(900, 9, 0).decode()]
opened = {fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")}
print(*said, *sorted(opened), os.getcwd(), os.getsid(0) == os.getpid(), flush=True)
time.sleep(600)
"""
    start = stage.start("vm", sys.executable, "-c", code, fds={"a": 4, "b": 3})
    start = Start(start.guest, start.words, start.directory, start.log, (*start.fds, ("a", 900)))
    holds = (Hold("s", 1, "a"), Hold("s", 2, "b"))
    assert stage.resume(BootPlan(holds, (), (start,)))[0] == 0
    until(lambda: stage.log("vm").endswith("\n"), "its words")
    assert stage.log("vm").split() == [
        *("first", "second", "first", "0", "1", "2", "3", "4", "900"),
        str(stage.directory / "guests" / "vm"),
        "True",
    ]


def test_a_vmm_runs_as_whom_the_plan_says(stage: Stage) -> None:
    if os.geteuid():
        pytest.skip("only root can start a VMM as another user")
    code = "import os, time; print(os.getresuid(), os.getresgid(), os.getgroups(), flush=True); time.sleep(600)"
    stage.directory.chmod(0o755)
    for parent in stage.directory.parents[:-2]:
        parent.chmod(parent.stat().st_mode | 0o111)
    start = stage.start("vm", "/usr/bin/env", "python3", "-c", code, uid=65534, gid=65534)
    assert stage.resume(BootPlan((), (), (start,)))[0] == 0
    until(lambda: stage.log("vm").endswith("\n"), "its words")
    assert stage.log("vm") == "(65534, 65534, 65534) (65534, 65534, 65534) []\n"


def test_the_record_says_who_runs_and_when(stage: Stage) -> None:
    stage.put("a")
    code, err, resume = stage.resume(BootPlan((Hold("s", 1, "a"),), (), (stage.start("vm", fds={"a": 3}),)))
    assert (code, err, resume.findings, resume.held, resume.mode) == (0, "", (), ("a",), "rehearse")
    assert [phase.name for phase in resume.phases] == PHASES
    moments = [phase.at.boottime_ns for phase in resume.phases]
    assert moments == sorted(moments)
    found = of(resume, "vm")
    assert (found.state, found.why) == ("started", "")
    with Handle(found.pid, found.start_ticks) as process:
        assert process.alive()
    assert sorted(stage.custody.names()) == ["a", "manifest", "resume"]


def test_a_guest_without_all_of_its_memory_is_held_and_the_others_run(stage: Stage) -> None:
    stage.put("a")
    starts = (stage.start("whole", fds={"a": 3}), stage.start("half", fds={"a": 3, "b": 4}))
    code, err, resume = stage.resume(BootPlan((Hold("s", 1, "a"), Hold("s", 2, "b")), (), starts))
    assert code == 4
    assert of(resume, "whole").state == "started"
    assert (of(resume, "half").state, of(resume, "half").pid) == ("held", 0)
    assert of(resume, "half").why == "b is not in custody"
    assert ids(resume) == [("not-in-custody", "b"), ("guest-held", "half")]
    assert "guest-held: half: b is not in custody" in err


def test_a_broken_plan_starts_nothing(stage: Stage) -> None:
    stage.put("a", b"kept")
    raw = bytearray(bootplan.encode(BootPlan((Hold("s", 1, "a"),), (), (stage.start("vm", fds={"a": 3}),))))
    raw[-1] ^= 1
    code, _, resume = stage.resume(bytes(raw))
    assert (code, resume.guests, resume.held) == (4, (), ("a",))
    assert ids(resume) == [("plan-broken", "manifest")]
    assert not (stage.directory / "guests").exists()


def test_an_empty_manifest_is_a_broken_plan(stage: Stage) -> None:
    code, _, resume = stage.resume(b"")
    assert (code, ids(resume)) == (4, [("plan-broken", "manifest")])


def test_a_vmm_that_cannot_start_or_ends_at_once_is_held_and_says_why(stage: Stage) -> None:
    starts = (
        stage.start("nowhere", "/nowhere/vmm"),
        stage.start("fails", "/bin/sh", "-c", "echo no; exit 7"),
        stage.start("dies", "/bin/sh", "-c", "kill -9 $$"),
        stage.start("stays"),
    )
    code, _, resume = stage.resume(BootPlan((), (), starts))
    assert code == 4
    assert of(resume, "nowhere").why == "its VMM /nowhere/vmm cannot be started: No such file or directory"
    assert of(resume, "fails").why == f"its VMM ended with status 7; see {starts[1].log}"
    assert of(resume, "dies").why == f"its VMM was killed by signal 9; see {starts[2].log}"
    assert [found.state for found in resume.guests] == ["held", "held", "held", "started"]
    assert stage.log("fails") == "no\n"


def test_pages_are_compared_and_in_a_rehearsal_may_have_moved(stage: Stage) -> None:
    fd = os.memfd_create("ram")
    os.truncate(fd, 16 * M)
    own_frames(fd, 16 * M)
    stage.custody.put("ram", fd)
    with ExtentTable.scan_fd(fd, 16 * M) as table:
        digest = table.digest()
    os.close(fd)
    holds, starts = (Hold("s", 1, "ram"),), (stage.start("vm", fds={"ram": 3}),)
    assert stage.resume(BootPlan(holds, (Verify("ram", 16 * M, digest),), starts))[2].findings == ()
    code, _, resume = stage.resume(BootPlan(holds, (Verify("ram", 16 * M, "00" * 16),), starts))
    assert (code, ids(resume)) == (4, [("pages-moved", "ram")])
    assert of(resume, "vm").state == "started"
    code, _, resume = stage.resume(BootPlan(holds, (Verify("ram", 16 * M + 1, digest),), starts))
    assert [finding.text for finding in resume.findings] == ["the size is not whole pages"]


CONVERSATIONS: dict[str, tuple[list[str | None], str]] = {
    "said": (['{"return": {}}', '{"return": {"status": "inmigrate"}}', '{"return": {"status": "running"}}'], ""),
    "events": (
        ['{"event": "error"}\n{"return": {}}', '{"event": "STOP"}\n{"return": "running"}'],
        "",
    ),
    "refused": (['{"error": {"class": "GenericError"}}'], "qmp_capabilities"),
    "silent": ([None], "does not answer within 400 ms"),
    "other": (['{"return": {}}', *['{"return": {"status": "paused"}}'] * 2000], "does not answer within 400 ms"),
    "gone": ([], "its monitor went away"),
}


@pytest.mark.parametrize("how", CONVERSATIONS)
def test_a_monitor_is_talked_to_until_it_says_what_is_awaited(stage: Stage, how: str) -> None:
    answers, why = CONVERSATIONS[how]
    path = stage.directory / "qmp"
    if how == "gone":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def hang_up() -> None:
            listener.accept()[0].close()

        closer = threading.Thread(target=hang_up, daemon=True)
        closer.start()
    else:
        monitor = Monitor(path, answers)
    say = MonitorLines("vm", str(path), LINES, 400 if why else 30_000)
    code, _, resume = stage.resume(BootPlan((), (), (stage.start("vm"),), (say,)))
    found = of(resume, "vm")
    if why:
        assert (code, found.state) == (4, "started")
        assert why in found.why
        assert found.pid  # it is there, to be looked at
    else:
        assert (code, found.state, found.why) == (0, "resumed", "")
        assert monitor.heard[0] == LINES[0][0]
        assert set(monitor.heard[1:]) == {LINES[1][0]}
        assert found.at.boottime_ns <= resume.phases[-1].at.boottime_ns
    if how == "gone":
        closer.join(30)
        listener.close()
    else:
        monitor.end()


BUSY = """
import socket, sys, time
ends = time.monotonic() + 5
while time.monotonic() < ends:
    pass
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
connection = listener.accept()[0]
connection.sendall(b"greeting\\n")
for line in connection.makefile():
    connection.sendall(b'{"return": {"status": "running"}}\\n')
time.sleep(600)
"""


def test_a_vmm_that_is_busy_is_waited_for_longer_than_one_that_sleeps(stage: Stage) -> None:
    path = stage.directory / "qmp"
    start = stage.start("vm", sys.executable, "-c", BUSY, str(path))
    code, _, resume = stage.resume(BootPlan((), (), (start,), (MonitorLines("vm", str(path), LINES, 3000),)))
    assert (code, of(resume, "vm").state, of(resume, "vm").why) == (0, "resumed", "")


def test_a_vmm_that_ends_before_its_monitor_is_there_is_not_waited_for(stage: Stage) -> None:
    say = MonitorLines("vm", str(stage.directory / "qmp"), LINES, 120_000)
    start = stage.start("vm", sys.executable, "-c", "raise SystemExit(3)")
    code, _, resume = stage.resume(BootPlan((), (), (start,), (say,)))
    assert code == 4
    assert (of(resume, "vm").state, of(resume, "vm").pid) == ("held", 0)
    assert of(resume, "vm").why.startswith("its VMM ended with status 3")


def test_a_canary_goes_on_through_a_rehearsal(stage: Stage) -> None:
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(hubs())()
        fd = stack.enter_context(region(M))
        offer = stack.enter_context(given(fd, "g-1", M))
        guest = CanaryGuest.start("bird", hub, stage.directory, args=["--as", "process"])
        first = stack.enter_context(Handle(guest.pid, child=True))
        stack.callback(first.kill)
        assert guest.offer(offer, 10)
        until(lambda: (now := guest.progress()) is not None and now.checked > 1024, "sweeps")
        state = os.memfd_create("state")
        guest.save(state, 10)
        stood = guest.progress()
        assert stood is not None
        stage.custody.put("state:bird", state)
        stage.custody.put("region:bird:0", fd)
        os.close(state)
        again = guest.restart(hub.path, "state:bird", [("g-1", "region:bird:0")])
        first.kill()
        guest.close()
        start = Start("bird", again.words, str(stage.directory), str(stage.directory / "log"), again.fds)
        holds = (Hold("memconsole:bird", 1, "region:bird:0"), Hold("memconsole:manifest", 2, "state:bird"))
        code, err, resume = stage.resume(BootPlan(holds, (), (start,)))
        assert (code, err) == (0, "")
        found = of(resume, "bird")
        guest = CanaryGuest.adopt("bird", found.pid, found.start_ticks, hub, [offer])
        stack.callback(guest.close)
        assert hub.connected("bird", 30)
        assert sweep(guest, 10) == (M // 4096 - 4, 0)
        until(lambda: (now := guest.progress()) is not None and now.beats > stood.beats, "beats")
        assert guest.blackout()[0] == 1
        os.kill(found.pid, signal.SIGKILL)


def test_the_record_is_json_whatever_a_monitor_says(stage: Stage) -> None:
    path = stage.directory / "qmp"
    monitor = Monitor(path, ['{"error": "\\"quoted\\" \\\\ \x01 \x1f"}'])
    code, _, resume = stage.resume(
        BootPlan((), (), (stage.start("vm"),), (MonitorLines("vm", str(path), LINES, 30_000),))
    )
    assert code == 4
    assert json.dumps(of(resume, "vm").why)
    assert "quoted" in of(resume, "vm").why
    monitor.end()


def test_killed_at_each_of_its_points_it_starts_no_vmm_twice_and_goes_on(stage: Stage, tmp_path: Path) -> None:
    stage.put("a")
    plan = BootPlan((Hold("s", 1, "a"),), (), (stage.start("one", fds={"a": 3}), stage.start("two")))
    stage.put(bootplan.MANIFEST, bootplan.encode(plan))
    seen = tmp_path / "points"
    first: dict[str, int] = {}
    while (code := stage.run(f"@{seen}")[0]) == -signal.SIGKILL:
        for guest in ("one", "two"):
            pids = vmms(stage, guest)
            assert len(pids) <= 1
            if pids:
                assert first.setdefault(guest, pids[0]) == pids[0]
    assert code == 0
    points = seen.read_text().splitlines()
    assert {f"resume.start.{guest}.{when}" for guest in ("one", "two") for when in ("before", "after")} <= set(points)
    assert points[0] == "resume.begun.reached"
    resume = stage.record()
    assert {guest.guest: (guest.state, guest.pid) for guest in resume.guests} == {
        guest: ("started", first[guest]) for guest in ("one", "two")
    }
    assert resume.findings == ()
    assert sorted(stage.custody.names()) == ["a", "manifest", "resume"]


@pytest.mark.parametrize("told", [False, True])
def test_a_vmm_that_only_waited_is_started_anew_and_one_that_was_told_to_go_on_is_not(stage: Stage, told: bool) -> None:
    lines = (LINES[0], ('{"execute": "cont"}', "return"), LINES[1])
    path = stage.directory / "qmp"
    answers: list[str | None] = ['{"return": {}}', '{"return": {}}', '{"return": {"status": "running"}}']
    say = MonitorLines("vm", str(path), lines, 30_000)
    stage.put(bootplan.MANIFEST, bootplan.encode(BootPlan((), (), (stage.start("vm"),), (say,))))
    before = Monitor(path, answers)
    assert stage.run(f"resume.say.vm.{int(told)}")[0] == -signal.SIGKILL
    before.end()
    (waiting,) = vmms(stage, "vm")
    path.unlink()
    again = Monitor(path, answers)
    assert stage.run()[0] == 0
    again.end()
    found = of(stage.record(), "vm")
    assert (found.state, found.pid == waiting) == ("resumed", told)
    assert vmms(stage, "vm") == [found.pid]
    assert again.heard[:2] == [lines[0][0], lines[1][0]]


def test_a_vmm_that_ended_between_two_starts_is_held_because_its_state_is_behind_it(stage: Stage) -> None:
    stage.put(bootplan.MANIFEST, bootplan.encode(BootPlan((), (), (stage.start("vm"),))))
    assert stage.run("resume.started.reached")[0] == -signal.SIGKILL
    (pid,) = vmms(stage, "vm")
    os.kill(pid, signal.SIGKILL)
    until(lambda: not vmms(stage, "vm"), "its end")
    assert stage.run()[0] == 4
    found = of(stage.record(), "vm")
    assert (found.state, found.pid) == ("held", 0)
    assert found.why.startswith("its VMM has ended; see ")
