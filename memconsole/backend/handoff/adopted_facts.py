"""What keeps an adopted guest from being carried by a handoff: what libvirt has written down, and what QEMU says.

written down    host devices, virtiofs, vhost-user, TPM, jobs, state (the domain's status file, as it is now)
its process     RAM that was plugged in since it was adopted
its QEMU        query-migrate: what blocks a migration (invtsc, devices); asked only where nothing else keeps it
the mount       libvirt finds the RAM there when it starts the guest again
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from memconsole import decoding
from memconsole.backend import needs
from memconsole.backend.handoff.hindrances import hindrances
from memconsole.backend.kernel import tree
from memconsole.backend.managers import libvirt, virsh
from memconsole.errors import MemconsoleError
from memconsole.model import Guest, GuestState, Managed, Value
from memconsole.units import format_size

_AT_ONCE = 8
_CARRIED = frozenset({"running", "paused"})
_SLEEPS = "QEMU cannot let a guest that sleeps go on once its state was taken, should the handoff be taken back"


class AdoptedLooks(needs.LiveGuests, needs.RegionFds, needs.ForeignMemory, needs.GrantFiles, Protocol):
    """What adopted guests are looked at by."""


class _Blocked(Value, frozen=True, rename="kebab"):
    status: str = "none"
    blocked_reasons: tuple[str, ...] = ()


def kept(desk: AdoptedLooks, guests: Sequence[Guest]) -> dict[str, tuple[str, ...]]:
    """What keeps each of these adopted guests, in words; nothing where it comes along."""
    if not guests:
        return {}
    try:
        domains = libvirt.domains(desk.root)
    except tree.UNREADABLE:
        domains = {}
    now = {guest.name: libvirt.of_process(domains, guest.pid or 0, guest.command) for guest in guests}
    ended = {guest.name: _ended(desk, guest, domains.values()) for guest in guests}
    found = {guest.name: ended[guest.name] or tuple(_seen(desk, guest, now[guest.name])) for guest in guests}
    asked = {name: managed for name, managed in now.items() if managed is not None and not found[name]}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        said = dict(zip(asked, pool.map(_said, asked.values()), strict=True))
    return {name: each or said.get(name, ()) for name, each in found.items()}


def adopted_anew(desk: needs.LedgerState, guest: Guest) -> str:
    """The commands that adopt a guest whose process ended as it runs now."""
    name = guest.managed.name if guest.managed is not None else guest.name
    regions = sorted({grant.region for grant in desk.state.grants_of(guest=guest.name)})
    words = [f"let-go {guest.name}", *(f"release {region}" for region in regions), f"adopt {shlex.quote(name)}"]
    return "; ".join(f"memconsole {'' if word.startswith('release') else 'guest '}{word}" for word in words)


def _ended(desk: AdoptedLooks, guest: Guest, domains: Iterable[Managed]) -> tuple[str, ...]:
    """That its process ended: its domain may run again, on RAM that custody has not."""
    live = desk.live_guest(guest.name)
    if live is not None and live.state() is not GuestState.GONE:
        return ()
    what = f"its process {guest.pid} has ended, and what custody holds is the RAM of that"
    if guest.managed is not None and any(each.is_systems(guest.managed.uuid) for each in domains):
        again = "libvirt has started it again on other RAM (a save and restore, or a new start)"
        return (f"{what}; {again}: {adopted_anew(desk, guest)}",)
    return (f"{what}: memconsole guest let-go {guest.name}",)


def _seen(desk: AdoptedLooks, guest: Guest, managed: Managed | None) -> list[str]:
    """What keeps it, without asking anybody."""
    if guest.managed is None:
        return ["no manager starts it again: libvirt does not run it"]
    if managed is None:
        return ["libvirt has no word of its process (systemctl status libvirtd virtqemud)"]
    found = hindrances(managed)
    if managed.state not in _CARRIED:
        why = f": {_SLEEPS}; {managed.by_virsh('dompmwakeup')} wakes it" if managed.state == "pmsuspended" else ""
        found.append(f"libvirt says that it is {managed.state}{why}")
    if desk.mount is None:
        found.append("no mount shows its RAM to libvirt: memconsole serve --mount")
    more = _not_adopted(desk, guest)
    if more:
        found.append(f"{more}: memconsole guest adopt {guest.name}")
    return found


def _not_adopted(desk: AdoptedLooks, guest: Guest) -> str:
    """RAM that it has and custody has not."""
    held = {(each.device, each.inode) for region in desk.state.regions.values() for each in region.segments}
    try:
        size = sum(file.size for file in desk.ram_files(guest) if file.can_be_held and file.identity not in held)
    except MemconsoleError as error:
        return f"its RAM is not shown ({error})"
    return f"{format_size(size)} of RAM plugged in since it was adopted" if size else ""


def _said(managed: Managed) -> tuple[str, ...]:
    """What its QEMU says against a migration."""
    monitor = virsh.monitor(managed.uuid)
    try:
        answer = decoding.convert(monitor("query-migrate", {}), _Blocked, what="QEMU's answer to query-migrate")
    except MemconsoleError as error:
        return (f"libvirt does not answer: {error.why or error.what}",)
    return answer.blocked_reasons
