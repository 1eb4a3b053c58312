"""What memconsole puts into libvirt's configuration, how each part stands, and what makes or removes it.

    hook                  /etc/libvirt/hooks/qemu.d/50-memconsole: ``hook.sh``; hooks of others stay, and are called
    apparmor              QEMU may open the files of the mount: a file in abstractions/libvirt-qemu.d, where the
                          abstraction includes that (Ubuntu), else lines in local/abstractions/libvirt-qemu (Debian)
    order-DAEMON          /etc/systemd/system/DAEMON.service.d/50-memconsole.conf: what a handoff carried is in place
                          before the daemon looks for it
    order-resume          /etc/systemd/system/memconsole-resume.service.d/50-libvirt.conf: what libvirt's QEMUs need on
                          the disk is there before memconsole-resume starts them
    selinux, daemon-DAEMON  are looked at, never changed: a boolean of the policy, and whether a daemon knows of hooks

qemu.conf is left alone. Nothing is kept elsewhere of what was written: each part tells by itself (:mod:`.sealed`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.backend.managers import libvirt_host, plans
from memconsole.backend.managers.sealed import Block, Change, Look, Standing, Whole, make
from memconsole.errors import Denied, MemconsoleError, NotFound, Refused
from memconsole.model.base import Value

OLDEST = (6, 5)
"""The first libvirt that calls the hooks of a directory, so that an operator's own stays beside memconsole's."""
HOOK = f"{libvirt_host.HOOKS}/qemu.d/50-memconsole"
SETUP = "memconsole libvirt setup"
_ABSTRACTION = "/etc/apparmor.d/abstractions/libvirt-qemu"
_LOCAL = "/etc/apparmor.d/local/abstractions/libvirt-qemu"
_BOOLEAN = "/sys/fs/selinux/booleans/virt_use_fusefs"
_RULES = """  # QEMU opens the RAM that memconsole's mount shows, or that it was moved into.
  /run/memconsole/guests/ r,
  /run/memconsole/guests/*/ram/* rw,
  /run/memconsole/ram/*/* rw,
