"""The one registry of Actions: everything that is *done* is one of these values.

An Action is a frozen struct tagged by ``do``. Keys, palette, dialogs, macros, the command line and the wire all
derive from the registry: a field's :class:`Arg` says how people write it, :class:`Spec` says what the action is.

The command line of an action is its ``words``, its positional fields in order, then ``--options``; :func:`cli_form`
writes it, :func:`memconsole.command.parse` reads it, and the two are inverse.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from typing import Annotated, ClassVar, get_args, get_origin, get_type_hints

import msgspec

from memconsole.arguments import ActionField, Arg, ArgumentKind, write_value
from memconsole.model import Access, Danger, Plan, Refusal, Request, Rung


class Spec(msgspec.Struct, frozen=True):
    """What an action is: id, command words, title, danger class, the key it has by default, what it works on."""

    id: str
    words: tuple[str, ...]
    title: str
    help: str
    danger: Danger
    key: str = ""
    on: str = ""


class Action(Request, frozen=True, tag_field="do"):
    """The base of every Action."""

    spec: ClassVar[Spec]


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,54}"
"""What a region or guest may be called: it becomes a file name and, with a prefix, a LUO session name (63 bytes)."""


STORES = ("memfd", "dax", "devdax", "raw")
"""Where frames can live: docs/stores.md says what each survives."""


class Reserve(Action, frozen=True, tag="reserve"):
    """Set memory aside under a name."""

    spec = Spec(
        "reserve", ("reserve",), "Reserve region", "Set memory aside under a name", Danger.CHANGES, "n", "regions"
    )
    name: Annotated[str, Arg(ArgumentKind.NEW_NAME, "name of the new region", positional=True)]
    size: Annotated[int, Arg(ArgumentKind.SIZE, "its size, for example 64M or 2G", positional=True)]
    store: Annotated[str, Arg(ArgumentKind.CHOICE, "where its frames live", choices=STORES)] = "memfd"
    page_size: Annotated[int, Arg(ArgumentKind.SIZE, "page size: 4K, 2M or 1G", choices=("4K", "2M", "1G"))] = 4096
    node: Annotated[int | None, Arg(ArgumentKind.INTEGER, "NUMA node to take it from")] = None
    prefault: Annotated[bool, Arg(ArgumentKind.FLAG, "give every page its frame now")] = False
    path: Annotated[str, Arg(ArgumentKind.TEXT, "show it as this file below files/ on the mount: db/items")] = ""
    owner: Annotated[str, Arg(ArgumentKind.TEXT, "USER[:GROUP] whose file it is; root")] = ""
    mode: Annotated[str, Arg(ArgumentKind.TEXT, "permissions of the file, in octal (0600)")] = ""
    quota: Annotated[int | None, Arg(ArgumentKind.SIZE, "the most that its owner may have in files from now on")] = None


class Map(Action, frozen=True, tag="map"):
    """Grant a guest a range of a region."""

    spec = Spec("map", ("map",), "Map region", "Grant a guest a range of a region", Danger.CHANGES, "m", "regions")
    region: Annotated[str, Arg(ArgumentKind.REGION, "region to map", positional=True)]
    guest: Annotated[str, Arg(ArgumentKind.GUEST, "guest that may map it", positional=True)]
    offset: Annotated[int, Arg(ArgumentKind.ADDRESS, "where in the region the grant begins")] = 0
    length: Annotated[int | None, Arg(ArgumentKind.SIZE, "how many bytes; up to the region's end if left out")] = None
    gpa: Annotated[int | None, Arg(ArgumentKind.ADDRESS, "guest physical address to map it at")] = None
    access: Annotated[Access, Arg(ArgumentKind.CHOICE, "ro or rw", choices=("ro", "rw"))] = Access.RW
    dma: Annotated[str | None, Arg(ArgumentKind.BDF, "also map it for this device")] = None
    lazy: Annotated[bool, Arg(ArgumentKind.FLAG, "give pages their frames when the guest first touches them")] = False


class Revoke(Action, frozen=True, tag="revoke"):
    """Take a mapping back and keep the contents."""

    spec = Spec(
        "revoke",
        ("revoke",),
        "Revoke grant",
        "Take a mapping back and keep the contents",
        Danger.DESTROYS,
        "R",
        "grants",
    )
    grant: Annotated[str, Arg(ArgumentKind.GRANT, "grant to revoke", positional=True)]
    within: Annotated[float, Arg(ArgumentKind.SECONDS, "seconds each rung may take")] = 5.0
    at_most: Annotated[
        Rung, Arg(ArgumentKind.CHOICE, "the hardest rung allowed", choices=("ask", "protect", "copy", "kill"))
    ] = Rung.KILL


class Release(Action, frozen=True, tag="release"):
    """Free a region and zero its memory."""

    spec = Spec(
        "release",
        ("release",),
        "Release region",
        "Free a region; its contents are gone",
        Danger.DESTROYS,
        "X",
        "regions",
    )
    region: Annotated[str, Arg(ArgumentKind.REGION, "region to free", positional=True)]


class Move(Action, frozen=True, tag="move"):
    """Have a region live in another store."""

    spec = Spec(
        "move",
        ("move",),
        "Move region",
        "Move a region's contents to another store; its guests have it again afterwards",
        Danger.CHANGES,
        "N",
        "regions",
    )
    region: Annotated[str, Arg(ArgumentKind.REGION, "region to move", positional=True)]
    store: Annotated[str, Arg(ArgumentKind.CHOICE, "where its frames are to live", choices=STORES)]
    within: Annotated[float, Arg(ArgumentKind.SECONDS, "seconds its guests have to give it back, each")] = 5.0


class GuestStart(Action, frozen=True, tag="guest-start"):
    """Start a guest whose RAM is a region of ours."""

    spec = Spec(
        "guest-start",
        ("guest", "start"),
        "Start guest",
        "Start a guest whose RAM is a region",
        Danger.CHANGES,
        "n",
        "guests",
    )
    name: Annotated[str, Arg(ArgumentKind.NEW_NAME, "name of the new guest and of its region", positional=True)]
    vmm: Annotated[str, Arg(ArgumentKind.CHOICE, "the VMM that runs it", choices=("canary", "qemu"))] = "canary"
    memory: Annotated[int, Arg(ArgumentKind.SIZE, "its RAM")] = 64 << 20
    store: Annotated[str, Arg(ArgumentKind.CHOICE, "where its RAM lives", choices=STORES)] = "memfd"
    device: Annotated[str | None, Arg(ArgumentKind.BDF, "PCI device to pass through with VFIO (qemu)")] = None
    agent: Annotated[bool, Arg(ArgumentKind.FLAG, "add a channel for QEMU's guest agent (qemu)")] = False
    args: Annotated[tuple[str, ...], Arg(ArgumentKind.WORDS, "arguments for the VMM, after --")] = ()


SAVE_S = 60.0
"""Seconds a service has to save, where the command does not say."""
_Unit = Annotated[str, Arg(ArgumentKind.TEXT, "systemd unit it runs as, and is started again by")]
_Exec = Annotated[str, Arg(ArgumentKind.TEXT, "command it is started by, after a handoff too")]
_SaveSignal = Annotated[str, Arg(ArgumentKind.TEXT, "signal that has it save and end before a handoff (SIGTERM)")]
_Save = Annotated[str, Arg(ArgumentKind.TEXT, "shell command that has it save before that, and is waited for")]
_Ready = Annotated[str, Arg(ArgumentKind.TEXT, "shell command that succeeds once it answers")]
_SaveWithin = Annotated[float, Arg(ArgumentKind.SECONDS, "seconds it may take to save, and to be ready")]


class GuestAttach(Action, frozen=True, tag="guest-attach"):
    """Take a running process as a guest."""

    spec = Spec(
        "guest-attach",
        ("guest", "attach"),
        "Attach process",
        "Take a running process as a guest",
        Danger.CHANGES,
        "O",
        "guests",
    )
    name: Annotated[str, Arg(ArgumentKind.NEW_NAME, "name of the new guest", positional=True)]
    pid: Annotated[int, Arg(ArgumentKind.INTEGER, "the process's PID")]
    unit: _Unit = ""
    exec: _Exec = ""
    save_signal: _SaveSignal = ""
    save: _Save = ""
    ready: _Ready = ""
    within: _SaveWithin = SAVE_S

    @property
    def is_service(self) -> bool:
        """Whether it was said how the process is saved or started."""
        return bool(self.unit or self.exec or self.save_signal or self.save or self.ready)


class GuestService(Action, frozen=True, tag="guest-service"):
    """Have a systemd unit or a command as a guest: saved before a handoff, started again after it."""

    spec = Spec(
        "guest-service",
        ("guest", "service"),
        "Add service",
        "Have a unit or a command as a guest: told to save before a handoff, started again after it",
        Danger.CHANGES,
        "D",
        "guests",
    )
    name: Annotated[str, Arg(ArgumentKind.NEW_NAME, "name of the new guest", positional=True)]
    unit: _Unit = ""
    exec: _Exec = ""
    user: Annotated[
        str, Arg(ArgumentKind.TEXT, "user its files are of, and its command runs as; the unit's, or root")
    ] = ""
    save_signal: _SaveSignal = ""
    save: _Save = ""
    ready: _Ready = ""
    within: _SaveWithin = SAVE_S


class GuestHelper(Action, frozen=True, tag="guest-helper"):
    """Let a process that works for a guest share what the guest has been granted."""

    spec = Spec(
        "guest-helper",
        ("guest", "helper"),
        "Name helper",
        "Say that a process works for a guest (a vhost-user backend)",
        Danger.CHANGES,
        "H",
        "guests",
    )
    name: Annotated[str, Arg(ArgumentKind.GUEST, "guest that the process works for", positional=True)]
    pid: Annotated[int, Arg(ArgumentKind.INTEGER, "the process's PID")]


class GuestAdopt(Action, frozen=True, tag="guest-adopt"):
    """Take the RAM of a VM that somebody else runs into custody, while it runs."""

    spec = Spec(
        "guest-adopt",
        ("guest", "adopt"),
        "Adopt guest",
        "Take the RAM of a running VM (libvirt's, or any QEMU) into custody",
        Danger.CHANGES,
        "a",
        "guests",
    )
    name: Annotated[str, Arg(ArgumentKind.GUEST, "guest to adopt, as memconsole guests shows it", positional=True)] = ""
    all: Annotated[bool, Arg(ArgumentKind.FLAG, "adopt every guest of libvirt that can be adopted")] = False
    qmp: Annotated[str, Arg(ArgumentKind.PATH, "QMP socket of a QEMU that libvirt does not run")] = ""
    copy: Annotated[
        bool,
        Arg(ArgumentKind.FLAG, "move private or hugetlb RAM live, and have libvirt start it again on it"),
    ] = False


class GuestLetGo(Action, frozen=True, tag="guest-let-go"):
    """Undo an adoption: the guest goes on as if it had not been."""

    spec = Spec(
        "guest-let-go",
        ("guest", "let-go"),
        "Let guest go",
        "Undo an adoption; the guest runs on",
        Danger.CHANGES,
        "L",
        "guests",
    )
    name: Annotated[str, Arg(ArgumentKind.GUEST, "adopted guest to let go", positional=True)]


class GuestStop(Action, frozen=True, tag="guest-stop"):
    """End a guest; a VM of ours is shut down, an attached process is only let go."""

    spec = Spec(
        "guest-stop",
        ("guest", "stop"),
        "Stop guest",
        "End a guest; its regions keep their contents",
        Danger.DESTROYS,
        "S",
        "guests",
    )
    name: Annotated[str, Arg(ArgumentKind.GUEST, "guest to stop", positional=True)]


class GuestPause(Action, frozen=True, tag="guest-pause"):
    """Stop a guest's vCPUs."""

    spec = Spec("guest-pause", ("guest", "pause"), "Pause guest", "Stop a guest's vCPUs", Danger.CHANGES, "p", "guests")
    name: Annotated[str, Arg(ArgumentKind.GUEST, "guest to pause", positional=True)]


