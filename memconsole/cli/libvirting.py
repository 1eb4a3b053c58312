"""Commands that put memconsole into libvirt's configuration, say how it stands, and take it out again."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from memconsole.backend.managers import libvirt_host, libvirt_setup
from memconsole.backend.managers.sealed import Change, Standing
from memconsole.cli import confirming, output
from memconsole.errors import Denied, ExitCode, Refused

MARKS = {Standing.THERE: "+", Standing.STALE: "~", Standing.MISSING: "-", Standing.ALTERED: "!"}


def status(options: argparse.Namespace) -> int:
    """Each part: there, missing, stale or altered; exit code 4 where one is not there."""
    parts = libvirt_setup.status(options.root)
    lacking = libvirt_setup.lacking(parts)
    if options.json:
        output.json(parts)
        return ExitCode.FINDINGS if lacking else ExitCode.DONE
    output.text(_found(options.root))
    for part in parts:
        output.text(f"{MARKS[part.state]} {part.title}: {part.state}  {part.path}")
        if part.why:
            output.text(f"    {part.why}")
        if part.remedy:
            output.text(f"    remedy: {part.remedy}")
    return ExitCode.FINDINGS if lacking else ExitCode.DONE


def setup(options: argparse.Namespace) -> int:
    """Show what has to be changed, and change it."""
    changes = libvirt_setup.setup(options.root)
    return _change(options, changes, "every part is there already", libvirt_setup.restarts)


def remove(options: argparse.Namespace) -> int:
    """Show what has to be taken away, and take it away."""
    return _change(options, libvirt_setup.remove(options.root), "nothing of memconsole is there", lambda _: [])


def _found(root: str) -> str:
    version = libvirt_host.version(root)
    words = [f"libvirt {'.'.join(map(str, version)) if version else 'of an unknown version'}"]
    runs = {each.name: each.pid for each in libvirt_host.running(root)}
    words += [
        f"{name} (process {runs[name]})" if name in runs else f"{name} (does not run)"
        for name in libvirt_host.installed(root)
    ]
    return ", ".join(words)


def _change(
    options: argparse.Namespace, changes: Sequence[Change], nothing: str, restarts: Callable[[str], list[str]]
) -> int:
    root = options.root
    todo = [] if options.dry_run or not changes else _confirmed(options, changes)
    libvirt_setup.apply(todo, root)
    after = [*libvirt_setup.reloads(changes, root), *restarts(root)]
    if options.json:
        shown = [
            {"path": _shown(each, root), "before": each.before, "after": each.after, "mode": each.mode}
            for each in changes
        ]
        output.json({"changes": shown, "done": bool(todo), "after": after})
        return ExitCode.DONE
    if options.dry_run:
        _show(changes, root)
    if not changes:
        output.text(nothing)
    for each in todo:
        output.text(f"{'removed' if each.after is None else 'wrote'} {_shown(each, root)}")
    for command in after:
        output.text(f"then: {command}")
    return ExitCode.DONE


def _confirmed(options: argparse.Namespace, changes: Sequence[Change]) -> Sequence[Change]:
    """The changes, once somebody has seen them and said yes.

    Raises:
        Denied: this user is not root. UsageError: nobody is there to say so. Refused: another word was typed.
    """
    if os.geteuid() and options.root == "/":
        raise Denied("libvirt's configuration cannot be changed", "it is root's", "run as root; --dry-run shows it")
    if options.yes:
        return changes
    remedy = "type yes, or add --yes"
    confirming.typed(
        "yes",
        "type yes to make these changes: ",
        lambda: _show(changes, options.root),
        what="the changes",
        refused=Refused("the changes were not confirmed", "nothing was changed", remedy, code="NotConfirmed"),
        remedy="add --yes, or --dry-run to see",
    )
    return changes


def _show(changes: Sequence[Change], root: str) -> None:
    for each in changes:
        for line in each.diff(_shown(each, root)):
            output.text(line)


def _shown(change: Change, root: str) -> str:
    """A file's name as the host has it."""
    return str(change.path) if root == "/" else f"/{change.path.relative_to(root)}"