"""
_ORDER = """[Unit]
# RAM and images that the kernel before handed over are in place before domains are started from them.
After=memconsole-resume.service memconsole.service
"""
_RESUME = "/etc/systemd/system/memconsole-resume.service.d/50-libvirt.conf"
_DISK = """[Unit]
# QEMUs that go on before libvirt is there find their directories, and may open /dev/kvm.
After=systemd-remount-fs.service systemd-modules-load.service systemd-tmpfiles-setup-dev.service
RequiresMountsFor=/var/lib/libvirt
"""


class Part(Value, frozen=True):
    """A part of the configuration: where it is, how it stands, why, and what to do about it."""

    id: str
    title: str
    path: str
    state: Standing
    why: str = ""
    remedy: str = ""


class _Place(NamedTuple):
    id: str
    title: str
    path: str
    wanted: Whole | Block

    def part(self, look: Look) -> Part:
        """As it is told."""
        remedy = {
            Standing.THERE: "",
            Standing.ALTERED: f"see what is in it and who needs it; put it aside, then {SETUP}",
        }.get(look.standing, SETUP)
        return Part(self.id, self.title, self.path, look.standing, look.why, remedy)


def status(root: Root = "/") -> tuple[Part, ...]:
    """How each part stands, the hook first.

    Raises:
        NotFound: there is no libvirt on this host. KernelRefused: a part cannot be read.
    """
    _there(root)
    return (*_hook(root), *(place.part(place.wanted.look()) for place in _places(root)[1:]), *_looked_at(root))


def unknown(error: MemconsoleError) -> Part:
    """A part that stands for all of them, where it is not known how they stand."""
    why = f"{error.what}: {error.why}" if error.why else error.what
    return Part("libvirt", "libvirt's configuration", "/etc/libvirt", Standing.MISSING, why, error.remedy or SETUP)


def lacking(parts: Iterable[Part]) -> list[Part]:
    """Those that are not as they should be."""
    return [part for part in parts if part.state is not Standing.THERE]


def setup(root: Root = "/") -> list[Change]:
    """What has to be changed for every part to be there; nothing, where it is.

    Raises:
        NotFound: there is no libvirt on this host.
        Refused: libvirt is too old; a part was altered, or has a file of another's in its place.
    """
    _there(root)
    if (why := _too_old(root)) is not None:
        raise Refused("libvirt cannot be set up", why, "install libvirt 6.5 or newer", code="TooOld")
    looks = [(place, place.wanted.look()) for place in _places(root)]
    _untouched(looks)
    wrong = ((place, look) for place, look in looks if look.standing in {Standing.MISSING, Standing.STALE})
    return [_inside(root, place.wanted.put(look)) for place, look in wrong]


def remove(root: Root = "/", runtime: Path | None = None) -> list[Change]:
    """What has to be changed for nothing of memconsole to be left.

    Raises:
        NotFound: there is no libvirt on this host.
        Refused: a part was altered; RAM is planned for domains, which would start without it.
    """
    _there(root)
    planned = plans.planned(runtime) if tree.live(root) or runtime is not None else ()
    if planned:
        raise Refused(
            "libvirt's hook cannot be removed",
            f"memconsole holds the RAM of {len(planned)} of its domains: {', '.join(planned[:4])}",
            "shut these domains down first, or end that they are adopted",
            code="RamPlanned",
        )
    looks = [(place, place.wanted.look()) for place in (*_places(root), *_former(root))]
    _untouched(looks)
    there = ((place, look) for place, look in looks if look.standing in {Standing.THERE, Standing.STALE})
    return [_inside(root, place.wanted.take(look)) for place, look in there]


def apply(changes: Iterable[Change], root: Root = "/") -> None:
    """Make the changes, one after the other; each is whole, and what is left undone is seen by ``status``.

    Raises:
        Denied: this user is not root. Refused: a file was changed since. KernelRefused: one cannot be written.
    """
    if tree.live(root) and os.geteuid():
        raise Denied("libvirt's configuration cannot be changed", "it is root's", "run as root")
    for change in changes:
        now = change.path.read_text(errors="surrogateescape") if change.path.is_file() else None
        if now != change.before:
            raise Refused(f"{change.path} was changed meanwhile", "it is not overwritten", "look again", code="Altered")
        make(change)


def restarts(root: Root = "/") -> list[str]:
    """The commands after which what was set up counts; domains run on meanwhile."""
    stale = [each.unit for each in libvirt_host.running(root) if not libvirt_host.sees_hooks(each, root)]
    return [f"systemctl restart {unit}" for unit in stale]


def reloads(changes: Iterable[Change], root: Root = "/") -> list[str]:
    """The commands after which systemd has read the units' order as it is now."""
    units = any(change.path.name.endswith(".conf") for change in changes)
    return ["systemctl daemon-reload"] if units and tree.exists(root, "/run/systemd/system") else []


def _there(root: Root) -> None:
    if not libvirt_host.installed(root):
        why = "neither libvirtd nor virtqemud is installed"
        raise NotFound("there is no libvirt on this host", why, "nothing need be done without guests of libvirt")


def _too_old(root: Root) -> str | None:
    version = libvirt_host.version(root)
    if version is None or version[:2] >= OLDEST:
        return None
    return f"libvirt {'.'.join(map(str, version))} does not call the hooks in {os.path.dirname(HOOK)}"  # noqa: PTH120


def _untouched(looks: Iterable[tuple[_Place, Look]]) -> None:
    altered = [(place, look) for place, look in looks if look.standing is Standing.ALTERED]
    if altered:
        named = "; ".join(f"{place.path}: {look.why}" for place, look in altered)
        remedy = "see what is in it and who needs it; put it aside and try again"
        raise Refused(
            "what is there was not written by memconsole, or was changed since", named, remedy, code="Altered"
        )


