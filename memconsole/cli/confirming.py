"""What is done is shown and confirmed first: a word is typed, at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from memconsole.errors import Refused, UsageError


def typed(
    word: str, ask: str, show: Callable[[], None], *, what: str, refused: Refused, remedy: str = "add --yes"
) -> None:
    """Show what would be done, ask, and read a line from stdin; ``what`` is the subject of the message without one.

    Raises:
        UsageError: stdin is no terminal. Refused: ``refused``, where another word was typed.
    """
    if not sys.stdin.isatty():
        raise UsageError(f"{what} must be confirmed", "stdin is not a terminal", remedy)
    show()
    sys.stderr.write(ask)
    sys.stderr.flush()
    if sys.stdin.readline().strip() != word:
        raise refused
