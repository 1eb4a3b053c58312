"""The commands of docs/kubernetes.md, run as kured and system-upgrade-controller run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.services import MEMCONSOLE, services
from support.stub_host import HUGETLB, NEW, OLD, StubHost, stub_host

import memconsole
from memconsole.actions import HandoffRun
from memconsole.errors import ExitCode, KernelRefused

PAGE = (Path(memconsole.__path__[0]).parent / "docs/kubernetes.md").read_text(encoding="utf-8")
HERE = Path("/proc/1/ns/mnt")


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture
def host(socket: Path) -> Iterator[StubHost]:
    with stub_host(socket) as served:
        yield served


def entered() -> list[str]:
    """How kured enters the node, where this test may and is not elsewhere."""
    try:
        inside = HERE.readlink() == Path("/proc/self/ns/mnt").readlink()
    except OSError:
        return []
    return ["nsenter", f"-m{HERE}", "--"] if inside and os.geteuid() == 0 else []


def run(socket: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of the page, on the control process of this test."""
    assert words[0] == "/usr/bin/memconsole"
    command = [*entered(), *MEMCONSOLE, "--socket", str(socket), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def kured(socket: Path, option: str) -> subprocess.CompletedProcess[str]:
    """The command that an option of kured's names, split as kured splits it."""
    (line,) = re.findall(rf"- --{option}=(.*)", PAGE)
    return run(socket, *shlex.split(line))


def container(socket: Path, name: str) -> subprocess.CompletedProcess[str]:
    """The command of a container of the controller's plan, behind its chroot."""
    (listed,) = re.findall(rf"  {name}:\n.*\n.*\n    args: \[(.*)\]", PAGE)
    return run(socket, *[word.strip(' "') for word in listed.split(",")])


def test_kured_boots_the_next_kernel_once_and_asks_for_no_more(host: StubHost, socket: Path) -> None:
    wanted = kured(socket, "reboot-sentinel-command")
    assert (wanted.returncode, wanted.stdout, wanted.stderr) == (ExitCode.DONE, "", "")
    assert kured(socket, "reboot-command").returncode == ExitCode.DONE
    assert host.applied == [HandoffRun(unless_running=True)]
    assert host.kernels == (NEW, NEW)
    assert kured(socket, "reboot-sentinel-command").returncode == ExitCode.REFUSED


def test_kured_is_held_up_by_a_condition_that_refuses(host: StubHost, socket: Path) -> None:
    host.refuses(HUGETLB)
    said = kured(socket, "reboot-sentinel-command")
    assert (said.returncode, said.stdout, said.stderr) == (ExitCode.REFUSED, "", "")
    refused = kured(socket, "reboot-command")
    assert refused.returncode == ExitCode.REFUSED
    assert "web has some" in refused.stderr
    assert host.applied == []


def test_a_step_that_fails_is_no_success(host: StubHost, socket: Path) -> None:
    host.fail["apply"] = KernelRefused("kexec_file_load", 12)
    assert kured(socket, "reboot-command").returncode == ExitCode.FAILED
    assert host.kernels == (OLD, NEW)


def test_the_controller_ends_its_job_once_the_kernel_runs(host: StubHost, socket: Path) -> None:
    for _ in range(2):  # the pod of the job is started again behind the jump
        assert container(socket, "prepare").returncode == ExitCode.DONE
        assert container(socket, "upgrade").returncode == ExitCode.DONE
        assert host.kernels == (NEW, NEW)
    assert host.jumps == 1


def test_without_a_control_process_nothing_is_wanted_and_nothing_is_done(socket: Path) -> None:
    assert kured(socket, "reboot-sentinel-command").returncode == ExitCode.REFUSED
    assert kured(socket, "reboot-command").returncode == ExitCode.NO_CONTROL


def test_a_real_host_says_no_by_its_exit_code(socket: Path) -> None:
    with services() as service:
        service.start()
        wanted = kured(service.path, "reboot-sentinel-command")
        judged = run(service.path, "/usr/bin/memconsole", "handoff", "check")
    assert (wanted.returncode, wanted.stdout) == (judged.returncode, "")
    assert wanted.returncode in {ExitCode.DONE, ExitCode.REFUSED}
    assert "conditions" in judged.stdout
