"""A lab host for a person: a control process, guests that count, and a shell; the kexec in it is real.

shell [dax]     with dax, on a kernel that hands nothing over: what outlives it lies in an arena

In every kernel after the first, memconsole-resume runs before anything else, as its unit would have it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import lab_commands
from support import lab_guest as lab

BIN = Path(sys.executable).parent
DAX = "dax" in sys.argv
STATE = str(lab_commands.STATE)
GUIDE = """
  memconsole                    the console (q leaves it)
  memconsole guests             who runs here
  memconsole handoff rehearse   restart every VMM on this kernel, on the same memory
  lab-handoff                   boot the next kernel; the guests go on in it
  memconsole handoff report     how that went (--json; --picture /run/lab/report.svg draws it)
"""
GUIDE_DAX = f"""
Its kernel hands nothing over (kho=off). What outlives it lies in an arena, in the range of {lab_commands.WORD}.

  memconsole                    the console (q leaves it); memconsole guests: web counts in its RAM, mc is a memcached
  memconsole arena list         the range, its word, the regions in it; memconsole pfn web: its frames, one run
  lab-cache fill                items into memcached; lab-cache check asks for all of them
  lab-handoff                   boot the next kernel: web counts on, lab-cache check finds every item
  memconsole handoff report     how that went

  lab-holder &                  a process that maps a region of the arena and counts in it
  memconsole revoke GRANT       take it back (memconsole grants): the process ends, the contents stay

  lab-kexec                     boot the next kernel without a word to memconsole: its guests end with this one, and
                                memconsole serve finds the regions by what the range says of itself
  lab-kexec forgetful           the same without that word: memconsole audit names what to boot; then lab-kexec
"""


def script(name: str, text: str) -> None:
    """A command of this host."""
    path = Path("/usr/local/bin", name)
    path.write_text(f"#!/bin/sh\nexec {text}\n")
    path.chmod(0o755)


def main() -> None:
    """Bring the host up, and give it to the person."""
    Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").write_text("advise")
    if DAX:
        lab_commands.begin()
        for name in ("cache", "holder", "kexec"):
            script(f"lab-{name}", f'{sys.executable} -m support.lab_commands {name} "$@"')
    else:
        lab_commands.tool("serve", "--state-dir", STATE)
        if lab.stage() == 1:
            for name, size in (("web", "64M"), ("db", "32M")):
                lab_commands.tool("guest", "start", name, "--memory", size)
    share, line = lab.SHARE, lab.next_command_line()
    words = f'--kernel {share}/bzImage --initrd {share}/initrd --append "{line}" --yes'
    script("lab-handoff", f"memconsole handoff run {words}")
    rows, columns = (os.environ.get(f"LAB_{what}", "0") for what in ("ROWS", "COLUMNS"))
    subprocess.run(["stty", "-F", "/dev/ttyS0", "rows", rows, "columns", columns], check=True)
    since = f"kernel {os.uname().release}, kernel number {lab.stage()} since power-on"
    print(f"\nThis is a hypervisor host in a VM, on {since}.\n{GUIDE_DAX if DAX else GUIDE}")
    print("  exit                          end it (or Ctrl-A X)\n")
    print(
        f"/run/lab is a directory of the machine outside: {os.environ.get('LAB_SHARE')}, until it ends.\n", flush=True
    )
    shell = ["setsid", "--ctty", "bash", "--norc", "-i"]
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PS1": "lab# ",
        "TERM": os.environ.get("LAB_TERM", "vt220"),
    }
    with open("/dev/ttyS0", "r+b", buffering=0) as terminal:  # noqa: PTH123 - a device, for three streams
        subprocess.run(shell, env=env, stdin=terminal, stdout=terminal, stderr=terminal, check=False)


main()