class GuestResume(Action, frozen=True, tag="guest-resume"):
    """Let a paused guest go on."""

    spec = Spec(
        "guest-resume",
        ("guest", "resume"),
        "Resume guest",
        "Let a paused guest run again",
        Danger.CHANGES,
        "u",
        "guests",
    )
    name: Annotated[str, Arg(ArgumentKind.GUEST, "guest to resume", positional=True)]


class WindowMap(Action, frozen=True, tag="window-map"):
    """Grant a guest an MMIO window."""

    spec = Spec(
        "window-map", ("window", "map"), "Map window", "Grant a guest an MMIO window", Danger.CHANGES, "m", "windows"
    )
    window: Annotated[str, Arg(ArgumentKind.WINDOW, "window as BDF:BAR", positional=True)]
    guest: Annotated[str, Arg(ArgumentKind.GUEST, "guest that may map it", positional=True)]


class WindowRevoke(Action, frozen=True, tag="window-revoke"):
    """Take an MMIO window back."""

    spec = Spec(
        "window-revoke",
        ("window", "revoke"),
        "Revoke window",
        "Take an MMIO window back",
        Danger.DESTROYS,
        "R",
        "windows",
    )
    window: Annotated[str, Arg(ArgumentKind.WINDOW, "window as BDF:BAR", positional=True)]


