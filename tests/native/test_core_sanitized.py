"""The native core under sanitizers, with its own C driver (core_driver.c): spoiled tables, scans, digests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
NATIVE = TREE / "memconsole/native"
SOURCES = ["extents.c", "sealed.c", "pagescan.c", "runs.c", "query.c", "labels.c", "iommu.c", "digest.c", "moment.c"]
SOURCES += ["xxh_base.c", "xxh_avx2.c"]
FLAGS = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread"]


def drive(tmp_path: Path, sanitizers: str, rounds: int, *prefix: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "core_driver"
    sources = [Path(__file__).parent / "core_driver.c", *(NATIVE / source for source in SOURCES)]
    words = ["cc", *FLAGS, f"-fsanitize={sanitizers}", "-I", NATIVE, "-o", program, *sources]
    subprocess.run([str(word) for word in words], check=True)
    return subprocess.run(
        [*prefix, program, str(rounds), "20261123"], check=False, capture_output=True, text=True, timeout=300
    )


def test_no_address_or_behaviour_is_undefined_and_nothing_leaks(tmp_path: Path) -> None:
    result = drive(tmp_path, "address,undefined", 20_000)
    assert result.returncode == 0, result.stderr


def test_threads_of_scan_and_digest_do_not_race(tmp_path: Path) -> None:
    """Without address randomisation, which the older thread sanitizers do not bear."""
    result = drive(tmp_path, "thread", 200, "setarch", "--addr-no-randomize")
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this compiler's thread sanitizer cannot run on this kernel")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("source", sorted(path.name for path in NATIVE.glob("*.c")))
def test_no_c_file_has_a_warning(tmp_path: Path, source: str) -> None:
    """At -O2 as users build it; not an error for them, whose compiler may know warnings that ours does not."""
    strict = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *strict, "-I", NATIVE, "-c", "-o", tmp_path / "object", NATIVE / source], check=True)


def test_every_source_of_the_core_is_driven() -> None:
    parts = [path.name for pattern in ("fuse*.c", "resume*.c") for path in NATIVE.glob(pattern)]
    programs = {"canary.c", "guard.c", "keeper.c", *parts}
    driven = {"copy.c", "fault.c", *(path.name for path in NATIVE.glob("migration*.c"))}  # by drivers of their own
    assert {path.name for path in NATIVE.glob("*.c")} - programs - driven == set(SOURCES)
