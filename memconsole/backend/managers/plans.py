"""What RAM a domain of libvirt is to get at its next start, written where libvirt's hook (``hook.sh``) reads it.

    /run/memconsole/libvirt/UUID             the plan, a line a RAM block: ``ram FILE PATH``
    /run/memconsole/libvirt/UUID.verified    the digest of the image whose RAM is here, compared, and has not run since
    /run/memconsole/libvirt/UUID.restoring   the same while the hook uses it; nobody else writes it

FILE is what libvirt calls the block in the directory that it makes for the domain (``pc.ram``, ``ram-node0``,
``dimm0``), PATH where the RAM is. A locked image carries ``<mc:handoff digest=...>`` in its domain's metadata
(:mod:`.domainxml`): the hook refuses to restore it unless ``UUID.verified`` has the same digest, and that right is
spent when the guest runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from memconsole import decoding, paths, wholefile
from memconsole.errors import BadFile, KernelRefused, NotFound

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DIGEST = re.compile(r"[0-9a-f]{16,128}")
_ALL = ("", ".verified", ".restoring")


def directory(runtime: Path | None = None) -> Path:
    """Where plans lie, below the runtime directory; libvirt's hook knows the one of the host's own service."""
    return (runtime or paths.HOST) / "libvirt"


def write(uuid: str, blocks: Mapping[str, Path], runtime: Path | None = None) -> None:
    """Plan the RAM of a domain's next starts: a path for each block; a right that an earlier plan had is gone.

    Raises:
        BadFile: a block or path is none that the hook could read. Refused, KernelRefused: it cannot be written.
    """
    text = _plan(uuid, blocks)
    paths.make_directory(directory(runtime), 0o700)
    for suffix in _ALL[1:]:
        _unlink(_place(uuid, runtime, suffix))
    _put(_place(uuid, runtime), text)


def grant(uuid: str, blocks: Mapping[str, Path], digest: str, runtime: Path | None = None) -> None:
    """The same with the right to restore the image with this digest, both at once: a plan without it has spent it.

    Raises:
        BadFile: a block or path is none that the hook could read. Refused, KernelRefused: it cannot be written.
    """
    text = _plan(uuid, blocks)
    paths.make_directory(directory(runtime), 0o700)
    remove(uuid, runtime)
    _put(_place(uuid, runtime, ".verified"), f"{_right(digest)}\n")  # of no use without the plan
    _put(_place(uuid, runtime), text)


def _plan(uuid: str, blocks: Mapping[str, Path]) -> str:
    rows = []
    for name, path in blocks.items():
        if not _FILE.fullmatch(name) or not path.is_absolute() or not str(path).isprintable():
            raise BadFile(f"{name} at {path} is no RAM block", "no plan can name it", "name the file by a plain path")
        rows.append(f"ram {name} {path}\n")
    if not rows:
        raise BadFile(f"the plan of {uuid} is empty", "it names no RAM block", "name at least one")
    return "".join(rows)


def verified(uuid: str, digest: str, runtime: Path | None = None) -> None:
    """Say that the RAM of the image with this digest is here and was compared: the image may be restored, once.

    Raises:
        NotFound: no RAM is planned for the domain. KernelRefused: it cannot be written.
    """
    read(uuid, runtime)
    _unlink(_place(uuid, runtime, ".restoring"))
    _put(_place(uuid, runtime, ".verified"), f"{_right(digest)}\n")


def read(uuid: str, runtime: Path | None = None) -> dict[str, Path]:
    """The RAM that is planned for a domain: the path of each block.

    Raises:
        NotFound: none is. BadFile: the plan is not one that :func:`write` wrote. KernelRefused: it cannot be read.
    """
    place = _place(uuid, runtime)
    try:
        said = decoding.text(place.read_bytes())
    except FileNotFoundError:
        remedy = "adopt the domain first"
        raise NotFound(f"no RAM is planned for the domain {uuid}", f"there is no {place}", remedy) from None
    except OSError as error:
        raise KernelRefused(str(place), error.errno or 0) from None
    found = {}
    for line in said.splitlines():
        kind, _, rest = line.partition(" ")
        name, _, path = rest.partition(" ")
        if kind != "ram" or not _FILE.fullmatch(name) or not path.startswith("/"):
            raise BadFile(
                f"{place} is no plan", f"cannot read {line!r}", "adopt the domain again, which writes it anew"
            )
        found[name] = Path(path)
    return found


def is_verified(uuid: str, runtime: Path | None = None) -> bool:
    """Whether an image of the domain may be restored: its RAM is here, and the guest has not run on it since."""
    return any(_place(uuid, runtime, suffix).exists() for suffix in _ALL[1:])


def planned(runtime: Path | None = None) -> tuple[str, ...]:
    """The UUIDs of the domains whose RAM is planned."""
    try:
        return tuple(sorted(each.name for each in directory(runtime).iterdir() if _UUID.fullmatch(each.name)))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise KernelRefused(str(directory(runtime)), error.errno or 0) from None


def remove(uuid: str, runtime: Path | None = None) -> None:
    """Plan nothing any more: the domain's next start is as libvirt makes it; a locked image of it is refused."""
    for suffix in _ALL:
        _unlink(_place(uuid, runtime, suffix))


def _place(uuid: str, runtime: Path | None, suffix: str = "") -> Path:
    if not _UUID.fullmatch(uuid):
        raise BadFile(f"{uuid!r} is no UUID", "a plan has the name of its domain's", "virsh domuuid NAME says it")
    return directory(runtime) / f"{uuid}{suffix}"


def _right(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise BadFile(f"{digest!r} is no digest", "it is not 16 to 128 hexadecimal digits", "make the image again")
    return digest


def _put(place: Path, text: str) -> None:
    try:
        with wholefile.written(place) as file:
            file.write(text.encode())
    except OSError as error:
        raise KernelRefused(str(place), error.errno or 0, remedy="make room in the runtime directory") from None


def _unlink(place: Path) -> None:
    try:
        place.unlink(missing_ok=True)
    except OSError as error:
        raise KernelRefused(str(place), error.errno or 0) from None