class ArenaCreate(Action, frozen=True, tag="arena-create"):
    """Make an arena of a range that was set aside at boot."""

    spec = Spec(
        "arena-create",
        ("arena", "create"),
        "Create arena",
        "Format a range that was set aside at boot, for regions of the dax store, of devdax, or of raw",
        Danger.DESTROYS,
    )
    name: Annotated[str, Arg(ArgumentKind.NEW_NAME, "name of the new arena", positional=True)]
    device: Annotated[
        str, Arg(ArgumentKind.TEXT, "pmem0, or dax0.0 with devdax, 0x50000000 with raw; the only one if left out")
    ] = ""
    devdax: Annotated[bool, Arg(ArgumentKind.FLAG, "without a file system, for regions of the devdax store")] = False
    raw: Annotated[bool, Arg(ArgumentKind.FLAG, "a range that the service was started with (--raw START)")] = False


class ArenaScan(Action, frozen=True, tag="arena-scan"):
    """Take up the arenas of this host, and the regions in them that this host has no record of."""

    spec = Spec(
        "arena-scan",
        ("arena", "scan"),
        "Scan arenas",
        "Take up the arenas of this host, and the regions in them",
        Danger.CHANGES,
    )


class ArenaGrow(Action, frozen=True, tag="arena-grow"):
    """Have an arena have all of its range, which became larger."""

    spec = Spec(
        "arena-grow",
        ("arena", "grow"),
        "Grow arena",
        "Have an arena of devdax or raw have all of its range, which became larger; with a file system it cannot",
        Danger.CHANGES,
    )
    name: Annotated[str, Arg(ArgumentKind.TEXT, "arena to grow", positional=True)]