def _hook(root: Root) -> Iterator[Part]:
    place = _places(root)[0]
    if (why := _too_old(root)) is not None:
        yield Part(place.id, place.title, place.path, Standing.MISSING, why, "install libvirt 6.5 or newer")
        return
    yield place.part(place.wanted.look())


def _places(root: Root) -> list[_Place]:
    """What is written, where libvirt is as it is here."""

    def at(path: str) -> Path:
        return Path(tree.below(root, path))

    script = Path(__file__).with_name("hook.sh").read_text()
    found = [_Place("hook", "libvirt's hook", HOOK, Whole(at(HOOK), script, 0o755))]
    if tree.exists(root, _ABSTRACTION):
        title = "AppArmor's rules for QEMU"
        own = f"{_ABSTRACTION}.d/memconsole"
        if b"abstractions/libvirt-qemu.d" in tree.read(root, _ABSTRACTION):
            found.append(_Place("apparmor", title, own, Whole(at(own), _RULES)))
        else:
            found.append(_Place("apparmor", title, _LOCAL, Block(at(_LOCAL), _RULES)))
    found += [_order(name, root) for name in libvirt_host.with_unit(root)]
    return [*found, _resume(root)] if libvirt_host.with_unit(root) else found


def _resume(root: Root) -> _Place:
    title = "memconsole-resume behind libvirt's disk"
    return _Place("order-resume", title, _RESUME, Whole(Path(tree.below(root, _RESUME)), _DISK))


def _order(name: str, root: Root) -> _Place:
    path = f"/etc/systemd/system/{name}.service.d/50-memconsole.conf"
    return _Place(f"order-{name}", f"{name} after memconsole", path, Whole(Path(tree.below(root, path)), _ORDER))


def _former(root: Root) -> list[_Place]:
    """What may be left of a daemon, or of an AppArmor, that is not installed any more."""
    known = {place.path for place in _places(root)}
    own = f"{_ABSTRACTION}.d/memconsole"
    left = [
        _Place("apparmor", "AppArmor's rules for QEMU", own, Whole(Path(tree.below(root, own)), _RULES)),
        _Place("apparmor", "AppArmor's rules for QEMU", _LOCAL, Block(Path(tree.below(root, _LOCAL)), _RULES)),
        *(_order(name, root) for name in libvirt_host.DAEMONS),
        _resume(root),
    ]
    return [place for place in left if place.path not in known and tree.exists(root, place.path)]


def _looked_at(root: Root) -> Iterator[Part]:
    if tree.exists(root, _BOOLEAN):
        on = tree.line(root, _BOOLEAN).startswith("1")
        yield Part(
            "selinux",
            "SELinux lets QEMU open the mount",
            _BOOLEAN,
            Standing.THERE if on else Standing.MISSING,
            "" if on else "the boolean virt_use_fusefs is off",
            "" if on else f"setsebool -P virt_use_fusefs on; restorecon -R {libvirt_host.HOOKS}",
        )
    for daemon in libvirt_host.running(root):
        sees = libvirt_host.sees_hooks(daemon, root)
        yield Part(
            f"daemon-{daemon.name}",
            f"{daemon.name} calls hooks",
            f"/proc/{daemon.pid}",
            Standing.THERE if sees else Standing.STALE,
            "" if sees else "no hook of QEMU's was there when it started, and it does not look again",
            "" if sees else f"systemctl restart {daemon.unit} (domains run on)",
        )


def _inside(root: Root, change: Change) -> Change:
    """The change, if its file is below the root: a link in an image may lead out of it.

    Raises:
        Refused: it does.
    """
    top = Path(os.path.realpath(str(root)))
    if not Path(os.path.realpath(change.path.parent)).is_relative_to(top):
        why = f"its directory is {os.path.realpath(change.path.parent)}"
        raise Refused(f"{change.path} is not below {root}", why, "chroot into the image instead", code="OutsideOfRoot")
    return change
