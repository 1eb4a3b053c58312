"""What memconsole-resume is built of, and how, where the tests build one of their own."""

from __future__ import annotations

from pathlib import Path

NATIVE = Path(__file__).parents[2] / "memconsole" / "native"
PARTS = ("resume.c", "resume_arena.c", "resume_cargo.c", "resume_custody.c")
SOURCES = [NATIVE / name for name in (*PARTS, "extents.c", "pagescan.c", "runs.c", "query.c")]
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-pthread", "-fsanitize=address,undefined"]
