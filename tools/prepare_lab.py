"""Prepare the lab: say which kernel it has, or build one (tools/build_kernel.sh) into the cache; ``make lab``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent / "tests")]

from support import lab  # noqa: E402 - found by the line before


def outdated(kernel: Path) -> bool:
    """Whether it is a kernel of ours that was built with another configuration than the project has now."""
    made_with = lab.cache() / "kernel.config"
    wanted = lab.ROOT / "tests" / "vm" / "kernel.config"
    ours = kernel.parent == lab.cache() and made_with.is_file()
    return ours and made_with.read_bytes() != wanted.read_bytes()


def main() -> int | str:
    """0 with a lab that is ready, else the build's exit status, or what is lacking."""
    kernel = lab.kernel()
    if kernel is None or outdated(kernel):
        code = subprocess.run([TOOLS / "build_kernel.sh", lab.cache()], check=False).returncode
        if code:
            return code
    why = lab.lacking()
    if why:
        return why
    print(f"the lab is ready: {lab.kernel()}")
    return 0


sys.exit(main())
