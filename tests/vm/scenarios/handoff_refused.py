"""Every condition that can be brought about here, brought about, and refused by its name; the host it was is not."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from msgspec.structs import replace
from support import lab_guest as lab
from support import lab_host as host
from support.waiting import until

from memconsole import paths
from memconsole.actions import GuestAttach, GuestStart, GuestStop, HandoffRun, Release, Reserve
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody, OwnCustody
from memconsole.backend.handoff import image, luo
from memconsole.backend.handoff.check import refusal_code
from memconsole.backend.wire.client import Client
from memconsole.model import GuestState, Plan, Severity

MIB = 1 << 20
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
DISABLED = Path("/proc/sys/kernel/kexec_load_disabled")
LIMIT = Path("/sys/fs/cgroup/small")
OLD = Path("/run/old")


def with_words(words: bytes, name: str) -> str:
    """The lab's kernel with an uncompressed one in it that says these words; none: with nothing that could be read."""
    return lab.image_of((b"\x7fELF\0" + words if words else b"").ljust(4096, b"\0"), f"/tmp/bzImage.{name}")


class Refusals:
    """A control process in a cgroup of its own, and what its plans say while something is not as it should be."""

    def __init__(self) -> None:
        Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
        LIMIT.mkdir()
        share = str(lab.SHARE)
        self.fine = HandoffRun(f"{share}/bzImage", f"{share}/initrd", lab.next_command_line())
        self.client = self.serve()

    def serve(self) -> Client:
        """Start it; a stand-in for an old QEMU is the first that its PATH leads to."""
        env = os.environ | {"PATH": f"{OLD}:{os.environ['PATH']}"}
        done = subprocess.run(
            [host.TOOL, "serve", "--state-dir", host.STATE, "--record", str(host.RECORD_S)],
            capture_output=True,
            text=True,
            check=False,
            env=env,
            preexec_fn=lambda: (LIMIT / "cgroup.procs").write_text(str(os.getpid())) and None,
        )
        if done.returncode:
            raise AssertionError(done.stderr)
        return host.connected()

    def again(self) -> None:
        """Another control process in its place."""
        host.end(self.client)
        self.client = self.serve()

    def plan(self, **changes: str) -> Plan:
        """The plan of a handoff with something else about its image."""
        return host.plan(self.client, replace(self.fine, **changes))

    def clean(self, name: str) -> None:
        """A host on which nothing is wrong is not refused."""
        refusals = self.plan().refusals
        lab.say(name, not refusals, refusals=str(refusals))

    def refused(self, id: str, **changes: str) -> None:
        """It is refused by this name, and by no other."""
        codes = [each.code for each in self.plan(**changes).refusals]
        lab.say(f"refused-{id}", codes == [refusal_code(id)], codes=codes)

    def warned(self, id: str, **changes: str) -> None:
        """It is warned of by this name, and not refused."""
        plan = self.plan(**changes)
        found = {each.id: each for each in plan.conditions if not each.ok}
        fine = id in found and found[id].severity is Severity.WARNING and bool(found[id].observed)
        lab.say(f"warned-{id}", fine and not plan.refusals, found=sorted(found), said=str(found.get(id)))

    def pid(self, guest: str) -> int:
        """The process of a guest."""
        pid = next(each.pid for each in self.client.snapshot().guests if each.name == guest)
        assert pid is not None
        return pid


def of_the_image(seen: Refusals) -> None:
    line = seen.fine.append
    seen.refused("command-line-kho", append=line.replace("kho=on", ""))
    seen.refused("command-line-liveupdate", append=line.replace("liveupdate=on", ""))
    seen.refused("command-line-memmap", append=line.replace("memmap=16M!1G", ""))
    seen.refused("image-kho-abi", kernel=with_words(b"luo-v5\0memfd-v2\0kho-v3\0", "kho"))
    seen.refused("image-luo-abi", kernel=with_words(b"kho-v4\0memfd-v2\0luo-v6\0", "luo"))
    seen.refused("image-memfd-abi", kernel=with_words(b"kho-v4\0luo-v5\0memfd-v1\0", "memfd"))
    seen.warned("image-abi-unknown", kernel=with_words(b"", "unknown"))
    seen.refused("image-unreadable", initrd="/nowhere")
    seen.refused("image-without-initrd", initrd="")
    vast = Path("/tmp/vast")
    with vast.open("wb") as file:
        file.truncate(1 << 30)
    seen.refused("image-too-large", initrd=str(vast))
    lab.load()
    seen.warned("image-of-another")
    image.unload()


