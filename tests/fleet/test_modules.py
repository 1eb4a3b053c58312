"""The modules of the Ansible collection: what each makes of the command line's answers, on a host that is a stub."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args
from support.playbooks import COLLECTION, environment, executable
from support.stub_host import HUGETLB, NEW, OLD, StubHost, stub_host
from support.waiting import until

from memconsole import actions as do
from memconsole.model import GuestKind, Severity

PLUGINS = "ansible_collections.memconsole.fleet.plugins"
MODULES = sorted(path.stem for path in (COLLECTION / "plugins/modules").glob("*.py"))
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[StubHost]:
    with stub_host(tmp_path / "control") as served:
        yield served


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a module in this process, as Ansible's loader does, and read what it says."""
    command = str(executable(tmp_path))

    def ran(module: str, *, check: bool = False, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(basic, "_PARSED_MODULE_ARGS", None, raising=False)
        told = {"executable": command, "socket": str(tmp_path / "control"), "_ansible_check_mode": check, **options}
        with patch_module_args(told), pytest.raises(SystemExit):
            importlib.import_module(f"{PLUGINS}.modules.{module}").main()
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    return ran


def test_a_check_says_each_condition_and_fails_only_where_that_was_asked_for(host: StubHost, run: Run) -> None:
    found = run("handoff_check")
    assert (found["ready"], found["running"], found["changed"]) == (True, False, False)
    assert (found["from_kernel"], found["to_kernel"]) == (OLD, NEW)
    host.refuses(HUGETLB)
    found = run("handoff_check", check=True)
    assert (found["ready"], found["refused_by"], found.get("failed", False)) == (False, ["hugetlb"], False)
    assert found["conditions"][0]["remedy"] == "reserve"
    refused = run("handoff_check", must_be_ready=True)
    assert refused["failed"]
    assert refused["msg"] == "Hugetlb: web has some: a region is lost (reserve)"
    assert host.applied == []


def test_the_plan_is_what_check_mode_says_and_nothing_is_begun(host: StubHost, run: Run) -> None:
    planned = run("handoff_run", check=True)
    assert planned["changed"]
    assert "job" not in planned
    assert planned["before"]["kernel"], planned["after"]["kernel"] == (OLD, NEW)
    processes = [each.name for each in host.snapshot().guests if each.kind is GuestKind.PROCESS]
    assert processes
    assert not set(processes) & planned["after"]["guests"].keys()
    assert planned["before"]["regions"] == planned["after"]["regions"]
    assert host.applied == []


def test_a_handoff_is_begun_once_and_looked_at_until_it_is_over(host: StubHost, run: Run) -> None:
    begun = run("handoff_run", contents=True)
    assert begun["changed"]
    job = begun["job"]
    found: dict[str, Any] = {}

    def over() -> bool:
        found.update(run("handoff_run", job=job))
        return bool(found["over"])

    until(over)
    assert host.applied == [do.HandoffRun(contents=True)]
    assert (found["jumped"], found["whole"], found["after"]["kernel"]) == (True, True, NEW)
    assert set(found["blackouts"].values()) == {250_000_000}
    assert found["picture"].startswith("<svg")
    until(lambda: run("handoff_run", job=job) and not Path(job["path"]).exists())
    again = run("handoff_run")
    assert (again["changed"], again["blackouts"]) == (False, found["blackouts"])
    assert "runs, and everything came back" in again["msg"]
    assert host.jumps == 1


def test_a_host_on_the_kernel_whose_guests_did_not_come_back_is_not_left_as_good(host: StubHost, run: Run) -> None:
    host.lands = "torn"
    host.apply(do.HandoffRun())
    found = run("handoff_run")
    assert found["failed"]
    assert "not everything came back" in found["msg"]
    assert run("handoff_report", must_be_whole=True)["failed"]
    assert run("handoff_report")["whole"] is False


def test_a_command_that_fails_is_told_by_its_exit_code_and_its_words(host: StubHost, run: Run) -> None:
    job = run("handoff_run")["job"]
    until(lambda: host.jumps)
    host.refuses(HUGETLB)
    refused = run("handoff_run", force=True)
    assert (refused["failed"], refused["rc"]) == (True, 3)
    Path(job["path"]).mkdir(exist_ok=True)
    for name, text in (("code", "1\n"), ("err", "memconsole: no\n")):
        (Path(job["path"]) / name).write_text(text, encoding="utf-8")
    assert run("handoff_run", job=job)["ended"] == 1


def test_a_report_that_was_never_made_is_none(host: StubHost, run: Run) -> None:
    assert run("handoff_report")["made"] is False
    assert run("handoff_report", must_be_whole=True)["msg"].startswith("there was no handoff")
    host.apply(do.HandoffRun())
    found = run("handoff_report", picture=True)
    assert (found["made"], found["whole"], found["changed"]) == (True, True, False)
    assert found["picture"].startswith("<svg")
    assert {each["severity"] for each in found["findings"]} <= set(Severity)


def test_a_snapshot_comes_whole_or_in_parts(host: StubHost, run: Run) -> None:
    names = {each.name for each in host.snapshot().guests}
    assert {each["name"] for each in run("memory_info")["snapshot"]["guests"]} == names
    assert run("memory_info", subset=["host"])["snapshot"].keys() == {"host"}
    assert "no field 'ghosts'" in run("memory_info", subset=["ghosts"])["msg"]
    assert names.isdisjoint(each["name"] for each in run("memory_info", redact=True)["snapshot"]["guests"])


def test_a_region_is_reserved_once_and_never_resized(host: StubHost, run: Run) -> None:
    region = host.snapshot().regions[0]
    assert run("region", name=region.name, size=str(region.size))["changed"] is False
    assert "never resized" in run("region", name=region.name, size=str(region.size * 2))["msg"]
    assert "no size" in run("region", name="fresh")["msg"]
    planned = run("region", name="fresh", size="64M", prefault=True, check=True)
    assert (planned["changed"], host.applied) == (True, [])
    assert run("region", name="fresh", size="64M", prefault=True)["changed"]
    assert host.applied == [do.Reserve("fresh", 64 << 20, prefault=True)]
    assert run("region", name="other", state="absent")["changed"] is False
    assert run("region", name=region.name, state="absent")["changed"]
    assert host.applied[1:] == [do.Release(region.name)]


def test_a_guest_is_brought_to_its_state_and_no_further(host: StubHost, run: Run) -> None:
    running = next(each.name for each in host.snapshot().guests if each.state == "running")
    assert run("guest", name=running, state="running")["changed"] is False
    assert run("guest", name=running, state="paused")["changed"]
    assert run("guest", name="fresh", vmm="qemu", memory="1G", args=["-smp", "2"], state="present")["changed"]
    assert run("guest", name="more", pid=1, check=True)["plan"]["action"] == "guest-attach"
    assert run("guest", name="none", state="absent")["changed"] is False
    assert run("guest", name=running, state="absent")["changed"]
    assert host.applied == [
        do.GuestPause(running),
        do.GuestStart("fresh", "qemu", 1 << 30, args=("-smp", "2")),
        do.GuestStop(running),
    ]


def test_no_control_process_and_no_command_are_told_as_what_they_are(tmp_path: Path, run: Run) -> None:
    for module in ("region", "handoff_check", "handoff_run"):
        found = run(module, **({"name": "web", "size": "64M"} if module == "region" else {}))
        assert (found["failed"], found["rc"]) == (True, 5), found
    looked = run("handoff_run", job={"path": "", "began_ns": 0, "boot_id": "the one before"})
    assert looked["answers"] is False, "a host that booted, and whose service did not start, lost nothing yet"
    assert "no control process answers" in looked["msg"]
    missing = run("memory_info", executable=str(tmp_path / "nowhere"))
    assert (missing["failed"], missing["rc"]) == (True, 127)


OLDER = """#!/bin/sh
case "$*" in
*--version*) echo memconsole 0.0.9 ;;
*--dry-run*) echo '{"action": "handoff-run", "cli": "handoff run", "conditions": [], "effects": [], "refusals": []}' ;;
*snapshot*) echo '{"host": {}, "guests": [], "regions": [], "findings": [], "handoff": null}' ;;
*) echo "memconsole: error: unrecognized arguments: $*" >&2; exit 2 ;;
esac
"""


def test_a_memconsole_that_is_older_than_the_collection_is_told_by_its_version(tmp_path: Path, run: Run) -> None:
    older = tmp_path / "older"
    older.write_text(OLDER, encoding="utf-8")
    older.chmod(0o755)
    for module, why in (
        ("handoff_check", "its plan says nothing of from_kernel, to_kernel"),
        ("handoff_run", "its plan says nothing of from_kernel, to_kernel"),
        ("handoff_report", "unrecognized arguments"),
    ):
        found = run(module, executable=str(older))
        assert (found["failed"], found["error"]) == (True, {"code": "TooOld"})
        assert "memconsole 0.0.9 on this host is older than the collection" in found["msg"]
        assert why in found["msg"]


def test_a_service_that_does_not_say_which_kernel_would_boot_is_not_begun(host: StubHost, run: Run) -> None:
    host.kernels = ("", "")
    found = run("handoff_run")
    assert (found["failed"], found["error"], host.jumps) == (True, {"code": "NoKernel"}, 0)
    assert run("handoff_check")["failed"]


def test_every_module_is_documented_as_ansible_doc_reads_it(tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "ansible-doc")
    (tmp_path / "none.cfg").touch()
    names = [f"memconsole.fleet.{name}" for name in MODULES]
    said = subprocess.run(
        [program, "--json", *names], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    found = json.loads(said.stdout)
    assert sorted(found) == sorted(names)
    for name in names:
        assert found[name]["doc"]["short_description"]
        assert found[name]["examples"]
        assert found[name]["return"]
