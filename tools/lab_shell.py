"""A shell in a lab host with guests running, to try a handoff by hand: ``make lab-shell``; Ctrl-A X ends it.

lab_shell.py [memfd | dax]      where the guests' memory lies; dax: in an arena, on a kernel that hands nothing over
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

from support import lab  # noqa: E402 - found by the line before

RANGE = "memmap=512M!1G"
STORES = {"memfd": "", "dax": f"kho=off liveupdate=off {RANGE}"}
"""What each wants on the kernel's command line."""


def main(store: str = "memfd") -> int | str:
    """Boot it on this terminal; QEMU's exit status, or what is lacking."""
    if why := lab.lacking():
        return why
    if store not in STORES:
        return f"{store} is no store of the lab's shell: make lab-shell STORE={'|'.join(STORES)}"
    columns, rows = shutil.get_terminal_size()
    terminal = f"LAB_TERM={os.environ.get('TERM', 'vt220')} LAB_ROWS={rows} LAB_COLUMNS={columns}"
    with tempfile.TemporaryDirectory(prefix="memconsole-lab-") as share:
        early = f"{lab.RESUME}; export LAB_SHARE={share} LAB_RANGE={RANGE} {terminal}"
        command = lab.prepare(
            "shell",
            Path(share),
            memory="3G",
            processors=2,
            serial="mon:stdio",
            early=early,
            append=STORES[store],
            arguments=[store],
        )
        print("the lab boots; that takes a minute under emulation", flush=True)
        return subprocess.run(command, check=False).returncode


sys.exit(main(*sys.argv[1:2]))
