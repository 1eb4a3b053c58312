"""A guest that is a Linux with QEMU's guest agent: the lab's kernel, busybox, and the agent of this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support import lab

AGENT = Path("/usr/sbin/qemu-ga")

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for port in /sys/class/virtio-ports/*; do
	[ "$(cat "$port/name")" = org.qemu.guest_agent.0 ] && found=/dev/${port##*/}
done
[ "$found" ] && exec /usr/sbin/qemu-ga -m virtio-serial -p "$found"
exec sleep 1000000
"""


def words(directory: Path) -> tuple[str, ...]:
    """What QEMU is told to run it, its initrd built in a directory; a test is skipped where it cannot be."""
    kernel = lab.the_kernel()
    if not AGENT.exists():
        pytest.skip(f"there is no {AGENT}: tools/install_debian.sh installs it")
    root = directory / "root"
    for name in ("bin", "sbin", "dev", "proc", "sys", "run", "var/run", "usr/sbin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(lab.BUSYBOX, root / "bin/busybox")
    (root / "sbin/hwclock").symlink_to("/bin/busybox")  # the agent sets no clock where it cannot set the hardware's
    needed = subprocess.run(["ldd", AGENT], capture_output=True, text=True, check=True).stdout
    for path in (str(AGENT), *re.findall(r"(/\S+)", needed)):
        inside = root / path.lstrip("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, inside)
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    image = directory / "initrd"
    pack = f"cd {root} && find . | {lab.BUSYBOX} cpio -o -H newc > {image}"
    subprocess.run(["sh", "-c", pack], capture_output=True, check=True)
    line = "console=ttyS0 panic=-1 quiet no_timer_check"
    return ("-accel", "tcg", "-kernel", str(kernel), "-initrd", str(image), "-append", line)
