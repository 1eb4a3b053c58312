"""Commands of a lab host that a person sits at (``make lab-shell STORE=dax``).

lab-cache fill | check      items into memcached, and all of them asked for again
lab-holder                  a process that maps region box by its file on the mount, and counts there, until it may not
lab-kexec [forgetful]       the next kernel, without a word to memconsole; forgetful: without that for the range
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

from memconsole import actions as do
from support import lab_guest as lab
from support import lab_host as host
from support.memcached import LEAST_MIB, Memcached

MOUNT = Path("/run/memory")
STATE = Path(host.STATE)
NOTES = "arenas.json"
WORD, FORGETFUL = os.environ.get("LAB_RANGE", ""), "mem=1G"
"""What sets the range aside (tools/lab_shell.py); what keeps a kernel without that word from using what is there."""
SOCKET = Path("/run/mc.sock")
HOME = lab.SHARE / "home"
ITEMS = 10_000


def tool(*words: str) -> None:
    """A command of memconsole, which must not fail."""
    subprocess.run([host.TOOL, *words], check=True)


def begin() -> None:
    """A control process, and in the first kernel an arena with a guest's RAM and a cache in it."""
    STATE.mkdir()
    if (lab.SHARE / NOTES).exists():  # other hosts have their state directory on a disk
        shutil.copy(lab.SHARE / NOTES, STATE)
    client = host.serve("--mount", str(MOUNT))
    if lab.stage() > 1:
        return
    HOME.mkdir()
    (HOME / "cache").symlink_to(MOUNT / "guests/mc/ram/cache")
    client.apply(do.ArenaCreate("lab"))
    client.apply(do.GuestStart("web", memory=64 << 20, store="dax"))
    client.apply(do.Reserve("cache", LEAST_MIB << 20, "dax"))
    command = f"memcached -u root -s {SOCKET} -m {LEAST_MIB} -t 1 -e {HOME}/cache"
    ready = f"test -S {SOCKET}"
    client.apply(do.GuestService("mc", exec=command, save_signal="USR1", ready=ready, within=host.PATIENCE))
    client.apply(do.Map("cache", "mc"))
    client.apply(do.GuestResume("mc"))


def cache(what: str = "") -> int | str:
    """Fill memcached, or ask it for what it was filled with."""
    spoken = Memcached(SOCKET)
    if what == "fill":
        spoken.fill(ITEMS)
        print(f"{ITEMS} items are in the cache")
        return 0
    if what != "check":
        return "lab-cache fill | check"
    lacking = spoken.missing(range(ITEMS))
    print(f"{ITEMS - lacking} of {ITEMS} items are there, with every byte")
    return int(lacking > 0)


def holder() -> int | str:
    """Be a guest with a region, and count in it; who takes the region away ends this by SIGBUS."""
    tool("reserve", "box", "16M", "--store", "dax")
    tool("guest", "attach", "me", "--pid", str(os.getpid()))
    tool("map", "box", "me")
    print("lab-holder counts in region box; take it back: memconsole grants, memconsole revoke GRANT", flush=True)
    with (MOUNT / "guests/me/ram/box").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        while True:
            (count,) = struct.unpack_from("<Q", memory)
            struct.pack_into("<Q", memory, 0, count + 1)
            time.sleep(0.1)


def kexec(how: str = "") -> int | str:
    """Boot the next kernel as if there were no memconsole; the range is set aside again, or forgotten."""
    if how not in {"", "forgetful"}:
        return "lab-kexec [forgetful]"
    shutil.copy(STATE / NOTES, lab.SHARE)
    old, new = (WORD, FORGETFUL) if how else (FORGETFUL, WORD)
    lab.load(lab.next_command_line().replace(old, new))
    lab.jump()
    return 1


if __name__ == "__main__":
    sys.exit({"cache": cache, "holder": holder, "kexec": kexec}[sys.argv[1]](*sys.argv[2:]))
