"""A database that is warm in the next kernel against one that is filled again, in the same run of the lab.

Warm: from the start of its process until it answers, its data in a region. Filled: the same data, put in anew.
"""

from __future__ import annotations

import shutil

from harness import Result, Skip
from labs import RESUME, said

ITEMS, ROWS, SIZE = 500_000, 200_000, 128 << 20
NAMES = {
    "mc": (f"memcached, {ITEMS:,} items", 1 / 10),
    "lm": (f"LMDB, {ROWS:,} rows", 1 / 50),
    "sq": (f"SQLite, {ROWS:,} rows", 1 / 100),
}


def bench_warm() -> list[Result]:
    """memcached, LMDB and SQLite over a kexec."""
    if shutil.which("memcached") is None:
        raise Skip("memcached is not installed")
    words = [str(word) for word in (ITEMS, ROWS, SIZE)]
    (figures,) = said("handoff_services", "figures", *words, memory="3G", early=RESUME)
    return [
        Result(
            f"warm after a kexec, {name}, against filling again", figures["warm"][id], "s", figures["cold"][id], goal
        )
        for id, (name, goal) in NAMES.items()
    ]
