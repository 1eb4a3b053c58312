"""The FUSE server's parsers under sanitizers, with their own C driver (fuse_driver*.c) in the kernel's place."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from support.waiting import LONG_S

TREE = Path(__file__).parents[2]
NATIVE = TREE / "memconsole/native"
DRIVER = sorted(Path(__file__).parent.glob("fuse_driver*.c"))
OURS = sorted(path.name for path in NATIVE.glob("fuse_*.c"))
FLAGS = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread"]


def core() -> list[Path]:
    """The C sources of the extension, which the server is linked with."""
    tool = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]
    return [TREE / source for source in tool["setuptools"]["ext-modules"][0]["sources"]]


def build(directory: Path, sanitizers: str) -> Path:
    program = directory / "fuse_driver"
    sources = [*DRIVER, *(NATIVE / name for name in OURS), *core()]
    subprocess.run(["cc", *FLAGS, f"-fsanitize={sanitizers}", "-I", NATIVE, "-o", program, *sources], check=True)
    return program


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fuse"), "address,undefined")


@pytest.mark.parametrize("seed", [1, 20261123, 77777])
def test_spoiled_requests_are_answered_once_and_leave_nothing(sanitized: Path, seed: int) -> None:
    command = [str(sanitized), "30000", str(seed)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LONG_S)
    assert result.returncode == 0, result.stderr


def test_threads_of_the_server_do_not_race(tmp_path: Path) -> None:
    """Without address randomisation, which the older thread sanitizers do not bear."""
    command = ["setarch", "--addr-no-randomize", str(build(tmp_path, "thread")), "4000", "7"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LONG_S)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this compiler's thread sanitizer cannot run on this kernel")
    assert result.returncode == 0, result.stderr


def test_every_source_of_the_server_is_driven() -> None:
    assert {path.name for path in NATIVE.glob("fuse*.c")} == {*OURS, "fuse.c"}
