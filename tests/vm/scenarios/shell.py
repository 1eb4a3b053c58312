"""A lab host for a person: a control process, guests that count, and a shell; `kexec` in it is real.

In every kernel after the first, memconsole-resume runs before anything else, as its unit would have it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import lab_guest as lab

BIN = Path(sys.executable).parent
TOOL = str(BIN / "memconsole")
HELP = f"""
This is a hypervisor host in a VM, on kernel {os.uname().release}, kernel number {lab.stage()} since power-on.

  memconsole                    the console (q leaves it)
  memconsole guests             who runs here
  memconsole handoff rehearse   restart every VMM on this kernel, on the same memory
  lab-handoff                   boot the next kernel; the guests go on in it
  memconsole handoff report     how that went (--json; --picture /run/lab/report.svg draws it)
  exit                          end it (or Ctrl-A X)

/run/lab is a directory of the machine outside: {os.environ.get("LAB_SHARE")}, until it ends.
"""


def main() -> None:
    """Bring the host up, and give it to the person."""
    Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").write_text("advise")
    subprocess.run([TOOL, "serve", "--state-dir", "/run/state"], check=True)
    if lab.stage() == 1:
        for name, size in (("web", "64M"), ("db", "32M")):
            subprocess.run([TOOL, "guest", "start", name, "--memory", size], check=True)
    share, line = lab.SHARE, lab.next_command_line()
    words = f'memconsole handoff run --kernel {share}/bzImage --initrd {share}/initrd --append "{line}" --yes'
    script = Path("/usr/local/bin/lab-handoff")
    script.write_text(f"#!/bin/sh\nexec {words}\n")
    script.chmod(0o755)
    rows, columns = (os.environ.get(f"LAB_{what}", "0") for what in ("ROWS", "COLUMNS"))
    subprocess.run(["stty", "-F", "/dev/ttyS0", "rows", rows, "columns", columns], check=True)
    print(HELP, flush=True)
    shell = ["setsid", "--ctty", "bash", "--norc", "-i"]
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PS1": "lab# ",
        "TERM": os.environ.get("LAB_TERM", "vt220"),
    }
    with open("/dev/ttyS0", "r+b", buffering=0) as terminal:  # noqa: PTH123 - a device, for three streams
        subprocess.run(shell, env=env, stdin=terminal, stdout=terminal, stderr=terminal, check=False)


main()
