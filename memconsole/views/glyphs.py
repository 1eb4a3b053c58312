"""ASCII in place of glyphs, a cell for a cell, for terminals whose font or encoding has no others (``TERM=linux``)."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping

_TWINS = {
    "·": ".",
    "•": "*",
    "…": "~",
    "‥": ":",
    "‖": "=",
    "⏎": "<",
    "⌫": "<",
    "⇥": ">",
    "→": ">",
    "←": "<",
    "↑": "^",
    "↓": "v",
    "█": "#",
    "▓": "%",
    "▒": "=",
    "░": ":",
    "▄": "o",
    "▁": "_",
    "▂": ".",
    "▃": "-",
    "▅": "+",
    "▆": "*",
    "▇": "%",
    "■": "#",
    "▲": "^",
    "▼": "v",
    "▶": ">",
    "▸": ">",
    "▹": ")",
    "◂": "<",
    "◆": "@",
    "◇": "O",
    "○": "o",
    "◌": "@",
    "●": "*",
    "✔": "+",
    "✖": "x",
    "━": "=",
    "│": "|",
    "┃": "|",
    "║": "|",
    "─": "-",
    "═": "=",
}
_FONTLESS = frozenset({"linux", "vt100", "vt102", "vt220", "cons25"})
"""Values of TERM for terminals that have a few hundred glyphs at most."""


class _Twins(dict[int, str]):
    """Twins of single characters, those that the table does not name worked out when they are first seen."""

    def __missing__(self, code: int) -> str:
        sign = chr(code)
        self[code] = twin = sign if code < 128 else _TWINS.get(sign) or _like(sign)
        return twin


def _like(sign: str) -> str:
    """What is likest: frames of lines, blocks by their side, letters without their marks, ``?`` for anything else."""
    name = unicodedata.name(sign, "")
    if name.startswith("BOX DRAWINGS"):
        return "+"
    if "BLOCK" in name or "QUADRANT" in name:
        return "|" if name.startswith(("LEFT", "RIGHT")) else "_" if name.startswith("LOWER ONE") else "-"
    if unicodedata.combining(sign):
        return ""
    plain = unicodedata.normalize("NFKD", sign)[0]
    wide = unicodedata.east_asian_width(sign) in {"W", "F"}
    return (plain if ord(plain) < 128 else "?") * (2 if wide else 1)


_TABLE = _Twins()


def plain(text: str) -> str:
    """A text in ASCII alone, as many cells wide."""
    return text if text.isascii() else text.translate(_TABLE)


def only_ascii(setting: str, environment: Mapping[str, str] = os.environ, encoding: str = "utf-8") -> bool:
    """Whether glyphs are to be ASCII: as ``console.toml`` says (``ascii``, ``unicode``), else as the terminal needs."""
    if setting:
        return setting == "ascii"
    return environment.get("TERM", "") in _FONTLESS or encoding.lower().replace("-", "") != "utf8"
