"""The lab: a hypervisor host in a VM, in which a real kernel really kexecs.

QEMU (TCG) boots the lab's kernel over this machine's own root, read-only over 9p under an overlay in memory (or on a
disk, where the command line has ``disk=vda``), so that the lab has this machine's userland, Python and QEMU. ``/init``
of a small initrd (busybox and the script below) mounts all that and runs ``/run/lab/start``; after a kexec the same
initrd finds the next kernel's command line and starts it again with ``stage=N+1``.

A scenario is a Python file of tests/vm/scenarios; what it has to say it appends to ``/run/lab/verdicts`` (one JSON
object a line, see :mod:`lab_guest`), in a directory shared with this machine. A run that says nothing has failed, and
QEMU never outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support import lab_kernel, lab_python, lab_watch

ROOT = Path(__file__).resolve().parent.parent.parent
SCENARIOS = ROOT / "tests" / "vm" / "scenarios"
BUSYBOX = Path("/bin/busybox")
IOMMU = "intel-iommu,intremap=on"
# no_timer_check: a busy machine's TCG misses the ticks the kernel counts to see whether its timer works
RESUME = f"{ROOT}/memconsole/native/bin/memconsole-resume > /run/early.log 2>&1; echo $? > /run/early.code"
"""What a lab host begins with where guests are handed over, as its unit would have it."""
SYSTEMD = f". {ROOT}/tests/support/lab_systemd.sh"
"""What a lab host begins with that goes on as systemd, with this project's units; the scenario is a service of it."""
BOOTS, RUNS = 4, 2
"""How often the lab is booted until its first kernel has a userland (no code of ours ran before), and how often a run
is begun whose QEMU crashed, or that went deaf (lab_watch.py)."""
repeated: list[str] = []
"""What was begun again, and why; tests/vm/conftest.py takes it into the summary."""
COMMAND_LINE = "console=ttyS0 panic=-1 quiet kho=on liveupdate=on intel_iommu=on no_timer_check"

INIT = """#!/bin/busybox sh
B=/bin/busybox
fail() { echo "lab: $1"; $B poweroff -f; }
$B mount -t devtmpfs dev /dev; $B mount -t proc proc /proc; $B mount -t sysfs sys /sys
share="trans=virtio,version=9p2000.L,msize=524288"
$B mount -t 9p -o $share,ro,cache=loose host0 /ro || fail "no root share"
case "$($B cat /proc/cmdline)" in
*disk=vda*) $B mount -t ext4 /dev/vda /rw || fail "no disk" ;;
*) $B mount -t tmpfs -o size=25% tmp /rw ;;
esac
$B mkdir -p /rw/up /rw/work
$B mount -t overlay -o lowerdir=/ro,upperdir=/rw/up,workdir=/rw/work over /new || fail "no overlay"
for d in dev proc sys; do $B mount -o move /$d /new/$d; done
$B mount -t tmpfs run /new/run
$B mkdir -p /new/run/lab /new/dev/shm /new/dev/pts
$B mount -t tmpfs shm /new/dev/shm; $B mount -t devpts pts /new/dev/pts
$B mount -t debugfs debug /new/sys/kernel/debug; $B mount -t cgroup2 cgroup /new/sys/fs/cgroup
$B mount -t 9p -o $share lab /new/run/lab || fail "no lab share"
exec $B switch_root /new /bin/sh /run/lab/start
"""


@dataclass
class Verdicts:
    """What a run of the lab said: its verdicts in order, the serial console, and the directory it shared."""

    said: list[dict[str, Any]]
    console: str
    share: Path
    seconds: float
    stages: int = field(default=0)

    def of(self, name: str) -> dict[str, Any]:
        """The last verdict of this name; a run that never gave it fails here, with the end of its console."""
        for verdict in self.said[::-1]:
            if verdict["name"] == name:
                return verdict
        raise AssertionError(f"the lab never said {name!r}; its console ends:\n{self.console[-4000:]}")

    def check(self) -> None:
        """Fail with the first verdict that is bad, or when there is none."""
        for verdict in self.said:
            assert verdict["ok"], f"{verdict}\n{self.console[-4000:]}"
        self.of("end")


