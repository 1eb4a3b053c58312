"""The Python that the lab runs, as an image of a file system, mounted where it is on this machine.

Over 9p, every module that is imported costs the lab a dozen questions to QEMU, and each of them two switches of an
emulated processor. In the image are the standard library, the packages, the project and what scenarios import, all of
it compiled; the lab reads it ahead and asks no more. It is built once for what is in those directories.
"""

from __future__ import annotations

import compileall
import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = {
    "library": Path(sysconfig.get_path("stdlib")),
    "packages": Path(sysconfig.get_path("purelib")),
    "project": ROOT / "memconsole",
    "support": ROOT / "tests" / "support",
}
"""Directories of the image, and what each is mounted over; none lies in another."""
LEFT_OUT = (
    *("site-packages", "test", "tests", "config-*", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),
    *(
        "mypy*",
        "*__mypyc*.so",
        "pip",
        "ruff*",
        "setuptools",
        "grimp",
        "hypothesis",
        "pytest",
        "_pytest",
        "*.pytest-*.pyc",
    ),
    *("distutils-precedence.pth", "a1_coverage.pth"),
)
"""What no scenario imports, and is large, or costs each Python that starts."""
MKE2FS = shutil.which("mke2fs", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
KEPT_S = 86400
"""Seconds for which an image is kept that no run used."""
NAME = "python.ext4"
MOUNTS = "\n".join(
    (
        "b=/bin/busybox; mkdir -p /run/python",
        f"$b mount -t ext4 -o loop,ro /run/lab/{NAME} /run/python || {{ echo 'lab: no Python'; $b poweroff -f; }}",
        "echo 1024 >/sys/block/loop0/queue/read_ahead_kb",
        *(f"$b mount -o bind /run/python/{name} {place}" for name, place in PLACES.items()),
    )
)
"""What a stage of the lab begins with."""


def files() -> Iterator[tuple[str, Path]]:
    """Every file of the image, with its path there."""
    for name, place in PLACES.items():
        for path, directories, names in os.walk(place):
            left_out = shutil.ignore_patterns("__pycache__", *LEFT_OUT)(path, [*directories, *names])
            directories[:] = sorted(set(directories) - left_out)
            for each in sorted(set(names) - left_out):
                yield str(Path(name, os.path.relpath(path, place), each)), Path(path, each)


def key() -> str:
    """A name for what is in the image: files' paths, sizes and times."""
    digest = hashlib.sha256(f"{ROOT} {LEFT_OUT} {sysconfig.get_platform()}".encode())
    for name, path in files():
        found = path.stat()
        digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def image(cache: Path) -> Path:
    """The image of what is in the directories now: one of the cache, else it is built there."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "python.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = cache / f"python-{key()}.ext4"
        for old in cache.glob("python-*.ext4"):
            if old != found and time.time() - old.stat().st_mtime > KEPT_S:
                old.unlink()
        if not found.exists():
            _build(found)
        os.utime(found)
        return found


def give(cache: Path, share: Path) -> None:
    """Put the image into a lab's share, where it stays whatever becomes of the cache."""
    found = image(cache)
    try:
        os.link(found, share / NAME)
    except OSError:  # another file system
        shutil.copyfile(found, share / NAME)


def _build(found: Path) -> None:
    memory = Path("/dev/shm")  # mke2fs has what it wrote synchronized, which takes minutes on a busy disk
    with tempfile.TemporaryDirectory(prefix="python-", dir=memory if memory.is_dir() else found.parent) as directory:
        stage, made = Path(directory, "stage"), Path(directory, "image")
        for name, place in PLACES.items():
            shutil.copytree(place, stage / name, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
            compileall.compile_dir(stage / name, stripdir=stage / name, prependdir=place, quiet=2)
        for path in (stage / "packages").glob("__editable__*.pth"):
            path.write_text(f"{ROOT}\n")  # setuptools' own finder imports more than it finds
        size = sum(path.lstat().st_size + 4096 for path in stage.rglob("*"))
        command = [str(MKE2FS), "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(stage)]
        subprocess.run([*command, str(made), f"{size * 5 // 4 >> 10}k"], check=True, stdout=subprocess.DEVNULL)
        shutil.copyfile(made, found.with_suffix(".new"))
        found.with_suffix(".new").rename(found)
