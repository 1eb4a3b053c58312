"""The command line against a real service with real guests: what it says is what an independent reader finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.services import Service, services
from support.waiting import LONG_S

PAGE = 4096
RAM = 32 << 20


@pytest.fixture(scope="module")
def host() -> Iterator[Service]:
    if os.geteuid() != 0:
        pytest.skip("not root")
    with services() as running:
        running.start()
        yield running


def run(host: Service, *words: str, code: int = 0) -> str:
    ended = subprocess.run(host.command(*words), capture_output=True, text=True, check=False, timeout=LONG_S)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout or ended.stderr


def of(host: Service, *words: str) -> Any:
    return json.loads(run(host, *words, "--json"))


def frames(pid: int, start: int, length: int) -> dict[int, int]:
    """Ten lines that know nothing of memconsole: page index to PFN, from /proc/PID/pagemap."""
    found = {}
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(start // PAGE * 8)
        for page in range(length // PAGE):
            entry = int.from_bytes(pagemap.read(8), "little")
            if entry >> 63:
                found[page] = entry & ((1 << 55) - 1)
    return found


def test_a_qemu_guests_pages_are_where_an_independent_reader_finds_them(host: Service) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    run(host, "guest", "start", "vm", "--vmm", "qemu", "--memory", "32M")
    run(host, "guest", "pause", "vm")
    guest = next(guest for guest in of(host, "guests") if guest["name"] == "vm")
    host.guests.add(guest["pid"])
    block = next(block for block in guest["seen"]["ram"] if block.get("region") == "vm")
    independent = frames(guest["pid"], block["start"], RAM)
    said = {
        extent["offset"] // PAGE + page: extent["pfn"] + page
        for extent in of(host, "pfn", "guest:vm")["extents"]
        for page in range(extent["count"])
        if "present" in extent["flags"]
    }
    assert independent
    assert said == independent
    region = {
        extent["offset"] // PAGE + page: extent["pfn"] + page
        for extent in of(host, "pfn", "region:vm")["extents"]
        for page in range(extent["count"])
    }
    assert independent.items() <= region.items()
    first = of(host, "pfn", "region:vm", "--range", "0-8K")["extents"]
    assert sum(extent["count"] for extent in first) == len([page for page in region if page < 2])
    run(host, "guest", "stop", "vm", "--yes")
    assert "no region or guest" in run(host, "pfn", "ghost", code=1)


def test_the_life_of_a_region_from_the_command_line(host: Service) -> None:
    run(host, "reserve", "web", "8M", "--prefault")
    assert "NameTaken" in run(host, "reserve", "web", "8M", "--json", code=3)
    run(host, "guest", "start", "bird", "--memory", "16M")
    host.guests.add(next(guest["pid"] for guest in of(host, "guests") if guest["name"] == "bird"))
    assert "not ready to hand off: " in run(host, "status", code=3)
    chosen = of(host, "regions", "--where", "size=8M state:reserved")
    assert [region["name"] for region in chosen] == ["web"]
    assert of(host, "regions", "--where", "name=web size>8M") == []
    grant = of(host, "map", "web", "bird", "--gpa", "64M")["subject"]
    assert "Granted" in run(host, "release", "web", "--yes", "--json", code=3)
    assert "--yes" in run(host, "revoke", grant, code=2)
    report = of(host, "revoke", grant, "--at-most", "ask", "--yes")["revoke"]
    assert (report["rung"], report["outcome"]) == ("ask", "cut")
    run(host, "release", "web", "--yes")
    assert [region["name"] for region in of(host, "regions") if region["name"] == "web"] == []
    run(host, "audit", "--where", "id!=custody-unguarded")  # whether the keeper may be exempt is this host's affair


def test_a_dry_run_shows_the_plan_and_changes_nothing(host: Service) -> None:
    before = [region["name"] for region in of(host, "regions")]
    plan = of(host, "reserve", "dry", "4M", "--dry-run")
    assert [effect["text"] for effect in plan["effects"]]
    assert [region["name"] for region in of(host, "regions")] == before


def test_a_macro_runs_and_one_that_fails_says_how_far_it_came(host: Service, tmp_path: Path) -> None:
    macro = tmp_path / "two.toml"
    macro.write_text(
        "[params.name]\n[[step]]\ndo='reserve'\nname='${name}'\nsize='4M'\n"
        "[[step]]\ndo='map'\nregion='${name}'\nguest='nobody'\n[[step]]\ndo='release'\nregion='${name}'\n"
    )
    said = run(host, "macro", "run", str(macro), "--set", "name=m1", "--dry-run", code=3)
    assert said.count("plan: ") == 3
    said = run(host, "macro", "run", str(macro), "--set", "name=m1", "--yes", code=1)
    assert "step 1: region m1 is reserved" in said
    assert "not begun" in said
    run(host, "release", "m1", "--yes")


def test_a_snapshot_file_is_opened_compared_and_drawn(host: Service, tmp_path: Path) -> None:
    run(host, "reserve", "kept", "4M", "--prefault")
    path = tmp_path / "host.snap"
    run(host, "snapshot", "-o", str(path), "--pfn")
    run(host, "release", "kept", "--yes")
    assert "- regions kept" in run(host, "diff", str(path), "live")
    picture = tmp_path / "regions.svg"
    run(host, "snapshot", "--from", str(path), "--format", "svg", "--view", "regions", "-o", str(picture))
    assert "kept" in picture.read_text()
    text = run(host, "snapshot", "--from", str(path), "--format", "text", "--view", "pfn", "--subject", "region:kept")
    assert "region:kept" in text
    path.write_bytes(path.read_bytes()[:-100])
    assert "host.snap" in run(host, "diff", str(path), "live", code=1)


def test_read_only_refuses_by_name(host: Service) -> None:
    ended = subprocess.run(
        [*host.command("--read-only"), "reserve", "no", "4M", "--json"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 3
    assert json.loads(ended.stdout)["error"]["code"] == "ReadOnly"


def test_a_process_that_is_gone_is_named(host: Service) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    assert "NoSuchProcess" in run(host, "guest", "attach", "late", "--pid", str(ended.pid), "--json", code=3)