def cache() -> Path:
    """Where `make lab` leaves a kernel it has built, with the configuration it was made with."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memconsole" / "lab"


def kernel() -> Path | None:
    """The lab's kernel: ``MEMCONSOLE_LAB_KERNEL``, the shared one beside the checkout, or the one `make lab` built."""
    named = os.environ.get("MEMCONSOLE_LAB_KERNEL")
    if named:
        return Path(named)
    places = (ROOT.parent / "shared" / "lab" / "bzImage", cache() / "bzImage")
    return next((path for path in places if path.is_file()), None)


def lacking() -> str:
    """Why there is no lab here, and what to do about it; empty where there is one."""
    if not BUSYBOX.is_file() or shutil.which("qemu-system-x86_64") is None or lab_python.MKE2FS is None:
        wants = "qemu-system-x86_64, mke2fs and a static /bin/busybox"
        return f"the lab wants {wants}: tools/install_debian.sh installs them"
    found = kernel()
    if found is None:
        return "the lab has no kernel: `make lab` builds one, or set MEMCONSOLE_LAB_KERNEL"
    return "" if found.is_file() else f"MEMCONSOLE_LAB_KERNEL is {found}, and there is no such file"


def the_kernel() -> Path:
    """The lab's kernel; a test is skipped where there is none."""
    found, why = kernel(), lacking()
    if why or found is None:
        pytest.skip(why)
    return found


def initrd() -> bytes:
    """An uncompressed newc archive: busybox, /init, and the mount points."""
    out = bytearray()
    number = 0

    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        nonlocal number
        number += 1
        raw = name.encode() + b"\0"
        words = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
        out.extend(b"070701" + b"".join(b"%08X" % word for word in words) + raw)
        out.extend(bytes(-len(out) % 4) + data)
        out.extend(bytes(-len(out) % 4))

    for name in ("bin", "dev", "proc", "sys", "ro", "rw", "new"):
        entry(name, 0o40755)
    entry("dev/console", 0o20600, device=(5, 1))
    entry("bin/busybox", 0o100755, BUSYBOX.read_bytes())
    entry("init", 0o100755, INIT.encode())
    entry("TRAILER!!!", 0)
    return bytes(out)


def prepare(
    scenario: str,
    share: Path,
    *,
    memory: str = "2G",
    processors: int = 1,
    packed: bool = False,
    append: str = "",
    serial: str = "stdio",
    iommu: str = IOMMU,
    devices: Sequence[str] = (),
    options: Sequence[str] = (),
    arguments: Sequence[str] = (),
    early: str = "",
) -> list[str]:
    """The QEMU command that boots the lab over a shared directory, which is filled; see :func:`run`."""
    kernel = the_kernel()
    share.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(kernel if packed else lab_kernel.image(kernel, cache()), share / "bzImage")
    (share / "initrd").write_bytes(initrd())
    lab_python.give(cache(), share)
    words = " ".join([str(SCENARIOS / f"{scenario}.py"), *arguments])
    (share / "start").write_text(
        ": > /run/lab/booted\n"
        f"{lab_watch.COUNTS}"
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8\n"
        f"export PYTHONPATH={ROOT}/tests PYTHONDONTWRITEBYTECODE=1 TERM=dumb\n"
        f"{lab_python.MOUNTS}\n{early}\n"
        ". /run/lab/scenario\n"
    )
    (share / "scenario").write_text(f"cd {ROOT}; {sys.executable} {words}\nsync; /bin/busybox poweroff -f\n")
    line = f"{COMMAND_LINE} stage=1 {append}".strip()
    return [
        *(
            "qemu-system-x86_64",
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-m",
            memory,
            "-smp",
            str(processors),
        ),
        *("-nographic", "-nodefaults", "-no-reboot", "-serial", serial),
        *("-device", iommu, "-device", "edu,addr=4,dma_mask=0xffffffffffff"),
        *(word for device in devices for word in ("-device", device)),
        *options,
        *("-kernel", str(share / "bzImage"), "-initrd", str(share / "initrd"), "-append", line),
        *("-virtfs", "local,path=/,mount_tag=host0,security_model=none,readonly=on,multidevs=remap"),
        *("-virtfs", f"local,path={share},mount_tag=lab,security_model=none,multidevs=remap"),
    ]


