"""The fault points inside a climb and a move, in the order they are passed; *named* is of moves between stores."""

from __future__ import annotations

from memconsole.backend import steps

POINTS = (
    "revoke.ask.before",
    "revoke.aside.saved",
    "revoke.aside.held",
    "revoke.ask.after",
    "revoke.protect.before",
    "revoke.protect.barred",
    "revoke.protect.after",
    "revoke.copy.before",
    "revoke.copy.stopped",
    "revoke.move.copied",
    "revoke.move.held",
    "revoke.move.named",
    "revoke.move.committed",
    "revoke.move.emptied",
    "revoke.move.replaced",
    "revoke.copy.after",
    "revoke.kill.before",
    "revoke.kill.after",
)


def pass_by(rung: str, moment: str) -> None:
    """Pass a fault point; the log has its time."""
    name = f"revoke.{rung}.{moment}"
    assert name in POINTS, name  # noqa: S101 - the tests go by the list
    steps.passed(name)