class ArenaRemove(Action, frozen=True, tag="arena-remove"):
    """Give an arena up."""

    spec = Spec(
        "arena-remove",
        ("arena", "remove"),
        "Remove arena",
        "Give an arena without regions up: its range holds nothing then",
        Danger.DESTROYS,
    )
    name: Annotated[str, Arg(ArgumentKind.TEXT, "arena to remove", positional=True)]


NO_INITRD = "none"
"""In the place of an initrd's path: the kernel needs none."""


class HandoffAction(Action, frozen=True):
    """What a handoff's actions share: the kernel that is next, and how it is booted."""

    kernel: Annotated[str, Arg(ArgumentKind.PATH, "image of the next kernel; the host's boot default if left out")] = ""
    initrd: Annotated[
        str, Arg(ArgumentKind.PATH, "initrd of the next kernel, or none; the image's own if left out")
    ] = ""
    append: Annotated[str, Arg(ArgumentKind.TEXT, "command line of the next kernel; this kernel's if left out")] = ""
    contents: Annotated[bool, Arg(ArgumentKind.FLAG, "compare contents too; the blackout is longer")] = False


class HandoffRun(HandoffAction, frozen=True, tag="handoff-run"):
    """Boot another kernel and let the guests go on in it."""

    finish: Annotated[
        bool, Arg(ArgumentKind.FLAG, "finish leftover incoming sessions; files that no entry refers to are discarded")
    ] = False
    unless_running: Annotated[
        bool, Arg(ArgumentKind.FLAG, "do nothing where the kernel that would be booted is the one that runs")
    ] = False

    spec = Spec(
        "handoff-run",
        ("handoff", "run"),
        "Hand off",
        "Boot another kernel; guests continue in it on the same memory",
        Danger.DESTROYS,
        "J",
        "handoff",
    )