@contextlib.contextmanager
def started(command: Sequence[str], console: Path) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU, which does not outlive this, nor a process of tests that is killed."""
    words = ["setpriv", "--pdeathsig", "KILL", *command]
    with (
        console.open("wb", buffering=0) as file,
        subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as qemu,
    ):
        try:
            yield qemu
        finally:
            if qemu.poll() is None:
                os.killpg(qemu.pid, signal.SIGKILL)


def _once(command: list[str], share: Path) -> str:
    """One boot of the lab, until it ends; why this was no end of its own, else nothing."""
    with started(command, share / "console") as qemu:
        why = lab_watch.Watch(qemu, share).ends()
        if not why and qemu.returncode < 0:
            return f"QEMU was ended by signal {-qemu.returncode}"
    return why or ("" if (share / "booted").exists() else "the first kernel had no userland")


def _said(share: Path) -> list[dict[str, Any]]:
    verdicts = share / "verdicts"
    return [json.loads(line) for line in verdicts.read_text().splitlines()] if verdicts.exists() else []


def _may_be_repeated(share: Path, why: str, booted: int, ran: int) -> bool:
    """Whether it is the emulation that failed, and has not too often: never after something went wrong in the lab."""
    if not why or why == lab_watch.SILENT or not all(verdict["ok"] for verdict in _said(share)):
        return False
    return ran < RUNS if ran else booted < BOOTS


def run(
    scenario: str,
    share: Path,
    *,
    memory: str = "2G",
    processors: int = 1,
    packed: bool = False,
    append: str = "",
    iommu: str = IOMMU,
    devices: Sequence[str] = (),
    options: Sequence[str] = (),
    arguments: Sequence[str] = (),
    early: str = "",
) -> Verdicts:
    """Boot the lab, run a scenario through its stages, return what it said; it has time while it says something.

    One processor does the same for two thirds of the work: where two are emulated, each spins whenever the other has a
    lock and does not run. ``processors=2`` is for what processors do to each other. The kernel is ``packed`` as
    it came, or need not be unpacked (lab_kernel.py).

    ``iommu``, ``devices`` and ``options`` are QEMU's, ``arguments`` the scenario's; ``early`` is a line of shell that
    every stage begins with, before any Python.
    """
    command = prepare(
        scenario,
        share,
        memory=memory,
        processors=processors,
        packed=packed,
        append=append,
        iommu=iommu,
        devices=devices,
        options=options,
        arguments=arguments,
        early=early,
    )
    filled = set(share.iterdir())
    began = time.monotonic()
    tries: list[str] = []
    booted = ran = 0
    while True:
        why = _once(command, share)
        booted += 1
        ran += (share / "booted").exists()
        if not _may_be_repeated(share, why, booted, ran):
            break
        tries.append(f"{scenario} {' '.join(arguments)}: {why}; its console ended: {_console(share)[-400:]!r}")
        for path in set(share.iterdir()) - filled:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    repeated.extend(tries)
    said = _said(share)
    stages = max((verdict["stage"] for verdict in said), default=0)
    console = "\n".join([*tries, _console(share), *([f"lab: {why}"] if why else [])])
    return Verdicts(said, console, share, time.monotonic() - began, stages)


def _console(share: Path) -> str:
    return (share / "console").read_text(errors="replace")
