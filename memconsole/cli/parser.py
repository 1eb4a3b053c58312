"""The grammar of the command line (DESIGN section 10); actions come from their registry, the rest stands here."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from memconsole import __version__, actions
from memconsole.cli.serving import add_options
from memconsole.command import Parser, add_actions, reader, split_rest
from memconsole.fields import TABLES
from memconsole.units import parse_address

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


def _tables(commands: Any, shared: Sequence[argparse.ArgumentParser]) -> None:
    for table in TABLES.values():
        listing = commands.add_parser(table.id, help=f"list {table.title}", parents=list(shared))
        known = ", ".join(field.id for field in table.fields)
        listing.add_argument("--fields", metavar="A,B,C", help=f"which columns, or all; of: {known}")
        listing.add_argument("--csv", action="store_true", help="write CSV")
        listing.set_defaults(run=_lazily("listing", "listing"), table=table.id)


def _picture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="write to a file, not to stdout")
    parser.add_argument("--format", choices=("json", "svg", "text"), default="json")
    parser.add_argument("--view", metavar="NAME", help="the view to render (svg, text)")
    parser.add_argument("--subject", metavar="KEY", default="", help="what the view shows, e.g. region:web")
    parser.add_argument("--size", metavar="WxH", default="132x50", help="the view's size in cells (132x50)")


def _history(commands: Any, json_too: argparse.ArgumentParser) -> None:
    history = commands.add_parser("history", help="the snapshots that were recorded").add_subparsers(
        dest="history_command", required=True, metavar="COMMAND"
    )
    listing = history.add_parser("list", help="when snapshots were recorded", parents=[json_too])
    listing.add_argument("--since", metavar="TIME", help="only those from then on")
    listing.set_defaults(run=_lazily("past", "history_list"))
    show = history.add_parser("show", help="the snapshot of a time: JSON, or any view as SVG or text")
    show.add_argument("time", metavar="TIME", help="-5m, 14:03:12, 2026-09-21T14:03:12, or since the epoch")
    _picture(show)
    show.set_defaults(run=_lazily("past", "history_show"), pfn=False)
    for parser in (listing, show):
        parser._negative_number_matcher = re.compile(r"-\d")  # noqa: SLF001 - so that -5m is no option


def _headless(commands: Any, json_too: argparse.ArgumentParser) -> None:
    snapshot = commands.add_parser("snapshot", help="take a Snapshot: JSON, or any view as SVG or text")
    _picture(snapshot)
    snapshot.add_argument("--pfn", action="store_true", help="with the PFN maps of regions, guests, domains (needs -o)")
    snapshot.add_argument("--from", dest="origin", metavar="FILE", help="of a recorded snapshot, not of this host")
    snapshot.set_defaults(run=_lazily("files", "snapshot"))

    diff = commands.add_parser("diff", help="what differs between two snapshots", parents=[json_too])
    side = "a snapshot file, 'live', or a recorded time (@-5m, @14:03:12)"
    diff.add_argument("a", metavar="A", help=side)
    diff.add_argument("b", metavar="B", help=side)
    diff.set_defaults(run=_lazily("files", "diff"))

    audit = commands.add_parser("audit", help="list findings; exit code 4 when there are any", parents=[json_too])
    audit.set_defaults(run=_lazily("listing", "audit"))

    pfn = commands.add_parser("pfn", help="the PFN map of a region, guest or domain as extents", parents=[json_too])
    pfn.add_argument("target", metavar="REGION-OR-GUEST", help="a name, or region:NAME, guest:NAME, domain:GROUP")
    pfn.add_argument("--range", type=reader(_range), metavar="A-B", help="only offsets or GPAs from A up to B")
    pfn.add_argument("--csv", action="store_true", help="write CSV")
    pfn.set_defaults(run=_lazily("listing", "pfn"))

    reach = commands.add_parser("reach", help="who reaches a frame; a guest's memory joined", parents=[json_too])
    where = "GUEST; a PFN; ADDRESS@ a device (BDF: its IOVA), a guest (GPA) or a region (offset)"
    reach.add_argument("target", metavar="TARGET", help=where)
    reach.add_argument("--from", dest="origin", metavar="FILE", help="in a recorded snapshot (--pfn), not on this host")
    reach.set_defaults(run=_lazily("listing", "reach"))

    inspect = commands.add_parser(
        "inspect",
        help="what a file of ours is and whether it is whole; or what this kernel hands over",
        parents=[json_too],
    )
    inspect.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="a snapshot, a ledger, an audit trail, a file of the history, a kernel's dump; none: this kernel",
    )
    inspect.set_defaults(run=_lazily("past", "inspect"))

    schema = commands.add_parser("schema", help="the JSON Schema of a Snapshot")
    schema.set_defaults(run=_lazily("files", "schema"))

    doctor = commands.add_parser("doctor", help="what this host can do, what is missing, why", parents=[json_too])
    doctor.set_defaults(run=_lazily("hosting", "doctor"))


def _macros(commands: Any, json_too: argparse.ArgumentParser, act: argparse.ArgumentParser) -> None:
    macro = commands.add_parser("macro", help="scripted actions").add_subparsers(
        dest="macro_command", required=True, metavar="COMMAND"
    )
    listing = macro.add_parser("list", help="the macros that are found", parents=[json_too])
    listing.set_defaults(run=_lazily("acting", "macro_list"))
    run = macro.add_parser("run", help="run a macro file, or one by name", parents=[act])
    run.add_argument("macro", metavar="FILE-OR-NAME")
    run.add_argument("--set", dest="settings", action="append", type=_setting, default=[], metavar="K=V")
    run.set_defaults(run=_lazily("acting", "macro_run"))
    record = macro.add_parser("record", help="open the console and record what is done into a macro file")
    record.add_argument("file", metavar="FILE")
    record.set_defaults(run=_lazily("hosting", "macro_record"))


def _handoff(commands: Any, json_too: argparse.ArgumentParser) -> None:
    check = commands.add_parser("check", help="everything that could go wrong at a handoff", parents=[json_too])
    for field in actions.fields(actions.HandoffRun):
        if field.name != "contents":
            check.add_argument(
                field.option, dest=field.name, default="", metavar=field.arg.kind.upper(), help=field.arg.help
            )
    check.set_defaults(run=_lazily("handing", "check"))
    report = commands.add_parser("report", help="the last handoff: phases and blackouts", parents=[json_too])
    report.add_argument("--picture", metavar="FILE", help="also write its timeline as SVG")
    report.set_defaults(run=_lazily("handing", "report"))


def _hosting(commands: Any) -> None:
    demo = commands.add_parser("demo", help="the console on an embedded control process with live guests")
    demo.add_argument("--interval", type=_interval, default=1.0, metavar="S", help="seconds between refreshes (1)")
    demo.set_defaults(run=_lazily("hosting", "demo"))
    opened = commands.add_parser("open", help="the console on a recorded snapshot")
    opened.add_argument("file", metavar="FILE")
    opened.set_defaults(run=_lazily("hosting", "open_file"))
    serving = commands.add_parser("serve", help="the control process: a service that consoles and commands talk to")
    add_options(serving)
    serving.set_defaults(run=_lazily("serving", "serve"))


def build() -> Parser:
    """The whole parser."""
    parser = Parser(prog="memconsole", description="Guest memory that outlives the hypervisor's kernel.")
    parser.add_argument("--version", action="version", version=f"memconsole {__version__}")
    parser.add_argument("--socket", metavar="PATH", help="the control process's socket")
    parser.add_argument("--embedded", action="store_true", help="do not ask a control process, be one")
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
    _hosting(commands)
    _headless(commands, json_too)
    _history(commands, json_too)
    _tables(commands, [json_too])
    groups = add_actions(commands, [act], run=_lazily("acting", "act"))
    _handoff(groups["handoff"], json_too)
    _macros(commands, json_too, act)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; ``run`` is its command.

    Raises:
        UsageError: it does not parse.
    """
    words, rest = split_rest(words)
    options = build().parse_args(words)
    options.rest = rest
    return options
