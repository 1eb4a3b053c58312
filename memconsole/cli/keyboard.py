"""The console's keys: the cheat sheet, the sample file, and what is wrong with an operator's own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memconsole import keys
from memconsole.cli import output
from memconsole.errors import BadFile, ExitCode, UsageError


def show(options: argparse.Namespace) -> int:
    """The keys of a keymap, or the sample, the document, or what is wrong with a file."""
    if options.check:
        return _check(Path(options.check))
    if options.sample or options.markdown:
        sys.stdout.write(keys.sample() if options.sample else keys.markdown())
        return ExitCode.DONE
    if options.map and options.map not in keys.KEYMAPS:
        known = ", ".join(keys.KEYMAPS)
        raise UsageError(f"there is no keymap {options.map!r}", "none has this name", f"one of: {known}")
    for line in keys.lines(options.map):
        output.text(line)
    return ExitCode.DONE


def _check(path: Path) -> int:
    """Every complaint about a file, a line each.

    Raises:
        BadFile: there is none, or it cannot be used at all.
    """
    from memconsole.views import settings

    if not path.is_file():
        raise BadFile(f"{path} is not there", "no file has this name", "memconsole keys --sample prints one")
    found = settings.load([path])
    complaints = keys.keymap(found.keymap, found.keys, found.place).complaints
    for complaint in complaints:
        output.text(complaint)
    return ExitCode.FINDINGS if complaints else ExitCode.DONE
