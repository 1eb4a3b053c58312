"""``arena list`` and ``arena check``: they read the ranges themselves; what acts is in the registry of actions."""

from __future__ import annotations

import argparse
import contextlib

from memconsole import paths
from memconsole.cli import connect, output
from memconsole.errors import Denied, ExitCode, NoControl
from memconsole.model import Finding


def listing(options: argparse.Namespace) -> int:
    """Every range that was set aside, what it holds, and the regions of an arena that is mounted."""
    from memconsole.backend.diagnose import arenas
    from memconsole.backend.stores import arena

    found = arenas.ranges(raw=options.raw)
    if options.json:
        output.json(found)
        return ExitCode.DONE
    for each in found:
        for line in arenas.lines(each):
            output.text(line)
    missing = _noted(options)
    for finding in missing:
        output.text(f"{finding.observed}: {finding.remedy}")
    if not found and not missing:
        output.text(f"no range of memory is set aside on this host: {arena.words()}")
    return ExitCode.DONE


def check(options: argparse.Namespace) -> int:
    """What is wrong with arenas; exit code 4 when anything is."""
    from memconsole.backend.diagnose import arenas

    found = arenas.check(options.name, noted=_noted(options), raw=options.raw)
    if options.json:
        output.json(found)
    elif found:
        output.findings(found)
    else:
        output.text("nothing is wrong with the arenas of this host")
    return ExitCode.FINDINGS if found else ExitCode.DONE


def _noted(options: argparse.Namespace) -> tuple[Finding, ...]:
    """What is known of arenas that are not there: by the service, where one runs, whatever its state directory is."""
    from memconsole.backend.stores.noted import IDS, ArenaNotes

    try:
        with contextlib.closing(connect.client(options)) as client:
            return tuple(each for each in client.snapshot().findings if each.id in IDS)
    except (NoControl, Denied):
        return ArenaNotes(paths.state_dir()).findings()
