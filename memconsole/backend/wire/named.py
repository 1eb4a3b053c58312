"""Files that a peer names: an operator any, a viewer only below the directories where kernels are kept.

The service opens what is named with rights that its viewers lack: whether there is such a file, and what is in it, is
none of their business anywhere else. So a name is judged before anything is looked for, and what it leads to once more.
"""

from __future__ import annotations

import os
from pathlib import Path

from memconsole import actions
from memconsole.actions import Action
from memconsole.arguments import ArgumentKind
from memconsole.errors import Denied

KERNELS = ("/boot", "/efi", "/usr/lib/modules", "/lib/modules")
"""Where distributions keep kernels and what they boot with; only root writes there."""


def check(action: Action, directories: tuple[str, ...] = KERNELS) -> None:
    """Nothing, for an action whose paths a viewer may name.

    Raises:
        Denied: one is elsewhere, or leads elsewhere; the error is the same whether or not it exists.
    """
    for field in actions.fields(type(action)):
        path = getattr(action, field.name)
        if field.arg.kind is ArgumentKind.PATH and path and (field.name, path) != ("initrd", actions.NO_INITRD):
            _check(path, directories)


def _check(path: str, directories: tuple[str, ...]) -> None:
    roots = {os.path.realpath(directory) for directory in directories}
    if not _below(path, set(directories) | roots) or ".." in path.split("/") or not _leads_below(path, roots):
        raise Denied(
            f"viewers cannot name {path}",
            f"viewers may name files below {', '.join(directories)}",
            "name an image there, or ask an operator",
        )


def _leads_below(path: str, roots: set[str]) -> bool:
    """Whether what is there, if anything is, is below the directories; it is found without being opened."""
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return _below(os.path.realpath(path), roots)
    try:
        return _below(str(Path(f"/proc/self/fd/{found}").readlink()), roots)
    finally:
        os.close(found)


def _below(path: str, roots: set[str]) -> bool:
    return any(path.startswith(f"{root}/") for root in roots)
