"""Build a Debian package of memconsole as it is installed in this environment, with what it depends on inside.

Usage: build_deb.py [DIRECTORY] (``make deb``; dist if left out)

    /usr/lib/memconsole         a virtual environment of Debian's Python: memconsole and its dependencies, of the
                                versions that constraints.txt names (Debian's own are others)
    /usr/bin                    memconsole, memconsole-resume
    /usr/lib/systemd, sysusers.d, /usr/share/man, completions

dpkg-deb alone makes it: it wants no root, no network and no other tool, and the same tree makes the same package. What
debhelper would add is the two scripts of packaging/. Directories are made by the units (RuntimeDirectory=,
StateDirectory=), so there is no tmpfiles.d.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from memconsole import __version__
from memconsole.cli.shelldocs import COMPLETIONS, MAN, completion, man_page

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = ROOT / "packaging"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
HOME = Path("usr/lib/memconsole")
SITE = HOME / "lib" / f"python{VERSION}" / "site-packages"
MAINTAINER = "memconsole developers <developers@memconsole.invalid>"
DESCRIPTION = """guest memory that outlives the hypervisor's kernel
 A control process reserves memory for virtual machines, maps it into them,
 takes it back with its contents, and boots another kernel under running
 guests. The console shows where every page is.
 .
 Nothing is enabled by the installation: systemctl enable --now
 memconsole.socket memconsole.service does it."""
DEBIAN = {"zsh": "share/zsh/vendor-completions/_memconsole"}
"""Where Debian has the completion of a shell elsewhere than a wheel."""


def moment() -> int:
    """The time of everything in the package, in seconds: SOURCE_DATE_EPOCH, else of the last commit."""
    if (said := os.environ.get("SOURCE_DATE_EPOCH")) is not None:
        return int(said)
    words = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def dependencies(name: str = "memconsole") -> dict[str, metadata.Distribution]:
    """Everything that a distribution needs to run here, in turn, by its name."""
    found: dict[str, metadata.Distribution] = {}
    left = list(metadata.requires(name) or ())
    while left:
        wanted = Requirement(left.pop())
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if wanted.name.lower() not in found:
            made = metadata.distribution(wanted.name)
            found[wanted.name.lower()] = made
            left += [f"{line}" for line in made.requires or ()]
            left += [line.partition(";")[0] for extra in wanted.extras for line in extra_of(made, extra)]
    return found


def extra_of(made: metadata.Distribution, extra: str) -> Iterator[str]:
    """What a distribution needs for an extra of its."""
    for line in made.requires or ():
        marker = Requirement(line).marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield line


def lay(tree: Path) -> None:
    """The files of the package below ``tree``."""
    for made in dependencies().values():
        for file in made.files or ():
            if (
                ".." in file.parts
                or "__pycache__" in file.parts
                or file.name in {"RECORD", "REQUESTED", "direct_url.json"}
            ):
                continue
            put(tree / SITE / file, Path(str(made.locate_file(file))))
    for path in sorted((ROOT / "memconsole").rglob("*")):
        kept = path.suffix in {".py", ".toml", ".varlink", ".typed", ".so"} or path.parent.name == "bin"
        if path.is_file() and kept and "__pycache__" not in path.parts:
            put(tree / SITE / path.relative_to(ROOT), path)
    home = tree / HOME
    (home / "bin").mkdir(parents=True)
    (home / "bin/python3").symlink_to("../../../bin/python3")
    write(home / "pyvenv.cfg", f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {VERSION}\n")
    put(tree / "usr/bin/memconsole", PACKAGING / "memconsole.sh", mode=0o755)
    resume = SITE.relative_to("usr") / "memconsole/native/bin/memconsole-resume"
    (tree / "usr/bin/memconsole-resume").symlink_to(Path("..") / resume)
    units = tree / "usr/lib/systemd/system"
    for name in ("memconsole.service", "memconsole.socket", "memconsole-resume.service"):
        put(units / name, ROOT / "systemd" / name)
    put(tree / "usr/lib/sysusers.d/memconsole.conf", ROOT / "systemd/memconsole.sysusers")


def document(tree: Path, when: int) -> None:
    """Manual pages, completions, licences and the changelog."""
    pack(tree / "usr" / f"{MAN}.gz", man_page())
    pack(tree / "usr/share/man/man1/memconsole-resume.1.gz", (PACKAGING / "memconsole-resume.1").read_text("utf-8"))
    for shell, path in COMPLETIONS.items():
        write(tree / "usr" / DEBIAN.get(shell, path), completion(shell))
    stamp = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(when))
    entry = f"memconsole ({__version__}) unstable; urgency=medium\n\n  * See CHANGELOG.md of the source.\n\n"
    documents = tree / "usr/share/doc/memconsole"
    pack(documents / "changelog.gz", f"{entry} -- {MAINTAINER}  {stamp}\n")
    write(documents / "copyright", licences())
    put(tree / "usr/share/lintian/overrides/memconsole", PACKAGING / "lintian-overrides")


def licences() -> str:
    """The copyright file: memconsole's, and of each dependency what its metadata say."""
    head = (
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: memconsole\n\n"
        f"Files: *\nCopyright: {time.gmtime(moment()).tm_year} the memconsole developers\nLicense: Apache-2.0\n"
        " On Debian systems the text of the licence is in /usr/share/common-licenses/Apache-2.0.\n"
    )
    parts = [head]
    for name, made in sorted(dependencies().items()):
        said = first(made, "License-Expression", "License")
        classes = made.metadata.get_all("Classifier") or []
        kinds = [line.rpartition("::")[2].strip() for line in classes if line.startswith("License")]
        short = said.splitlines()[0] if said else ", ".join(kinds)
        who = first(made, "Author", "Author-email") or f"the authors of {name}"
        kind = f"{short.replace(' ', '-')}-{name}"
        parts.append(f"\nFiles: /{SITE}/{name}*\nCopyright: {who}\nLicense: {kind}\n")
        parts.append(f" {name} {made.version}, under {short or 'its own licence'}: see its directory in /{SITE}.\n")
    return "".join(parts)


