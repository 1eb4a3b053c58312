"""What memconsole-resume is built of, and how, where the tests build one of their own."""

from __future__ import annotations

from pathlib import Path

NATIVE = Path(__file__).parents[2] / "memconsole" / "native"
SOURCES = [NATIVE / name for name in ("resume.c", "resume_custody.c", "extents.c", "pagescan.c", "runs.c", "query.c")]
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-pthread", "-fsanitize=address,undefined"]