class HandoffRehearse(HandoffAction, frozen=True, tag="handoff-rehearse"):
    """Do all of a handoff but the jump: restart every VMM on this kernel, on the same memory."""

    spec = Spec(
        "handoff-rehearse",
        ("handoff", "rehearse"),
        "Rehearse handoff",
        "Do a handoff without the jump: restart every VMM on this kernel",
        Danger.DESTROYS,
        "B",
        "handoff",
    )


AnyAction = (
    Reserve
    | Map
    | Revoke
    | Release
    | Move
    | GuestStart
    | GuestAttach
    | GuestService
    | GuestHelper
    | GuestAdopt
    | GuestLetGo
    | GuestStop
    | GuestPause
    | GuestResume
    | WindowMap
    | WindowRevoke
    | ArenaCreate
    | ArenaScan
    | ArenaGrow
    | ArenaRemove
    | HandoffRun
    | HandoffRehearse
)
REGISTRY: Mapping[str, type[Action]] = {cls.spec.id: cls for cls in get_args(AnyAction)}


@functools.cache
def fields(cls: type[Action]) -> tuple[ActionField, ...]:
    """The fields of an action, positional ones first, each in the order it is declared."""
    hints = get_type_hints(cls, include_extras=True)
    found = []
    for info in msgspec.structs.fields(cls):
        hint = hints[info.name]
        if get_origin(hint) is not Annotated:
            raise TypeError(f"{cls.__name__}.{info.name} lacks an Arg")
        arg = next(extra for extra in get_args(hint)[1:] if isinstance(extra, Arg))
        found.append(ActionField(info.name, arg, info.required, None if info.required else info.default))
    return tuple(sorted(found, key=lambda field: not field.arg.positional))


def cli_form(action: Action) -> str:
    """The command that does the same: ``memconsole map web db1 --gpa 0x00100000``."""
    words = ["memconsole", *action.spec.words]
    options: list[str] = []
    rest: list[str] = []
    for field in fields(type(action)):
        value = getattr(action, field.name)
        if field.arg.positional:
            words += [write_value(field, value)] if field.required or value != field.default else []
        elif field.arg.kind is ArgumentKind.WORDS:
            rest = ["--", *value] if value else []
        elif not field.required and value == field.default:
            continue
        elif field.arg.kind is ArgumentKind.FLAG:
            options.append(field.option)
        else:
            options += [field.option, write_value(field, value)]
    return shlex.join([*words, *options, *rest])


def refused_plan(action: Action, refusal: Refusal) -> Plan:
    """A plan of an Action that is refused, whatever it would do."""
    return Plan(action.spec.id, cli_form(action), action.spec.danger, refusals=(refusal,))