def of_memory(seen: Refusals) -> None:
    client = seen.client
    POOL.write_text("4")
    client.apply(Reserve("huge", 2 * MIB, page_size=2 * MIB))
    seen.refused("hugetlb")
    client.apply(Release("huge"))
    POOL.write_text("0")
    client.apply(Reserve("big", 512 * MIB))
    (LIMIT / "memory.max").write_text(str(400 * MIB))
    seen.refused("memory-max")
    (LIMIT / "memory.max").write_text("max")
    available = client.snapshot().memory.available
    with mmap.mmap(-1, available - 300 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        seen.refused("sparse")
    client.apply(Release("big"))
    host.SHMEM_THP.write_text("never")
    client.apply(Reserve("spread", 64 * MIB))
    with contextlib.closing(KeeperCustody(paths.runtime_dir() / "keeper")) as keeper:
        fd, _ = keeper.get("region:spread:0")
    with mmap.mmap(fd, 64 * MIB) as memory:  # one page after the other, anywhere: no two lie side by side
        for page in random.Random(1).sample(range(64 * MIB // 4096), 64 * MIB // 4096):
            memory[page * 4096] = 1
    os.close(fd)
    seen.warned("fragmented")
    seen.warned("base-pages")
    client.apply(Release("spread"))
    most = client.snapshot().memory.available // MIB - 160  # the kernel takes pages from there when others run short
    client.apply(Reserve("wide", most * MIB, prefault=True))
    seen.warned("scratch-migrates")
    client.apply(Release("wide"))
    host.SHMEM_THP.write_text("advise")
    client.apply(Reserve("lost", 2 * MIB))
    with contextlib.closing(KeeperCustody(paths.runtime_dir() / "keeper")) as keeper:
        keeper.drop("region:lost:0")
    seen.again()
    seen.refused("region-lost")
    seen.client.apply(Release("lost"))


def of_guests(seen: Refusals) -> None:
    client = seen.client
    os.kill(seen.pid("c0"), signal.SIGSTOP)
    seen.refused("guest-silent")
    os.kill(seen.pid("c0"), signal.SIGCONT)
    client.apply(GuestStart("c1", memory=4 * MIB))
    os.kill(seen.pid("c1"), signal.SIGKILL)
    until(lambda: host.guest(client.snapshot(), "c1").state is GuestState.GONE, "it is seen to be gone", host.PATIENCE)
    seen.warned("guest-ended")
    client.apply(GuestStop("c1"))
    client.apply(Release("c1"))
    process = subprocess.Popen(["sleep", "1000"])
    client.apply(GuestAttach("db", process.pid))
    seen.warned("guest-process")
    client.apply(GuestStop("db"))
    process.kill()
    process.wait()
    words = ["-machine", "q35", "-accel", "kvm", "-nodefaults", "-display", "none", "-m", "16", "-S"]
    vm = subprocess.Popen(["qemu-system-x86_64", *words])
    foreign = f"qemu-{vm.pid}"
    until(lambda: any(each.name == foreign for each in client.snapshot().guests), "the VM is seen", host.PATIENCE)
    seen.warned("guest-foreign")
    vm.kill()
    vm.wait()
    client.apply(GuestStart("old", vmm="qemu", memory=8 * MIB))
    seen.refused("guest-incapable")
    client.apply(GuestStop("old"))
    client.apply(Release("old"))


def of_this_kernel(seen: Refusals) -> None:
    device = os.open(luo.DEVICE, os.O_RDWR)
    seen.refused("device-taken")
    os.close(device)
    with luo.LuoSession.create("another:one"):
        seen.warned("session-elsewhere")
    with contextlib.closing(Control(Path("/run/embedded"), OwnCustody())) as embedded:
        codes = [each.code for each in embedded.plan(seen.fine).refusals]
        lab.say("refused-custody", codes == [refusal_code("custody")], codes=codes)


def main() -> None:
    OLD.mkdir()
    stand_in = OLD / "qemu-system-x86_64"
    source = Path(lab.__file__).with_name("qemu_without_shared.py")
    stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} {source} "$@"\n')
    stand_in.chmod(0o755)
    seen = Refusals()
    seen.client.apply(GuestStart("c0", memory=8 * MIB))
    seen.clean("clean")
    of_this_kernel(seen)
    of_the_image(seen)
    of_guests(seen)
    of_memory(seen)
    seen.clean("clean-again")
    DISABLED.write_text("1")
    seen.refused("kexec-disabled")
    lab.say("end")


main()
