r"""Text of others, as it may leave the process: nothing in it that a terminal, a log or a reader's eye would obey.

Names of processes, hosts and files, error texts and command lines come from whoever made them. What is escaped, as
``\xNN``, ``\uNNNN`` or ``\UNNNNNNNN``: control characters (C0, DEL, C1), format characters (the marks that turn the
direction of writing, zero-width ones), line and paragraph separators, surrogates, and what has no meaning assigned.
It is done once, where text leaves: the command line's output, the log, and what the console's widgets are made of.
"""

from __future__ import annotations

import logging
import re
import unicodedata

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_IN_JSON = re.compile(r"[^\x00-\x7e]")


def escape(text: str, *, keep: str = "") -> str:
    """A text in which nothing acts, but for the characters in ``keep`` (a newline where it may have lines)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep or not _acts(char) else _escape(char) for char in text)


def json(document: str) -> str:
    """A JSON document that says the same, in which nothing acts that JSON itself lets through."""
    return _IN_JSON.sub(lambda found: _escape_in_json(found[0]) if _acts(found[0]) else found[0], document)


def _acts(char: str) -> bool:
    return not char.isprintable() and unicodedata.category(char) != "Zs"


def _escape(char: str) -> str:
    number = ord(char)
    if number < 0x100:
        return _SHORT.get(char, f"\\x{number:02x}")
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _escape_in_json(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


class Formatter(logging.Formatter):
    """A log's formatter: a message is one line, whatever others wrote into it; traces keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The record's line."""
        record.message = escape(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's own name
        """The trace."""
        return escape(super().formatException(ei), keep="\n")  # type: ignore[arg-type]
