"""The grammar of the command line; actions come from their registry, the rest stands here."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from memconsole import __version__, actions
from memconsole.arguments import ArgumentKind
from memconsole.cli import connect
from memconsole.cli.reserved import add_raw
from memconsole.cli.serving import add_options
from memconsole.command import Parser, add_actions, reader, split_rest
from memconsole.errors import UsageError
from memconsole.exporting import FORMATS
from memconsole.field import Field
from memconsole.fields import TABLES
from memconsole.units import parse_address

_GONE = {"findings": "audit"}
"""Commands that were, and what does what they did."""

Run = Callable[[argparse.Namespace], int]


def _lazily(module: str, function: str) -> Run:
    """A command whose module is imported when it runs."""

    def run(options: argparse.Namespace) -> int:
        command = getattr(importlib.import_module(f"memconsole.cli.{module}"), function)
        return int(command(options))

    return run


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _steps(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (not dash or last.isdecimal())):
            raise argparse.ArgumentTypeError(f"{text!r} names no steps (for example 2-4,6)")
        found.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(found))


def _range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not dash:
        raise argparse.ArgumentTypeError(f"{text!r} is not A-B (for example 0x0-0x200000 or 0-2M)")
    return parse_address(first), parse_address(last)


def _interval(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("an interval is from 0.1 to 3600 seconds")
    return value


REDACT = "write pseudonyms for names of hosts, guests, regions, processes, users and files"


def _tables(commands: Any) -> None:
    for table in TABLES.values():
        name, help = table.id, f"list {table.title}"
        if name == "findings":
            name, help = "audit", f"{help}; exit code 4 when there are any"
        listing = commands.add_parser(name, help=help)
        _rows(listing, table.fields)
        listing.add_argument("--redact", action="store_true", help=REDACT)
        if any(field.part is not None for field in table.fields):
            over = "CPU %% and rates over so many seconds"
            listing.add_argument("--over", type=reader(_interval), metavar="SECONDS", help=over)
        listing.set_defaults(run=_lazily("fleeting", "table"), table=table.id, over=None)


def _rows(listing: argparse.ArgumentParser, fields: Sequence[Field]) -> None:
    known = ", ".join(field.id for field in fields)
    listing.add_argument("--columns", metavar="A,B,C", help=f"which columns, or all; of: {known}")
    listing.add_argument(
        "--where", metavar="FILTER", default="", help="only rows that match, e.g. 'size>1G state:mapped'"
    )
    listing.add_argument("--sort", metavar="FIELD", help="by a field: the largest number, the latest time first")
    listing.add_argument("--reverse", action="store_true", help="the other way round")
    _formats(listing)


def _formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=tuple(FORMATS), default="text", help="what is written (text)")
    for name in ("json", "csv", "plain"):
        parser.add_argument(
            f"--{name}", dest="format", action="store_const", const=name, help=f"short for --format {name}"
        )


def _picture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="write to a file, not to stdout")
    formats = ("json", "svg", "text", "plain", "html", "markdown")
    parser.add_argument("--format", choices=formats, default="json", help="what is written (json)")
    parser.add_argument(
        "--plain", dest="format", action="store_const", const="plain", help="a fact a line, for a screen reader"
    )
    parser.add_argument("--view", metavar="NAME", help="the view to show; JSON has the whole snapshot without one")
    parser.add_argument("--redact", action="store_true", help=REDACT)
    parser.add_argument("--subject", metavar="KEY", default="", help="the subject of the view, e.g. region:web")
    parser.add_argument("--size", metavar="WxH", default="132x50", help="the view's size in cells (132x50)")


def _history(commands: Any, json_too: argparse.ArgumentParser) -> None:
    history = commands.add_parser("history", help="list and show recorded snapshots").add_subparsers(
        dest="history_command", required=True, metavar="COMMAND"
    )
    listing = history.add_parser("list", help="list when snapshots were recorded", parents=[json_too])
    listing.add_argument("--since", metavar="TIME", help="only snapshots since TIME")
    listing.set_defaults(run=_lazily("past", "history_list"))
    show = history.add_parser("show", help="show the snapshot of a time: JSON, or any view as SVG or text")
    show.add_argument("time", metavar="TIME", help="-5m, 14:03:12, 2026-09-21T14:03:12, or since the epoch")
    _picture(show)
    show.add_argument("--pfn", action="store_true", help="include the PFN maps that are recorded (needs -o)")
    show.set_defaults(run=_lazily("past", "history_show"), usage=False, placement=False)
    done = history.add_parser("commands", help="list the command lines that console sessions did")
    done.add_argument("--since", metavar="TIME", help="only lines since TIME")
    done.add_argument("--session", metavar="SESSION", default="", help="only those of one session")
    done.add_argument("--macro", metavar="FILE", help="write the actions in them to a macro file")
    _formats(done)
    done.set_defaults(run=_lazily("past", "history_commands"))
    for parser in (listing, show, done):
        _takes_times(parser)


def _takes_times(parser: argparse.ArgumentParser) -> None:
    """Let a parser take -5m for a time and not for an option."""
    parser._negative_number_matcher = re.compile(r"-\d")  # noqa: SLF001


def _headless(commands: Any, json_too: argparse.ArgumentParser) -> None:
    snapshot = commands.add_parser("snapshot", help="take a snapshot: JSON, or any view as SVG or text")
    _picture(snapshot)
    snapshot.add_argument(
        "--pfn", action="store_true", help="include the PFN maps of regions, guests, domains (needs -o)"
    )
    snapshot.add_argument("--usage", action="store_true", help="with CPU, threads, I/O, affinity of host and guests")
    snapshot.add_argument("--placement", action="store_true", help="with usage, and guests' memory by NUMA node")
    snapshot.add_argument("--from", dest="origin", metavar="FILE", help="show a recorded snapshot instead of this host")
    snapshot.set_defaults(run=_lazily("files", "snapshot"))

    _reading(commands, json_too)
    _reports(commands)
    _shells(commands)
    keys = commands.add_parser("keys", help="list the console's keys, their meanings and ids")
    form = keys.add_mutually_exclusive_group()
    form.add_argument("--map", metavar="NAME", default="", help="of the keymap default, vim or arrows")
    form.add_argument("--sample", action="store_true", help="print a console.toml with every id")
    form.add_argument("--markdown", action="store_true", help="print the cheat sheet of the documents")
    form.add_argument("--check", metavar="FILE", help="say what is wrong with a console.toml; exit code 4 if anything")
    keys.set_defaults(run=_lazily("keyboard", "show"))
    _about(commands, json_too)


def _shells(commands: Any) -> None:
    completion = commands.add_parser("completion", help="print the completion of a shell, for its start file")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")
    completion.set_defaults(run=_lazily("completing", "script"))


def _reports(commands: Any) -> None:
    report = commands.add_parser("report", help="write an audit as one page: HTML, Markdown or plain text")
    report.add_argument("-o", "--output", metavar="FILE", help="write to a file; its name tells the format")
    report.add_argument(
        "--format",
        choices=("html", "markdown", "plain", "json"),
        help="what is written (html, or as the file is named)",
    )
    report.add_argument(
        "--plain", dest="format", action="store_const", const="plain", help="a fact a line, for a screen reader"
    )
    report.add_argument("--from", dest="origin", metavar="FILE", help="of a recorded snapshot instead of this host")
    report.add_argument("--redact", action="store_true", help=REDACT)
    report.set_defaults(run=_lazily("reporting", "report"))
    bug = commands.add_parser(
        "bugreport", help="write what a report of a fault wants into one file, with names redacted in all but its logs"
    )
    bug.add_argument("-o", "--output", metavar="FILE", default="memconsole-bugreport.tar.gz", help="the file to write")
    bug.add_argument("--no-logs", action="store_true", help="leave the logs out: they keep names of what is gone")
    bug.set_defaults(run=_lazily("reporting", "bugreport"), here=True)


def _reading(commands: Any, json_too: argparse.ArgumentParser) -> None:
    diff = commands.add_parser("diff", help="show what differs between two snapshots", parents=[json_too])
    side = "a snapshot file, 'live', or a recorded time (@-5m, @14:03:12)"
    diff.add_argument("a", metavar="A", help=side)
    diff.add_argument("b", metavar="B", help=side)
    diff.set_defaults(run=_lazily("files", "diff"))

    status = commands.add_parser(
        "status", help="say in one line whether this host is ready for a handoff", parents=[json_too]
    )
    status.set_defaults(run=_lazily("handing", "status"))

    pfn = commands.add_parser(
        "pfn", help="list the PFN map of a region, guest or domain as extents", parents=[json_too]
    )
    pfn.add_argument("target", metavar="REGION-OR-GUEST", help="a name, or region:NAME, guest:NAME, domain:GROUP")
    pfn.add_argument("--range", type=reader(_range), metavar="A-B", help="only offsets or GPAs from A up to B")
    pfn.add_argument(
        "--at", metavar="TIME", help="as it was last scanned until TIME, where that is recorded (-5m, 14:03:12)"
    )
    pfn.add_argument("--csv", action="store_true", help="write CSV")
    pfn.set_defaults(run=_lazily("listing", "pfn"))
    _takes_times(pfn)

    host = commands.add_parser(
        "hostmap", help="list whose the host's physical memory is, by owner or by address", parents=[json_too]
    )
    host.add_argument("--ranges", action="store_true", help="every range of addresses, not the sum of an owner's")
    host.add_argument("--range", type=reader(_range), metavar="A-B", help="only ranges from address A up to B")
    host.add_argument("--csv", action="store_true", help="write CSV")
    host.add_argument("--from", dest="origin", metavar="FILE", help="of a recorded snapshot (--pfn), not of this host")
    host.set_defaults(run=_lazily("listing", "host_map"))

    iovas = commands.add_parser(
        "iovamap", help="list where each IOVA of a domain leads, and where it should", parents=[json_too]
    )
    iovas.add_argument("target", metavar="GROUP-OR-DEVICE", help="the number of an IOMMU group, or a device (BDF)")
    iovas.add_argument("--csv", action="store_true", help="write CSV")
    iovas.add_argument("--from", dest="origin", metavar="FILE", help="of a recorded snapshot (--pfn), not of this host")
    iovas.set_defaults(run=_lazily("listing", "iova_map"))

    reach = commands.add_parser(
        "reach", help="list who can reach a frame, or everything in a guest's memory", parents=[json_too]
    )
    where = "GUEST; a PFN; ADDRESS@ a device (BDF: its IOVA), a guest (GPA) or a region (offset)"
    reach.add_argument("target", metavar="TARGET", help=where)
    reach.add_argument(
        "--from", dest="origin", metavar="FILE", help="search a recorded snapshot (--pfn) instead of this host"
    )
    reach.set_defaults(run=_lazily("listing", "reach"))


def _many(commands: Any) -> None:
    hosts = commands.add_parser(
        "hosts", help="list hosts with what each says; exit code 1 when one does not answer", fill=_columns_of_hosts
    )
    hosts.add_argument("--within", type=reader(_interval), default=30.0, metavar="S", help="seconds to wait (30)")
    hosts.set_defaults(run=_lazily("fleeting", "hosts"))


def _columns_of_hosts(hosts: Parser) -> None:
    from memconsole.fleet import HOSTS

    _rows(hosts, HOSTS.fields)


def _live(commands: Any, json_too: argparse.ArgumentParser) -> None:
    watch = commands.add_parser("watch", help="tell what changes as it changes, a line each", parents=[json_too])
    watch.add_argument("--every", type=reader(_interval), default=1.0, metavar="S", help="seconds between looks (1)")
    watch.add_argument("--tables", metavar="A,B", default="", help=f"only these; of: {', '.join(TABLES)}")
    watch.set_defaults(run=_lazily("live", "watch"))

    copy = commands.add_parser("copy", help="copy a region's contents to a new file", parents=[json_too])
    copy.add_argument("region", metavar="REGION", help="its name")
    copy.add_argument("file", metavar="FILE", help="the new file; holes of the region are holes in it")
    copy.set_defaults(run=_lazily("live", "copy"))


def _about(commands: Any, json_too: argparse.ArgumentParser) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="identify and verify a memconsole file, or show what this kernel hands over",
        parents=[json_too],
    )
    inspect.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="snapshot, ledger, audit trail, history file, kernel dump, libvirt's save image; this kernel if left out",
    )
    inspect.set_defaults(run=_lazily("past", "inspect"), here=True)

    schema = commands.add_parser("schema", help="print the JSON Schema of a snapshot")
    schema.set_defaults(run=_lazily("files", "schema"))

    doctor = commands.add_parser(
        "doctor", help="show what this host can do, what is missing and why", parents=[json_too]
    )
    trees = doctor.add_mutually_exclusive_group()
    trees.add_argument(
        "--record", metavar="DIR", help="write what is read of this host into a new directory, for a report"
    )
    trees.add_argument("--from", dest="origin", metavar="DIR", help="of the host that was recorded, not of this one")
    doctor.set_defaults(run=_lazily("hosting", "doctor"))


def _libvirt(commands: Any, json_too: argparse.ArgumentParser, act: argparse.ArgumentParser) -> None:
    libvirt = commands.add_parser("libvirt", help="set up libvirt's hook, rights and order of units").add_subparsers(
        dest="libvirt_command", required=True, metavar="COMMAND"
    )
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--root", metavar="DIR", default="/", help="of the system whose files are in DIR, not this one")
    setup = libvirt.add_parser(
        "setup", help="show what has to be changed in libvirt's configuration, and change it", parents=[act, where]
    )
    setup.set_defaults(run=_lazily("libvirting", "setup"))
    status = libvirt.add_parser(
        "status", help="say of each part if it is there; exit code 4 when one is not", parents=[json_too, where]
    )
    status.set_defaults(run=_lazily("libvirting", "status"))
    remove = libvirt.add_parser(
        "remove", help="take out of libvirt's configuration what setup put there", parents=[act, where]
    )
    remove.set_defaults(run=_lazily("libvirting", "remove"))


def _macros(commands: Any, json_too: argparse.ArgumentParser, act: argparse.ArgumentParser) -> None:
    macro = commands.add_parser("macro", help="run and record scripted actions").add_subparsers(
        dest="macro_command", required=True, metavar="COMMAND"
    )
    listing = macro.add_parser("list", help="list the macros that are installed", parents=[json_too])
    listing.set_defaults(run=_lazily("macroing", "listing"))
    show = macro.add_parser("show", help="show a macro's parameters and steps", parents=[json_too])
    show.add_argument("macro", metavar="FILE-OR-NAME", help="a macro that macro list lists, or its file")
    show.set_defaults(run=_lazily("macroing", "show"))
    run = macro.add_parser("run", help="run a macro file, or one by name", parents=[act])
    run.add_argument("macro", metavar="FILE-OR-NAME", help="a macro that macro list lists, or its file")
    run.add_argument(
        "--set", dest="settings", action="append", type=_setting, default=[], metavar="K=V", help="a parameter's value"
    )
    run.add_argument("--steps", type=_steps, default=(), metavar="2-4,6", help="run these of its steps only")
    run.add_argument("--step", action="store_true", help="show each step's plan and ask before it is done")
    run.set_defaults(run=_lazily("macroing", "run"))
    record = macro.add_parser("record", help="open the console and record actions into a macro file")
    record.add_argument("file", metavar="FILE")
    record.set_defaults(run=_lazily("hosting", "macro_record"))


def _each(commands: Any, act: argparse.ArgumentParser) -> None:
    each = commands.add_parser(
        "each", help="do one action on several, with one plan and one confirmation", parents=[act]
    )
    each.usage = "%(prog)s [options] (NAME ... | --where FILTER) -- ACTION [ARG ...]"
    each.epilog = "-- ACTION [ARG ...]: the action as it is written for one, without its name: -- map db1 --lazy"
    each.add_argument(
        "names", metavar="NAME", nargs="*", help="regions, guests, grants or windows, as the action takes"
    )
    each.add_argument("--where", metavar="FILTER", help="all of them that match, e.g. 'size>1G state:reserved'")
    each.set_defaults(run=_lazily("bulking", "each"), acts=True)


def _handoff(commands: Any, json_too: argparse.ArgumentParser) -> None:
    check = commands.add_parser("check", help="check every condition of a handoff", parents=[json_too])
    for field in actions.fields(actions.HandoffRun):
        if field.name == "unless_running":
            help = "refuse where the kernel that would be booted is the one that runs"
            check.add_argument(field.option, dest=field.name, action="store_true", help=help)
        elif field.arg.kind is not ArgumentKind.FLAG:
            check.add_argument(
                field.option, dest=field.name, default="", metavar=field.arg.kind.upper(), help=field.arg.help
            )
    check.add_argument("--quiet", action="store_true", help="say it by the exit code alone")
    check.set_defaults(run=_lazily("handing", "check"))
    report = commands.add_parser("report", help="show the last handoff: phases and blackouts", parents=[json_too])
    report.add_argument("--picture", metavar="FILE", help="also write its timeline as SVG")
    report.set_defaults(run=_lazily("handing", "report"))


def _arenas(commands: Any, json_too: argparse.ArgumentParser) -> None:
    listing = commands.add_parser(
        "list", help="list the ranges set aside at boot, and what is in them", parents=[json_too]
    )
    add_raw(listing, "look into the range of memmap=nn$ss that begins there, too")
    listing.set_defaults(run=_lazily("arenas", "listing"))
    check = commands.add_parser(
        "check", help="say what is wrong with arenas; exit code 4 if anything", parents=[json_too]
    )
    check.add_argument("name", metavar="NAME", nargs="?", default="", help="only this arena")
    add_raw(check, "look into the range of memmap=nn$ss that begins there, too")
    check.set_defaults(run=_lazily("arenas", "check"))


def _hosting(commands: Any) -> None:
    demo = commands.add_parser("demo", help="open the console on an embedded control process with live guests")
    demo.add_argument("--interval", type=_interval, default=1.0, metavar="S", help="seconds between refreshes (1)")
    demo.set_defaults(run=_lazily("hosting", "demo"), here=True)
    opened = commands.add_parser("open", help="open the console on a recorded snapshot")
    opened.add_argument("file", metavar="FILE")
    opened.set_defaults(run=_lazily("hosting", "open_file"), here=True)
    serving = commands.add_parser(
        "serve", help="run the control process: the service that consoles and commands talk to"
    )
    add_options(serving)
    serving.set_defaults(run=_lazily("serving", "serve"), here=True)
    bridge = commands.add_parser("bridge", help="carry stdin and stdout to the control process, for --host of others")
    bridge.set_defaults(run=_lazily("bridging", "bridge"), here=True)


def build() -> Parser:
    """The whole parser."""
    parser = Parser(prog="memconsole", description="Guest memory that outlives the hypervisor's kernel.")
    parser.add_argument("--version", action="version", version=f"memconsole {__version__}")
    parser.add_argument("--socket", metavar="PATH", help="socket of the control process")
    parser.add_argument(
        "--host",
        metavar="HOST",
        action="append",
        help="ask the control process of another host, over ssh (MEMCONSOLE_HOST); --socket is the one there. Given"
        " several times, with snapshot files too: all of them",
    )
    parser.add_argument("--hosts", metavar="FILE", help="ask the hosts that a file names, one a line")
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="run in this process; what it reserves ends with the command, so commands only look",
    )
    parser.add_argument("--read-only", action="store_true", help="show everything, change nothing")
    parser.add_argument("--interval", type=_interval, default=1.0, metavar="S", help="seconds between refreshes (1)")
    parser.set_defaults(run=_lazily("hosting", "console"), rest=())

    json_too = argparse.ArgumentParser(add_help=False)
    json_too.add_argument("--json", action="store_true", help="write JSON")
    act = argparse.ArgumentParser(add_help=False)
    act.add_argument("--dry-run", action="store_true", help="show the plan, change nothing")
    act.add_argument("--yes", action="store_true", help="do it without asking")
    act.add_argument("--json", action="store_true", help="write JSON")

    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    _live(commands, json_too)
    _many(commands)
    _hosting(commands)
    _headless(commands, json_too)
    _history(commands, json_too)
    _tables(commands)
    groups = add_actions(commands, [act], run=_lazily("acting", "act"))
    _arenas(groups["arena"], json_too)
    _each(commands, act)
    _handoff(groups["handoff"], json_too)
    _libvirt(commands, json_too, act)
    _macros(commands, json_too, act)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; ``run`` is its command.

    Raises:
        UsageError: it does not parse.
    """
    words, rest = split_rest(words)
    try:
        options = build().parse_args(words)
    except UsageError as error:
        for old, new in _GONE.items():
            if f"invalid choice: {old!r}" in error.what:
                why = f"memconsole {new} lists the same and takes the same options"
                raise UsageError(f"there is no command {old}", why, f"memconsole {new}") from None
        raise
    options.rest = rest
    if getattr(options, "here", False):
        connect.here_only(options, "the command works on the host that it runs on", "run it there, over ssh")
        options.host, options.hosts = [""], None
    return options
