"""The wheel that users get, built from the sdist and not from the tree: everything native is in it and works."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from memconsole import native
from memconsole.cli import shelldocs
from memconsole.errors import NotFound

TREE = Path(__file__).parents[2]
PROGRAMS = ["memconsole-canary", "memconsole-fuse", "memconsole-keeper", "memconsole-resume"]
NEEDED = ["pyproject.toml", "README.md", "LICENSE", "NOTICE", "memconsole"]


def run(*command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, check=False, capture_output=True, text=True, cwd=cwd, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from an sdist of the committed files, so that what only lies about in the tree does not help."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = run("git", "ls-files", "-z", "--", *NEEDED, cwd=TREE).split("\0")
    for name in filter(None, files):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((TREE / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)  # wheel from sdist is its default
    return next(out.glob("*.whl"))


def test_the_wheel_is_abi3_and_holds_the_extension_and_the_programs(wheel: Path) -> None:
    assert "-cp311-abi3-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "memconsole/native/_core.abi3.so" in names
        assert "memconsole/py.typed" in names
        assert {name.rpartition("/")[2] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
        beside = {name.partition(".data/data/")[2]: name for name in names if ".data/data/" in name}
        assert set(beside) == {shelldocs.MAN, *shelldocs.COMPLETIONS.values()}
        assert b"memconsole guest start" in archive.read(beside[shelldocs.MAN]).replace(b"\\", b"")
        for program in PROGRAMS:
            info = archive.getinfo(f"memconsole/native/bin/{program}")
            assert info.external_attr >> 16 & 0o111 == 0o111


def needs_a_loader(elf: bytes) -> bool:
    """Whether a 64-bit ELF file names a dynamic loader (a PT_INTERP program header)."""
    assert elf[:5] == b"\x7fELF\x02"
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    return any(struct.unpack_from("<I", elf, table + i * size)[0] == 3 for i in range(count))


def test_what_is_installed_from_the_wheel_works(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    code = """
import os
from memconsole import native
from memconsole.extents import Extent, ExtentTable, digest_fd
print(native.__file__)
with ExtentTable.from_rows([Extent(0, 7, 3, 1)]) as table, ExtentTable.from_fd(table.fd) as other:
    assert other.rows() == [(0, 7, 3, 1)] and len(digest_fd(table.fd)) == 32
with ExtentTable.scan(os.getpid(), 0, 4096) as table:
    assert table.pages == 1
print(native.program("memconsole-canary"))
print(native.program("memconsole-keeper"))
print(native.program("memconsole-resume"))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    printed = run(sys.executable, "-c", code, env=environment, cwd=tmp_path).splitlines()
    assert all(line.startswith(str(tmp_path / "site")) for line in printed)
    for program in printed[1:]:
        assert not needs_a_loader(Path(program).read_bytes())


def test_a_program_that_was_not_built_is_not_found_by_name() -> None:
    for program in PROGRAMS:
        assert os.access(native.program(program), os.X_OK)
    with pytest.raises(NotFound, match="memconsole-nothing is missing"):
        native.program("memconsole-nothing")