def first(made: metadata.Distribution, *fields: str) -> str:
    """The first of these fields that a distribution has; empty if it has none."""
    return next((made.metadata[field] for field in fields if field in made.metadata), "")


def put(target: Path, source: Path, mode: int | None = None) -> None:
    """A copy; executable if it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    executable = source.stat().st_mode & 0o100 and source.read_bytes()[:4] == b"\x7fELF" and source.suffix != ".so"
    target.chmod(mode or (0o755 if executable else 0o644))


def write(target: Path, text: str) -> None:
    """A file of ours."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    target.chmod(0o644)


def pack(target: Path, text: str) -> None:
    """The same, compressed as Debian wants it, with no time in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    target.chmod(0o644)


def strip(tree: Path) -> None:
    """Leave symbols out of what is native."""
    native = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in native:
        with path.open("rb") as file:
            elf = file.read(4) == b"\x7fELF"
        if elf:
            subprocess.run(["strip", "--strip-unneeded", "--remove-section=.comment", str(path)], check=True)


def control(tree: Path) -> None:
    """The package's own directory: what it is, what it wants, its sums and scripts."""
    libc = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    after = f"{sys.version_info.major}.{sys.version_info.minor + 1}"
    sizes = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    words = ["dpkg", "--print-architecture"]
    architecture = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    fields = {
        "Package": "memconsole",
        "Version": __version__,
        "Architecture": architecture,
        "Maintainer": MAINTAINER,
        "Installed-Size": str(-(-sizes // 1024)),
        "Depends": f"python3 (>= {VERSION}), python3 (<< {after}), libc6 (>= {libc})",
        "Recommends": "qemu-system-x86 (>= 1:8.2), systemd (>= 254), zstd",
        "Section": "admin",
        "Priority": "optional",
        "Description": DESCRIPTION,
    }
    directory = tree / "DEBIAN"
    write(directory / "control", "".join(f"{name}: {value}\n" for name, value in fields.items()))
    for name in ("postinst", "prerm"):
        put(directory / name, PACKAGING / name, mode=0o755)


def build(into: Path) -> Path:
    """Make the package in a directory; its path."""
    when = moment()
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mc-deb-") as name:
        tree = Path(name) / "tree"
        tree.mkdir(mode=0o755)
        lay(tree)
        document(tree, when)
        strip(tree)
        control(tree)
        for path in (tree, *tree.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        words = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(into)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(when)}
        said = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if said.returncode:
            raise SystemExit(f"dpkg-deb: {said.stderr.strip()}")
    return max(into.glob("memconsole_*.deb"), key=lambda path: path.stat().st_mtime_ns)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "dist"))
